//! The flush queue, served on a thread of its own: a disk takes its time.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_queue::DescriptorChain;

use crate::devices::virtio::chain::Chain;
use crate::devices::virtio::queue_thread::{Aside, ThreadWorker};
use crate::devices::virtio::served_queue::ServedQueue;
use crate::devices::virtio::state::QueuePosition;
use crate::memory::GuestMemory;

/// Flushes per turn, so that a reset waits for few of them to be begun.
const BUDGET: usize = 2;
/// VIRTIO_PMEM_REQ_TYPE_FLUSH.
const FLUSH: u32 = 0;
/// `ret` of the response: 0 is success, anything else EIO (5.19.6).
const FAILED: u32 = 1;

/// What the device counts.
#[derive(Debug, Default)]
pub(super) struct Counters {
    flushes: AtomicU64,
    errors: AtomicU64,
    invalid: AtomicU64,
}

impl Counters {
    /// All counters by name.
    pub(super) fn all(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("flushes", self.flushes.load(Ordering::Relaxed)),
            ("flush_errors", self.errors.load(Ordering::Relaxed)),
            ("requests_invalid", self.invalid.load(Ordering::Relaxed)),
        ]
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
        self.queue.take_kick();
        self.queue.suppress_kicks();
        let memory = self.queue.memory().clone();
        for _ in 0..BUDGET {
            let Some(chain) = self.queue.pop(&memory) else {
                if self.queue.enable_kicks() {
                    self.queue.suppress_kicks();
                    continue;
                }
                self.queue.notify();
                return;
            };
            let head = chain.head_index();
            match self.answer(&memory, chain) {
                Some(written) => self.queue.complete(head, written),
                // Somebody else serves the queue now.
                None => return,
            }
        }
        self.queue.notify();
        self.queue.kick_self();
    }
}

impl PmemWorker {
    /// Carries out one chain; returns the bytes written, or `None` when the worker was stopped meanwhile. A chain without room
    /// for the response is not carried out.
    fn answer(&mut self, memory: &GuestMemory, chain: DescriptorChain<&GuestMemory>) -> Option<u32> {
        let counters = &self.counters;
        let chain = match Chain::parse(memory, chain, self.queue.size()) {
            Ok(chain) if chain.writable.len() >= 4 => chain,
            Ok(_) => {
                counters.invalid.fetch_add(1, Ordering::Relaxed);
                return Some(0);
            }
            Err(error) => {
                guest_log!(DEBUG, %error, "pmem: chain dropped");
                counters.invalid.fetch_add(1, Ordering::Relaxed);
                return Some(0);
            }
        };
        let mut kind = [0; 4];
        let read = chain.readable.read(memory, 0, &mut kind);
        let result = if read.is_ok() && u32::from_le_bytes(kind) == FLUSH {
            self.flush()?
        } else {
            counters.invalid.fetch_add(1, Ordering::Relaxed);
            FAILED
        };
        match chain.writable.write(memory, 0, &result.to_le_bytes()) {
            Ok(()) => Some(4),
            Err(_) => Some(0),
        }
    }

    /// Stores through a shared mapping made their pages dirty in the page cache, which is what fdatasync writes. That may take
    /// as long as there is written data; `None` when the worker was stopped meanwhile.
    fn flush(&mut self) -> Option<u32> {
        let Some(file) = &self.file else {
            self.counters.flushes.fetch_add(1, Ordering::Relaxed);
            return Some(0);
        };
        // What was answered is told before: this may be the last look at the queue.
        self.queue.notify();
        let mut standing = self.queue.position();
        standing.next_avail = standing.next_avail.wrapping_sub(1);
        let flushed = self.aside.wait(standing, || file.sync_data())?;
        self.counters.flushes.fetch_add(1, Ordering::Relaxed);
        match flushed {
            Ok(()) => Some(0),
            Err(error) => {
                guest_log!(WARN, %error, "pmem: flush failed");
                self.counters.errors.fetch_add(1, Ordering::Relaxed);
                Some(FAILED)
            }
        }
    }
}
