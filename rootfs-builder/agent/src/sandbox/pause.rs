//! PID 1 of the PID namespace that the containers of a pod share when no container stands for the pod: what a pause container
//! is under Kubernetes. It keeps the namespace while containers come and go, and collects their orphans.
//!
//! Containers see this process. It is nobody, can do nothing, and there is nothing behind its `/proc/1/root`.

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Gid, Pid, Uid, chdir, chroot, setgid, setgroups, setuid};

use super::namespaces::on_own_thread;
use crate::reaper::Reaper;

/// First argument that makes the agent's binary run as this process.
pub const ARGUMENT: &str = "__pause";
/// An empty folder: all that the process can see.
const ROOT: &str = "/run/kata-agent/pause";
/// The user that owns nothing.
const NOBODY: u32 = 65534;

/// The process, which lives until this is dropped.
pub struct Pause {
    pid: Pid,
    namespace: File,
}

impl Pause {
    /// Starts it in a new PID namespace.
    ///
    /// # Errors
    /// Naming the step.
    pub fn start(reaper: &Reaper) -> io::Result<Self> {
        std::fs::create_dir_all(ROOT)?;
        let _launch = reaper.launch();
        let child = on_own_thread(|| {
            // Of this thread's children, not of the thread itself.
            unshare(CloneFlags::CLONE_NEWPID)?;
            // The reaper is the only one that waits.
            Command::new("/proc/self/exe")
                .arg0("pause")
                .arg(ARGUMENT)
                .env_clear()
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
        })?;
        let pid = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
        let namespace = File::open(format!("/proc/{pid}/ns/pid"))?;
        Ok(Self { pid, namespace })
    }

    /// The namespace, for containers to join.
    pub fn namespace(&self) -> &File {
        &self.namespace
    }
}

impl Drop for Pause {
    fn drop(&mut self) {
        // It only ends this way, so the pid is still its own.
        let _ = nix::sys::signal::kill(self.pid, Signal::SIGKILL);
    }
}

/// The process's `main`.
pub fn main() -> ExitCode {
    match become_nobody().and_then(|()| collect_orphans()) {
        Ok(()) => ExitCode::SUCCESS,
        // Its end ends the namespace, and joining that fails; there is nobody to tell.
        Err(_) => ExitCode::FAILURE,
    }
}

fn become_nobody() -> nix::Result<()> {
    chroot(Path::new(ROOT))?;
    chdir("/")?;
    setgroups(&[])?;
    setgid(Gid::from_raw(NOBODY))?;
    // With the user id go the capabilities.
    setuid(Uid::from_raw(NOBODY))?;
    // Not even another nobody may look into it.
    nix::sys::prctl::set_dumpable(false)
}

/// Waits for whatever the namespace leaves behind, for ever: the process is killed.
fn collect_orphans() -> nix::Result<()> {
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    // Blocked, so that none is lost between a look and the wait.
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&children), None)?;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => {
                children.wait()?;
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
    }
}
