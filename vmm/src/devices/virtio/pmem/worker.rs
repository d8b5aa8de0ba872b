//! The flush queue, served on a thread of its own: a disk takes its time.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use virtio_queue::DescriptorChain;

use crate::devices::virtio::counter::counters;
use crate::devices::virtio::queue::chain::Chain;
use crate::devices::virtio::queue::served_queue::{Answer, ServedQueue};
use crate::devices::virtio::state::QueuePosition;
use crate::devices::virtio::worker::queue_thread::{Aside, ThreadWorker};
use crate::memory::GuestMemory;

/// Flushes per turn, so that a reset waits for few of them to be begun.
const BUDGET: usize = 2;
/// VIRTIO_PMEM_REQ_TYPE_FLUSH.
const FLUSH: u32 = 0;
/// `ret` of the response: 0 is success, anything else EIO (5.19.6).
const FAILED: u32 = 1;

counters! {
    /// What the device counts.
    pub(super) struct Counters {
        flushes: "flushes",
        errors: "flush_errors",
        invalid: "requests_invalid",
    }
}

/// Carries out flushes.
#[derive(Debug)]
pub(super) struct PmemWorker {
    queue: ServedQueue,
    /// `None` when writes stay out of the file.
    file: Option<Arc<File>>,
    counters: Arc<Counters>,
    /// Where it waits for the disk; the queue's position with the flush in hand given back.
    aside: Arc<Aside<QueuePosition>>,
}

impl PmemWorker {
    pub(super) fn new(queue: ServedQueue, file: Option<Arc<File>>, counters: Arc<Counters>) -> Self {
        Self {
            queue,
            file,
            counters,
            aside: Arc::default(),
        }
    }

    /// What stops it while it waits for the disk.
    pub(super) fn aside(&self) -> Arc<Aside<QueuePosition>> {
        self.aside.clone()
    }

    /// Where the queue stands.
    pub(super) fn position(&self) -> QueuePosition {
        self.queue.position()
    }
}

impl ThreadWorker for PmemWorker {
    fn watched(&self) -> Vec<RawFd> {
        vec![self.queue.kick().as_raw_fd()]
    }

    fn ready(&mut self, _index: usize) {
        let Self {
            queue,
            file,
            counters,
            aside,
        } = self;
        let flusher = Flusher {
            file: file.as_deref(),
            counters,
            aside,
        };
        queue.turn(BUDGET, |queue, memory, chain| {
            flusher.answer(queue, memory, chain)
        });
    }
}

/// What a flush needs beside the queue.
struct Flusher<'w> {
    file: Option<&'w File>,
    counters: &'w Counters,
    aside: &'w Aside<QueuePosition>,
}

impl Flusher<'_> {
    /// Carries out one chain. A chain without room for the response is not carried out.
    fn answer(
        &self,
        queue: &mut ServedQueue,
        memory: &GuestMemory,
        chain: DescriptorChain<&GuestMemory>,
    ) -> Answer {
        let chain = match Chain::parse(memory, chain, queue.size()) {
            Ok(chain) if chain.writable.len() >= 4 => chain,
            Ok(_) => {
                self.counters.invalid.inc();
                return Answer::Written(0);
            }
            Err(error) => {
                guest_log!(DEBUG, %error, "pmem: chain dropped");
                self.counters.invalid.inc();
                return Answer::Written(0);
            }
        };
        let mut kind = [0; 4];
        let read = chain.readable.read(memory, 0, &mut kind);
        let result = if read.is_ok() && u32::from_le_bytes(kind) == FLUSH {
            let Some(result) = self.flush(queue) else {
                return Answer::Left;
            };
            result
        } else {
            self.counters.invalid.inc();
            FAILED
        };
        match chain.writable.write(memory, 0, &result.to_le_bytes()) {
            Ok(()) => Answer::Written(4),
            Err(_) => Answer::Written(0),
        }
    }

    /// Stores through a shared mapping made their pages dirty in the page cache, which is what fdatasync writes. That may take
    /// as long as there is written data; `None` when the worker was stopped meanwhile.
    fn flush(&self, queue: &mut ServedQueue) -> Option<u32> {
        let Some(file) = self.file else {
            self.counters.flushes.inc();
            return Some(0);
        };
        // What was answered is told before: this may be the last look at the queue.
        queue.notify();
        let mut standing = queue.position();
        standing.next_avail = standing.next_avail.wrapping_sub(1);
        let flushed = self.aside.wait(standing, || file.sync_data())?;
        self.counters.flushes.inc();
        match flushed {
            Ok(()) => Some(0),
            Err(error) => {
                guest_log!(WARN, %error, "pmem: flush failed");
                self.counters.errors.inc();
                Some(FAILED)
            }
        }
    }
}
