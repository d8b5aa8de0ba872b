//! The flush queue, served on a thread of its own: a disk takes its time.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_queue::DescriptorChain;

use crate::devices::virtio::chain::Chain;
use crate::devices::virtio::queue_thread::ThreadWorker;
use crate::devices::virtio::served_queue::{Served, ServedQueue};
use crate::devices::virtio::state::QueuePosition;
use crate::memory::GuestMemory;

/// Flushes per turn, so that a reset waits for few of them.
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
}

impl PmemWorker {
    pub(super) fn new(queue: ServedQueue, file: Option<Arc<File>>, counters: Arc<Counters>) -> Self {
        Self {
            queue,
            file,
            counters,
        }
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
        let limit = self.queue.size();
        let (file, counters) = (self.file.as_deref(), &self.counters);
        let served = self.queue.serve(BUDGET, |memory, chain| {
            answer(file, counters, memory, chain, limit)
        });
        if served == Served::More {
            self.queue.kick_self();
        }
    }
}

/// Carries out one chain; returns the bytes written. A chain without room for the response is not carried out.
fn answer(
    file: Option<&File>,
    counters: &Counters,
    memory: &GuestMemory,
    chain: DescriptorChain<&GuestMemory>,
    limit: u16,
) -> u32 {
    let chain = match Chain::parse(memory, chain, limit) {
        Ok(chain) if chain.writable.len() >= 4 => chain,
        Ok(_) => {
            counters.invalid.fetch_add(1, Ordering::Relaxed);
            return 0;
        }
        Err(error) => {
            guest_log!(DEBUG, %error, "pmem: chain dropped");
            counters.invalid.fetch_add(1, Ordering::Relaxed);
            return 0;
        }
    };
    let mut kind = [0; 4];
    let read = chain.readable.read(memory, 0, &mut kind);
    let result = if read.is_ok() && u32::from_le_bytes(kind) == FLUSH {
        flush(file, counters)
    } else {
        counters.invalid.fetch_add(1, Ordering::Relaxed);
        FAILED
    };
    match chain.writable.write(memory, 0, &result.to_le_bytes()) {
        Ok(()) => 4,
        Err(_) => 0,
    }
}

/// Stores through a shared mapping made their pages dirty in the page cache, which is what fdatasync writes.
fn flush(file: Option<&File>, counters: &Counters) -> u32 {
    counters.flushes.fetch_add(1, Ordering::Relaxed);
    match file.map(File::sync_data) {
        None | Some(Ok(())) => 0,
        Some(Err(error)) => {
            guest_log!(WARN, %error, "pmem: flush failed");
            counters.errors.fetch_add(1, Ordering::Relaxed);
            FAILED
        }
    }
}
