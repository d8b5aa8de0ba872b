//! A queue at work: what every device does around its own request handling.
//!
//! Kicks are suppressed while the queue is being served and enabled again before it sleeps (with the check that closes
//! the race, virtio 1.2 section 2.7.10), interrupts are sent once per batch and only when the driver asks for them.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::virtio::device::{ActivateError, Activation, ActiveQueue};
use crate::devices::virtio::interrupt::Interrupt;
use crate::devices::virtio::queue::chain::{Chain, ChainError};
use crate::devices::virtio::queue::ring;
use crate::devices::virtio::state::QueuePosition;
use crate::memory::GuestMemory;

/// What a round of [`ServedQueue::serve`] left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// Nothing to do until the next kick.
    Idle,
    /// The budget ran out first: call again soon, a kick will not come.
    More,
}

/// What became of a chain that was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// It is answered, with this many bytes written into it.
    Written(u32),
    /// A part of it is done. It is taken again for the rest, after others had their turn.
    Again,
    /// The worker was stopped meanwhile: somebody else serves the queue now.
    Left,
}

/// Where queue `index` stands.
pub fn queue_position(index: usize, queue: &Queue) -> QueuePosition {
    QueuePosition {
        // A device has at most 65,536 queues (QueueSel is checked against their number).
        index: index as u16,
        next_avail: queue.next_avail(),
        next_used: queue.next_used(),
    }
}

/// An [`ActiveQueue`] with the memory and interrupt it works on.
#[derive(Debug)]
pub struct ServedQueue {
    device: String,
    index: usize,
    queue: Queue,
    kick: Arc<EventFd>,
    memory: Arc<GuestMemory>,
    interrupt: Interrupt,
    /// The driver broke a ring; nothing is taken any more.
    broken: bool,
    /// `enable_kicks` saw chains, so the next `pop` must find one.
    promised: bool,
    /// Chains were completed since the last `notify`.
    completed: bool,
    /// The used index at the last `notify`.
    notified_at: u16,
}

impl ServedQueue {
    /// `device` is the id used in logs.
    pub fn new(device: &str, active: ActiveQueue, memory: Arc<GuestMemory>, interrupt: Interrupt) -> Self {
        Self {
            notified_at: active.queue.next_used(),
            device: device.to_owned(),
            index: active.index,
            queue: active.queue,
            kick: active.kick,
            memory,
            interrupt,
            broken: false,
            promised: false,
            completed: false,
        }
    }

    /// The eventfd the driver's notifications arrive on.
    pub fn kick(&self) -> &Arc<EventFd> {
        &self.kick
    }

    /// Clears a kick that has been seen. The eventfd must be non-blocking.
    pub fn take_kick(&self) {
        // Nothing to read means somebody took it already.
        let _ = self.kick.read();
    }

    /// Makes the kick's eventfd readable, to come back to the queue later.
    pub fn kick_self(&self) {
        if let Err(error) = self.kick.write(1) {
            guest_log!(ERROR, device = %self.device, queue = self.index, %error, "virtio: cannot kick");
        }
    }

    /// Guest memory the queue lives in.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Entries of the queue, which is also the longest chain allowed.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Where the queue stands, for [`VirtioDevice::suspend`](crate::devices::virtio::VirtioDevice::suspend).
    pub fn position(&self) -> QueuePosition {
        queue_position(self.index, &self.queue)
    }

    /// Takes the queue of `device` (its id) that the driver set up as number `index`.
    ///
    /// # Errors
    /// [`ActivateError::QueueMissing`].
    pub fn take(activation: &mut Activation, device: &str, index: usize) -> Result<Self, ActivateError> {
        let active = activation.take_queue(device, index)?;
        let (memory, interrupt) = (activation.memory.clone(), activation.interrupt.clone());
        Ok(Self::new(device, active, memory, interrupt))
    }

