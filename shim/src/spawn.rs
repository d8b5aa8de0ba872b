//! From `start` to the serving process: what is handed over, and how the child says that it serves or why not.
//!
//! The child gets two descriptors by number in its environment: the listening socket, so that no client can come too
//! early, and a pipe on which it reports. Everything else is closed or `/dev/null`, because containerd reads `start`'s
//! output until its last holder is gone.

#![allow(unsafe_code)]

use std::env;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FileType;
use rustix::io::{FdFlags, fcntl_setfd};

use crate::args::Args;

const LISTENER_ENV: &str = "KATA_RUNTIME_BIND_FD";
const REPORT_ENV: &str = "KATA_RUNTIME_READY_FD";

/// The report of a child that serves; anything else is the error.
const READY: &[u8] = b"ready";

/// Longest report that is read, bytes.
const MAX_REPORT: u64 = 4096;

/// How long the child may take to serve. It takes milliseconds; this only bounds a machine in trouble.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why there is no serving process.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// A system call of the parent failed.
    #[error("starting the shim process: {what}: {source}")]
    Io {
        /// Which step.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The child said why it cannot serve.
    #[error("shim process {pid}: {message}")]
    Refused {
        /// Its pid.
        pid: u32,
        /// What it said.
        message: String,
    },
    /// The child ended without a word.
    #[error("shim process {pid} ended before it served: {status}")]
    Died {
        /// Its pid.
        pid: u32,
        /// How it ended.
        status: String,
    },
    /// The child neither served nor ended.
    #[error("shim process {pid} did not serve within {} s", PATIENCE.as_secs())]
    Silent {
        /// Its pid.
        pid: u32,
    },
}

/// Marks every descriptor above stderr close-on-exec: what containerd leaked into this process must not live as long as
/// the pod.
pub fn close_inherited_on_exec() {
    const FIRST: libc::c_uint = 3;
    // SAFETY: close_range with CLOSE_RANGE_CLOEXEC closes nothing, it only sets a flag. Kernels before 5.11 refuse the
    // flag, and then the descriptors stay as they are.
    unsafe {
        libc::syscall(
            libc::SYS_close_range,
            FIRST,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        );
    }
}

/// Starts the serving process in the working folder (the bundle) and waits until it serves. Returns its pid.
///
/// # Errors
/// [`SpawnError`]; no process is left then.
pub fn spawn(
    args: &Args,
    debug: bool,
    environment: &[(&str, &str)],
    listener: &UnixListener,
) -> Result<u32, SpawnError> {
    let failed = |what| move |source| SpawnError::Io { what, source };
    let (report, child_end) = io::pipe().map_err(failed("making a pipe"))?;
    let program = env::current_exe().map_err(failed("finding its own program"))?;
    for fd in [listener.as_fd(), child_end.as_fd()] {
        fcntl_setfd(fd, FdFlags::empty())
            .map_err(io::Error::from)
            .map_err(failed("keeping a descriptor open"))?;
    }
    let mut command = Command::new(program);
    command
        .args([
            "-namespace",
            &args.namespace,
            "-id",
            &args.id,
            "-address",
            &args.address,
        ])
        .args(["-publish-binary", &args.publish_binary])
        .args(debug.then_some("-debug"))
        .envs(environment.iter().copied())
        .env(LISTENER_ENV, listener.as_raw_fd().to_string())
        .env(REPORT_ENV, child_end.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = command.spawn().map_err(failed("executing itself"))?;
    // Only the child may hold the other end, or its death would go unnoticed.
    drop(child_end);
    wait_ready(&mut child, report).inspect_err(|_| {
        // It may have ended by itself; either way it must not stay, nor stay a zombie.
        let _ = child.kill();
        let _ = child.wait();
    })
}

fn wait_ready(child: &mut Child, report: io::PipeReader) -> Result<u32, SpawnError> {
    let pid = child.id();
    let failed = |what| move |source| SpawnError::Io { what, source };
    if !readable_within(report.as_fd(), PATIENCE).map_err(failed("waiting for it"))? {
        return Err(SpawnError::Silent { pid });
    }
    let mut text = Vec::new();
    report
        .take(MAX_REPORT)
        .read_to_end(&mut text)
        .map_err(failed("reading its report"))?;
    match text.as_slice() {
        READY => Ok(pid),
        [] => {
            let status = child.wait().map_err(failed("waiting for it"))?;
            Err(SpawnError::Died {
                pid,
                status: describe(status),
            })
        }
        message => Err(SpawnError::Refused {
            pid,
            message: String::from_utf8_lossy(message).into_owned(),
        }),
    }
}

fn readable_within(fd: BorrowedFd<'_>, patience: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)) {
            Err(rustix::io::Errno::INTR) => {}
            other => return Ok(other? > 0),
        }
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}

/// What the child got from its parent.
#[derive(Debug)]
pub struct Inherited {
    /// The listening socket.
    pub listener: UnixListener,
    /// Where to report.
    pub report: Report,
}

/// The child's one word to its parent.
#[derive(Debug)]
pub struct Report(File);

impl Report {
    /// The socket is served from now on.
    pub fn ready(mut self) {
        // If the parent is gone nobody waits for the word.
        let _ = self.0.write_all(READY);
    }

    /// It is not, because of `error`.
    pub fn failed(mut self, error: &dyn std::fmt::Display) {
        let _ = self.0.write_all(error.to_string().as_bytes());
    }
}

/// Takes over what the parent passed on; `None` when this process was not started by `start`.
pub fn inherited() -> Option<Inherited> {
    let listener = from_environment(LISTENER_ENV, FileType::Socket)?;
    let report = from_environment(REPORT_ENV, FileType::Fifo)?;
    Some(Inherited {
        listener: listener.into(),
        report: Report(report.into()),
    })
}

fn from_environment(name: &str, kind: FileType) -> Option<OwnedFd> {
    let fd: RawFd = env::var(name).ok()?.parse().ok().filter(|fd| *fd > 2)?;
    // SAFETY: the descriptor is only looked at, and fstat answers EBADF if it is not open.
    let stat = rustix::fs::fstat(unsafe { BorrowedFd::borrow_raw(fd) }).ok()?;
    if FileType::from_raw_mode(stat.st_mode) != kind {
        return None;
    }
    // SAFETY: the descriptor is open, and our parent passed it on for us alone; this runs once, before anything else
    // in this process opens descriptors.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    // Hooks and loggers that this process starts must not inherit it.
    fcntl_setfd(&owned, FdFlags::CLOEXEC).ok()?;
    Some(owned)
}
