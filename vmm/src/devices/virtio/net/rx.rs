//! A receive queue: frames read from the TAP straight into the driver's buffers.
//!
//! The length of a frame shows only when it has been read. So a read gets as many buffers as the driver has, up to the
//! largest frame, and behind them a scratch area of ours: what overflows into it (the driver is short of buffers) is
//! copied when the driver offers more, and no frame is lost for want of them. Chains taken and not used are
//! held for the next frame, in the order of the ring, so that a suspend can put them back; where they are in host memory is
//! found out once.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;

use virtio_queue::DescriptorChain;

use super::counters::Counters;
use super::tap::{Backend, read_frame};
use super::{BUDGET, FRAME_MAX, HEADER, MAX_SEGMENTS, NUM_BUFFERS};
use crate::devices::virtio::queue::chain::{Buffers, Chain, Iovecs};
use crate::devices::virtio::queue::served_queue::ServedQueue;
use crate::devices::virtio::state::QueuePosition;
use crate::memory::GuestMemory;
use crate::rate_limiter::RateLimiter;

/// Chains taken per turn: a frame of the largest size in buffers of 1,500 bytes needs 44.
const CHAIN_BUDGET: usize = 64 * BUDGET;

/// What a receive queue waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RxWait {
    /// A frame.
    Frame,
    /// Its next turn.
    Turn,
    /// Buffers: the next kick.
    Buffers,
    /// The rate limiter.
    Tokens,
    /// Nothing any more: the TAP is gone.
    Gone,
}

/// A chain taken from the ring. One that cannot be used is returned when its turn comes, for the order.
#[derive(Debug)]
struct Held {
    head: u16,
    buffers: Option<Buffers>,
    /// How many entries of [`Pieces`] are its.
    pieces: usize,
}

/// The held chains' buffers in host memory, in order.
#[derive(Debug, Default)]
struct Pieces {
    list: Iovecs,
    /// Entries before are of chains that were returned.
    first: usize,
}

impl Pieces {
    /// Adds `buffers`, and says how many entries that took.
    fn push(&mut self, memory: &GuestMemory, buffers: &Buffers) -> usize {
        let before = self.list.0.len();
        buffers.iovecs(memory, usize::MAX, &mut self.list.0);
        self.list.0.len() - before
    }

    /// Takes out the first `count`.
    fn pop(&mut self, count: usize) {
        self.first += count;
        // Moved down only when at most as many are left as were taken out since the last time.
        if self.first * 2 >= self.list.0.len() {
            self.list.0.drain(..self.first.min(self.list.0.len()));
            self.first = 0;
        }
    }

    fn clear(&mut self) {
        self.list.0.clear();
        self.first = 0;
    }

    /// Number of entries.
    fn len(&self) -> usize {
        self.list.0.len() - self.first
    }

    /// Bytes of the first `count`.
    fn bytes(&self, count: usize) -> u64 {
        let pieces = self.list.0.iter().skip(self.first).take(count);
        pieces.map(|piece| piece.iov_len as u64).sum()
    }

    /// Calls `read` with the first `count` and `last` behind them.
    fn with<T>(&mut self, count: usize, last: libc::iovec, read: impl FnOnce(&[libc::iovec]) -> T) -> T {
        let list = &mut self.list.0;
        let end = self.first + count;
        // `last` takes the place of an entry that is not wanted now.
        let wanted = match list.get_mut(end) {
            Some(place) => Some(std::mem::replace(place, last)),
            None => {
                list.push(last);
                None
            }
        };
        let result = read(list.get(self.first..=end).unwrap_or_default());
        match wanted {
            Some(wanted) => {
                if let Some(place) = list.get_mut(end) {
                    *place = wanted;
                }
            }
            None => list.truncate(end),
        }
        result
    }
}

/// A frame longer than the buffers there were: bytes up to `written` are in the held chains, the rest is here.
#[derive(Debug)]
struct Spilled {
    written: u64,
    rest: Vec<u8>,
}

