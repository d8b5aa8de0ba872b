//! Suspend, resume, save, restore.

use super::rig::{EVENT_IDX, MERGE, Rig, device, eventually, frame, net_config, rx_buffer};
use crate::config::{NetConfig, RateLimiterConfig, TokenBucketConfig};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::test_ring::Buf;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ};

/// A device with buffers held, one unusable among them, a frame half received and frames it cannot send yet.
fn busy(config: &NetConfig, features: u64) -> Rig {
    let mut rig = Rig::with(config, features);
    rig.offer_rx(0, 300);
    rig.rings[0].kick();
    rig.wires[0].send(&frame(0, 100));
    assert_eq!(rig.rings[0].wait_used().len, 100);
    rig.offer_tx(0, &frame(0, 100));
    rig.rings[1].kick();
    assert_eq!(rig.wires[0].recv(), frame(0, 100));
    rig.rings[1].wait_used();
    // Held and not used.
    for number in 1..4 {
        rig.offer_rx(number, 300);
    }
    rig.rings[0].submit(&[Buf::Write(rx_buffer(4), 3)]);
    rig.rings[0].kick();
    rig.settle();
    rig
}

fn go_on(rig: &mut Rig) {
    for number in 1..4 {
        rig.wires[0].send(&frame(number, 200));
        assert_eq!(rig.rings[0].wait_used().len, 200);
        assert_eq!(rig.received(number as u64, 200), (1, frame(number, 200)));
    }
    // The unusable one.
    assert_eq!(rig.rings[0].wait_used().len, 0);
    assert_eq!(rig.wires[0].recv(), frame(5, 100));
    rig.rings[1].wait_used();
    rig.rings[1].submit(&[Buf::Read(super::rig::tx_buffer(5), 100)]);
    rig.rings[1].kick();
    assert_eq!(rig.wires[0].recv(), frame(5, 100));
}

#[test]
fn suspend_when_buffers_are_held_puts_them_back_and_resume_goes_on() {
    for features in [MERGE, MERGE | EVENT_IDX] {
        let mut rig = busy(&net_config(), features);
        let positions = rig.net.suspend();
        let at: Vec<_> = positions
            .iter()
            .map(|p| (p.index, p.next_avail, p.next_used))
            .collect();
        assert_eq!(at, [(0, 1, 1), (1, 1, 1)]);
        assert!(rig.net.suspend().is_empty());
        // Offered while nobody listens, and no kick after.
        rig.offer_tx(5, &frame(5, 100));
        rig.activate(&positions);
        go_on(&mut rig);
    }
}

#[test]
fn restore_when_saved_goes_on_in_another_device() {
    let mut rig = busy(&net_config(), MERGE | EVENT_IDX);
    let mut mac = [0; 6];
    rig.net.read_config(0, &mut mac);
    rig.net.handle().set_link(false);
    let positions = rig.net.suspend();
    let saved = rig.net.save().unwrap();
    rig.offer_tx(5, &frame(5, 100));
    let mut elsewhere = net_config();
    elsewhere.tap.name = "other".to_owned();
    rig.net = device(&elsewhere, &rig.sockets);
    rig.net.restore(&saved).unwrap();
    rig.activate(&positions);
    go_on(&mut rig);
    let mut space = [0; 8];
    rig.net.read_config(0, &mut space);
    assert_eq!((&space[..6], space[6]), (&mac[..], 0), "address and link stay");
}

#[test]
fn suspend_when_a_frame_waits_for_buffers_drops_that_frame_only() {
    let mut rig = Rig::new(MERGE);
    rig.offer_rx(0, 100);
    rig.rings[0].kick();
    rig.wires[0].send(&frame(1, 1000));
    rig.wait_first_bytes(&frame(1, 1000));
    let positions = rig.net.suspend();
    assert_eq!((positions[0].next_avail, positions[0].next_used), (0, 0));
    rig.activate(&positions);
    rig.wires[0].send(&frame(2, 90));
    assert_eq!(rig.rings[0].wait_used().len, 90);
    assert_eq!(rig.received(0, 90), (1, frame(2, 90)));
    assert_eq!(rig.counter("rx_dropped"), 1);
}

