//! Child processes with a time limit: every wait ends, and a hang shows what was printed so far.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use std::os::unix::process::ExitStatusExt;

/// How long the readers get to see end-of-file once the process itself is gone.
const DRAIN_LIMIT: Duration = Duration::from_secs(60);
/// How often a running child is looked at.
const POLL: Duration = Duration::from_millis(5);

/// Why a command has no result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program could not be started.
    #[error("cannot start `{command}`: {source}")]
    Start {
        /// The command line.
        command: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The process was still running at its limit; it has been killed.
    #[error(
        "`{command}` did not finish within {limit:?} (E2E_TIMEOUT raises it); it was killed\nstdout: {stdout}\nstderr: {stderr}"
    )]
    TimedOut {
        /// The command line.
        command: String,
        /// The limit.
        limit: Duration,
        /// The end of its standard output.
        stdout: String,
        /// The end of its standard error.
        stderr: String,
    },
    /// Something holds the output open although the process has exited.
    #[error("`{command}` exited but its {stream} is still open after {limit:?}")]
    OutputHeldOpen {
        /// The command line.
        command: String,
        /// `stdout` or `stderr`.
        stream: &'static str,
        /// The limit.
        limit: Duration,
    },
    /// The awaited output did not appear.
    #[error(
        "`{command}` did not print {what} within {limit:?} (E2E_TIMEOUT raises it)\nstdout: {stdout}\nstderr: {stderr}"
    )]
    NoSuchOutput {
        /// The command line.
        command: String,
        /// What was awaited.
        what: String,
        /// The limit.
        limit: Duration,
        /// The end of its standard output.
        stdout: String,
        /// The end of its standard error.
        stderr: String,
    },
    /// The system refused a wait or kill.
    #[error("`{command}`: {source}")]
    Wait {
        /// The command line.
        command: String,
        /// What the system said.
        source: std::io::Error,
    },
}

/// What a finished command left.
#[derive(Debug)]
pub struct Finished {
    /// The command line, for messages.
    pub command: String,
    /// Exit code; 128 + n after death by signal n.
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// From start to exit.
    pub elapsed: Duration,
}

impl Finished {
    /// Standard output as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Returns itself after checking the exit code.
    ///
    /// # Panics
    /// When the code differs; the message shows the command and both streams.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(self.code, code, "exit code of {}", self.describe());
        self
    }

    /// The command with the tail of its output, for assertion messages.
    pub fn describe(&self) -> String {
        format!(
            "`{}` (code {}, {:?})\nstdout: {}\nstderr: {}",
            self.command,
            self.code,
            self.elapsed,
            tail(&self.stdout),
            tail(&self.stderr)
        )
    }
}

/// The last 4 KiB of `bytes` as text.
pub fn tail(bytes: &[u8]) -> String {
    let start = bytes.len().saturating_sub(4096);
    String::from_utf8_lossy(bytes.get(start..).unwrap_or_default()).into_owned()
}

#[derive(Default)]
struct Stream {
    bytes: Vec<u8>,
    ended: bool,
}

#[derive(Default)]
struct Collected {
    stream: Mutex<Stream>,
    changed: Condvar,
}

