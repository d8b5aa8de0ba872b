//! Both directions stuck at once, rate limits, the link.

use super::rig::{EVENT_IDX, MERGE, Rig, eventually, frame, net_config, wire};
use crate::config::{NetConfig, RateLimiterConfig, TokenBucketConfig};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::transport::mmio::interrupt::INTERRUPT_CONFIG;

/// A driver without receive buffers that sends into a full TAP: nothing moves in either direction (CVE-2020-16843).
fn stuck(features: u64) -> (Rig, usize) {
    let (socket, other) = wire(4096);
    let mut rig = Rig::over(&net_config(), features, vec![socket], vec![other]);
    let mut waiting = 0;
    while rig.wires[0].try_send(&frame(waiting, 200)) {
        waiting += 1;
    }
    for number in 0..60 {
        rig.offer_tx(number, &frame(number as usize, 1000));
    }
    rig.rings[1].kick();
    eventually("both stuck", || {
        rig.counter("tx_blocked") > 0 && rig.counter("rx_starved") > 0
    });
    (rig, waiting)
}

fn receive_all(rig: &mut Rig, count: usize) {
    for number in 0..count {
        rig.offer_rx(0, 300);
        rig.rings[0].kick();
        assert_eq!(rig.rings[0].wait_used().len, 200);
        assert_eq!(rig.received(0, 200).1, frame(number, 200));
    }
}

fn send_all(rig: &mut Rig) {
    for number in 0..60 {
        assert_eq!(rig.wires[0].recv(), frame(number, 1000));
    }
}

#[test]
fn both_directions_when_stuck_go_on_in_either_order() {
    for features in [MERGE, MERGE | EVENT_IDX, 0] {
        for rx_first in [true, false] {
            let (mut rig, waiting) = stuck(features);
            assert!(waiting > 1);
            assert!(!rig.spins("rx_starved") && !rig.spins("tx_blocked"));
            if rx_first {
                receive_all(&mut rig, waiting);
                send_all(&mut rig);
            } else {
                send_all(&mut rig);
                receive_all(&mut rig, waiting);
            }
            // And again, from the state they are in now.
            rig.wires[0].send(&frame(7, 200));
            rig.offer_rx(1, 300);
            rig.rings[0].kick();
            assert_eq!(rig.rings[0].wait_used().len, 200);
        }
    }
}

fn ops(size: u64, refill_time_ms: u64) -> RateLimiterConfig {
    RateLimiterConfig {
        bandwidth: None,
        ops: Some(TokenBucketConfig {
            size,
            one_time_burst: 0,
            refill_time_ms,
        }),
    }
}

#[test]
fn frames_when_over_the_limit_are_late_but_all_there() {
    let config = NetConfig {
        rx_rate_limiter: ops(5, 50),
        tx_rate_limiter: ops(5, 50),
        ..net_config()
    };
    let mut rig = Rig::with(&config, MERGE | EVENT_IDX);
    for number in 0..15 {
        rig.offer_rx(number, 300);
        rig.offer_tx(number, &frame(number as usize, 100));
        rig.wires[0].send(&frame(number as usize, 200));
    }
    rig.rings[0].kick();
    rig.rings[1].kick();
    for number in 0..15 {
        assert_eq!(rig.wires[0].recv(), frame(number, 100));
        assert_eq!(rig.rings[0].wait_used().len, 200);
    }
    for counter in ["rx_throttled", "tx_throttled"] {
        // Once each time the bucket is empty, not a poll.
        assert!((1..=20).contains(&rig.counter(counter)), "{counter}");
    }
}

#[test]
fn set_rate_limits_when_frames_wait_lets_them_go() {
    let config = NetConfig {
        rx_rate_limiter: ops(1, 3_600_000),
        tx_rate_limiter: ops(1, 3_600_000),
        ..net_config()
    };
    let mut rig = Rig::with(&config, MERGE);
    for number in 0..3 {
        rig.offer_rx(number, 300);
        rig.offer_tx(number, &frame(number as usize, 100));
        rig.wires[0].send(&frame(number as usize, 200));
    }
    rig.rings[0].kick();
    rig.rings[1].kick();
    eventually("both throttled", || {
        rig.counter("rx_throttled") > 0 && rig.counter("tx_throttled") > 0
    });
    assert!(!rig.spins("rx_throttled") && !rig.spins("tx_throttled"));
    let handle = rig.net.handle();
    assert!(handle.set_rate_limits(ops(0, 1), ops(1, 1)).is_err());
    handle
        .set_rate_limits(RateLimiterConfig::default(), RateLimiterConfig::default())
        .unwrap();
    for number in 0..3 {
        assert_eq!(rig.wires[0].recv(), frame(number, 100));
        assert_eq!(rig.rings[0].wait_used().len, 200);
    }
}

#[test]
fn set_link_when_changed_tells_the_driver_once() {
    let rig = Rig::new(0);
    let status = |rig: &Rig| {
        let mut data = [0; 2];
        rig.net.read_config(6, &mut data);
        u16::from_le_bytes(data)
    };
    assert_eq!(status(&rig), 1);
    rig.guest.interrupts();
    rig.net.handle().set_link(false);
    assert_eq!((status(&rig), rig.guest.wait_interrupt()), (0, 1));
    assert_eq!(rig.guest.status() & INTERRUPT_CONFIG, INTERRUPT_CONFIG);
    rig.net.handle().set_link(false);
    assert_eq!(rig.guest.interrupts(), 0);
    rig.net.handle().set_link(true);
    assert_eq!((status(&rig), rig.guest.wait_interrupt()), (1, 1));
}
