//! Changes of the TAP the guest asks for, which take the kernel's RTNL lock: all network configuration of the host waits for
//! that, and it may be held by others for long.
//!
//! So a change is made on a thread of its own while the I/O loop goes on, nothing is done when nothing changes, and changes
//! are limited: [`LIMIT`].

use std::io;
use std::os::fd::AsRawFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::control::Command;
use super::handle::{Shared, lock};
use super::tap::Backend;
use crate::confinement::{Confinement, Role, Thread};
use crate::rate_limiter::RateLimiter;
use crate::rate_limiter::{RateLimiterConfig, TokenBucketConfig};

/// 16 changes at once, then one in a second. A driver makes one or two when it starts.
pub(super) const LIMIT: RateLimiterConfig = RateLimiterConfig {
    bandwidth: None,
    ops: Some(TokenBucketConfig {
        size: 16,
        one_time_burst: 0,
        refill_time_ms: 16_000,
    }),
};
/// Longest time a driver that starts waits for its turn: ten such changes a second.
const START_DELAY: Duration = Duration::from_millis(100);

/// Lets a change pass that cannot be put off, after a delay if there were many. Blocks the calling thread, a vCPU's.
pub(super) fn pace(limiter: &Mutex<RateLimiter>) {
    let wait = {
        let mut limiter = lock(limiter);
        let open = limiter.may_start();
        limiter.charge(0, 1);
        !open
    };
    if wait {
        std::thread::sleep(START_DELAY);
    }
}

/// A change of the number of queue pairs: of `backends`, of which the first `active` are in use, the first `wanted` are to be.
#[derive(Debug)]
struct Change {
    backends: Vec<Arc<dyn Backend>>,
    active: usize,
    wanted: usize,
}

/// The thread that makes such changes, one after the other. It is there from the start of a device whose driver may ask for
/// some: the I/O loop may not make threads.
#[derive(Debug)]
pub(super) struct Switcher {
    /// `None` when it is dropped, which ends the thread.
    changes: Option<Sender<Change>>,
    done: Receiver<bool>,
    thread: Option<Thread<()>>,
}

impl Switcher {
    /// Starts the thread. The eventfd `switched` of `shared` tells the end of each change.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub(super) fn spawn(shared: Arc<Shared>, confinement: Confinement) -> io::Result<Self> {
        let (changes, asked) = channel::<Change>();
        let (tell, done) = channel();
        let main = move || {
            for Change {
                backends,
                active,
                wanted,
            } in asked
            {
                let done = switch_pairs(&shared.id, &backends, active, wanted);
                // Before the result: who has that finds the event there, and takes it away.
                if let Err(error) = shared.switched.write(1) {
                    guest_log!(ERROR, device = %shared.id, %error, "net: cannot tell that queues were switched");
                }
                // The worker may be gone, which then waits for the thread.
                let _ = tell.send(done);
            }
        };
        let thread = confinement.spawn(Role::Tap, "vmm-net-mq", main)?;
        Ok(Self {
            changes: Some(changes),
            done,
            thread: Some(thread),
        })
    }

    /// Starts a change of `backends`, of which the first `active` are in use, to the first `wanted`.
    ///
    /// # Errors
    /// The command, when the thread has ended.
    pub(super) fn start(
        &self,
        backends: Vec<Arc<dyn Backend>>,
        (active, wanted): (usize, usize),
        command: Command,
    ) -> Result<Switch, Command> {
        let change = Change {
            backends,
            active,
            wanted,
        };
        match self.changes.as_ref().map(|changes| changes.send(change)) {
            Some(Ok(())) => Ok(Switch { command, wanted }),
            _ => Err(command),
        }
    }

    /// Waits for the end of `switch`. Returns what asked for it, and the number of pairs in use if it worked.
    pub(super) fn finish(&self, switch: Switch) -> (Command, Option<usize>) {
        let done = self.done.recv().unwrap_or(false);
        (switch.command, done.then_some(switch.wanted))
    }
}

impl Drop for Switcher {
    fn drop(&mut self) {
        self.changes = None;
        if let Some(thread) = self.thread.take() {
            thread.join();
        }
    }
}

/// A change under way.
#[derive(Debug)]
pub(super) struct Switch {
    /// What asked for it.
    pub(super) command: Command,
    /// Queue pairs it asked for.
    pub(super) wanted: usize,
}

/// Lets frames arrive at the first `wanted` queues of the TAP only. When the host refuses, all is as before.
fn switch_pairs(device: &str, backends: &[Arc<dyn Backend>], active: usize, wanted: usize) -> bool {
    let switch = |count: usize| -> io::Result<()> {
        // New ones first: there is never none.
        let (on, off) = backends.split_at(count.min(backends.len()));
        on.iter().try_for_each(|backend| backend.set_enabled(true))?;
        off.iter().try_for_each(|backend| backend.set_enabled(false))
    };
    match switch(wanted) {
        Ok(()) => true,
        Err(error) => {
            guest_log!(WARN, device, wanted, %error, "net: cannot switch queues of the TAP");
            if let Err(error) = switch(active) {
                guest_log!(ERROR, device, active, %error, "net: nor switch them back");
            }
            false
        }
    }
}

/// Brings the TAP to what a driver that starts has agreed to, if it is not there: `offload` in `TUN_F_…` bits, and the first
/// `active` queues in use.
///
/// # Errors
/// What was attempted, and why the host refused.
pub(super) fn set_up(
    shared: &Shared,
    backends: &[Arc<dyn Backend>],
    offload: u32,
    active: usize,
) -> Result<(), (&'static str, io::Error)> {
    let queues = || {
        backends
            .iter()
            .enumerate()
            .map(|(index, backend)| (backend, index < active))
    };
    let offloads = backends.first().filter(|first| first.offload() != Some(offload));
    if offloads.is_none() && queues().all(|(backend, enabled)| backend.enabled() == enabled) {
        return Ok(());
    }
    pace(&shared.changes);
    if let Some(first) = offloads {
        let set = first.set_offload(offload);
        set.map_err(|error| ("TUNSETOFFLOAD", error))?;
    }
    for (backend, enabled) in queues() {
        let set = backend.set_enabled(enabled);
        set.map_err(|error| ("TUNSETQUEUE", error))?;
    }
    Ok(())
}

/// The limiter's timer, for epoll.
pub(super) fn timer(limiter: &Mutex<RateLimiter>) -> i32 {
    lock(limiter).as_raw_fd()
}
