//! `binary://` loggers: a program that reads a container's output.
//!
//! containerd's contract: descriptor 3 is stdout, 4 is stderr, 5 is closed by the program once it is ready; the
//! environment has CONTAINER_ID and CONTAINER_NAMESPACE; arguments come from the URI's query, in its order.

#![allow(unsafe_code)]

use std::io::{PipeReader, PipeWriter, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::Owner;
use crate::error::{Error, ErrorKind, Result};

/// How long a logger may take to say that it is ready.
const READY: Duration = Duration::from_secs(10);
/// How often, and with which pause, a logger that says it is ready is looked at again.
const GONE_CHECKS: u32 = 5;
const GONE_PAUSE: Duration = Duration::from_millis(1);
/// How long a logger may go on after the end of the output.
const FINISH: Duration = Duration::from_secs(10);

/// A running logger.
pub(super) struct Logger {
    child: Child,
}

impl Logger {
    /// Starts the program of `uri` and waits until it is ready; returns the write ends for stdout and stderr. Blocks.
    ///
    /// # Errors
    /// Naming the program, which does not run then.
    pub(super) fn spawn(uri: &str, owner: &Owner) -> Result<(Self, OwnedFd, OwnedFd)> {
        let (program, args) = parse(uri);
        let failed = |error: std::io::Error| {
            let kind = match error.kind() {
                std::io::ErrorKind::NotFound => ErrorKind::NotFound,
                std::io::ErrorKind::TimedOut => ErrorKind::DeadlineExceeded,
                _ => ErrorKind::Internal,
            };
            Error::new(kind, format!("logger {program}: {error}"))
        };
        let (stdout_read, stdout_write) = std::io::pipe().map_err(failed)?;
        let (stderr_read, stderr_write) = std::io::pipe().map_err(failed)?;
        let (ready_read, ready_write) = std::io::pipe().map_err(failed)?;
        let fds = [
            stdout_read.as_raw_fd(),
            stderr_read.as_raw_fd(),
            ready_write.as_raw_fd(),
        ];
        let mut command = Command::new(&program);
        command
            .args(args)
            .env("CONTAINER_ID", &owner.container)
            .env("CONTAINER_NAMESPACE", &owner.namespace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // SAFETY: `place` only calls dup and dup2, which are async-signal-safe, on descriptors open in the child.
        unsafe { command.pre_exec(move || place(fds)) };
        let child = command.spawn().map_err(failed)?;
        let mut logger = Self { child };
        // Only the child may hold these ends now, or the end of a stream would never be seen.
        drop((stdout_read, stderr_read, ready_write));
        let ready = wait_ready(ready_read).and_then(|()| logger.still_runs());
        if let Err(error) = ready {
            logger.kill();
            return Err(failed(error));
        }
        Ok((
            logger,
            nonblocking(stdout_write).map_err(failed)?,
            nonblocking(stderr_write).map_err(failed)?,
        ))
    }

    /// A program that ends closes its descriptors as well: that is not being ready.
    fn still_runs(&mut self) -> std::io::Result<()> {
        // The kernel closes the descriptors of a process a moment before it can be waited for.
        for _ in 0..GONE_CHECKS {
            if let Some(status) = self.child.try_wait()? {
                return Err(std::io::Error::other(format!(
                    "ended before it was ready: {status}"
                )));
            }
            std::thread::sleep(GONE_PAUSE);
        }
        Ok(())
    }

    fn kill(&mut self) {
        // Both only fail for a process that is gone.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Reaps the program in the background, now that its input ends; kills it when it does not end by itself.
    pub(super) fn finish(mut self) {
        std::thread::spawn(move || {
            let deadline = Instant::now() + FINISH;
            while Instant::now() < deadline {
                // An error means that there is nothing to reap.
                if !matches!(self.child.try_wait(), Ok(None)) {
                    return;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            tracing::warn!(
                pid = self.child.id(),
                "logger does not end after its output: killed"
            );
            self.kill();
        });
    }
}

/// Descriptors 3, 4, 5 of the child. The sources may be 3, 4 or 5 themselves, so they are moved away first.
fn place(fds: [RawFd; 3]) -> std::io::Result<()> {
    let mut high = [0; 3];
    for (high, fd) in high.iter_mut().zip(fds) {
        // SAFETY: plain system call on a descriptor number; failure is checked.
        *high = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 10) };
        if *high < 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    for (target, fd) in (3..).zip(high) {
        // SAFETY: as above. dup2 clears close-on-exec on the copy, which is the point.
        if unsafe { libc::dup2(fd, target) } < 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}

fn nonblocking(pipe: PipeWriter) -> std::io::Result<OwnedFd> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    fcntl(&pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(pipe.into())
}

/// Blocks until the child closes its end or writes to it.
fn wait_ready(mut pipe: PipeReader) -> std::io::Result<()> {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let result = pipe.read(&mut [0]).map(drop);
        // The waiting side may have given up.
        let _ = sender.send(result);
    });
    receiver.recv_timeout(READY).unwrap_or_else(|_| {
        Err(std::io::Error::new(
            std::io::ErrorKind::TimedOut,
            format!("not ready after {READY:?}"),
        ))
    })
}

/// `binary:///path?key=value&flag` → program and `["key", "value", "flag"]`.
fn parse(uri: &str) -> (String, Vec<String>) {
    let rest = uri.strip_prefix("binary://").unwrap_or(uri);
    let (program, query) = rest.split_once('?').unwrap_or((rest, ""));
    let args = query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .flat_map(|pair| pair.splitn(2, '='))
        .filter(|word| !word.is_empty())
        .map(decode)
        .collect();
    (decode(program), args)
}

/// Percent decoding.
fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let code = tail
            .get(..2)
            .and_then(|hex| str::from_utf8(hex).ok())
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match (first, code) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            (b'+', _) => {
                bytes.push(b' ');
                rest = tail;
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn owner() -> Owner {
        Owner {
            container: "c1".into(),
            namespace: "ns".into(),
        }
    }

    /// A script that can be a logger, and its URI.
    fn script(folder: &std::path::Path, text: &str) -> String {
        let script = folder.join("logger");
        std::fs::write(&script, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        format!("binary://{}", script.display())
    }

    #[test]
    fn logger_when_it_ends_at_once_is_not_ready() {
        let folder = tempfile::tempdir().unwrap();
        let error = Logger::spawn(&script(folder.path(), "exit 3"), &owner())
            .err()
            .unwrap();
        assert!(error.message.contains("ended before it was ready"), "{error}");
        assert!(error.message.contains("exit status: 3"), "{error}");
    }

    #[test]
    fn logger_uri_when_parsed_is_program_and_arguments() {
        let (program, args) = parse("binary:///usr/bin/log%20ger?tag=a%3Db&verbose&x=");
        assert_eq!(program, "/usr/bin/log ger");
        assert_eq!(args, ["tag", "a=b", "verbose", "x"]);
    }

    #[test]
    fn logger_when_started_reads_both_streams() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let script = folder.path().join("logger");
        std::fs::write(
            &script,
            "#!/bin/sh\nexec 5>&-\n{ echo $CONTAINER_ID $CONTAINER_NAMESPACE $1; cat <&3; cat <&4; } > \"$1\"\n",
        )
        .unwrap();
        std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let uri = format!("binary://{}?{}", script.display(), out.display());

        let (mut logger, stdout, stderr) = Logger::spawn(&uri, &owner()).unwrap();
        std::fs::File::from(stdout).write_all(b"to stdout\n").unwrap();
        std::fs::File::from(stderr).write_all(b"to stderr\n").unwrap();
        assert!(logger.child.wait().unwrap().success());

        let text = std::fs::read_to_string(&out).unwrap();
        assert_eq!(text, format!("c1 ns {}\nto stdout\nto stderr\n", out.display()));
    }

    #[test]
    fn logger_when_missing_is_named() {
        let error = Logger::spawn("binary:///nonexistent/logger", &owner())
            .err()
            .unwrap();
        assert_eq!(error.kind, ErrorKind::NotFound);
        assert!(error.message.contains("/nonexistent/logger"), "{error}");
    }
}
