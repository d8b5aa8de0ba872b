//! Collects every child that dies: container processes, helpers, and the orphans a PID 1 inherits.
//!
//! `waitpid(-1)` has one caller, so a status can be collected before anyone knew the pid was interesting: a
//! container process may die before its helper has reported it. Statuses nobody asked for are therefore kept as
//! long as a [`Launch`] is in progress, and forgotten after.

#![allow(unsafe_code)]

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// Shells and container engines report a death by signal as this plus the signal's number.
pub const SIGNALED: i32 = 128;

/// The process's only caller of `waitpid(-1)`. Cheap to clone.
#[derive(Clone, Default)]
pub struct Reaper {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    waiting: HashMap<Pid, oneshot::Sender<i32>>,
    unclaimed: HashMap<Pid, i32>,
    launches: usize,
}

/// While one exists, the exit status of any child stays available to [`Reaper::exit_of`].
pub struct Launch {
    reaper: Reaper,
}

impl Reaper {
    /// Starts collecting. Must be called on the runtime, before the first child.
    ///
    /// # Errors
    /// The signal handler cannot be installed.
    pub fn start() -> io::Result<Self> {
        let reaper = Self::default();
        let mut child_died = signal(SignalKind::child())?;
        let collector = reaper.clone();
        tokio::spawn(async move {
            loop {
                collector.collect();
                if child_died.recv().await.is_none() {
                    return;
                }
            }
        });
        Ok(reaper)
    }

    /// Announces that a child is about to be started.
    pub fn launch(&self) -> Launch {
        self.state().launches += 1;
        Launch { reaper: self.clone() }
    }

    /// Resolves to the exit code of `pid`, 128 plus the signal for a death by signal. To be called before the
    /// [`Launch`] that made the child is dropped, and once per child.
    pub fn exit_of(&self, pid: Pid) -> oneshot::Receiver<i32> {
        let (sender, receiver) = oneshot::channel();
        let mut state = self.state();
        match state.unclaimed.remove(&pid) {
            // The receiver exists, so this cannot fail.
            Some(code) => drop(sender.send(code)),
            None => drop(state.waiting.insert(pid, sender)),
        }
        receiver
    }

    fn collect(&self) {
        loop {
            let (pid, code) = match next_exit() {
                Ok(Some(exit)) => exit,
                Ok(None) | Err(Errno::ECHILD) => return,
                Err(Errno::EINTR) => continue,
                Err(error) => return tracing::error!("waitpid: {error}"),
            };
            let mut state = self.state();
            if let Some(waiter) = state.waiting.remove(&pid) {
                // The waiter may have given up; the status is of no use to anybody else.
                let _ = waiter.send(code);
            } else if state.launches > 0 {
                state.unclaimed.insert(pid, code);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The next child that has ended, and how. Not by `nix`, whose `waitpid` takes the status of a child that died of a
/// real-time signal and then cannot say so.
fn next_exit() -> nix::Result<Option<(Pid, i32)>> {
    let mut status = 0;
    // SAFETY: waitpid writes one integer, which outlives the call.
    let pid = Errno::result(unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) })?;
    if pid == 0 {
        return Ok(None);
    }
    // Without WUNTRACED and WCONTINUED only ends are reported.
    let code = if libc::WIFEXITED(status) {
        libc::WEXITSTATUS(status)
    } else {
        SIGNALED + libc::WTERMSIG(status)
    };
    Ok(Some((Pid::from_raw(pid), code)))
}

impl Drop for Launch {
    fn drop(&mut self) {
        let mut state = self.reaper.state();
        state.launches -= 1;
        if state.launches == 0 {
            state.unclaimed.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::{Duration, Instant};

    use super::*;

    // One test: waitpid(-1) takes the children of every test in this process.
    #[tokio::test]
    async fn child_when_it_exits_reports_its_code_to_early_and_late_askers() {
        let reaper = Reaper::start().unwrap();
        let launch = reaper.launch();
        let spawn = |script| {
            #[expect(clippy::zombie_processes, reason = "the reaper under test collects it")]
            let child = Command::new("/bin/sh").args(["-c", script]).spawn().unwrap();
            Pid::from_raw(child.id() as i32)
        };

        let early = reaper.exit_of(spawn("sleep 0.05; exit 42"));
        let late = spawn("exit 7");
        let killed = reaper.exit_of(spawn("kill -9 $$"));
        let real_time = reaper.exit_of(spawn("kill -40 $$"));
        let ended = async |pid| {
            let deadline = Instant::now() + Duration::from_secs(60);
            while !reaper.state().unclaimed.contains_key(&pid) {
                assert!(Instant::now() < deadline, "{pid} has not ended");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        ended(late).await;

        assert_eq!(reaper.exit_of(late).await, Ok(7));
        assert_eq!(early.await, Ok(42));
        assert_eq!(killed.await, Ok(SIGNALED + 9));
        assert_eq!(real_time.await, Ok(SIGNALED + 40));
        let forgotten = spawn("exit 1");
        ended(forgotten).await;
        drop(launch);
        assert!(reaper.state().unclaimed.is_empty());
    }
}
