//! Signals by number.
//!
//! Linux has 64 of them. The real-time ones, 32 to 64, have no name in `nix`, but containers use them like any other:
//! `STOPSIGNAL SIGRTMIN+3` asks systemd to halt.

#![allow(unsafe_code)]

use std::fmt;

use nix::errno::Errno;
use nix::unistd::Pid;

/// `_NSIG` of <asm/signal.h>: the last real-time signal.
const LAST: u32 = 64;

/// A signal, or 0, which only asks whether the process is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signal(i32);

impl Signal {
    /// SIGKILL.
    pub const KILL: Self = Self(libc::SIGKILL);
    /// SIGTERM.
    pub const TERM: Self = Self(libc::SIGTERM);

    /// The signal with this number, if there is one.
    pub fn new(number: u32) -> Option<Self> {
        i32::try_from(number).ok().filter(|_| number <= LAST).map(Self)
    }

    /// Its number.
    pub fn number(self) -> i32 {
        self.0
    }

    /// Sends it to one process.
    ///
    /// # Errors
    /// There is no such process.
    pub fn send(self, pid: Pid) -> nix::Result<()> {
        if pid.as_raw() <= 0 {
            // These numbers mean groups of processes to kill(2).
            return Err(Errno::ESRCH);
        }
        // SAFETY: kill(2) takes no pointers; the pid names one process.
        Errno::result(unsafe { libc::kill(pid.as_raw(), self.0) }).map(drop)
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn number_when_linux_has_it_is_a_signal() {
        for number in [0, 1, 15, 32, 37, 64] {
            assert_eq!(
                Signal::new(number).map(Signal::number),
                i32::try_from(number).ok()
            );
        }
        for number in [65, 128, u32::MAX] {
            assert_eq!(Signal::new(number), None);
        }
    }

    #[test]
    fn group_of_processes_is_never_signalled() {
        for pid in [0, -1] {
            assert_eq!(Signal::KILL.send(Pid::from_raw(pid)), Err(Errno::ESRCH));
        }
    }
}