    /// One turn of a worker whose kick came: as [`serve_parts`](Self::serve_parts), and if the budget ran out the queue kicks
    /// itself.
    pub fn turn(
        &mut self,
        budget: usize,
        handle: impl FnMut(&mut Self, &GuestMemory, DescriptorChain<&GuestMemory>) -> Answer,
    ) {
        self.take_kick();
        if self.serve_parts(budget, handle) == Served::More {
            self.kick_self();
        }
    }

    /// Takes up to `budget` chains, gives each to `handle`, which returns the bytes it wrote into the chain.
    pub fn serve(
        &mut self,
        budget: usize,
        mut handle: impl FnMut(&GuestMemory, DescriptorChain<&GuestMemory>) -> u32,
    ) -> Served {
        self.serve_parts(budget, |_, memory, chain| Answer::Written(handle(memory, chain)))
    }

    /// As [`serve`](Self::serve), for requests that can be left half-done. `handle` may tell the driver what was answered
    /// before, and see where the queue stands: behind the chain in hand.
    pub fn serve_parts(
        &mut self,
        budget: usize,
        mut handle: impl FnMut(&mut Self, &GuestMemory, DescriptorChain<&GuestMemory>) -> Answer,
    ) -> Served {
        let memory = self.memory.clone();
        let mut left = budget;
        let outcome = loop {
            self.suppress_kicks();
            while left > 0
                && let Some(chain) = self.pop(&memory)
            {
                left -= 1;
                let head = chain.head_index();
                match handle(self, &memory, chain) {
                    Answer::Written(written) => self.complete(head, written),
                    Answer::Again => {
                        self.put_back(1);
                        left = 0;
                    }
                    Answer::Left => return Served::Idle,
                }
            }
            if left == 0 {
                break Served::More;
            }
            if !self.enable_kicks() {
                break Served::Idle;
            }
        };
        self.notify();
        outcome
    }