impl Spilled {
    fn len(&self) -> u64 {
        self.written + self.rest.len() as u64
    }
}

/// Why there are not enough buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Short {
    /// The ring is empty, and kicks are on.
    Starved,
    /// The turn is over.
    Budget,
    /// An unusable chain lies between the buffers.
    Interrupted,
}

/// A receive queue.
#[derive(Debug)]
pub(super) struct RxQueue {
    queue: ServedQueue,
    held: VecDeque<Held>,
    pieces: Pieces,
    /// Bytes of the usable chains in `held`.
    capacity: u64,
    /// The chain in hand, lists of buffers and of returned chains: kept for their memory.
    chain: Chain,
    spare: Vec<Buffers>,
    used: Vec<(u16, u32)>,
    spilled: Option<Spilled>,
    /// A frame may take several chains (VIRTIO_NET_F_MRG_RXBUF).
    merge: bool,
    /// Bytes to have ready for a frame.
    want: u64,
}

impl RxQueue {
    /// `want`: bytes of the usual largest frame, header included; only used with `merge`.
    pub(super) fn new(queue: ServedQueue, merge: bool, want: u64) -> Self {
        Self {
            queue,
            held: VecDeque::new(),
            pieces: Pieces::default(),
            capacity: 0,
            chain: Chain::default(),
            spare: Vec::new(),
            used: Vec::new(),
            spilled: None,
            merge,
            want,
        }
    }

    /// The queue, for kicks.
    pub(super) fn queue(&self) -> &ServedQueue {
        &self.queue
    }

    /// Puts back what is held and says where the queue stands.
    pub(super) fn stop(&mut self, counters: &Counters) -> QueuePosition {
        if self.spilled.take().is_some() {
            counters.rx_dropped.add(1);
        }
        self.queue.put_back(self.held.len());
        self.held.clear();
        self.pieces.clear();
        self.capacity = 0;
        self.queue.position()
    }

    /// Receives what the TAP has, up to the turn's budget. `scratch` has [`FRAME_MAX`] + 1 bytes. Kicks are needed only
    /// when it returns [`RxWait::Buffers`], and are on then.
    pub(super) fn serve(
        &mut self,
        backend: &dyn Backend,
        limiter: &mut RateLimiter,
        scratch: &mut [u8],
        counters: &Counters,
    ) -> RxWait {
        self.queue.suppress_kicks();
        let wait = self.receive(backend, limiter, scratch, counters);
        self.queue.notify();
        wait
    }

