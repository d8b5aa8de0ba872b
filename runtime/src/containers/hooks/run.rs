//! Running one hook on the host: state on its stdin, its words kept for the error, its time bounded.

use std::fmt::Write as _;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use oci_spec::runtime::Hook;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep_until};

use crate::error::{Error, ErrorKind};

/// Bound of a hook without a timeout of its own. runc has none; a caller that waits for ever helps nobody.
const LIMIT: Duration = Duration::from_secs(120);
/// How much of each output is kept for the error.
const KEPT: usize = 8 << 10;
/// How much is read at a time.
const CHUNK: usize = 4 << 10;

/// Why a hook failed.
#[derive(Debug, thiserror::Error)]
pub(in crate::containers) enum HookError {
    /// There is no such program, or it cannot be executed.
    #[error("cannot be executed: {0}")]
    Execute(io::Error),
    /// Its pipes or the wait failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// It ended with something else than 0.
    #[error("{status}{said}")]
    Status {
        /// How it ended.
        status: ExitStatus,
        /// Its output.
        said: String,
    },
    /// It did not end in time, and was killed with all of its process group.
    #[error("killed: has not ended after its timeout of {} s{said}", limit.as_secs())]
    Timeout {
        /// Its time.
        limit: Duration,
        /// Its output so far.
        said: String,
    },
}

impl From<HookError> for Error {
    fn from(error: HookError) -> Self {
        let kind = match &error {
            HookError::Execute(source) => match source.kind() {
                io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
                // Not "not found": to containerd that would mean the container.
                _ => ErrorKind::InvalidArgument,
            },
            HookError::Io(_) | HookError::Status { .. } => ErrorKind::Internal,
            HookError::Timeout { .. } => ErrorKind::DeadlineExceeded,
        };
        Self::new(kind, error.to_string())
    }
}

/// Runs `hook` in `folder` with `state` on its stdin. A process that it leaves behind is left alone, as long as the hook
/// itself ends in time.
///
/// # Errors
/// [`HookError`]; nothing of a hook that ran out of time is left.
pub(in crate::containers) async fn run(hook: &Hook, folder: &Path, state: &[u8]) -> Result<(), HookError> {
    let limit = hook
        .timeout()
        .and_then(|seconds| u64::try_from(seconds).ok())
        .map_or(LIMIT, Duration::from_secs);
    let mut running = Running::spawn(hook, folder)?;
    let ended = running.wait(state, limit).await?;
    let said = running.said();
    match ended {
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(HookError::Status { status, said }),
        None => Err(HookError::Timeout { limit, said }),
    }
}

/// A hook that runs, and our ends of its pipes.
struct Running {
    child: Child,
    stdin: Option<pipe::Sender>,
    stdout: Output,
    stderr: Output,
}

impl Running {
    fn spawn(hook: &Hook, folder: &Path) -> Result<Self, HookError> {
        let (stdin, stdin_writer) = io::pipe()?;
        let (stdout_reader, stdout) = io::pipe()?;
        let (stderr_reader, stderr) = io::pipe()?;
        let mut command = Command::new(hook.path());
        let args = hook.args().as_deref().unwrap_or_default();
        if let Some((arg0, rest)) = args.split_first() {
            command.arg0(arg0).args(rest);
        }
        // Without one it gets ours, as under runc.
        if let Some(env) = hook.env() {
            let pairs = env.iter().filter_map(|entry| entry.split_once('='));
            command.env_clear().envs(pairs);
        }
        // A group of its own: at the end of its time what it has started goes with it.
        command
            .current_dir(folder)
            .process_group(0)
            .stdin(Stdio::from(stdin))
            .stdout(Stdio::from(stdout))
            .stderr(Stdio::from(stderr));
        let child = command.spawn().map_err(HookError::Execute)?;
        // With the command go our copies of the hook's ends.
        drop(command);
        Ok(Self {
            child,
            stdin: Some(pipe::Sender::from_owned_fd(OwnedFd::from(stdin_writer))?),
            stdout: Output::of(stdout_reader.into())?,
            stderr: Output::of(stderr_reader.into())?,
        })
    }

    /// Waits for the hook's end; `None` when it came by force.
    async fn wait(&mut self, mut state: &[u8], limit: Duration) -> io::Result<Option<ExitStatus>> {
        let group = self.child.id().and_then(|id| i32::try_from(id).ok());
        let deadline = Instant::now() + limit;
        loop {
            tokio::select! {
                status = self.child.wait() => return status.map(Some),
                () = feed(&mut self.stdin, &mut state) => {}
                () = self.stdout.fill() => {}
                () = self.stderr.fill() => {}
                () = sleep_until(deadline) => break,
            }
        }
        if let Some(group) = group {
            // It fails for a group that has just gone by itself.
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
        self.child.wait().await?;
        Ok(None)
    }

    /// What it has printed, for the end of an error.
    fn said(&mut self) -> String {
        let mut said = String::new();
        for (name, output) in [("stderr", &mut self.stderr), ("stdout", &mut self.stdout)] {
            let text = output.take();
            if !text.is_empty() {
                // Writing to a string does not fail.
                let _ = write!(said, ", {name}: {text}");
            }
        }
        said
    }
}

/// Writes some of `state` and closes the pipe after the last byte. Never ready again then.
async fn feed(stdin: &mut Option<pipe::Sender>, state: &mut &[u8]) {
    let Some(pipe) = stdin else {
        return std::future::pending().await;
    };
    match pipe.write(state).await {
        Ok(count) => *state = state.get(count..).unwrap_or_default(),
        // It need not read its state.
        Err(_) => *state = &[],
    }
    if state.is_empty() {
        stdin.take();
    }
}

/// An output of the hook's: all of it is read, the beginning kept.
struct Output {
    pipe: Option<pipe::Receiver>,
    kept: Vec<u8>,
}

impl Output {
    fn of(pipe: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            pipe: Some(pipe::Receiver::from_owned_fd(pipe)?),
            kept: Vec::new(),
        })
    }

    /// Reads what is there as soon as something is. Never ready again after the end.
    async fn fill(&mut self) {
        match &self.pipe {
            Some(pipe) => {
                if pipe.readable().await.is_err() {
                    self.pipe = None;
                    return;
                }
            }
            None => return std::future::pending().await,
        }
        self.read();
    }

    /// Reads once; false when there is nothing to read, now or ever.
    fn read(&mut self) -> bool {
        let Some(pipe) = &self.pipe else { return false };
        let mut chunk = [0; CHUNK];
        match pipe.try_read(&mut chunk) {
            Ok(0) => self.pipe = None,
            Ok(count) => {
                let room = KEPT.saturating_sub(self.kept.len());
                self.kept
                    .extend_from_slice(chunk.get(..count.min(room)).unwrap_or_default());
                return true;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => self.pipe = None,
        }
        false
    }

    /// All that is known, once the hook has ended: what it wrote is in the pipe by then. Its end may not be, when a process
    /// that it has left behind holds it.
    fn take(&mut self) -> String {
        // Such a process may write for ever.
        for _ in 0..=KEPT / CHUNK * 16 {
            if self.kept.len() >= KEPT || !self.read() {
                break;
            }
        }
        String::from_utf8_lossy(&std::mem::take(&mut self.kept))
            .trim()
            .to_owned()
    }
}
