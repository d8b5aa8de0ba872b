//! A transmit queue: each chain is one frame with its header, written to the TAP straight from guest memory.

#![allow(unsafe_code)]

use std::io;

use super::counters::Counters;
use super::tap::{Backend, write_frame};
use super::{BUDGET, FRAME_MAX, HEADER, MAX_SEGMENTS};
use crate::devices::virtio::queue::chain::{Buffers, Chain, Iovecs};
use crate::devices::virtio::queue::served_queue::ServedQueue;
use crate::memory::GuestMemory;
use crate::rate_limiter::RateLimiter;

/// What a transmit queue waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TxWait {
    /// The next kick.
    Kick,
    /// Its next turn.
    Turn,
    /// Space in the TAP.
    Space,
    /// The rate limiter.
    Tokens,
}

/// A transmit queue.
#[derive(Debug)]
pub(super) struct TxQueue {
    pub(super) queue: ServedQueue,
    /// The chain in hand and where it is in host memory; kept for their memory.
    chain: Chain,
    segments: Iovecs,
}

impl TxQueue {
    pub(super) fn new(queue: ServedQueue) -> Self {
        Self {
            queue,
            chain: Chain::default(),
            segments: Iovecs::default(),
        }
    }

    /// Sends what the driver offers, up to the turn's budget. Kicks are on only when it returns [`TxWait::Kick`]: in the
    /// other cases something else brings the worker back.
    pub(super) fn serve(
        &mut self,
        backend: &dyn Backend,
        limiter: &mut RateLimiter,
        counters: &Counters,
    ) -> TxWait {
        let memory = self.queue.memory().clone();
        let limit = self.queue.size();
        let mut left = BUDGET;
        let wait = loop {
            self.queue.suppress_kicks();
            let mut stopped = None;
            while left > 0
                && let Some(chain) = self.queue.pop(&memory)
            {
                let head = chain.head_index();
                if !limiter.may_start() {
                    self.queue.put_back(1);
                    counters.tx_throttled.add(1);
                    stopped = Some(TxWait::Tokens);
                    break;
                }
                left -= 1;
                let frame = match self.chain.parse_again(&memory, chain, limit) {
                    Ok(()) => &self.chain.readable,
                    Err(error) => {
                        guest_log!(DEBUG, %error, "net: transmit chain dropped");
                        counters.tx_malformed.add(1);
                        self.queue.complete(head, 0);
                        continue;
                    }
                };
                if frame_len(frame).is_none() {
                    guest_log!(DEBUG, bytes = frame.len(), "net: chain is no frame, dropped");
                    counters.tx_malformed.add(1);
                    self.queue.complete(head, 0);
                    continue;
                }
                match send(&memory, frame, backend, &mut self.segments.0) {
                    Ok(()) => {
                        let bytes = frame.len().saturating_sub(HEADER as u64);
                        limiter.charge(bytes, 1);
                        counters.tx_frames.add(1);
                        counters.tx_bytes.add(bytes);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        self.queue.put_back(1);
                        counters.tx_blocked.add(1);
                        stopped = Some(TxWait::Space);
                        break;
                    }
                    Err(error) => {
                        guest_log!(DEBUG, %error, "net: the TAP refused a frame");
                        counters.tx_errors.add(1);
                    }
                }
                self.queue.complete(head, 0);
            }
            if let Some(wait) = stopped {
                break wait;
            }
            if left == 0 {
                break TxWait::Turn;
            }
            if !self.queue.enable_kicks() {
                break TxWait::Kick;
            }
        };
        self.queue.notify();
        wait
    }
}

/// The length of a frame with its header, if `buffers` can be one.
fn frame_len(buffers: &Buffers) -> Option<usize> {
    let len = usize::try_from(buffers.len()).ok()?;
    (HEADER..=FRAME_MAX).contains(&len).then_some(len)
}

fn send(
    memory: &GuestMemory,
    buffers: &Buffers,
    backend: &dyn Backend,
    segments: &mut Vec<libc::iovec>,
) -> io::Result<()> {
    segments.clear();
    let covered = buffers.iovecs(memory, MAX_SEGMENTS, segments);
    let mut copy;
    if covered < buffers.len() {
        // More pieces than one system call takes; `frame_len` bounds the copy.
        copy = vec![0; FRAME_MAX.min(buffers.len() as usize)];
        buffers
            .read(memory, 0, &mut copy)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))?;
        segments.clear();
        segments.push(libc::iovec {
            iov_base: copy.as_mut_ptr().cast(),
            iov_len: copy.len(),
        });
    }
    // SAFETY: the segments are guest memory, mapped while `memory` lives, or `copy`, which lives until the end of this
    // function. The guest changing a frame while it is sent is the guest's affair.
    unsafe { write_frame(backend, segments) }.map(drop)
}
