//! `binary://` and `binary-v2://` loggers: a program that reads a container's output.
//!
//! containerd's contract: descriptor 3 is stdout, 4 is stderr, 5 is closed by the program once it is ready; the
//! environment has CONTAINER_ID and CONTAINER_NAMESPACE; arguments come from the URI's query, in its order. With
//! `binary-v2://` a closed descriptor 5 is not enough, a program that dies closes it too: a byte is to be written first.

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
        let strict = uri.starts_with("binary-v2://");
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
        let ready = wait_ready(ready_read).and_then(|written| match written {
            0 if strict => Err(logger.not_ready()),
            0 => logger.still_runs(),
            _ => Ok(()),
        });
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

    /// What a program that has closed its descriptor without a word is told.
    fn not_ready(&mut self) -> std::io::Error {
        let why = match self.still_runs() {
            Err(error) => error.to_string(),
            Ok(()) => "closed descriptor 5 without writing the byte that binary-v2:// asks for".to_owned(),
        };
        std::io::Error::other(why)
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

/// Blocks until the child closes its end or writes to it. Returns how many bytes came.
fn wait_ready(mut pipe: PipeReader) -> std::io::Result<usize> {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let result = pipe.read(&mut [0]);
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
    let rest = uri.split_once("://").map_or(uri, |(_, rest)| rest);
    let (program, query) = rest.split_once('?').unwrap_or((rest, ""));
    let args = query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .flat_map(|pair| pair.splitn(2, '='))
        .filter(|word| !word.is_empty())
        .map(decode)
        .collect();
    // A plus is a plus in a path.
    (decode(&program.replace('+', "%2B")), args)
}

/// Decoding of a query: percent signs, and `+` for a space.
pub(super) fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let code = tail.split_at_checked(2).and_then(|(hex, after)| {
            let byte = u8::from_str_radix(str::from_utf8(hex).ok()?, 16).ok()?;
            Some((byte, after))
        });
        match (first, code) {
            (b'%', Some((byte, after))) => {
                bytes.push(byte);
                rest = after;
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

    /// The URI of a logger that is a shell script. Not a file written here: another test's fork may hold it open for writing
    /// for a moment, and then it cannot be executed.
    fn script(scheme: &str, text: &str) -> String {
        let text: String = text.bytes().map(|byte| format!("%{byte:02x}")).collect();
        format!("{scheme}:///bin/sh?-c={text}")
    }

    #[test]
    fn logger_when_it_ends_at_once_is_not_ready() {
        for scheme in ["binary", "binary-v2"] {
            let error = Logger::spawn(&script(scheme, "exit 3"), &owner()).err().unwrap();
            assert!(error.message.contains("ended before it was ready"), "{error}");
            assert!(error.message.contains("exit status: 3"), "{error}");
        }
    }

    #[test]
    fn logger_when_strict_is_ready_by_a_byte_only() {
        let silent = "exec 5>&-; cat <&3; cat <&4";
        let error = Logger::spawn(&script("binary-v2", silent), &owner())
            .err()
            .unwrap();
        assert!(error.message.contains("without writing the byte"), "{error}");

        let (mut logger, stdout, stderr) =
            Logger::spawn(&script("binary-v2", &format!("echo >&5; {silent}")), &owner()).unwrap();
        drop((stdout, stderr));
        assert!(logger.child.wait().unwrap().success());
    }

    #[test]
    fn logger_uri_when_parsed_is_program_and_arguments() {
        let (program, args) = parse("binary:///usr/bin/log%20ger+?tag=a%3Db&verbose&x=");
        assert_eq!(program, "/usr/bin/log ger+");
        assert_eq!(args, ["tag", "a=b", "verbose", "x"]);
    }

    #[test]
    fn logger_when_started_reads_both_streams() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let text = format!(
            "exec 5>&-; {{ echo $CONTAINER_ID $CONTAINER_NAMESPACE $0; cat <&3; cat <&4; }} > {}",
            out.display()
        );
        let uri = format!("{}&argument", script("binary", &text));

        let (mut logger, stdout, stderr) = Logger::spawn(&uri, &owner()).unwrap();
        std::fs::File::from(stdout).write_all(b"to stdout\n").unwrap();
        std::fs::File::from(stderr).write_all(b"to stderr\n").unwrap();
        assert!(logger.child.wait().unwrap().success());

        let text = std::fs::read_to_string(&out).unwrap();
        assert_eq!(text, "c1 ns argument\nto stdout\nto stderr\n");
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
