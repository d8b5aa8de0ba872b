//! The request queue, served on the I/O loop.

#![allow(unsafe_code)]

use std::io;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_queue::DescriptorChain;
use vm_memory::VolatileSlice;

use crate::devices::virtio::LoopWorker;
use crate::devices::virtio::queue::chain::Chain;
use crate::devices::virtio::queue::served_queue::{Answer, ServedQueue};
use crate::devices::virtio::state::QueuePosition;
use crate::interrupted;
use crate::memory::GuestMemory;

/// Most bytes of one request; the driver asks again for more (5.4.6 allows any positive number).
pub(super) const MAX_REQUEST_BYTES: u64 = 64 << 10;
/// Requests per turn: together well below a millisecond of the loop's time.
const BUDGET: usize = 4;

/// Fills the driver's buffers.
#[derive(Debug)]
pub(super) struct RngWorker {
    queue: ServedQueue,
}

impl RngWorker {
    pub(super) fn new(queue: ServedQueue) -> Self {
        Self { queue }
    }
}

impl LoopWorker for RngWorker {
    fn positions(&self) -> Vec<QueuePosition> {
        vec![self.queue.position()]
    }
}

impl MutEventSubscriber for RngWorker {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&**self.queue.kick(), EventSet::IN)) {
            guest_log!(ERROR, ?error, "rng: cannot watch the request queue");
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        self.queue.turn(BUDGET, |queue, memory, chain| {
            Answer::Written(fill(memory, chain, queue.size()))
        });
    }
}

/// Fills the device-writable part of one chain; returns the number of random bytes.
fn fill(memory: &GuestMemory, chain: DescriptorChain<&GuestMemory>, limit: u16) -> u32 {
    let slices = match Chain::parse(memory, chain, limit) {
        Ok(chain) => chain.writable.sub(0, MAX_REQUEST_BYTES).slices(memory),
        Err(error) => {
            guest_log!(DEBUG, %error, "rng: chain dropped");
            return 0;
        }
    };
    let mut filled = 0;
    for slice in slices.unwrap_or_default() {
        match fill_slice(&slice) {
            Ok(()) => filled += slice.len(),
            Err(error) => {
                guest_log!(WARN, %error, "rng: getrandom failed");
                break;
            }
        }
    }
    // At most MAX_REQUEST_BYTES.
    u32::try_from(filled).unwrap_or(u32::MAX)
}

fn fill_slice(slice: &VolatileSlice) -> io::Result<()> {
    let guard = slice.ptr_guard_mut();
    let mut done = 0;
    while done < slice.len() {
        done += interrupted::again_libc(|| {
            // SAFETY: `done` is below the length of the slice, whose memory stays mapped while `slice` lives. The guest may
            // change it at any time, which a system call that only writes does not mind.
            unsafe { libc::getrandom(guard.as_ptr().add(done).cast(), slice.len() - done, 0) }
        })?;
    }
    Ok(())
}
