//! Flow control (virtio 1.2, 5.10.6.3): each side says how large its receive buffer is (`buf_alloc`) and how many
//! bytes it has taken out of it so far (`fwd_cnt`); the other side never has more than that in flight.

use std::num::Wrapping;

/// Credit of the direction guest → host: what we let the guest send.
#[derive(Debug)]
pub(super) struct Inbound {
    buf_alloc: u32,
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    advertised: Wrapping<u32>,
}

impl Inbound {
    /// A receive buffer of `buf_alloc` bytes.
    pub(super) fn new(buf_alloc: u32) -> Self {
        Self {
            buf_alloc,
            received: Wrapping(0),
            forwarded: Wrapping(0),
            advertised: Wrapping(0),
        }
    }

    /// Size of the receive buffer in bytes.
    pub(super) fn buf_alloc(&self) -> u32 {
        self.buf_alloc
    }

    /// Takes `len` received bytes into account. False when the guest sent more than it was allowed to.
    pub(super) fn receive(&mut self, len: u32) -> bool {
        let free = self.buf_alloc - (self.received - self.forwarded).0;
        if len > free {
            return false;
        }
        self.received += len;
        true
    }

    /// `len` received bytes have left the buffer, for the host or for nowhere.
    pub(super) fn forward(&mut self, len: usize) {
        // Never more than the buffer held, which is a u32.
        self.forwarded += u32::try_from(len).unwrap_or(u32::MAX);
        debug_assert!((self.received - self.forwarded).0 <= self.buf_alloc);
    }

    /// Whether the guest should be told about freed space without waiting for a packet that goes its way. Half
    /// of the buffer: the guest, which can always use what is not yet told, never stalls while the host keeps reading,
    /// and a stream of small packets does not cost an update each.
    pub(super) fn update_due(&self) -> bool {
        (self.forwarded - self.advertised).0 >= self.buf_alloc / 2
    }

    /// The `fwd_cnt` of a packet that is sent now.
    pub(super) fn advertise(&mut self) -> u32 {
        self.advertised = self.forwarded;
        self.forwarded.0
    }
}

/// Credit of the direction host → guest: what the guest lets us send.
#[derive(Debug, Default)]
pub(super) struct Outbound {
    peer_buf_alloc: u32,
    peer_fwd_cnt: Wrapping<u32>,
    sent: Wrapping<u32>,
}

impl Outbound {
    /// Takes the fields of a received header. They are the guest's word: any value is possible.
    pub(super) fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.peer_buf_alloc = buf_alloc;
        self.peer_fwd_cnt = Wrapping(fwd_cnt);
    }

    /// Bytes that may be sent now.
    pub(super) fn available(&self) -> u32 {
        let in_flight = (self.sent - self.peer_fwd_cnt).0;
        self.peer_buf_alloc.saturating_sub(in_flight)
    }

    /// `len` bytes were sent; at most [`Self::available`].
    pub(super) fn consume(&mut self, len: u32) {
        self.sent += len;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn receive_when_buffer_is_full_is_refused_until_forwarded() {
        let mut credit = Inbound::new(100);
        assert!(credit.receive(100));
        assert!(!credit.receive(1));
        credit.forward(10);
        assert!(credit.receive(10));
        assert!(!credit.receive(1));
    }

    #[test]
    fn update_due_when_half_is_untold() {
        let mut credit = Inbound::new(100);
        assert!(credit.receive(60));
        credit.forward(49);
        assert!(!credit.update_due());
        credit.forward(1);
        assert!(credit.update_due());
        assert_eq!(credit.advertise(), 50);
        assert!(!credit.update_due());
    }

    #[test]
    fn inbound_counters_when_past_4_gib_wrap() {
        let mut credit = Inbound::new(1 << 20);
        for _ in 0..(1 << 13) {
            assert!(credit.receive(1 << 20));
            credit.forward(1 << 20);
        }
        assert!(credit.receive(1 << 20));
        assert!(!credit.receive(1));
        assert_eq!(credit.advertise(), 0);
    }

    #[test]
    fn available_never_exceeds_what_the_peer_announced() {
        let mut credit = Outbound::default();
        assert_eq!(credit.available(), 0);
        credit.update(1000, 0);
        credit.consume(600);
        assert_eq!(credit.available(), 400);
        credit.update(1000, 500);
        assert_eq!(credit.available(), 900);
        // The peer shrinks its buffer below what is in flight.
        credit.update(50, 500);
        assert_eq!(credit.available(), 0);
        // A lie: more forwarded than was sent.
        credit.update(1000, 5000);
        assert_eq!(credit.available(), 0);
    }
}
