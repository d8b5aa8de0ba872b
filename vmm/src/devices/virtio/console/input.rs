//! What is typed: bytes on their way to the guest, never more than a few kilobytes.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Most bytes that wait for the guest. Firecracker's serial console once kept all of them (its issue 2177).
pub const INPUT_CAPACITY: usize = 4096;

/// Bytes that wait for the guest to take them. What does not fit is not accepted.
#[derive(Debug, Default)]
pub struct PendingInput {
    bytes: VecDeque<u8>,
}

impl PendingInput {
    /// Takes as much of `bytes` as there is room for and says how much that is.
    pub fn push(&mut self, bytes: &[u8]) -> usize {
        let count = bytes.len().min(INPUT_CAPACITY.saturating_sub(self.bytes.len()));
        self.bytes.extend(bytes.iter().take(count));
        count
    }

    /// The first bytes, at most `limit` of them; [`Self::consume`] takes them out.
    pub fn peek(&self, limit: usize) -> Vec<u8> {
        self.bytes.iter().take(limit).copied().collect()
    }

    /// Takes out the first `count` bytes.
    pub fn consume(&mut self, count: usize) {
        self.bytes.drain(..count.min(self.bytes.len()));
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Bytes that wait.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }
}

/// The keyboard of a virtio-console. Clones refer to the same one.
#[derive(Debug, Clone)]
pub struct ConsoleInput {
    pending: Arc<Mutex<PendingInput>>,
    /// Wakes the worker.
    wake: Arc<EventFd>,
}

impl ConsoleInput {
    /// An empty one.
    ///
    /// # Errors
    /// There is no eventfd to be had.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            pending: Arc::default(),
            wake: Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?),
        })
    }

    /// Gives `bytes` to the guest and says how many of them were accepted: what does not fit beside the input the guest
    /// has not taken yet is not. Works before the guest's driver is up, and never blocks.
    pub fn push(&self, bytes: &[u8]) -> usize {
        let count = self.pending().push(bytes);
        if count > 0 {
            self.wake();
        }
        count
    }

    pub(super) fn pending(&self) -> MutexGuard<'_, PendingInput> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wake(&self) {
        // Fails only when the count of wake-ups reaches 2^64.
        let _ = self.wake.write(1);
    }

    pub(super) fn wake_fd(&self) -> &EventFd {
        &self.wake
    }
}