#[test]
fn suspend_when_the_tap_is_full_keeps_frames_in_the_ring() {
    let (socket, other) = super::rig::wire(4096);
    let mut rig = Rig::over(&net_config(), 0, vec![socket], vec![other]);
    for number in 0..60 {
        rig.offer_tx(number, &frame(number as usize, 1000));
    }
    rig.rings[1].kick();
    eventually("a full TAP", || rig.counter("tx_blocked") > 0);
    let positions = rig.net.suspend();
    assert_eq!(positions[1].next_avail, positions[1].next_used);
    assert_eq!(u64::from(positions[1].next_avail), rig.counter("tx_frames"));
    rig.activate(&positions);
    for number in 0..60 {
        assert_eq!(rig.wires[0].recv(), frame(number, 1000));
    }
}

#[test]
fn restore_when_pairs_were_in_use_switches_them_on() {
    let config = NetConfig {
        queue_pairs: 2,
        ..net_config()
    };
    let mut rig = Rig::with(&config, MERGE | 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ);
    rig.guest.write(rx_buffer(9), &[4, 0, 2, 0]);
    rig.rings[4].round_trip(&[Buf::Read(rx_buffer(9), 4), Buf::Write(rx_buffer(9) + 64, 1)]);
    let positions = rig.net.suspend();
    assert_eq!(positions.len(), 5);
    let saved = rig.net.save().unwrap();
    rig.net = device(&config, &rig.sockets);
    rig.net.restore(&saved).unwrap();
    rig.rings[2].submit(&[Buf::Write(rx_buffer(0), 300)]);
    rig.activate(&positions);
    rig.wires[1].send(&frame(1, 100));
    assert_eq!(rig.rings[2].wait_used().len, 100);

    let mut smaller = device(&net_config(), &rig.sockets[..1]);
    let error = smaller.restore(&saved).unwrap_err().to_string();
    assert!(error.contains("2 queue pairs"), "{error}");
}

#[test]
fn restore_when_tokens_were_spent_does_not_give_them_again() {
    let once = TokenBucketConfig {
        size: 2,
        one_time_burst: 0,
        refill_time_ms: 3_600_000,
    };
    let config = NetConfig {
        tx_rate_limiter: RateLimiterConfig {
            bandwidth: None,
            ops: Some(once),
        },
        ..net_config()
    };
    let mut rig = Rig::with(&config, 0);
    for number in 0..3 {
        rig.offer_tx(number, &frame(number as usize, 100));
    }
    rig.rings[1].kick();
    eventually("the limit", || rig.counter("tx_throttled") > 0);
    let positions = rig.net.suspend();
    let saved = rig.net.save().unwrap();
    rig.net = device(&config, &rig.sockets);
    rig.net.restore(&saved).unwrap();
    rig.activate(&positions);
    eventually("the limit", || rig.counter("tx_throttled") > 0);
    assert_eq!(rig.counter("tx_frames"), 0);
}

#[test]
fn restore_when_the_bytes_are_no_state_is_refused() {
    let rig = Rig::new(0);
    let saved = rig.net.save().unwrap();
    let mut fresh = device(&net_config(), &rig.sockets);
    assert!(fresh.restore(&saved).is_ok());
    for len in 0..saved.len() {
        assert!(fresh.restore(&saved[..len]).is_err(), "{len}");
    }
    assert!(fresh.restore(&[&saved[..], &[0]].concat()).is_err());
    let mut multicast = saved.clone();
    multicast[0] = 1;
    assert!(fresh.restore(&multicast).is_err());
    let mut no_pairs = saved;
    no_pairs[6] = 0;
    assert!(fresh.restore(&no_pairs).is_err());
}
