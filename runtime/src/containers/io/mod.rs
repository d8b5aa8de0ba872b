//! Streams of a process: descriptors are opened here and handed to the vsock muxer, which moves the bytes.
//!
//! FIFOs are containerd's. They are opened so that nothing ever blocks on a missing peer, and so that a client that
//! goes away and comes back (a restarted containerd) finds them as they were:
//! - stdin is read by the muxer while we hold a write end ourselves: its end comes when the client has closed its own
//!   end *and* asked for CloseIO;
//! - outputs are opened for reading and writing, which never waits for a reader and never fails with EPIPE. The end
//!   of the stream closes them, and the reader sees EOF after the last byte.

mod first_output;
mod logger;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::host::blocking;
use crate::hypervisor::{Attach, AttachDirection, Hypervisor};
use crate::types::Stdio;

/// Who a logger logs for.
#[derive(Debug, Clone)]
pub(super) struct Owner {
    /// Container id.
    pub container: String,
    /// containerd namespace.
    pub namespace: String,
}

/// A stream as containerd names it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Target {
    None,
    Fifo(PathBuf),
    File(PathBuf),
    Binary(String),
}

fn parse(stream: &'static str, uri: &str) -> Result<Target> {
    match uri.split_once("://") {
        _ if uri.is_empty() => Ok(Target::None),
        None if uri.starts_with('/') => Ok(Target::Fifo(uri.into())),
        Some(("fifo", path)) => Ok(Target::Fifo(path.into())),
        Some(("file", path)) => Ok(Target::File(path.into())),
        Some(("binary", _)) if stream != "stdin" => Ok(Target::Binary(uri.to_owned())),
        Some((scheme, _)) => Err(Error::new(
            ErrorKind::Unimplemented,
            format!("{stream} {uri:?}: {scheme}:// is not supported"),
        )),
        None => Err(Error::new(
            ErrorKind::InvalidArgument,
            format!("{stream} {uri:?} is not an absolute path"),
        )),
    }
}

/// The streams of a process, served by the muxer.
pub(super) struct ProcessIo {
    hypervisor: Arc<dyn Hypervisor>,
    /// Host ports, 0 for none, as the agent gets them.
    pub stdin_port: u32,
    /// See `stdin_port`.
    pub stdout_port: u32,
    /// See `stdin_port`.
    pub stderr_port: u32,
    /// Our write end of the stdin FIFO.
    stdin: Mutex<Option<File>>,
    /// The program that reads the outputs, if it is not a client of containerd.
    logger: Mutex<Option<logger::Logger>>,
}

impl ProcessIo {
    /// Connects `streams` to the agent's port `port`.
    ///
    /// # Errors
    /// Those of [`Hypervisor::vsock_attach`]; nothing is left open then.
    pub(super) fn attach(
        hypervisor: Arc<dyn Hypervisor>,
        mut streams: Streams,
        port: u32,
    ) -> Result<Arc<Self>> {
        let mut io = Self {
            hypervisor,
            stdin_port: 0,
            stdout_port: 0,
            stderr_port: 0,
            stdin: Mutex::new(streams.stdin_writer.take()),
            logger: Mutex::new(streams.logger.take()),
        };
        if let Some(fd) = streams.stdin.take() {
            let direction = AttachDirection::ToGuest;
            io.stdin_port = io.hypervisor.vsock_attach(Attach { fd, port, direction })?;
        }
        io.stdout_port = io.attach_output(streams.stdout.take(), port)?;
        io.stderr_port = io.attach_output(streams.stderr.take(), port)?;
        Ok(Arc::new(io))
    }

    fn attach_output(&self, fd: Option<OwnedFd>, port: u32) -> Result<u32> {
        let Some(fd) = fd else { return Ok(0) };
        self.hypervisor.vsock_attach(Attach {
            fd,
            port,
            direction: AttachDirection::FromGuest,
        })
    }

    /// Lets go of our write end: stdin ends as soon as the client has let go of its own.
    pub(super) fn close_stdin(&self) {
        self.stdin.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Ends stdin whatever the client holds: the process is gone.
    pub(super) fn end_stdin(&self) {
        self.close_stdin();
        if self.stdin_port != 0 {
            self.hypervisor.vsock_close(self.stdin_port);
        }
    }

    /// Waits until every output has come to its end, at most `timeout`; then closes what is left.
    pub(super) async fn drain(&self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        for port in [self.stdout_port, self.stderr_port]
            .into_iter()
            .filter(|port| *port != 0)
        {
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.hypervisor.vsock_wait(port, left).await {
                tracing::warn!(
                    ?timeout,
                    "output is not read to its end, or a process still holds it: closed"
                );
            }
        }
        self.close();
    }

    /// Closes everything.
    pub(super) fn close(&self) {
        self.end_stdin();
        for port in [self.stdout_port, self.stderr_port]
            .into_iter()
            .filter(|port| *port != 0)
        {
            self.hypervisor.vsock_close(port);
        }
        if let Some(logger) = self.logger.lock().unwrap_or_else(PoisonError::into_inner).take() {
            logger.finish();
        }
    }
}

impl Drop for ProcessIo {
    fn drop(&mut self) {
        self.close();
    }
}

/// The host's ends of a process' streams, before there is a process. Dropping them ends the logger.
#[derive(Default)]
pub(super) struct Streams {
    stdin: Option<OwnedFd>,
    /// See [`ProcessIo::stdin`].
    stdin_writer: Option<File>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    logger: Option<logger::Logger>,
}

impl Streams {
    /// Opens the streams and starts the logger; needs no guest.
    ///
    /// # Errors
    /// Naming the stream and its path; nothing is left open then.
    pub(super) async fn open(stdio: &Stdio, owner: Owner) -> Result<Self> {
        let stdio = stdio.clone();
        // Off the async threads: a logger has ten seconds to get ready, and files may be anywhere.
        blocking("streams", move || Self::open_now(&stdio, &owner)).await
    }

