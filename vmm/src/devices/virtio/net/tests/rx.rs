//! What the guest receives.

use super::rig::{EVENT_IDX, MERGE, Rig, eventually, frame, net_config, rx_buffer};
use crate::config::NetConfig;
use crate::devices::virtio::test_ring::{Buf, PATIENCE};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4};

#[test]
fn frame_when_a_buffer_is_there_arrives_in_it() {
    for features in [0, MERGE, MERGE | EVENT_IDX] {
        let mut rig = Rig::new(features);
        let head = rig.offer_rx(0, 2000);
        rig.rings[0].kick();
        rig.wires[0].send(&frame(1, 100));
        let used = rig.rings[0].wait_used();
        assert_eq!((used.head, used.len), (head, 100));
        assert_eq!(rig.received(0, 100), (1, frame(1, 100)));
        rig.guest.wait_interrupt();
        assert_eq!((rig.counter("rx_frames"), rig.counter("rx_bytes")), (1, 88));
    }
}

#[test]
fn frame_when_buffers_are_small_is_merged_over_several() {
    let mut rig = Rig::new(MERGE);
    for number in 0..5 {
        rig.offer_rx(number, 1000);
    }
    rig.rings[0].kick();
    rig.wires[0].send(&frame(1, 2500));
    rig.wires[0].send(&frame(2, 1001));
    let lens: Vec<_> = (0..5).map(|_| rig.rings[0].wait_used().len).collect();
    assert_eq!(lens, [1000, 1000, 500, 1000, 1]);
    let (count, mut bytes) = rig.received(0, 1000);
    assert_eq!(count, 3);
    bytes.extend(rig.guest.read(rx_buffer(1), 1000));
    bytes.extend(rig.guest.read(rx_buffer(2), 500));
    assert_eq!(bytes, frame(1, 2500));
    assert_eq!(rig.received(3, 1000).0, 2);
}

#[test]
fn frame_when_of_the_largest_size_arrives() {
    let features = MERGE | 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;
    let mut rig = Rig::new(features);
    for number in 0..50 {
        rig.offer_rx(number, 1526);
    }
    rig.rings[0].kick();
    rig.wires[0].send(&frame(1, 65_562));
    let mut bytes = Vec::new();
    for number in 0..43u64 {
        let len = rig.rings[0].wait_used().len as usize;
        bytes.extend(rig.guest.read(rx_buffer(number), len));
    }
    assert_eq!(u16::from_le_bytes([bytes[10], bytes[11]]), 43);
    bytes[10..12].fill(0);
    assert_eq!(bytes, frame(1, 65_562));
    assert_eq!(rig.rings[0].try_used(), None);
}

#[test]
fn frame_when_buffers_run_out_in_it_waits_for_more() {
    let mut rig = Rig::new(MERGE);
    rig.offer_rx(0, 1000);
    rig.rings[0].kick();
    rig.wires[0].send(&frame(1, 2500));
    rig.wires[0].send(&frame(2, 100));
    rig.wait_first_bytes(&frame(1, 2500));
    assert_eq!(rig.rings[0].try_used(), None);
    assert!(!rig.spins("rx_starved"));
    for number in 1..4 {
        rig.offer_rx(number, 1000);
        rig.rings[0].kick();
    }
    let lens: Vec<_> = (0..4).map(|_| rig.rings[0].wait_used().len).collect();
    assert_eq!(lens, [1000, 1000, 500, 100]);
    let (count, mut bytes) = rig.received(0, 1000);
    bytes.extend(rig.guest.read(rx_buffer(1), 1000));
    bytes.extend(rig.guest.read(rx_buffer(2), 500));
    assert_eq!((count, bytes), (3, frame(1, 2500)));
    assert_eq!(rig.received(3, 100), (1, frame(2, 100)));
    assert_eq!(rig.counter("rx_dropped"), 0);
}

#[test]
fn frame_when_too_large_without_merging_is_dropped_and_the_buffer_is_used_again() {
    let mut rig = Rig::new(0);
    rig.offer_rx(0, 200);
    rig.rings[0].kick();
    rig.wires[0].send(&frame(1, 201));
    rig.wires[0].send(&frame(2, 200));
    assert_eq!(rig.rings[0].wait_used().len, 200);
    assert_eq!(rig.received(0, 200), (1, frame(2, 200)));
    assert_eq!((rig.counter("rx_dropped"), rig.counter("rx_frames")), (1, 1));
}

#[test]
fn frame_when_larger_than_any_is_dropped() {
    let mut rig = Rig::new(MERGE);
    for number in 0..2 {
        rig.offer_rx(number, 65_570);
    }
    rig.rings[0].kick();
    rig.wires[0].send(&frame(1, 65_563));
    rig.wires[0].send(&frame(2, 65_562));
    assert_eq!(rig.rings[0].wait_used().len, 65_562);
    assert_eq!(rig.counter("rx_dropped"), 1);
}

#[test]
fn frame_when_the_header_is_split_over_descriptors_arrives() {
    let mut rig = Rig::new(MERGE);
    let at = rx_buffer(0);
    let pieces = [
        Buf::Write(at, 5),
        Buf::Write(at + 5, 6),
        Buf::Write(at + 11, 1),
        Buf::Write(at + 12, 300),
    ];
    rig.rings[0].submit(&pieces);
    rig.rings[0].kick();
    rig.wires[0].send(&frame(1, 300));
    assert_eq!(rig.rings[0].wait_used().len, 300);
    assert_eq!(rig.received(0, 300), (1, frame(1, 300)));
}

#[test]
fn frames_when_many_arrive_in_order_with_few_interrupts() {
    let config = NetConfig {
        queue_size: 256,
        ..net_config()
    };
    let mut rig = Rig::with(&config, MERGE);
    for number in 0..200usize {
        rig.wires[0].send(&frame(number, 60 + number));
    }
    // Let the backlog be there before the first buffer is.
    eventually("starvation", || rig.counter("rx_starved") > 0);
    for number in 0..200 {
        rig.offer_rx(number % 80, 300);
    }
    rig.guest.interrupts();
    rig.rings[0].kick();
    for number in 0..200 {
        assert_eq!(rig.rings[0].wait_used().len, 60 + number);
    }
    eventually("the last batch", || rig.counter("rx_frames") == 200);
    rig.settle();
    let interrupts = rig.guest.interrupts();
    assert!(
        (1..=5).contains(&interrupts),
        "{interrupts} interrupts in batches of 64"
    );
}

#[test]
fn frame_when_merged_is_seen_whole_by_a_driver_that_polls() {
    let mut rig = Rig::new(MERGE);
    for round in 0..300 {
        for number in 0..8 {
            rig.offer_rx(number, 100);
        }
        rig.rings[0].kick();
        rig.wires[0].send(&frame(round, 800));
        let deadline = std::time::Instant::now() + PATIENCE;
        while rig.rings[0].try_used().is_none() {
            assert!(std::time::Instant::now() < deadline);
        }
        for part in 1..8 {
            assert!(
                rig.rings[0].try_used().is_some(),
                "part {part} of frame {round} is missing"
            );
        }
    }
}
