//! What a frame takes from the heap: nothing, once some have passed.

use crate::devices::virtio::net::counters::Counters;
use crate::devices::virtio::net::rx::RxQueue;
use crate::devices::virtio::net::tx::TxQueue;
use crate::devices::virtio::net::{FRAME_MAX, HEADER};
use crate::devices::virtio::queue::served_queue::ServedQueue;
use crate::devices::virtio::test_allocations::allocations;
use crate::devices::virtio::test_ring::{Buf, TestGuest, TestRing};
use crate::rate_limiter::RateLimiter;

use super::rig::{RING, frame, rx_buffer, tx_buffer, wire};

fn served(guest: &TestGuest, ring: &TestRing) -> ServedQueue {
    let interrupt = guest.interrupt();
    ServedQueue::new("net0", ring.active(), guest.memory.clone(), interrupt)
}

#[test]
fn frame_when_others_have_passed_allocates_nothing() {
    let guest = TestGuest::new();
    let mut rings = [guest.ring(0, RING, true), guest.ring(1, RING, true)];
    let (socket, wire) = wire(1 << 20);
    let mut rx = RxQueue::new(served(&guest, &rings[0]), true, FRAME_MAX as u64);
    let mut tx = TxQueue::new(served(&guest, &rings[1]));
    let mut limiter = RateLimiter::new(&Default::default()).unwrap();
    let mut scratch = vec![0; FRAME_MAX + 1];
    let counters = Counters::default();
    let (small, merged) = (frame(1, 100), frame(2, 4000));
    let mut round = || {
        wire.send(&small);
        wire.send(&merged);
        for number in 0..4 {
            rings[0].submit(&[Buf::Write(rx_buffer(number), 1500)]);
        }
        rx.serve(&*socket, &mut limiter, &mut scratch, &counters);
        rings[1].submit(&[
            Buf::Read(tx_buffer(0), HEADER as u32),
            Buf::Read(tx_buffer(0) + HEADER as u64, 1000),
        ]);
        tx.serve(&*socket, &mut limiter, &counters);
        for ring in &mut rings {
            while ring.try_used().is_some() {}
        }
        wire.discard();
    };
    (0..4).for_each(|_| round());
    assert_eq!(allocations(|| (0..50).for_each(|_| round())), 0);
    assert_eq!(counters.rx_frames.get(), 2 * 54);
    assert_eq!(counters.tx_frames.get(), 54);
}
