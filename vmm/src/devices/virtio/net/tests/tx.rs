//! What the guest sends.

use super::rig::{EVENT_IDX, Rig, eventually, frame, net_config, tx_buffer, wire};
use crate::devices::virtio::test_ring::{Buf, INDIRECT, NEXT};

#[test]
fn frame_is_sent_with_its_header_as_it_is() {
    for features in [0, EVENT_IDX] {
        let mut rig = Rig::new(features);
        let mut bytes = frame(1, 500);
        bytes[..12].copy_from_slice(&[1, 3, 54, 0, 180, 5, 34, 0, 16, 0, 0, 0]);
        let head = rig.offer_tx(0, &bytes);
        rig.rings[1].kick();
        assert_eq!(rig.wires[0].recv(), bytes);
        let used = rig.rings[1].wait_used();
        assert_eq!((used.head, used.len), (head, 0));
        assert_eq!((rig.counter("tx_frames"), rig.counter("tx_bytes")), (1, 488));
    }
}

#[test]
fn frame_when_in_pieces_or_indirect_is_put_together() {
    let mut rig = Rig::new(0);
    let bytes = frame(1, 1000);
    let at = tx_buffer(0);
    rig.guest.write(at, &bytes);
    rig.rings[1].submit(&[
        Buf::Read(at, 7),
        Buf::Read(at + 7, 0),
        Buf::Read(at + 7, 900),
        Buf::Read(at + 907, 93),
    ]);
    rig.rings[1].kick();
    assert_eq!(rig.wires[0].recv(), bytes);
    let ring = &mut rig.rings[1];
    let table = tx_buffer(1);
    ring.descriptor_at(table, 0, at, 12, NEXT, 1);
    ring.descriptor_at(table, 1, at + 12, 988, 0, 0);
    ring.descriptor(9, table, 32, INDIRECT, 0);
    ring.offer(9);
    ring.kick();
    assert_eq!(rig.wires[0].recv(), bytes);
}

#[test]
fn frame_when_too_short_or_too_long_is_returned_and_counted() {
    let mut rig = Rig::new(0);
    for (index, len) in [0u32, 1, 11, 65_563, 1 << 20].into_iter().enumerate() {
        let used = rig.rings[1].round_trip(&[Buf::Read(tx_buffer(0), len)]);
        assert_eq!(used.len, 0);
        assert_eq!(rig.counter("tx_malformed"), index as u64 + 1, "{len}");
    }
    rig.rings[1].round_trip(&[Buf::Write(tx_buffer(0), 100)]);
    assert_eq!(rig.counter("tx_malformed"), 6);
    rig.rings[1].round_trip(&[Buf::Read(tx_buffer(0), 65_562)]);
    assert_eq!(rig.wires[0].recv().len(), 65_562);
    assert_eq!(rig.wires[0].try_recv(), None);
}

#[test]
fn frames_when_the_tap_is_full_wait_and_arrive_once_and_in_order() {
    let (socket, other) = wire(4096);
    let mut rig = Rig::over(&net_config(), EVENT_IDX, vec![socket], vec![other]);
    for number in 0..60 {
        rig.offer_tx(number, &frame(number as usize, 1000));
    }
    rig.rings[1].kick();
    eventually("a full TAP", || rig.counter("tx_blocked") > 0);
    assert!(!rig.spins("tx_blocked"));
    assert!(rig.counter("tx_frames") < 60);
    for number in 0..60 {
        assert_eq!(rig.wires[0].recv(), frame(number, 1000));
    }
    for _ in 0..60 {
        rig.rings[1].wait_used();
    }
    assert_eq!((rig.counter("tx_frames"), rig.wires[0].try_recv()), (60, None));
    // Kicks work again.
    rig.offer_tx(0, &frame(99, 100));
    rig.rings[1].kick();
    assert_eq!(rig.wires[0].recv(), frame(99, 100));
}

#[test]
fn frames_when_many_are_offered_at_once_interrupt_once_per_batch() {
    let mut rig = Rig::new(0);
    for number in 0..64 {
        rig.offer_tx(number, &frame(number as usize, 100));
    }
    rig.rings[1].kick();
    for number in 0..64 {
        assert_eq!(rig.wires[0].recv(), frame(number, 100));
    }
    rig.settle();
    assert!((1..=2).contains(&rig.guest.interrupts()));
}

#[test]
fn interrupt_when_the_driver_names_an_index_comes_there_only() {
    let mut rig = Rig::new(EVENT_IDX);
    rig.rings[1].set_used_event(2);
    for number in 0..4 {
        rig.offer_tx(number, &frame(1, 100));
        rig.rings[1].kick();
        rig.rings[1].wait_used();
        rig.settle();
        assert_eq!(rig.guest.interrupts(), u64::from(number == 2), "{number}");
    }
}

#[test]
fn frame_when_the_tap_is_full_and_then_gone_is_returned() {
    let (socket, other) = wire(4096);
    let mut rig = Rig::over(&net_config(), 0, vec![socket], vec![other]);
    for number in 0..60 {
        rig.offer_tx(number, &frame(number as usize, 1000));
    }
    rig.rings[1].kick();
    eventually("a full TAP", || rig.counter("tx_blocked") > 0);
    rig.wires.clear();
    for _ in 0..60 {
        rig.rings[1].wait_used();
    }
    assert!(rig.counter("tx_errors") > 0);
}
