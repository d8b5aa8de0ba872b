//! Threads give up what they do not need.
//!
//! A guest that breaks out of its virtual machine runs on one of our threads: a vCPU's, the I/O loop's, a device's. So each
//! of them, before it does anything for the guest,
//! - gives up its capabilities, the bounding set, ways back to them (securebits) and supplementary groups (`privileges`);
//! - sets `no_new_privs`;
//! - installs a filter that lets through the system calls of its role and nothing else (`filter`, `seccomp/policy.rs`).
//!
//! It blocks all signals but its own faults, so that no handler of the process runs behind a filter.
//!
//! A forbidden call ends the process with a line in the log ([`violation`]); on the threads of a share it fails with EPERM.
//! The process is not dumpable any more: no core dumps, and its `/proc` belongs to root.
//!
//! | thread | role |
//! |---|---|
//! | `vcpu<n>` | [`Role::Vcpu`] |
//! | `vmm-io` | [`Role::Io`] |
//! | `blk<n>-<id>` | [`Role::Block`] |
//! | `vmm-net-mq` | [`Role::Tap`] |
//! | `vmm-mem`, `vmm-balloon`, `vmm-pmem` | [`Role::Mem`], [`Role::Balloon`], [`Role::Pmem`] |
//! | `vmm-pager` | [`Role::Pager`] |
//! | `vmm-connector` | [`Role::Connector`] |
//! | `fs-<id>-<n>` | [`Role::Fs`], in a mount namespace of their own |
//!
//! Not confined, because they do what only a privileged thread can:
//! - `vmm-starter` carries out a driver's write to a status register: starts workers, makes rings, stops them (`delegate`);
//! - `vmm-reaper` takes the machine apart when it has ended;
//! - `vmm-load`, `vmm-netns` live for a moment when a machine or a TAP is made, before the guest has seen either;
//! - whoever calls [`Vm`](crate::Vm)'s methods: the runtime's threads.
//!
//! A `tracing` subscriber runs on these threads, too: it may write to what is open, and open or connect nothing.
//!
//! **What this does not do.** All threads share one address space: code that runs on a confined thread can write what an
//! unconfined one reads. It has to find and take over another thread by memory alone, without a system call of its own; that is
//! harder than calling `execve`, and not impossible. Moving the unconfined threads out of the process is another step.
//!
//! Cost: a filter is compiled with the crate, so a thread pays for a copy of some hundred instructions and for the kernel's
//! translation of them when it starts: 0.2 to 0.6 ms together with the capabilities, in a debug build on a loaded machine, beside
//! 0.05 ms for a thread as such. Afterwards calls without conditions cost a bit of a bitmap (Linux 5.11), others the walk
//! through the filter.

#![allow(unsafe_code)]

mod delegate;
mod filter;
mod names;
mod privileges;
mod role;
pub mod violation;
mod x86_64;

use std::io;
use std::mem;
use std::sync::mpsc::sync_channel;
use std::thread::{self, JoinHandle, ThreadId};

use rustix::thread::set_no_new_privs;
use rustix::time::{ClockId, clock_gettime};

pub(crate) use delegate::Delegate;
pub use role::Role;

/// What becomes of system calls that are not on a thread's list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Seccomp {
    /// They are not carried out, and end the process (on the threads of a share: fail with EPERM).
    #[default]
    Enforce,
    /// They are carried out, and the kernel logs them (`type=1326` in its log): to find what a list lacks.
    LogOnly,
    /// There are no filters.
    Off,
}

/// What the threads of a machine give up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Confinement {
    /// System calls.
    pub seccomp: Seccomp,
    /// Threads keep the process's capabilities. Those of a share never do.
    pub keep_capabilities: bool,
}

impl Confinement {
    /// Starts a thread that confines itself to `role`, then runs `main`. `name` has at most 15 bytes.
    ///
    /// # Errors
    /// The host refuses the thread, or its confinement; `main` has not run then.
    pub(crate) fn spawn<T: Send + 'static>(
        self,
        role: Role,
        name: &str,
        main: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<Thread<T>> {
        self.spawn_after(|| Ok(()), role, name, main)
    }

