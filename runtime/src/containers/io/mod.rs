//! Streams of a process: descriptors are opened here and handed to the vsock muxer, which moves the bytes.
//!
//! FIFOs are containerd's. They are opened so that nothing ever blocks on a missing peer, and so that a client that
//! goes away and comes back (a restarted containerd) finds them as they were:
//! - stdin is read by the muxer while we hold a write end ourselves: its end comes when the client has closed its own
//!   end *and* asked for CloseIO;
//! - outputs are opened for reading and writing, which never waits for a reader and never fails with EPIPE. The end
//!   of the stream closes them, and the reader sees EOF after the last byte.
//!
//! Instead of a FIFO there may be a program (`binary://`, `binary-v2://`), a file that is appended to (`file://`), or a stream
//! that the client fetches over the shim's socket (`ttrpc+unix://`, [`streaming`]).

mod first_output;
mod logger;
mod streaming;

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::host::blocking;
use crate::hypervisor::{Attach, AttachDirection, Hypervisor};
use crate::types::Stdio;

pub use streaming::{Client, Direction, Lease, ProcessStream, StreamHub};

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
    /// Name of a stream.
    Stream(String),
}

fn parse(stream: &'static str, uri: &str) -> Result<Target> {
    let invalid = |why: &str| Error::new(ErrorKind::InvalidArgument, format!("{stream} {uri:?}: {why}"));
    match uri.split_once("://") {
        _ if uri.is_empty() => Ok(Target::None),
        None if uri.starts_with('/') => Ok(Target::Fifo(uri.into())),
        Some(("fifo", path)) => Ok(Target::Fifo(path.into())),
        Some(("file", path)) => file_path(path)
            .map(Target::File)
            .ok_or_else(|| invalid("the path is not absolute")),
        Some(("ttrpc+unix", _)) => streaming::name_in(uri)
            .map(Target::Stream)
            .map_err(|why| invalid(&why)),
        Some(("binary" | "binary-v2", _)) if stream != "stdin" => Ok(Target::Binary(uri.to_owned())),
        Some((scheme, _)) => Err(Error::new(
            ErrorKind::Unimplemented,
            format!("{stream} {uri:?}: {scheme}:// is not supported"),
        )),
        None => Err(invalid("is not an absolute path")),
    }
}

/// The path in `file://PATH`, which a query may follow.
fn file_path(rest: &str) -> Option<PathBuf> {
    let path = rest.split('?').next().unwrap_or_default();
    // A plus is a plus in a path.
    let path = PathBuf::from(logger::decode(&path.replace('+', "%2B")));
    path.is_absolute().then_some(path)
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
    /// stdin and outputs that clients fetch from the shim.
    streamed: Mutex<Streamed>,
}