    fn open_now(stdio: &Stdio, owner: &Owner) -> Result<Self> {
        let mut opened = Self::default();
        opened.open_stdin(&stdio.stdin)?;
        opened.open_outputs(stdio, owner)?;
        if opened.stdout.is_some() {
            first_output::watch(&stdio.stdout);
        }
        Ok(opened)
    }

    fn open_stdin(&mut self, uri: &str) -> Result<()> {
        let named = |error: io::Error| stream_error("stdin", uri, &error);
        match parse("stdin", uri)? {
            Target::None | Target::Binary(_) => {}
            Target::File(path) => self.stdin = Some(File::open(path).map_err(named)?.into()),
            Target::Fifo(path) => {
                let Some(read) = open_fifo(&path, OpenOptions::new().read(true)).map_err(named)? else {
                    return Ok(());
                };
                // Cannot block or fail with ENXIO: the read end is open.
                let write = OpenOptions::new()
                    .write(true)
                    .custom_flags(libc::O_NONBLOCK)
                    .open(&path);
                self.stdin_writer = Some(write.map_err(named)?);
                self.stdin = Some(read.into());
            }
        }
        Ok(())
    }

    fn open_outputs(&mut self, stdio: &Stdio, owner: &Owner) -> Result<()> {
        let stdout = parse("stdout", &stdio.stdout)?;
        // With a terminal everything comes out of the one pty.
        let stderr = if stdio.terminal {
            Target::None
        } else {
            parse("stderr", &stdio.stderr)?
        };
        if let Target::Binary(uri) = &stdout {
            if !matches!(&stderr, Target::None) && stdio.stderr != stdio.stdout {
                let message = format!("stderr {:?}: must be the logger of stdout, {uri:?}", stdio.stderr);
                return Err(Error::new(ErrorKind::InvalidArgument, message));
            }
            let (logger, stdout, stderr) = logger::Logger::spawn(uri, owner)?;
            self.stdout = Some(stdout);
            self.stderr = Some(stderr).filter(|_| !stdio.terminal);
            self.logger = Some(logger);
            return Ok(());
        }
        self.stdout = open_output("stdout", stdout)?;
        self.stderr = open_output("stderr", stderr)?;
        Ok(())
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        // Its input ends first.
        self.stdout.take();
        self.stderr.take();
        if let Some(logger) = self.logger.take() {
            logger.finish();
        }
    }
}

fn open_output(stream: &'static str, target: Target) -> Result<Option<OwnedFd>> {
    match target {
        Target::None => Ok(None),
        Target::Fifo(path) => open_fifo(&path, OpenOptions::new().read(true).write(true))
            .map(|file| file.map(OwnedFd::from))
            .map_err(|error| stream_error(stream, &path.display().to_string(), &error)),
        Target::File(path) => OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map(|file| Some(file.into()))
            .map_err(|error| stream_error(stream, &path.display().to_string(), &error)),
        Target::Binary(uri) => Err(Error::new(
            ErrorKind::InvalidArgument,
            format!("{stream} {uri:?}: stdout must use the same logger"),
        )),
    }
}

/// Opens a FIFO without waiting for its other side. A path that does not exist means nobody listens (nerdctl removes
/// FIFOs of detached containers): `None`.
fn open_fifo(path: &Path, options: &mut OpenOptions) -> io::Result<Option<File>> {
    let file = match options.custom_flags(libc::O_NONBLOCK).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), "stream does not exist: nothing is attached");
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let kind = file.metadata()?.file_type();
    if kind.is_dir() || kind.is_block_device() {
        return Err(io::Error::other("not a FIFO or file"));
    }
    Ok(Some(file))
}

fn stream_error(stream: &str, path: &str, error: &io::Error) -> Error {
    let kind = match error.kind() {
        io::ErrorKind::NotFound => ErrorKind::NotFound,
        io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
        _ => ErrorKind::Internal,
    };
    Error::new(kind, format!("{stream} {path}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uri_when_parsed_is_of_its_kind() {
        assert_eq!(parse("stdin", "").unwrap(), Target::None);
        assert_eq!(parse("stdout", "/run/x").unwrap(), Target::Fifo("/run/x".into()));
        assert_eq!(
            parse("stdout", "fifo:///run/x").unwrap(),
            Target::Fifo("/run/x".into())
        );
        assert_eq!(
            parse("stdout", "file:///log").unwrap(),
            Target::File("/log".into())
        );
        assert!(matches!(
            parse("stdout", "binary:///bin/logger?a=b").unwrap(),
            Target::Binary(_)
        ));
        let error = parse("stdout", "ttrpc+unix:///x?streaming_id=1").unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unimplemented);
        assert_eq!(parse("stdout", "x").unwrap_err().kind, ErrorKind::InvalidArgument);
    }

    #[test]
    fn fifo_when_missing_or_without_a_peer_opens_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fifo");
        assert!(
            open_fifo(&path, OpenOptions::new().read(true).write(true))
                .unwrap()
                .is_none()
        );

        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        // No reader and no writer exists: a blocking or write-only open would hang or fail here.
        assert!(
            open_fifo(&path, OpenOptions::new().read(true).write(true))
                .unwrap()
                .is_some()
        );
        assert!(open_fifo(&path, OpenOptions::new().read(true)).unwrap().is_some());
    }
}
