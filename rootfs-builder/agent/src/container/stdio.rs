//! A process's standard streams: pipes or a terminal on the container's side, and on the host's either a vsock
//! connection each or the `WriteStdin`/`ReadStdout`/`ReadStderr` calls.
//!
//! The process gets pipes and the agent copies, although a vsock socket could be handed to it directly: programs
//! reopen `/dev/stdout` (ENXIO on a socket), test for pipes, and fork children that outlive them. The copy is
//! bounded by the pipe and one buffer, and runs to end of file, which comes when the last writer is gone, whether
//! or not the process that the streams were made for still exists.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{Gid, Uid, fchown, pipe2};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::{Mutex, Notify, watch};
use tokio::time::timeout;

use super::pty::Pty;
use crate::transport::Connection;

const BUFFER: usize = 64 * 1024;
/// For output that nobody wants.
const UNWANTED_BUFFER: usize = 4 * 1024;
/// After `CloseStdin`, input that the host had sent before may still be on its way through the other socket.
const LATE_INPUT: Duration = Duration::from_millis(200);

/// A stream of the process that is asked for, and is not there to be had.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The stream goes to a vsock port, or was closed.
    #[error("{0} is not connected to this call: it is closed, or has a vsock port")]
    NotHere(&'static str),
    /// The last writer is gone and everything was read.
    #[error("end of file")]
    EndOfFile,
    /// The process closed it.
    #[error("{stream}: {source}")]
    Io {
        /// Which.
        stream: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// Where the host is for each stream.
#[derive(Default)]
pub struct Connections {
    /// Input comes from here.
    pub stdin: Option<Box<dyn Connection>>,
    /// Output, or everything the terminal shows, goes here.
    pub stdout: Option<Box<dyn Connection>>,
    /// Errors go here.
    pub stderr: Option<Box<dyn Connection>>,
}

/// How a process's streams reach the host.
pub enum Plan {
    /// By calls: every stream exists and waits for them.
    Calls,
    /// By connections: a stream without one is /dev/null.
    Connections(Connections),
}

/// The streams of one process, as the rest of the agent sees them.
pub struct Stdio {
    stdin: Mutex<Option<Writer>>,
    stdout: Mutex<Option<Reader>>,
    stderr: Mutex<Option<Reader>>,
    terminal: std::sync::Mutex<Option<Arc<Pty>>>,
    close_stdin: Arc<Notify>,
}

enum Reader {
    Pipe(pipe::Receiver),
    Terminal(Arc<Pty>),
}

enum Writer {
    Pipe(pipe::Sender),
    Terminal(Arc<Pty>),
}

/// Pipes made for a process that does not exist yet.
pub struct Pipes {
    stdin: Option<pipe::Sender>,
    stdout: Option<pipe::Receiver>,
    stderr: Option<pipe::Receiver>,
}

impl Pipes {
    /// Makes the pipes `plan` needs, owned by the process's user so that it can reopen /dev/stdout. Returns them
    /// and the process's ends.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn make(plan: &Plan, owner: (u32, u32), size: Option<u32>) -> io::Result<(Self, Vec<OwnedFd>)> {
        let wanted = match plan {
            Plan::Calls => [true; 3],
            Plan::Connections(to) => [to.stdin.is_some(), to.stdout.is_some(), to.stderr.is_some()],
        };
        let mut child = Vec::with_capacity(wanted.len());
        let mut output = |wanted| -> io::Result<Option<pipe::Receiver>> {
            let Some((reader, writer)) = make_pipe(wanted, owner, size)? else {
                child.push(null()?);
                return Ok(None);
            };
            child.push(writer);
            pipe::Receiver::from_owned_fd(reader).map(Some)
        };
        let stdout = output(wanted[1])?;
        let stderr = output(wanted[2])?;
        let stdin = match make_pipe(wanted[0], owner, size)? {
            Some((reader, writer)) => {
                child.insert(0, reader);
                Some(pipe::Sender::from_owned_fd(writer)?)
            }
            None => {
                child.insert(0, null()?);
                None
            }
        };
        Ok((
            Self {
                stdin,
                stdout,
                stderr,
            },
            child,
        ))
    }

    /// Connects the pipes of a process that exists by now; `exit` changes when it dies.
    pub fn connect(self, plan: Plan, exit: watch::Receiver<Option<i32>>) -> Stdio {
        let stdin = self.stdin.map(Writer::Pipe);
        let stdout = self.stdout.map(Reader::Pipe);
        let stderr = self.stderr.map(Reader::Pipe);
        Stdio::new(stdin, stdout, stderr, None, plan, exit)
    }
}

impl Stdio {
    /// The streams of a process with a terminal. Its errors appear on the terminal like everything else.
    pub fn terminal(pty: Pty, plan: Plan, exit: watch::Receiver<Option<i32>>) -> Self {
        let pty = Arc::new(pty);
        let stdin = Writer::Terminal(Arc::clone(&pty));
        let stdout = Reader::Terminal(Arc::clone(&pty));
        Self::new(Some(stdin), Some(stdout), None, Some(pty), plan, exit)
    }

    fn new(
        mut stdin: Option<Writer>,
        mut stdout: Option<Reader>,
        mut stderr: Option<Reader>,
        terminal: Option<Arc<Pty>>,
        plan: Plan,
        exit: watch::Receiver<Option<i32>>,
    ) -> Self {
        let close_stdin = Arc::new(Notify::new());
        if let Plan::Connections(to) = plan {
            if let (Some(from), Some(writer)) = (to.stdin, stdin.take()) {
                tokio::spawn(pump_in(from, writer, exit.clone(), Arc::clone(&close_stdin)));
            }
            for (reader, to) in [(stdout.take(), to.stdout), (stderr.take(), to.stderr)] {
                if let Some(reader) = reader {
                    tokio::spawn(pump_out(reader, to, exit.clone()));
                }
            }
        }
        Self {
            stdin: Mutex::new(stdin),
            stdout: Mutex::new(stdout),
            stderr: Mutex::new(stderr),
            terminal: std::sync::Mutex::new(terminal),
            close_stdin,
        }
    }

    /// Writes all of `data` to the process's input.
    ///
    /// # Errors
    /// Input is closed, or has a connection.
    pub async fn write(&self, data: &[u8]) -> Result<(), StreamError> {
        let mut stdin = self.stdin.lock().await;
        let writer = stdin.as_mut().ok_or(StreamError::NotHere("stdin"))?;
        writer.write_all(data).await.map_err(|source| StreamError::Io {
            stream: "stdin",
            source,
        })
    }

    /// Reads up to `length` bytes of output, waiting for the first.
    ///
    /// # Errors
    /// End of file, or output has a connection.
    pub async fn read_stdout(&self, length: usize) -> Result<Vec<u8>, StreamError> {
        read("stdout", &self.stdout, length).await
    }

    /// Reads up to `length` bytes of errors, waiting for the first.
    ///
    /// # Errors
    /// End of file, or errors have a connection.
    pub async fn read_stderr(&self, length: usize) -> Result<Vec<u8>, StreamError> {
        read("stderr", &self.stderr, length).await
    }

    /// Ends the process's input. A terminal has no end of input but the character for it, so nothing happens.
    pub async fn close_stdin(&self) {
        self.close_stdin.notify_one();
        let mut stdin = self.stdin.lock().await;
        if matches!(*stdin, Some(Writer::Pipe(_))) {
            *stdin = None;
        }
    }

    /// The terminal, if there is one.
    pub fn pty(&self) -> Option<Arc<Pty>> {
        self.held_terminal().clone()
    }

    /// Gives back the descriptor of a terminal whose process has ended. What the terminal still shows is read by whoever
    /// reads it.
    pub fn release_terminal(&self) {
        *self.held_terminal() = None;
    }

    fn held_terminal(&self) -> std::sync::MutexGuard<'_, Option<Arc<Pty>>> {
        self.terminal.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn read(
    stream: &'static str,
    reader: &Mutex<Option<Reader>>,
    length: usize,
) -> Result<Vec<u8>, StreamError> {
    let mut reader = reader.lock().await;
    let mut data = vec![0; length.clamp(1, BUFFER)];
    let count = reader
        .as_mut()
        .ok_or(StreamError::NotHere(stream))?
        .read(&mut data)
        .await
        .map_err(|source| StreamError::Io { stream, source })?;
    if count == 0 {
        return Err(StreamError::EndOfFile);
    }
    data.truncate(count);
    Ok(data)
}

/// Copies output to the host until the last writer closes it. If the host goes away, or never came, output is
/// still read: a full pipe would block the process for ever.
///
/// A host that hangs up is noticed by the next write. Once the process is gone there may be no next one, only a child
/// that holds the stream open in silence; then the connection and the buffer are given back when the host closes it.
async fn pump_out(
    mut reader: Reader,
    mut host: Option<Box<dyn Connection>>,
    mut exit: watch::Receiver<Option<i32>>,
) {
    let mut buffer = vec![0; BUFFER];
    let mut exited = false;
    loop {
        if host.is_none() {
            buffer.truncate(UNWANTED_BUFFER);
            buffer.shrink_to_fit();
        }
        let read = tokio::select! {
            read = reader.read(&mut buffer) => read,
            // The reaper lives as long as the agent, so an error is an end, too.
            _ = exit.wait_for(Option::is_some), if !exited => {
                exited = true;
                continue;
            }
            () = hung_up(host.as_mut()), if exited && host.is_some() => {
                host = None;
                continue;
            }
        };
        let count = match read {
            Ok(0) | Err(_) => break,
            Ok(count) => count,
        };
        if let Some(connection) = &mut host
            && let Err(error) = connection
                .write_all(buffer.get(..count).unwrap_or_default())
                .await
        {
            tracing::debug!("output after the host hung up: {error}");
            host = None;
        }
    }
    if let Some(mut connection) = host {
        // The host may be gone; it has seen all there was, or does not want it.
        let _ = connection.shutdown().await;
    }
}

/// Resolves when the host has closed its end of an output, on which it never sends anything.
async fn hung_up(host: Option<&mut Box<dyn Connection>>) {
    let Some(connection) = host else { return };
    let mut nothing = [0; 64];
    while connection.read(&mut nothing).await.is_ok_and(|count| count > 0) {}
}

/// Copies input from the host until it ends, is closed, or the process is gone.
async fn pump_in(
    mut from: Box<dyn Connection>,
    mut writer: Writer,
    mut exit: watch::Receiver<Option<i32>>,
    close: Arc<Notify>,
) {
    let mut buffer = vec![0; BUFFER];
    let mut closing = false;
    loop {
        let count = tokio::select! {
            read = from.read(&mut buffer) => read.unwrap_or(0),
            () = close.notified(), if !closing => {
                closing = true;
                continue;
            }
            () = tokio::time::sleep(LATE_INPUT), if closing => 0,
            _ = exit.wait_for(Option::is_some) => return,
        };
        if count == 0 {
            break;
        }
        tokio::select! {
            written = writer.write_all(buffer.get(..count).unwrap_or_default()) => if written.is_err() { break },
            _ = exit.wait_for(Option::is_some) => return,
        }
    }
    if matches!(writer, Writer::Terminal(_)) {
        // Dropping one of the terminal's users closes nothing; the input just ends.
        return;
    }
    drop(writer);
}

impl Reader {
    async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe) => pipe.read(buffer).await,
            Self::Terminal(pty) => pty.read(buffer).await,
        }
    }
}