#[derive(Default)]
struct Streamed {
    stdin: Option<ProcessStream>,
    outputs: Vec<ProcessStream>,
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
            streamed: Mutex::new(std::mem::take(&mut streams.streamed)),
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
        if let Some(stream) = &self.streamed().stdin {
            stream.close();
        }
    }

    fn streamed(&self) -> std::sync::MutexGuard<'_, Streamed> {
        self.streamed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends stdin whatever the client holds: the process is gone.
    pub(super) fn end_stdin(&self) {
        self.close_stdin();
        if self.stdin_port != 0 {
            self.hypervisor.vsock_close(self.stdin_port);
        }
        self.streamed().stdin.take();
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
        let outputs = std::mem::take(&mut self.streamed().outputs);
        for output in outputs {
            // What is in the pipe has yet to be fetched.
            if tokio::time::timeout_at(deadline.into(), output.delivered())
                .await
                .is_err()
            {
                tracing::warn!(?timeout, "output is not fetched to its end: closed");
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
        self.streamed().outputs.clear();
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
    streamed: Streamed,
}

impl Streams {
    /// Opens the streams, those that `hub` knows by name among them, and starts the logger; needs no guest.
    ///
    /// # Errors
    /// Naming the stream and its path; nothing is left open then.
    pub(super) async fn open(stdio: &Stdio, owner: Owner, hub: Arc<StreamHub>) -> Result<Self> {
        let stdio = stdio.clone();
        // Off the async threads: a logger has ten seconds to get ready, and files may be anywhere.
        blocking("streams", move || Self::open_now(&stdio, &owner, &hub)).await
    }

    fn open_now(stdio: &Stdio, owner: &Owner, hub: &Arc<StreamHub>) -> Result<Self> {
        let mut opened = Self::default();
        opened.open_stdin(&stdio.stdin, hub)?;
        opened.open_outputs(stdio, owner, hub)?;
        if opened.stdout.is_some() {
            first_output::watch(&stdio.stdout);
        }
        Ok(opened)
    }

    fn open_stdin(&mut self, uri: &str, hub: &Arc<StreamHub>) -> Result<()> {
        let named = |error: io::Error| stream_error("stdin", uri, &error);
        match parse("stdin", uri)? {
            Target::None | Target::Binary(_) => {}
            Target::Stream(name) => {
                let (stream, fd) = hub.open(&name, Direction::Input)?;
                self.streamed.stdin = Some(stream);
                self.stdin = Some(fd);
            }
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

    fn open_outputs(&mut self, stdio: &Stdio, owner: &Owner, hub: &Arc<StreamHub>) -> Result<()> {
        let stdout = parse("stdout", &stdio.stdout)?;
        // With a terminal everything comes out of the one pty.
        let stderr = if stdio.terminal {
            Target::None
        } else {
            parse("stderr", &stdio.stderr)?
        };
        if stdio.terminal && matches!(stdout, Target::File(_)) {
            // As under runc, which looks for a FIFO of that name.
            let message = format!(
                "stdout {:?}: a terminal is not written to a file; use a FIFO, binary:// or a process without terminal",
                stdio.stdout
            );
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
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
        self.stdout = self.open_output("stdout", stdout, hub)?;
        self.stderr = self.open_output("stderr", stderr, hub)?;
        Ok(())
    }

    fn open_output(
        &mut self,
        stream: &'static str,
        target: Target,
        hub: &Arc<StreamHub>,
    ) -> Result<Option<OwnedFd>> {
        let named = |path: &Path, error: &io::Error| stream_error(stream, &path.display().to_string(), error);
        match target {
            Target::None => Ok(None),
            Target::Fifo(path) => open_fifo(&path, OpenOptions::new().read(true).write(true))
                .map(|file| file.map(OwnedFd::from))
                .map_err(|error| named(&path, &error)),
            Target::File(path) => open_log(&path)
                .map(|file| Some(file.into()))
                .map_err(|error| named(&path, &error)),
            Target::Stream(name) => {
                let (stream, fd) = hub.open(&name, Direction::Output)?;
                self.streamed.outputs.push(stream);
                Ok(Some(fd))
            }
            Target::Binary(uri) => Err(Error::new(
                ErrorKind::InvalidArgument,
                format!("{stream} {uri:?}: stdout must use the same logger"),
            )),
        }
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

/// Opens a file that output is appended to, as runc's shim of containerd does: it and the folders to it are made.
fn open_log(path: &Path) -> io::Result<File> {
    if let Some(folder) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o755).create(folder)?;
    }
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o644)
        .open(path)
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
        assert!(matches!(
            parse("stdout", "binary-v2:///bin/logger?a=b").unwrap(),
            Target::Binary(_)
        ));
        assert_eq!(
            parse("stdout", "ttrpc+unix:///x?streaming_id=c1-stdout").unwrap(),
            Target::Stream("c1-stdout".into())
        );
        assert_eq!(
            parse("stdout", "file:///var/log/a%20b+c?x=y").unwrap(),
            Target::File("/var/log/a b+c".into())
        );
        for unknown in [
            "grpc+unix:///x?streaming_id=1",
            "ttrpc+vsock://3:9?streaming_id=1",
            "attachablebinary:///x",
        ] {
            let error = parse("stdout", unknown).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Unimplemented, "{unknown}");
            assert!(error.message.contains(unknown), "{error}");
        }
        for bad in ["ttrpc+unix:///x", "file://log", "file://"] {
            let error = parse("stdout", bad).unwrap_err();
            assert_eq!(error.kind, ErrorKind::InvalidArgument, "{bad}");
        }
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

    fn stdio(stdout: &str, terminal: bool) -> Stdio {
        Stdio {
            stdout: stdout.to_owned(),
            terminal,
            ..Default::default()
        }
    }

    async fn open(stdio: &Stdio) -> Result<Streams> {
        let owner = Owner {
            container: "c".into(),
            namespace: "ns".into(),
        };
        Streams::open(stdio, owner, Arc::default()).await
    }

    #[tokio::test]
    async fn file_when_output_goes_to_it_is_made_and_appended_to() {
        use std::io::Write;
        use std::os::unix::fs::PermissionsExt;

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b/log");
        let uri = format!("file://{}", path.display());
        for words in ["one", "two"] {
            let mut streams = open(&stdio(&uri, false)).await.unwrap();
            File::from(streams.stdout.take().unwrap())
                .write_all(words.as_bytes())
                .unwrap();
        }

        assert_eq!(std::fs::read_to_string(&path).unwrap(), "onetwo");
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path) & !0o644, 0);
        assert_eq!(mode(path.parent().unwrap()) & !0o755, 0);
    }

    #[tokio::test]
    async fn terminal_when_it_is_to_go_to_a_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let uri = format!("file://{}", path.display());

        let error = open(&stdio(&uri, true)).await.err().unwrap();

        assert_eq!(error.kind, ErrorKind::InvalidArgument);
        assert!(
            error.message.contains("a terminal is not written to a file"),
            "{error}"
        );
        assert!(!path.exists());
    }
}