impl Collected {
    fn lock(&self) -> MutexGuard<'_, Stream> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn collect(from: impl Read + Send + 'static) -> Arc<Self> {
        let collected = Arc::new(Self::default());
        let sink = Arc::clone(&collected);
        thread::spawn(move || sink.read_all(from));
        collected
    }

    fn read_all(&self, mut from: impl Read) {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let read = match from.read(&mut buffer) {
                Ok(read) => read,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(_) => 0,
            };
            let mut stream = self.lock();
            stream
                .bytes
                .extend_from_slice(buffer.get(..read).unwrap_or_default());
            stream.ended |= read == 0;
            self.changed.notify_all();
            if read == 0 {
                return;
            }
        }
    }

    /// Waits until `done` holds; `false` when the limit passes or the stream ends first.
    fn wait(&self, limit: Duration, mut done: impl FnMut(&Stream) -> bool) -> bool {
        let deadline = Instant::now() + limit;
        let mut stream = self.lock();
        loop {
            if done(&stream) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if stream.ended || left.is_zero() {
                return false;
            }
            stream = self
                .changed
                .wait_timeout(stream, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// What a command reads.
pub enum Input {
    /// Nothing: `/dev/null`.
    Null,
    /// These bytes, then end-of-file.
    Bytes(Vec<u8>),
    /// A pipe the test writes to and closes.
    Open,
}

/// A process whose output is being collected. Dropping it kills the process.
pub struct Running {
    command: String,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Arc<Collected>,
    stderr: Arc<Collected>,
    started: Instant,
}

impl Running {
    /// Starts `command` in the background.
    ///
    /// # Errors
    /// [`Error::Start`] when the program cannot be executed.
    pub fn start(command: &mut Command, input: Input) -> Result<Self, Error> {
        let text = describe(command);
        let stdin = if matches!(input, Input::Null) {
            Stdio::null()
        } else {
            Stdio::piped()
        };
        let mut child = command
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| Error::Start {
                command: text.clone(),
                source,
            })?;
        let stdout = child.stdout.take().map(Collected::collect).unwrap_or_default();
        let stderr = child.stderr.take().map(Collected::collect).unwrap_or_default();
        let mut stdin = child.stdin.take();
        if let Input::Bytes(bytes) = input
            && let Some(mut pipe) = stdin.take()
        {
            // A reader that exits early makes this fail with EPIPE; what it did read is what the test checks.
            thread::spawn(move || pipe.write_all(&bytes));
        }
        Ok(Self {
            command: text,
            child,
            stdin,
            stdout,
            stderr,
            started: Instant::now(),
        })
    }

    /// Writes to the process's standard input.
    ///
    /// # Errors
    /// [`Error::Wait`] when the pipe is closed.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let Some(pipe) = self.stdin.as_mut() else {
            return Ok(());
        };
        let command = &self.command;
        pipe.write_all(bytes).map_err(|source| Error::Wait {
            command: command.clone(),
            source,
        })
    }

    /// Closes the process's standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Standard output so far, as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout.lock().bytes).into_owned()
    }

    /// Waits until standard output satisfies `done`.
    ///
    /// # Errors
    /// [`Error::NoSuchOutput`] when the limit passes or the output ends first; `what` names it.
    pub fn wait_out(&self, what: &str, limit: Duration, done: impl Fn(&str) -> bool) -> Result<(), Error> {
        if self
            .stdout
            .wait(limit, |stream| done(&String::from_utf8_lossy(&stream.bytes)))
        {
            return Ok(());
        }
        let (stdout, stderr) = self.tails();
        Err(Error::NoSuchOutput {
            command: self.command.clone(),
            what: what.to_owned(),
            limit,
            stdout,
            stderr,
        })
    }

    /// Waits for the process and the end of its output.
    ///
    /// # Errors
    /// [`Error::TimedOut`] after killing the process, [`Error::OutputHeldOpen`] when somebody else keeps a
    /// stream open.
    pub fn finish(mut self, limit: Duration) -> Result<Finished, Error> {
        let status = self.wait(limit)?;
        let elapsed = self.started.elapsed();
        for (name, stream) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            if !stream.wait(DRAIN_LIMIT, |s| s.ended) {
                return Err(Error::OutputHeldOpen {
                    command: self.command.clone(),
                    stream: name,
                    limit: DRAIN_LIMIT,
                });
            }
        }
        Ok(Finished {
            command: self.command.clone(),
            code: status
                .code()
                .unwrap_or_else(|| 128 + status.signal().unwrap_or_default()),
            stdout: std::mem::take(&mut self.stdout.lock().bytes),
            stderr: std::mem::take(&mut self.stderr.lock().bytes),
            elapsed,
        })
    }

    fn wait(&mut self, limit: Duration) -> Result<ExitStatus, Error> {
        let deadline = Instant::now() + limit;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Ok(status),
                Ok(None) if Instant::now() < deadline => thread::sleep(POLL),
                Ok(None) => {
                    let (stdout, stderr) = self.tails();
                    return Err(Error::TimedOut {
                        command: self.command.clone(),
                        limit,
                        stdout,
                        stderr,
                    });
                }
                Err(source) => {
                    return Err(Error::Wait {
                        command: self.command.clone(),
                        source,
                    });
                }
            }
        }
    }

    fn tails(&self) -> (String, String) {
        (tail(&self.stdout.lock().bytes), tail(&self.stderr.lock().bytes))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // Both fail only for a process that is already gone.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Runs `command` to its end within `limit`, reading nothing.
///
/// # Errors
/// Those of [`Running::start`] and [`Running::finish`].
pub fn run(command: &mut Command, limit: Duration) -> Result<Finished, Error> {
    Running::start(command, Input::Null)?.finish(limit)
}

/// Asks `done` until it holds, at most for `limit`; says whether it did.
pub fn eventually(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if done() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(50));
    }
}

fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|word| word.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    #[test]
    fn run_when_child_exits_collects_code_and_streams() {
        let done = run(
            Command::new("sh").args(["-c", "echo out; echo err >&2; exit 3"]),
            LIMIT,
        )
        .unwrap();
        assert_eq!(
            (done.code, done.out().as_str(), done.err().as_str()),
            (3, "out\n", "err\n")
        );
    }

    #[test]
    fn run_when_child_dies_by_signal_returns_128_plus_signal() {
        assert_eq!(
            run(Command::new("sh").args(["-c", "kill -9 $$"]), LIMIT)
                .unwrap()
                .code,
            137
        );
    }

    #[test]
    fn run_when_limit_passes_kills_and_shows_output() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo started; exec sleep 600"]);
        let running = Running::start(&mut command, Input::Null).unwrap();
        running
            .wait_out("its output", LIMIT, |out| out == "started\n")
            .unwrap();
        let text = running.finish(Duration::from_secs(1)).unwrap_err().to_string();
        assert!(
            text.contains("did not finish within 1s (E2E_TIMEOUT raises it)") && text.contains("started"),
            "{text}"
        );
    }

    #[test]
    fn finish_when_stdin_is_given_feeds_it_and_closes() {
        let bytes = vec![7; 1 << 20];
        let cat = Running::start(&mut Command::new("cat"), Input::Bytes(bytes.clone())).unwrap();
        assert!(cat.finish(LIMIT).unwrap().stdout == bytes);
    }
}