    fn receive(
        &mut self,
        backend: &dyn Backend,
        limiter: &mut RateLimiter,
        scratch: &mut [u8],
        counters: &Counters,
    ) -> RxWait {
        let memory = self.queue.memory().clone();
        let mut chains_left = CHAIN_BUDGET;
        for _ in 0..BUDGET {
            let needed = self.spilled.as_ref().map_or(1, Spilled::len);
            let want = needed.max(if self.merge { self.want } else { 1 });
            match self.hold(&memory, needed, want, &mut chains_left, counters) {
                Ok(()) => {}
                Err(Short::Starved) => {
                    counters.rx_starved.add(1);
                    return RxWait::Buffers;
                }
                Err(Short::Budget) => return RxWait::Turn,
                Err(Short::Interrupted) => {
                    self.give_up_spilled(counters);
                    continue;
                }
            }
            if let Some(spilled) = self.spilled.take() {
                self.finish_spilled(&memory, &spilled, counters);
                continue;
            }
            if !limiter.may_start() {
                counters.rx_throttled.add(1);
                return RxWait::Tokens;
            }
            let (count, covered) = self.room();
            let beyond = spill_room(scratch, covered);
            // SAFETY: the segments are guest memory, mapped while `memory` lives, and `scratch`.
            let read = |segments: &[libc::iovec]| unsafe { read_frame(backend, segments) };
            let len = match self.pieces.with(count, beyond, read) {
                Ok(len) if len >= HEADER => len,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return RxWait::Frame,
                Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                    // The driver has unplugged the memory of its buffers (virtio-mem). The frame is gone, too.
                    self.give_up_held(counters);
                    counters.rx_errors.add(1);
                    continue;
                }
                other => {
                    guest_log!(WARN, result = ?other, "net: the TAP is gone, nothing is received any more");
                    counters.rx_errors.add(1);
                    return RxWait::Gone;
                }
            };
            limiter.charge(len.saturating_sub(HEADER) as u64, 1);
            self.received(&memory, len, covered, scratch, counters);
        }
        RxWait::Turn
    }

    /// Takes chains until `want` bytes are held, or at least `needed`.
    fn hold(
        &mut self,
        memory: &GuestMemory,
        needed: u64,
        want: u64,
        chains_left: &mut usize,
        counters: &Counters,
    ) -> Result<(), Short> {
        loop {
            while self.capacity < want && !self.ends_unusable(counters) {
                if *chains_left == 0 {
                    return if self.capacity >= needed {
                        Ok(())
                    } else {
                        Err(Short::Budget)
                    };
                }
                let Some(chain) = self.queue.pop(memory) else {
                    break;
                };
                *chains_left -= 1;
                self.take(memory, chain);
            }
            if self.capacity >= needed {
                return Ok(());
            }
            if self.ends_unusable(counters) {
                return Err(Short::Interrupted);
            }
            if !self.queue.enable_kicks() {
                return Err(Short::Starved);
            }
            self.queue.suppress_kicks();
        }
    }

    /// Returns unusable chains whose turn it is; true if there is one behind usable ones.
    fn ends_unusable(&mut self, counters: &Counters) -> bool {
        while let Some(first) = self.held.pop_front_if(|held| held.buffers.is_none()) {
            counters.rx_errors.add(1);
            self.queue.complete(first.head, 0);
        }
        self.held.back().is_some_and(|held| held.buffers.is_none())
    }

    /// Takes a chain apart and holds it. Without room for the header it is of no use (5.1.6.3.2).
    fn take(&mut self, memory: &GuestMemory, chain: DescriptorChain<&GuestMemory>) {
        let head = chain.head_index();
        let parsed = self.chain.parse_again(memory, chain, self.queue.size());
        let usable = match parsed {
            Ok(()) => self.chain.writable.len() >= HEADER as u64,
            Err(error) => {
                guest_log!(DEBUG, %error, "net: receive chain dropped");
                false
            }
        };
        let mut held = Held {
            head,
            buffers: None,
            pieces: 0,
        };
        if usable {
            let spare = self.spare.pop().unwrap_or_default();
            let buffers = std::mem::replace(&mut self.chain.writable, spare);
            held.pieces = self.pieces.push(memory, &buffers);
            self.capacity += buffers.len();
            held.buffers = Some(buffers);
        }
        self.held.push_back(held);
    }

    /// How many of the pieces the next frame can have, and their bytes: all, or those of the first chain; as many as one
    /// system call takes with one more. An unusable chain can only be the last that is held.
    fn room(&self) -> (usize, u64) {
        let first = self.held.front();
        let (wanted, bytes) = match self.merge {
            true => (self.pieces.len(), self.capacity),
            false => (
                first.map_or(0, |held| held.pieces),
                first
                    .and_then(|held| held.buffers.as_ref())
                    .map_or(0, Buffers::len),
            ),
        };
        let count = wanted.min(MAX_SEGMENTS - 1);
        let covered = if count == wanted {
            bytes
        } else {
            self.pieces.bytes(count)
        };
        (count, covered)
    }

    /// A frame of `len` bytes was read, `covered` of which had room in the chains.
    fn received(
        &mut self,
        memory: &GuestMemory,
        len: usize,
        covered: u64,
        scratch: &[u8],
        counters: &Counters,
    ) {
        let first = self.held.front().and_then(|held| held.buffers.as_ref());
        let fits = self.merge || first.is_some_and(|buffers| len as u64 <= buffers.len());
        if len > FRAME_MAX || !fits {
            guest_log!(DEBUG, len, "net: frame larger than the driver's buffers, dropped");
            counters.rx_dropped.add(1);
            return;
        }
        let beyond = usize::try_from((len as u64).saturating_sub(covered)).unwrap_or(0);
        if beyond == 0 {
            self.finish(memory, len as u64, counters);
            return;
        }
        self.spilled = Some(Spilled {
            written: covered,
            rest: scratch.get(..beyond).unwrap_or_default().to_vec(),
        });
    }

    /// The held chains are long enough now.
    fn finish_spilled(&mut self, memory: &GuestMemory, spilled: &Spilled, counters: &Counters) {
        let mut skip = spilled.written;
        let mut rest = spilled.rest.as_slice();
        for buffers in self.held.iter().map_while(|held| held.buffers.as_ref()) {
            if skip >= buffers.len() {
                skip -= buffers.len();
                continue;
            }
            let room = usize::try_from(buffers.len() - skip).unwrap_or(usize::MAX);
            let (now, later) = rest.split_at(room.min(rest.len()));
            if let Err(error) = buffers.write(memory, skip, now) {
                guest_log!(DEBUG, %error, "net: a part of a frame is lost");
            }
            (rest, skip) = (later, 0);
        }
        self.finish(memory, spilled.len(), counters);
    }

    /// The frame cannot be finished: an unusable chain lies between its buffers. Only a broken driver makes one; it gets
    /// its buffers back empty.
    fn give_up_spilled(&mut self, counters: &Counters) {
        if self.spilled.take().is_some() {
            counters.rx_dropped.add(1);
        }
        self.give_up_held(counters);
    }

    /// Returns all held chains, empty.
    fn give_up_held(&mut self, counters: &Counters) {
        for held in self.held.drain(..) {
            if held.buffers.is_none() {
                counters.rx_errors.add(1);
            }
            self.queue.complete(held.head, 0);
        }
        self.pieces.clear();
        self.capacity = 0;
    }

    /// Returns the chains that hold the frame of `len` bytes, all at once.
    fn finish(&mut self, memory: &GuestMemory, len: u64, counters: &Counters) {
        self.used.clear();
        let mut first = None;
        let (mut left, mut pieces) = (len, 0);
        while left > 0
            && let Some(held) = self.held.pop_front_if(|held| held.buffers.is_some())
        {
            let Some(buffers) = held.buffers else { break };
            let now = left.min(buffers.len());
            self.capacity -= buffers.len();
            left -= now;
            pieces += held.pieces;
            // At most FRAME_MAX.
            self.used.push((held.head, now as u32));
            match first {
                None => first = Some(buffers),
                Some(_) => self.spare.push(buffers),
            }
        }
        self.pieces.pop(pieces);
        // 1 without VIRTIO_NET_F_MRG_RXBUF (5.1.6.4.1); a chain has at least HEADER bytes.
        let count = u16::try_from(self.used.len()).unwrap_or(u16::MAX).to_le_bytes();
        if let Some(first) = first {
            if let Err(error) = first.write(memory, NUM_BUFFERS, &count) {
                guest_log!(DEBUG, %error, "net: num_buffers is lost");
            }
            self.spare.push(first);
        }
        counters.rx_frames.add(1);
        counters.rx_bytes.add(len.saturating_sub(HEADER as u64));
        self.queue.complete_together(&self.used);
    }
}

/// The part of `scratch` for what `covered` bytes of buffers do not hold: one byte more than the largest frame, so that a
/// larger one shows.
fn spill_room(scratch: &mut [u8], covered: u64) -> libc::iovec {
    let covered = usize::try_from(covered).unwrap_or(usize::MAX);
    let room = scratch.len().saturating_sub(covered).max(1);
    libc::iovec {
        iov_base: scratch.as_mut_ptr().cast(),
        iov_len: room.min(scratch.len()),
    }
}