    /// As [`spawn`](Self::spawn), with something the thread does before, while it may.
    ///
    /// # Errors
    /// Those of `prepare`, too.
    pub(crate) fn spawn_after<T: Send + 'static>(
        self,
        prepare: impl FnOnce() -> io::Result<()> + Send + 'static,
        role: Role,
        name: &str,
        main: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<Thread<T>> {
        let (report, confined) = sync_channel(1);
        let handle = thread::Builder::new().name(name.to_owned()).spawn(move || {
            let result = prepare().and_then(|()| self.apply(role));
            let confined = result.is_ok();
            // Whoever starts the thread waits for exactly this.
            let _ = report.send(result);
            confined.then(main)
        })?;
        let ended = || Err(io::Error::other("the thread ended early"));
        confined.recv().unwrap_or_else(|_| ended())?;
        Ok(Thread(handle))
    }

    /// Confines the calling thread, and the threads it starts from now on, to `role`, for good.
    ///
    /// # Errors
    /// What the kernel says. The thread must end.
    pub(crate) fn apply(self, role: Role) -> io::Result<()> {
        let failed = |what: &'static str| {
            move |error: io::Error| {
                io::Error::new(error.kind(), format!("{} thread: {what}: {error}", role.name()))
            }
        };
        let drops = role == Role::Fs || !self.keep_capabilities;
        if drops {
            privileges::drop_others(role.kept()).map_err(failed("cannot give up capabilities"))?;
            make_undumpable().map_err(failed("PR_SET_DUMPABLE"))?;
        }
        if drops || self.seccomp != Seccomp::Off {
            set_no_new_privs(true).map_err(|error| failed("no_new_privs")(error.into()))?;
        }
        if self.seccomp == Seccomp::Off {
            return Ok(());
        }
        // What a library finds out once in a process, on whatever thread comes first: rustix, where the vDSO is.
        let _ = clock_gettime(ClockId::Monotonic);
        take_no_signals().map_err(failed("signal mask"))?;
        violation::prepare(role).map_err(failed("handler of SIGSYS"))?;
        filter::install(role, self.seccomp == Seccomp::LogOnly).map_err(failed("system call filter"))
    }
}

/// Leaves signals to the process to other threads: a handler somebody installed (tokio's writes to a socket) would be bound to
/// this thread's filter. Faults and aborts are the thread's own; a vCPU lets its kicks through afterwards.
fn take_no_signals() -> io::Result<()> {
    // SAFETY: zero is a valid set; the calls change it, and the mask of this thread.
    unsafe {
        let mut blocked: libc::sigset_t = mem::zeroed();
        libc::sigfillset(&raw mut blocked);
        for own in [
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGILL,
            libc::SIGFPE,
            libc::SIGTRAP,
            libc::SIGABRT,
            libc::SIGSYS,
        ] {
            libc::sigdelset(&raw mut blocked, own);
        }
        match libc::pthread_sigmask(libc::SIG_SETMASK, &raw const blocked, std::ptr::null_mut()) {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

/// No core dump of the process, and no look into it by others of its user. Of the process: once is enough, and again harmless.
fn make_undumpable() -> io::Result<()> {
    // SAFETY: takes numbers.
    match unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A thread that was started by [`Confinement::spawn`].
#[derive(Debug)]
pub(crate) struct Thread<T>(JoinHandle<Option<T>>);

impl<T: Send + 'static> Thread<T> {
    /// One that stays as it is.
    fn unconfined(name: &str, main: impl FnOnce() -> T + Send + 'static) -> io::Result<Self> {
        let builder = thread::Builder::new().name(name.to_owned());
        builder.spawn(|| Some(main())).map(Self)
    }
}

impl<T> Thread<T> {
    /// Waits for its end: what it returned, or `None` if it panicked.
    pub(crate) fn join(self) -> Option<T> {
        self.0.join().ok().flatten()
    }

    /// Whether it has ended.
    pub(crate) fn is_finished(&self) -> bool {
        self.0.is_finished()
    }

    /// The thread, for signals; valid as long as `self` is.
    pub(crate) fn pthread(&self) -> libc::pthread_t {
        use std::os::unix::thread::JoinHandleExt;
        self.0.as_pthread_t()
    }

    fn id(&self) -> ThreadId {
        self.0.thread().id()
    }
}

#[cfg(test)]
mod tests;
