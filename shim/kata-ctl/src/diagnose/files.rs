//! Reading what may vanish meanwhile.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// How much of a file is shown, in bytes.
const SHOWN: u64 = 16 << 10;

/// The end of a file as text, but nothing before `from` bytes; in brackets why it cannot be read.
pub fn tail_of(path: &Path, from: u64) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(from.max(length.saturating_sub(SHOWN))))?;
        let mut bytes = Vec::new();
        file.take(SHOWN).read_to_end(&mut bytes)?;
        Ok(printable(&bytes))
    };
    read().unwrap_or_else(|error| format!("({}: {error})", path.display()))
}

/// A guest writes its console: nothing of it may steer the operator's terminal.
fn printable(bytes: &[u8]) -> String {
    let shown = |c: char| match c {
        '\n' | '\t' => Some(c),
        '\r' => None,
        c if c.is_control() => Some('\u{fffd}'),
        c => Some(c),
    };
    String::from_utf8_lossy(bytes).chars().filter_map(shown).collect()
}

/// The entries of a folder, sorted; none when it cannot be read.
pub fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    paths.sort();
    paths
}

/// A small file as text; empty when it cannot be read.
pub fn text(path: &Path) -> String {
    fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default()
}

/// The last component of a path.
pub fn name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tail_of_when_file_is_missing_says_so() {
        assert!(tail_of(Path::new("/nowhere/x"), 0).contains("/nowhere/x"));
    }

    #[test]
    fn tail_of_when_file_is_long_shows_its_end_without_control_characters() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.log");
        let mut bytes = vec![b'a'; 20 << 10];
        bytes.extend_from_slice(b"\r\n\x1b[2Jend\n");
        fs::write(&path, &bytes).unwrap();

        let text = tail_of(&path, 0);

        assert!(
            text.len() <= (16 << 10) + 8 && text.ends_with("a\n\u{fffd}[2Jend\n"),
            "{text:?}"
        );
    }
}
