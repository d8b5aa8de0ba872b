//! One process of a container, from its making to after its end.

use std::sync::atomic::{AtomicI32, Ordering};

use nix::errno::Errno;
use nix::unistd::Pid;
use tokio::sync::{oneshot, watch};

use super::stdio::Stdio;
use crate::reaper::SIGNALED;
use crate::signal::Signal;

/// A signal that was not delivered.
#[derive(Debug, thiserror::Error)]
pub enum SignalError {
    /// The process has ended.
    #[error("the process has ended")]
    Gone,
}

/// A process. Its exit code stays readable for as long as this lives.
pub struct Process {
    pid: Pid,
    exit: watch::Receiver<Option<i32>>,
    stdio: Stdio,
    /// Signal that ended it before it was started, to be reported in the place of SIGKILL; 0 if none.
    canceled: AtomicI32,
}

impl Process {
    /// A running process, whose end `exit` will tell. `stdio` gets a watch on the exit code.
    pub fn new(
        pid: Pid,
        exit: oneshot::Receiver<i32>,
        stdio: impl FnOnce(watch::Receiver<Option<i32>>) -> Stdio,
    ) -> Self {
        let (sender, receiver) = watch::channel(None);
        tokio::spawn(async move {
            // The reaper lives as long as the agent, so its end of the channel is not dropped unused.
            if let Ok(code) = exit.await {
                sender.send_replace(Some(code));
            }
        });
        Self {
            pid,
            stdio: stdio(receiver.clone()),
            exit: receiver,
            canceled: AtomicI32::new(0),
        }
    }

    /// Its pid in the guest.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Its streams.
    pub fn stdio(&self) -> &Stdio {
        &self.stdio
    }

    /// How it ended, if it has.
    pub fn exit_code(&self) -> Option<i32> {
        (*self.exit.borrow()).map(|code| self.reported(code))
    }

    /// Waits for its end. Any number of callers, before or after.
    pub async fn wait(&self) -> i32 {
        let mut exit = self.exit.clone();
        let code = exit.wait_for(Option::is_some).await.ok().and_then(|code| *code);
        self.reported(code.unwrap_or(SIGNALED + Signal::KILL.number()))
    }

    /// Sends `signal`. The kernel shields the init of a PID namespace from signals it has no handler for: they change
    /// nothing, as with runc, and a container that does not care for a polite end dies of the SIGKILL behind it.
    ///
    /// # Errors
    /// The process has ended. The pid is only ours to signal until it is reaped; after that it may be somebody else's.
    pub fn signal(&self, signal: Signal) -> Result<(), SignalError> {
        if self.exit.borrow().is_some() {
            return Err(SignalError::Gone);
        }
        match signal.send(self.pid) {
            Ok(()) => Ok(()),
            Err(Errno::ESRCH) => Err(SignalError::Gone),
            Err(error) => {
                tracing::warn!(pid = self.pid.as_raw(), "signal {signal}: {error}");
                Ok(())
            }
        }
    }

    /// Ends an init that still waits to be started. It is asked to by SIGTERM and SIGKILL, as with runc; no other
    /// signal reaches a program that does not run yet. It is reported to have died of the signal it was sent, although the
    /// kernel lets only SIGKILL through.
    ///
    /// # Errors
    /// The process has ended.
    pub fn cancel(&self, signal: Signal) -> Result<(), SignalError> {
        if !matches!(signal, Signal::TERM | Signal::KILL) {
            return Ok(());
        }
        self.canceled.store(signal.number(), Ordering::Relaxed);
        self.signal(Signal::KILL)
    }

    fn reported(&self, code: i32) -> i32 {
        match self.canceled.load(Ordering::Relaxed) {
            signal if signal != 0 && code == SIGNALED + Signal::KILL.number() => SIGNALED + signal,
            _ => code,
        }
    }
}