    /// The next chain, or `None` when the queue is empty or the driver broke it.
    pub fn pop<'m>(&mut self, memory: &'m GuestMemory) -> Option<DescriptorChain<&'m GuestMemory>> {
        if self.broken {
            return None;
        }
        match ring::take(&mut self.queue, memory) {
            Ok(chain) => {
                if chain.is_none() && self.promised {
                    self.stop(&"avail index and ring disagree");
                }
                self.promised = false;
                chain
            }
            Err(error) => {
                // E.g. an avail index more than a queue ahead.
                self.stop(&error);
                None
            }
        }
    }

    /// Reads the chain at descriptor `head`, which was taken before and not returned, into `chain`.
    ///
    /// # Errors
    /// As [`Chain::parse`].
    pub fn parse_head(&self, head: u16, chain: &mut Chain) -> Result<(), ChainError> {
        let table = GuestAddress(self.queue.desc_table());
        chain.parse_head(&self.memory, table, head, self.queue.size())
    }

    /// Returns a chain to the driver, with the number of bytes written into it.
    pub fn complete(&mut self, head: u16, written: u32) {
        if let Err(error) = ring::give_back(&mut self.queue, &self.memory, head, written) {
            // The head index came from the guest; there is no entry to return.
            guest_log!(DEBUG, device = %self.device, queue = self.index, head, %error, "virtio: cannot return a chain");
        }
        self.completed = true;
    }

    /// Returns several chains with one update of the used index, so that the driver sees all of them or none: a driver
    /// that finds a part of a merged network frame only drops it (virtio 1.2, 5.1.6.4).
    pub fn complete_together(&mut self, chains: &[(u16, u32)]) {
        self.completed = true;
        if let Err(error) = self.put_used(chains) {
            self.stop(&error);
        }
    }

    fn put_used(&mut self, chains: &[(u16, u32)]) -> Result<(), vm_memory::GuestMemoryError> {
        let ring = GuestAddress(self.queue.used_ring());
        let mut next = self.queue.next_used();
        for &(head, written) in chains {
            // A ring is ready only with a size of 1 or more.
            let slot = next.checked_rem(self.queue.size()).unwrap_or(0);
            // `flags` and `idx`, then the elements: `id` and `len` (virtio 1.2, 2.7.8).
            let element = u64::from(head) | u64::from(written) << 32;
            let at = ring.unchecked_add(4 + 8 * u64::from(slot));
            self.memory.write_slice(&element.to_le_bytes(), at)?;
            next = next.wrapping_add(1);
        }
        self.queue.set_next_used(next);
        self.memory
            .store(next.to_le(), ring.unchecked_add(2), Ordering::Release)
    }

    /// Gives the last `count` chains taken back to the ring; the next [`pop`](Self::pop) takes them again. None of them
    /// may have been returned to the driver.
    pub fn put_back(&mut self, count: usize) {
        for _ in 0..count {
            self.queue.go_to_previous_position();
        }
    }

    /// Asks the driver not to kick: the queue is being looked at anyway.
    pub fn suppress_kicks(&mut self) {
        if let Err(error) = self.queue.disable_notification(&*self.memory) {
            guest_log!(DEBUG, device = %self.device, queue = self.index, %error, "virtio: cannot suppress kicks");
        }
    }

    /// Asks for kicks again; true when chains arrived meanwhile and must be taken without one.
    pub fn enable_kicks(&mut self) -> bool {
        if self.broken {
            return false;
        }
        match self.queue.enable_notification(&*self.memory) {
            Ok(more) => {
                self.promised = more;
                more
            }
            Err(error) => {
                self.stop(&error);
                false
            }
        }
    }

    /// Interrupts the driver if chains were completed since the last call and it wants to hear about them.
    pub fn notify(&mut self) {
        if !std::mem::take(&mut self.completed) {
            return;
        }
        fence(Ordering::SeqCst);
        if self.interrupt_wanted() {
            self.interrupt.used(self.index);
        }
    }

    /// Chains returned since the last [`notify`](Self::notify).
    pub fn unannounced(&self) -> u16 {
        self.queue.next_used().wrapping_sub(self.notified_at)
    }

    /// Chains taken whose return the driver has not seen, as far as it says so (EVENT_IDX); else 0.
    pub fn awaited(&self) -> u16 {
        let Ok(Some(event)) = self.used_event() else {
            return 0;
        };
        let awaited = self.queue.next_avail().wrapping_sub(event);
        if awaited <= self.queue.size() { awaited } else { 0 }
    }

    /// The value of the used index the driver waits for, with EVENT_IDX. It follows the avail ring's flags, index and
    /// entries.
    fn used_event(&self) -> Result<Option<u16>, vm_memory::GuestMemoryError> {
        if !self.queue.event_idx_enabled() {
            return Ok(None);
        }
        let at = self.queue.avail_ring() + 4 + 2 * u64::from(self.queue.size());
        let event = self.memory.load::<u16>(GuestAddress(at), Ordering::Relaxed)?;
        Ok(Some(u16::from_le(event)))
    }

    /// What the driver asks for: an interrupt when the used index passes one value (EVENT_IDX, virtio 1.2, 2.7.7.2), or
    /// one flag for all.
    fn interrupt_wanted(&mut self) -> bool {
        let next_used = self.queue.next_used();
        let before = std::mem::replace(&mut self.notified_at, next_used);
        match self.used_event() {
            Ok(None) => !self.interrupts_suppressed(),
            Ok(Some(event)) => {
                let since_event = next_used.wrapping_sub(event).wrapping_sub(1);
                since_event < next_used.wrapping_sub(before)
            }
            Err(error) => {
                self.stop(&error);
                false
            }
        }
    }

    fn interrupts_suppressed(&self) -> bool {
        let flags = self
            .memory
            .load::<u16>(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed);
        flags.is_ok_and(|flags| u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT != 0)
    }

    /// Gives the queue up until the driver resets the device. Going on would never end: every look finds "new" work.
    fn stop(&mut self, reason: &dyn std::fmt::Display) {
        self.broken = true;
        guest_log!(WARN, device = %self.device, queue = self.index, %reason, "virtio: the driver broke a ring, queue stopped");
    }
}

#[cfg(test)]
mod properties;
