//! The state machine of a machine: Configured → Running ⇄ Paused → Stopped.

mod exit;
pub mod gate;

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub use exit::{ExitReason, Failure, VcpuFailure, errno_of};
use gate::Gate;

/// Where a machine is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmState {
    /// Built; no vCPU has run.
    Configured,
    /// vCPUs run.
    Running,
    /// vCPUs are parked.
    Paused,
    /// Over: no vCPU and no device worker runs any more.
    Stopped(ExitReason),
}

impl std::fmt::Display for VmState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Configured => f.write_str("configured"),
            Self::Running => f.write_str("running"),
            Self::Paused => f.write_str("paused"),
            Self::Stopped(reason) => write!(f, "stopped ({reason})"),
        }
    }
}

/// State shared by the handle, the vCPU threads and the reaper.
#[derive(Debug)]
pub struct Lifecycle {
    gate: Gate,
    state: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug)]
struct Inner {
    state: VmState,
    /// Set once the machine is on its way to Stopped.
    ending: Option<ExitReason>,
}

impl Lifecycle {
    /// A configured machine; vCPU threads join its gate when they are made.
    pub fn new() -> Self {
        Self {
            gate: Gate::new(0),
            state: Mutex::new(Inner {
                state: VmState::Configured,
                ending: None,
            }),
            changed: Condvar::new(),
        }
    }

    /// The vCPU threads' gate.
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state now.
    pub fn state(&self) -> VmState {
        self.lock().state.clone()
    }

    /// Goes from one of `from` to `to`.
    ///
    /// # Errors
    /// The state it is in instead; a machine that is ending counts as stopped.
    pub fn transition(&self, from: &[VmState], to: VmState) -> Result<(), VmState> {
        let mut inner = self.lock();
        if let Some(reason) = &inner.ending {
            return Err(VmState::Stopped(reason.clone()));
        }
        if !from.contains(&inner.state) {
            return Err(inner.state.clone());
        }
        inner.state = to;
        Ok(())
    }

    /// Ends the machine; the first reason stays. The vCPU threads leave at their next passage of the gate and the reaper
    /// does the rest.
    pub fn finish(&self, reason: ExitReason) {
        let mut inner = self.lock();
        if inner.ending.is_none() {
            inner.ending = Some(reason);
            self.gate.end();
            self.changed.notify_all();
        }
    }

    /// Why the machine ends or has ended.
    pub fn ending(&self) -> Option<ExitReason> {
        self.lock().ending.clone()
    }

    /// Waits until somebody calls [`finish`](Self::finish).
    pub fn wait_ending(&self) -> ExitReason {
        let mut inner = self.lock();
        loop {
            if let Some(reason) = &inner.ending {
                return reason.clone();
            }
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A restored machine begins its life paused.
    pub fn set_restored(&self) {
        self.lock().state = VmState::Paused;
    }

    /// Publishes that nothing of the machine runs any more.
    pub fn set_stopped(&self, reason: ExitReason) {
        self.lock().state = VmState::Stopped(reason);
        self.changed.notify_all();
    }

    /// Waits until the machine is stopped, or until `deadline`.
    pub fn wait_stopped(&self, deadline: Option<Instant>) -> Option<ExitReason> {
        let mut inner = self.lock();
        loop {
            if let VmState::Stopped(reason) = &inner.state {
                return Some(reason.clone());
            }
            inner = match deadline.map(|d| d.saturating_duration_since(Instant::now())) {
                None => self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => return None,
                Some(left) => {
                    self.changed
                        .wait_timeout(inner, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finish_when_called_twice_keeps_the_first_reason() {
        let lifecycle = Lifecycle::new();
        lifecycle.finish(ExitReason::Panic);
        lifecycle.finish(ExitReason::Stopped);
        assert_eq!(lifecycle.wait_ending(), ExitReason::Panic);
        assert_eq!(lifecycle.state(), VmState::Configured);
    }

    #[test]
    fn transition_when_ending_is_refused_with_the_reason() {
        let lifecycle = Lifecycle::new();
        lifecycle
            .transition(&[VmState::Configured], VmState::Running)
            .unwrap();
        assert_eq!(
            lifecycle.transition(&[VmState::Configured], VmState::Running),
            Err(VmState::Running)
        );
        lifecycle.finish(ExitReason::PowerOff);
        assert_eq!(
            lifecycle.transition(&[VmState::Running], VmState::Paused),
            Err(VmState::Stopped(ExitReason::PowerOff))
        );
    }

    #[test]
    fn wait_stopped_when_the_deadline_passes_gives_none() {
        let lifecycle = Lifecycle::new();
        assert_eq!(
            lifecycle.wait_stopped(Some(Instant::now() + Duration::from_millis(5))),
            None
        );
        lifecycle.set_stopped(ExitReason::Stopped);
        assert_eq!(lifecycle.wait_stopped(None), Some(ExitReason::Stopped));
    }
}
