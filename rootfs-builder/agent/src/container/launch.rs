//! Starting the helper and hearing from it.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::unistd::{Pid, pipe2};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::unix::pipe;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::helper::{ARGUMENT, Answer, RESULT_FD, Request};
use crate::reaper::Reaper;

/// Building a container takes milliseconds; a stuck shared folder can make it take long, but not for ever.
const LAUNCH_PATIENCE: Duration = Duration::from_secs(60);
/// Longest answer: an error chain with paths in it.
const MAX_ANSWER: u64 = 64 * 1024;
/// Where the child parks descriptors before it puts them in place; above anything it passes.
const PARKING: RawFd = 64;

/// Why a container process was not made.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The helper could not be started or heard.
    #[error("run the container helper: {0}")]
    Helper(#[from] io::Error),
    /// The helper ended without an answer.
    #[error("the container helper ended with status {0} and no answer")]
    Silent(i32),
    /// The helper did not answer in time.
    #[error("the container helper gave no answer for {} s", LAUNCH_PATIENCE.as_secs())]
    Timeout,
    /// The helper's reason, usually libcontainer's.
    #[error("{0}")]
    Refused(String),
}

/// A container process that exists.
pub struct Launched {
    /// Its pid, a child of the agent.
    pub pid: Pid,
    /// Resolves to its exit code.
    pub exit: oneshot::Receiver<i32>,
    /// Ends when the process has executed its program, or died; yields the reason if it could not.
    pub exec_report: pipe::Receiver,
}

/// Runs the helper for `request`, with `stdio` as the process's standard streams (none with a console).
///
/// # Errors
/// No process was made. Nothing of it is left, except what libcontainer had put on disk.
pub async fn launch(
    reaper: &Reaper,
    request: &Request,
    stdio: Vec<OwnedFd>,
) -> Result<Launched, LaunchError> {
    let _launch = reaper.launch();
    let (result_reader, result_writer) = pipe2(OFlag::O_CLOEXEC).map_err(io::Error::from)?;
    let (exec_reader, exec_writer) = pipe2(OFlag::O_CLOEXEC).map_err(io::Error::from)?;

    let mut descriptors = vec![result_writer, exec_writer];
    descriptors.extend(stdio);
    let helper = spawn(request, descriptors)?;
    let helper_exit = reaper.exit_of(helper);

    let answer = timeout(
        LAUNCH_PATIENCE,
        hear(pipe::Receiver::from_owned_fd(result_reader)?, helper_exit),
    )
    .await;
    match answer {
        Err(_) => {
            // Its exit is collected like any orphan's.
            let _ = nix::sys::signal::kill(helper, nix::sys::signal::SIGKILL);
            Err(LaunchError::Timeout)
        }
        Ok(Err(error)) => Err(error),
        Ok(Ok(Answer::Error(reason))) => Err(LaunchError::Refused(reason)),
        Ok(Ok(Answer::Done)) => Err(LaunchError::Refused("no process was made".to_owned())),
        Ok(Ok(Answer::Pid(pid))) => {
            let pid = Pid::from_raw(pid);
            let exec_report = pipe::Receiver::from_owned_fd(exec_reader)?;
            Ok(Launched {
                pid,
                exit: reaper.exit_of(pid),
                exec_report,
            })
        }
    }
}

/// Runs the helper for `request`, which makes no process.
///
/// # Errors
/// The helper's reason, or that it gave none.
pub async fn run(reaper: &Reaper, request: &Request) -> Result<(), LaunchError> {
    let _launch = reaper.launch();
    let (result_reader, result_writer) = pipe2(OFlag::O_CLOEXEC).map_err(io::Error::from)?;
    let helper = spawn(request, vec![result_writer])?;
    let helper_exit = reaper.exit_of(helper);
    let results = pipe::Receiver::from_owned_fd(result_reader)?;
    match timeout(LAUNCH_PATIENCE, hear(results, helper_exit)).await {
        Ok(Ok(Answer::Done | Answer::Pid(_))) => Ok(()),
        Ok(Ok(Answer::Error(reason))) => Err(LaunchError::Refused(reason)),
        Ok(Err(error)) => Err(error),
        Err(_) => {
            // Its exit is collected like any orphan's.
            let _ = nix::sys::signal::kill(helper, nix::sys::signal::SIGKILL);
            Err(LaunchError::Timeout)
        }
    }
}

/// The agent's copies of `descriptors` close when this returns.
fn spawn(request: &Request, descriptors: Vec<OwnedFd>) -> io::Result<Pid> {
    let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("kata-agent")
        .arg(ARGUMENT)
        .arg(serde_json::to_string(request)?);
    let place = move || {
        // Park first: a source may carry the number of another one's place.
        let mut parked = [0; 8];
        for (slot, from) in parked.iter_mut().zip(&raw) {
            // SAFETY: fcntl on an open descriptor; async-signal-safe, and nothing is allocated.
            *slot = unsafe { libc::fcntl(*from, libc::F_DUPFD_CLOEXEC, PARKING) };
            if *slot < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        for (to, slot) in (RESULT_FD..).zip(parked.iter().take(raw.len())) {
            // SAFETY: as above; the copy is not close-on-exec, which is its purpose.
            if unsafe { libc::dup2(*slot, to) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec and makes only async-signal-safe calls.
    unsafe { command.pre_exec(place) };
    // Collected by the reaper, which is the only one to call waitpid.
    let child = command.spawn()?;
    let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
    Ok(Pid::from_raw(pid))
}

/// The helper's line. End of file does not tell that it is gone: the container process holds the pipe open too.
async fn hear(results: pipe::Receiver, mut exit: oneshot::Receiver<i32>) -> Result<Answer, LaunchError> {
    let mut reader = BufReader::new(results.take(MAX_ANSWER));
    let mut line = Vec::new();
    let read = tokio::select! {
        biased;
        read = reader.read_until(b'\n', &mut line) => read?,
        status = &mut exit => {
            let status = status.unwrap_or_default();
            // What it wrote before it ended is in the pipe by now.
            match timeout(Duration::ZERO, reader.read_until(b'\n', &mut line)).await {
                Ok(read) => read?,
                Err(_) => return Err(LaunchError::Silent(status)),
            }
        }
    };
    if read == 0 {
        return Err(LaunchError::Silent(exit.await.unwrap_or_default()));
    }
    serde_json::from_slice(&line).map_err(|error| LaunchError::Helper(error.into()))
}
