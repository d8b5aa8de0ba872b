//! Drivers that break the rules.

use super::rig::{EVENT_IDX, MERGE, Rig, eventually, frame, net_config, rx_buffer, tx_buffer};
use crate::config::NetConfig;
use crate::devices::virtio::test_ring::{Buf, flood, survive_malformed_chains};
use crate::guest_log::recorder::assert_limited;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ};

#[test]
fn malformed_chains_are_returned_on_every_queue() {
    let config = NetConfig {
        queue_pairs: 2,
        ..net_config()
    };
    for more in [0, MERGE] {
        let mut rig = Rig::with(&config, 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ | more);
        for queue in [0, 1, 4] {
            survive_malformed_chains(&mut rig.rings[queue]);
        }
        for (queue, message) in [
            (0, "net: receive chain dropped"),
            (1, "net: transmit chain dropped"),
            (4, "net: control chain dropped"),
        ] {
            assert_limited(&[message], 300, || flood(&mut rig.rings[queue], 300));
        }
        rig.offer_rx(0, 200);
        rig.rings[0].kick();
        rig.wires[0].send(&frame(1, 100));
        assert_eq!(rig.rings[0].wait_used().len, 100);
        rig.offer_tx(0, &frame(2, 100));
        rig.rings[1].kick();
        assert_eq!(rig.wires[0].recv(), frame(2, 100));
    }
}

#[test]
fn receive_buffer_when_too_small_or_of_the_wrong_direction_is_returned_empty() {
    let mut rig = Rig::new(MERGE);
    for buffer in [
        Buf::Write(rx_buffer(0), 0),
        Buf::Write(rx_buffer(0), 11),
        Buf::Read(rx_buffer(0), 2000),
    ] {
        assert_eq!(rig.rings[0].round_trip(&[buffer]).len, 0);
    }
    assert_eq!(rig.counter("rx_errors"), 3);
    rig.offer_rx(0, 12);
    rig.rings[0].kick();
    rig.wires[0].send(&frame(1, 12));
    assert_eq!(rig.rings[0].wait_used().len, 12);
}

#[test]
fn receive_buffer_when_unusable_behind_usable_ones_is_returned_in_its_turn() {
    let mut rig = Rig::new(MERGE);
    let heads = [rig.offer_rx(0, 100), rig.offer_rx(1, 5), rig.offer_rx(2, 100)];
    rig.rings[0].kick();
    rig.wires[0].send(&frame(1, 50));
    rig.wires[0].send(&frame(2, 60));
    let used: Vec<_> = (0..3).map(|_| rig.rings[0].wait_used()).collect();
    assert_eq!(used.iter().map(|u| u.head).collect::<Vec<_>>(), heads);
    assert_eq!(used.iter().map(|u| u.len).collect::<Vec<_>>(), [50, 0, 60]);
}

#[test]
fn receive_buffer_when_unusable_amid_a_frame_costs_that_frame_only() {
    let mut rig = Rig::new(MERGE);
    rig.offer_rx(0, 100);
    rig.offer_rx(1, 5);
    rig.rings[0].kick();
    rig.wires[0].send(&frame(1, 1000));
    assert_eq!(
        (rig.rings[0].wait_used().len, rig.rings[0].wait_used().len),
        (0, 0)
    );
    rig.offer_rx(2, 100);
    rig.rings[0].kick();
    rig.wires[0].send(&frame(2, 60));
    assert_eq!(rig.rings[0].wait_used().len, 60);
    assert_eq!(rig.counter("rx_dropped"), 1);
}

#[test]
fn avail_index_when_it_jumps_stops_that_queue_only() {
    for event_idx in [0, EVENT_IDX] {
        for queue in [0, 1] {
            let mut rig = Rig::new(MERGE | event_idx);
            rig.rings[queue].set_avail_index(30_000);
            rig.rings[queue].kick();
            rig.wires[0].send(&frame(1, 100));
            rig.settle();
            assert!(!rig.spins("rx_starved"));
            if queue == 0 {
                rig.offer_tx(0, &frame(2, 100));
                rig.rings[1].kick();
                assert_eq!(rig.wires[0].recv(), frame(2, 100));
            } else {
                rig.offer_rx(0, 100);
                rig.rings[0].kick();
                assert_eq!(rig.rings[0].wait_used().len, 100);
            }
        }
    }
}

#[test]
fn head_when_outside_the_table_is_skipped() {
    let mut rig = Rig::new(MERGE);
    for queue in [0, 1] {
        rig.rings[queue].offer(64);
        rig.rings[queue].offer(0xffff);
    }
    rig.offer_rx(0, 100);
    rig.rings[0].kick();
    rig.wires[0].send(&frame(1, 100));
    assert_eq!(rig.rings[0].wait_used().len, 100);
    rig.rings[1].round_trip(&[Buf::Read(tx_buffer(0), 100)]);
    assert_eq!(rig.wires[0].recv().len(), 100);
}

#[test]
fn other_end_when_gone_does_not_make_the_loop_spin() {
    let mut rig = Rig::new(MERGE);
    rig.offer_rx(0, 100);
    rig.rings[0].kick();
    rig.wires.clear();
    eventually("the end of the TAP", || rig.counter("rx_errors") > 0);
    assert!(!rig.spins("rx_errors"));
    // What is sent is refused and returned.
    rig.rings[1].round_trip(&[Buf::Read(tx_buffer(0), 100)]);
    assert_eq!(rig.counter("tx_errors"), 1);
}
