//! The queues, served on a thread of its own: freeing memory takes time.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use virtio_queue::DescriptorChain;

use super::device::Shared;
use super::release::{PAGE, Released, release};
use super::statistics::{MAX_BYTES, Snapshot};
use crate::devices::virtio::counter::counters;
use crate::devices::virtio::queue::chain::Chain;
use crate::devices::virtio::queue::served_queue::{Served, ServedQueue};
use crate::devices::virtio::state::QueuePosition;
use crate::devices::virtio::worker::queue_thread::ThreadWorker;
use crate::memory::GuestMemory;
use crate::memory::window::Windows;

/// Chains per turn.
const BUDGET: usize = 8;
/// Page numbers looked at in one chain, 16 MiB of memory; Linux sends 256 at most.
const MAX_PFNS: usize = 4096;

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Pages the guest gives.
    Inflate,
    /// Pages it takes back. It may use them without waiting, so there is nothing to do.
    Deflate,
    /// Statistics: the driver sends a buffer, and fills it again when it is returned.
    Statistics,
    /// Memory that is free in the guest.
    Reporting,
}

counters! {
    /// What the device counts.
    pub(super) struct Counters {
        inflated: "inflated_bytes",
        deflated: "deflated_bytes",
        reported: "reported_bytes",
        refused: "refused_ranges",
        statistics: "statistics_received",
        invalid: "requests_invalid",
    }
}

/// Serves all queues.
#[derive(Debug)]
pub(super) struct BalloonWorker {
    queues: Vec<(Role, ServedQueue)>,
    windows: Windows,
    shared: Arc<Shared>,
    /// When the next statistics are due; `None` without a queue for them.
    timer: Option<OwnedFd>,
    /// Head of the chain the driver waits for to send statistics again.
    held: Option<u16>,
}

impl BalloonWorker {
    /// `interval` is the time between two statistics.
    ///
    /// # Errors
    /// No timer could be made.
    pub(super) fn new(
        queues: Vec<(Role, ServedQueue)>,
        windows: Windows,
        shared: Arc<Shared>,
        interval: Duration,
    ) -> io::Result<Self> {
        let timer = if queues.iter().any(|(role, _)| *role == Role::Statistics) {
            let period = Timespec::try_from(interval).map_err(io::Error::other)?;
            let value = Itimerspec {
                it_interval: period,
                it_value: period,
            };
            let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
            let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
            timerfd_settime(&timer, TimerfdTimerFlags::empty(), &value)?;
            Some(timer)
        } else {
            None
        };
        Ok(Self {
            queues,
            windows,
            shared,
            timer,
            held: None,
        })
    }

    /// Returns what is held, then says where the queues stand. The driver sends new statistics for the returned buffer
    /// when it goes on.
    pub(super) fn finish(mut self) -> Vec<QueuePosition> {
        self.return_held();
        self.queues.iter().map(|(_, queue)| queue.position()).collect()
    }

    fn return_held(&mut self) {
        let statistics = self.queues.iter_mut().find(|(role, _)| *role == Role::Statistics);
        if let (Some(head), Some((_, queue))) = (self.held.take(), statistics) {
            queue.complete(head, 0);
            queue.notify();
        }
    }
}

impl ThreadWorker for BalloonWorker {
    fn watched(&self) -> Vec<RawFd> {
        let kicks = self.queues.iter().map(|(_, queue)| queue.kick().as_raw_fd());
        kicks.chain(self.timer.as_ref().map(AsRawFd::as_raw_fd)).collect()
    }

    fn ready(&mut self, index: usize) {
        let Some((role, queue)) = self.queues.get_mut(index) else {
            // The timer comes after the queues. There is nothing to read when it has not expired yet.
            let expired = |timer| rustix::io::read(timer, &mut [0; 8]).is_ok();
            if self.timer.as_ref().is_some_and(expired) {
                self.return_held();
            }
            return;
        };
        queue.take_kick();
        let (shared, windows, limit) = (&self.shared, &self.windows, queue.size());
        let served = match role {
            Role::Statistics => receive(shared, queue, &mut self.held),
            role => queue.serve(BUDGET, |memory, chain| {
                take(*role, shared, windows, memory, chain, limit);
                // The driver's buffers are only named or read, never written.
                0
            }),
        };
        if served == Served::More {
            queue.kick_self();
        }
    }
}

/// One chain of the inflate, deflate or reporting queue.
fn take(
    role: Role,
    shared: &Shared,
    windows: &Windows,
    memory: &GuestMemory,
    chain: DescriptorChain<&GuestMemory>,
    limit: u16,
) {
    let counters = &shared.counters;
    let chain = match Chain::parse(memory, chain, limit) {
        Ok(chain) => chain,
        Err(error) => {
            guest_log!(DEBUG, %error, "balloon: chain dropped");
            counters.invalid.inc();
            return;
        }
    };
    let (released, counter) = match role {
        Role::Inflate => {
            let released = release(memory, windows, &named_pages(memory, &chain));
            (released, &counters.inflated)
        }
        Role::Deflate => {
            let released = Released {
                bytes: chain.readable.len() / 4 * PAGE,
                refused: 0,
            };
            (released, &counters.deflated)
        }
        Role::Reporting | Role::Statistics => {
            let parts = chain.writable.parts();
            let ranges: Vec<_> = parts.map(|(address, len)| (address, u64::from(len))).collect();
            (release(memory, windows, &ranges), &counters.reported)
        }
    };
    counter.add(released.bytes);
    counters.refused.add(released.refused);
}

/// The pages an inflate chain names, at most [`MAX_PFNS`]: an array of le32 page numbers.
fn named_pages(memory: &GuestMemory, chain: &Chain) -> Vec<(u64, u64)> {
    let count = usize::try_from(chain.readable.len() / 4).unwrap_or(usize::MAX);
    let mut bytes = vec![0; count.min(MAX_PFNS) * 4];
    if chain.readable.read(memory, 0, &mut bytes).is_err() {
        return Vec::new();
    }
    let pfns = bytes.as_chunks::<4>().0.iter();
    pfns.map(|pfn| (u64::from(u32::from_le_bytes(*pfn)) * PAGE, PAGE))
        .collect()
}

/// Takes statistics and holds their chain until the next are wanted.
fn receive(shared: &Shared, queue: &mut ServedQueue, held: &mut Option<u16>) -> Served {
    let memory = queue.memory().clone();
    let limit = queue.size();
    let mut left = BUDGET;
    let served = loop {
        let Some(chain) = queue.pop(&memory) else {
            if queue.enable_kicks() {
                continue;
            }
            break Served::Idle;
        };
        let head = chain.head_index();
        match Chain::parse(&memory, chain, limit) {
            Ok(chain) => {
                let len = usize::try_from(chain.readable.len()).unwrap_or(usize::MAX);
                let mut bytes = vec![0; len.min(MAX_BYTES)];
                if chain.readable.read(&memory, 0, &mut bytes).is_ok() {
                    *shared.statistics() = Some(Snapshot::parse(&bytes));
                    shared.counters.statistics.inc();
                }
                // The driver has one buffer (5.5.6.3); one that sends more gets the older back.
                if let Some(older) = held.replace(head) {
                    queue.complete(older, 0);
                }
            }
            Err(error) => {
                guest_log!(DEBUG, %error, "balloon: statistics dropped");
                shared.counters.invalid.inc();
                queue.complete(head, 0);
            }
        }
        left -= 1;
        if left == 0 {
            break Served::More;
        }
    };
    queue.notify();
    served
}
