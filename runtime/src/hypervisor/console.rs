//! What the guest's console says, into `console.log` (bounded) and, when debugging, into the log.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

use crate::error::{Error, ErrorKind, Result};

/// Most bytes of `console.log`.
const MAX_FILE: usize = 1 << 20;
/// Longest line that is kept together.
const MAX_LINE: u64 = 4096;

/// Starts the thread that writes `path`; whoever owns the returned end feeds it. A socket, not a pipe: who looks for streams of
/// containers that were left open (containerd's own suite) finds pipes only.
///
/// # Errors
/// When the file, pipe or thread cannot be had.
pub(super) fn start(path: &Path, sandbox: &str, forward: bool) -> Result<UnixStream> {
    let failed = |error| {
        Error::new(
            ErrorKind::Internal,
            format!("console log {}: {error}", path.display()),
        )
    };
    let file = File::create(path).map_err(failed)?;
    let (reader, writer) = UnixStream::pair().map_err(failed)?;
    let sandbox = sandbox.to_owned();
    thread::Builder::new()
        .name("console-log".into())
        .spawn(move || copy(reader, file, &sandbox, forward))
        .map_err(failed)?;
    Ok(writer)
}

fn copy(reader: UnixStream, mut file: File, sandbox: &str, forward: bool) {
    let mut reader = BufReader::new(reader);
    let mut left = MAX_FILE;
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        if let Some(after) = left.checked_sub(line.len())
            && file.write_all(&line).is_ok()
        {
            left = after;
        } else {
            left = 0;
        }
        if forward {
            let text: String = String::from_utf8_lossy(&line)
                .chars()
                .filter(|c| !c.is_control())
                .collect();
            tracing::debug!(target: "guest-console", sandbox, "{text}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn console_file_when_flooded_stays_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.log");
        let mut writer = start(&path, "s", true).unwrap();
        writer.write_all(b"first line\n").unwrap();
        for _ in 0..2 * MAX_FILE / 1024 {
            writer.write_all(&[b'x'; 1024]).unwrap();
        }
        drop(writer);

        let size = || std::fs::metadata(&path).unwrap().len() as usize;
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while size() <= MAX_FILE - MAX_LINE as usize && std::time::Instant::now() < deadline {
            thread::sleep(std::time::Duration::from_millis(10));
        }
        assert!(size() <= MAX_FILE && size() > MAX_FILE / 2, "{}", size());
        assert!(std::fs::read(&path).unwrap().starts_with(b"first line\n"));
    }
}
