//! After a restore: telling the guest that all its connections are gone (virtio 1.2, 5.10.6.7).
//!
//! The device puts one VIRTIO_VSOCK_EVENT_TRANSPORT_RESET into the event queue. Linux then reads the CID again, ends
//! every connected socket and gives the event buffer back, in this order (net/vmw_vsock/virtio_transport.c,
//! `virtio_transport_event_work`). Only the last step is visible here and only after it a packet cannot meet a socket
//! of before: until then the guest gets none ([`TransportReset::is_settled`]). Firecracker's pull requests 5882 and
//! 6100 are what happens otherwise, and when the gate also closes where nothing was reset.

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::device::EVENT;
use super::worker::take;
use crate::devices::virtio::Interrupt;
use crate::devices::virtio::queue::chain::Chain;
use crate::devices::virtio::queue::ring;
use crate::memory::GuestMemory;

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, as `struct virtio_vsock_event` carries it.
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

/// How far the guest is with forgetting its connections. Kept over suspend and activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum TransportReset {
    /// Guest and host know the same connections.
    #[default]
    Settled,
    /// The guest has to be told; it may have no event buffer yet.
    ToSend,
    /// The guest was told when its avail index was this; one buffer more means that it is done.
    Sent(u16),
}

impl TransportReset {
    /// Whether packets may go to the guest.
    pub(super) fn is_settled(self) -> bool {
        self == Self::Settled
    }
}

/// The event queue as the driver configured it.
#[derive(Debug)]
pub(super) struct EventQueue {
    pub(super) queue: Queue,
    pub(super) kick: Arc<EventFd>,
}

impl EventQueue {
    /// Brings `reset` as far as the guest allows now, and asks for a kick where it does not.
    pub(super) fn advance(
        &mut self,
        reset: TransportReset,
        memory: &GuestMemory,
        interrupt: &Interrupt,
    ) -> TransportReset {
        match reset {
            TransportReset::Settled => TransportReset::Settled,
            TransportReset::ToSend => self.send(memory, interrupt),
            TransportReset::Sent(avail) => self.look_for_answer(avail, memory),
        }
    }

    fn send(&mut self, memory: &GuestMemory, interrupt: &Interrupt) -> TransportReset {
        // Twice around the ring: a driver that offers unusable buffers all the time must not keep the loop here.
        for _ in 0..2 * u32::from(self.queue.size()) {
            // Before the event is in the ring: what is offered after it is the answer.
            let avail = self.avail_index(memory);
            let Some(chain) = take(&mut self.queue, memory, "event") else {
                match self.queue.enable_notification(memory) {
                    Ok(true) => continue,
                    Ok(false) => return TransportReset::ToSend,
                    Err(error) => {
                        guest_log!(DEBUG, %error, "vsock: the driver broke the event queue");
                        return TransportReset::ToSend;
                    }
                }
            };
            let head = chain.head_index();
            let written = write_event(memory, chain, self.queue.size());
            if let Err(error) = ring::give_back(&mut self.queue, memory, head, written) {
                guest_log!(DEBUG, %error, head, "vsock: cannot return an event buffer");
            }
            // Always: there is at most one of these in the life of a process.
            interrupt.used(EVENT);
            if written > 0
                && let Some(avail) = avail
            {
                return self.look_for_answer(avail, memory);
            }
        }
        TransportReset::ToSend
    }

    fn look_for_answer(&self, sent_at: u16, memory: &GuestMemory) -> TransportReset {
        // `enable_notification` would ask for a kick for the buffers that were there all the time; the answer is the
        // first one after them (avail_event, virtio 1.2, 2.7.10).
        let avail_event = self.queue.used_ring() + 4 + 8 * u64::from(self.queue.size());
        if self.queue.event_idx_enabled()
            && let Err(error) = memory.store(sent_at.to_le(), GuestAddress(avail_event), Ordering::Relaxed)
        {
            guest_log!(DEBUG, %error, "vsock: cannot ask for kicks of the event queue");
        }
        fence(Ordering::SeqCst);
        match self.avail_index(memory) {
            Some(avail) if avail != sent_at => TransportReset::Settled,
            _ => TransportReset::Sent(sent_at),
        }
    }

    fn avail_index(&self, memory: &GuestMemory) -> Option<u16> {
        let index = self.queue.avail_idx(memory, Ordering::Acquire);
        index.ok().map(|Wrapping(index)| index)
    }
}

/// Returns the bytes written: none if the buffer is not one the driver may offer.
fn write_event(memory: &GuestMemory, chain: DescriptorChain<&GuestMemory>, limit: u16) -> u32 {
    let written = Chain::parse(memory, chain, limit)
        .map_err(|error| error.to_string())
        .and_then(|chain| {
            let written = chain.writable.write(memory, 0, &TRANSPORT_RESET);
            written.map_err(|error| error.to_string())
        });
    match written {
        Ok(()) => TRANSPORT_RESET.len() as u32,
        Err(error) => {
            guest_log!(DEBUG, error, "vsock: unusable event buffer");
            0
        }
    }
}