impl Writer {
    async fn write_all(&mut self, data: &[u8]) -> io::Result<()> {
        match self {
            Self::Pipe(pipe) => pipe.write_all(data).await,
            Self::Terminal(pty) => pty.write_all(data).await,
        }
    }
}

fn make_pipe(
    wanted: bool,
    (uid, gid): (u32, u32),
    size: Option<u32>,
) -> io::Result<Option<(OwnedFd, OwnedFd)>> {
    if !wanted {
        return Ok(None);
    }
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
    fchown(&reader, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    if let Some(size) = size {
        fcntl(
            &reader,
            FcntlArg::F_SETPIPE_SZ(i32::try_from(size).unwrap_or(i32::MAX)),
        )?;
    }
    Ok(Some((reader, writer)))
}

fn null() -> io::Result<OwnedFd> {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    Ok(file.into())
}

/// Waits for `report` to end; what it carried is the reason a program could not be executed.
pub async fn exec_outcome(report: &mut pipe::Receiver, patience: Duration) -> io::Result<Option<String>> {
    const LONGEST: u64 = 4096;
    let mut reason = Vec::new();
    match timeout(patience, report.take(LONGEST).read_to_end(&mut reason)).await {
        // Still not executed: a start hook, or a very slow filesystem. Not a failure by itself.
        Err(_) => Ok(None),
        Ok(Err(error)) => Err(error),
        Ok(Ok(0)) => Ok(None),
        Ok(Ok(_)) => Ok(Some(String::from_utf8_lossy(&reason).into_owned())),
    }
}
