//! Queue pairs, the configuration space, features.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::rig::{MERGE, Rig, device, eventually, frame, net_config, rx_buffer, tx_buffer, wire};
use crate::config::NetConfig;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::test_ring::{BUFFERS, Buf, PATIENCE};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_MQ, VIRTIO_NET_F_MTU,
};

const MQ: u64 = 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ;
const COMMAND: u64 = BUFFERS + 0x10_0000;
const ACK: u64 = COMMAND + 0x1000;

fn multi_queue(features: u64) -> Rig {
    let config = NetConfig {
        queue_pairs: 3,
        ..net_config()
    };
    Rig::with(&config, features)
}

/// Sends a command on queue `queue` and returns the answer.
fn command(rig: &mut Rig, queue: usize, bytes: &[u8]) -> u8 {
    rig.guest.write(COMMAND, bytes);
    rig.guest.write(ACK, &[0xee]);
    let used = rig.rings[queue].round_trip(&[Buf::Read(COMMAND, bytes.len() as u32), Buf::Write(ACK, 1)]);
    assert_eq!(used.len, 1);
    rig.guest.read(ACK, 1)[0]
}

fn enabled(rig: &Rig) -> Vec<bool> {
    rig.sockets
        .iter()
        .map(|s| s.enabled.load(Ordering::SeqCst))
        .collect()
}

#[test]
fn pairs_when_set_are_switched_and_work() {
    let mut rig = multi_queue(MQ | MERGE);
    assert_eq!(enabled(&rig), [true, false, false]);
    // Offered before the pair is in use, taken after.
    rig.rings[2].submit(&[Buf::Write(rx_buffer(0), 300)]);
    rig.guest.write(tx_buffer(0), &frame(1, 100));
    rig.rings[3].submit(&[Buf::Read(tx_buffer(0), 100)]);
    rig.rings[3].kick();
    rig.wires[1].send(&frame(2, 200));
    rig.settle();
    assert_eq!((rig.rings[2].try_used(), rig.rings[3].try_used()), (None, None));

    assert_eq!(command(&mut rig, 6, &[4, 0, 2, 0]), 0);
    assert_eq!(enabled(&rig), [true, true, false]);
    assert_eq!(rig.wires[1].recv(), frame(1, 100));
    assert_eq!(rig.rings[2].wait_used().len, 200);

    assert_eq!(command(&mut rig, 6, &[4, 0, 1, 0]), 0);
    assert_eq!(enabled(&rig), [true, false, false]);
    rig.rings[2].submit(&[Buf::Write(rx_buffer(0), 300)]);
    rig.rings[2].kick();
    rig.wires[1].send(&frame(3, 200));
    rig.settle();
    assert_eq!(rig.rings[2].try_used(), None);
    assert_eq!(command(&mut rig, 6, &[4, 0, 3, 0]), 0);
    assert_eq!(rig.rings[2].wait_used().len, 200);
    assert_eq!(rig.counter("control_commands"), 3);
}

#[test]
fn pairs_when_nothing_changes_are_not_switched() {
    let mut rig = multi_queue(MQ);
    let changes = |rig: &Rig| -> u32 { rig.sockets.iter().map(|s| s.changes.load(Ordering::SeqCst)).sum() };
    let before = changes(&rig);
    for _ in 0..100 {
        assert_eq!(command(&mut rig, 6, &[4, 0, 1, 0]), 0);
    }
    assert_eq!(changes(&rig), before);
    assert_eq!(rig.counter("control_commands"), 100);
}

#[test]
fn pairs_when_switched_in_a_loop_are_limited_and_all_are_answered() {
    let started = Instant::now();
    let mut rig = multi_queue(MQ);
    // One more than may be made at once (the driver's start took the first), or more where commands come no faster than
    // they may.
    let mut number = 0;
    while number < 16 || rig.counter("control_throttled") == 0 {
        number += 1;
        assert_eq!(command(&mut rig, 6, &[4, 0, 1 + number % 2, 0]), 0);
        assert!(started.elapsed() < PATIENCE, "{number} commands");
    }
    let least = Duration::from_secs(u64::from(number) - 15);
    assert!(started.elapsed() >= least, "{:?}", started.elapsed());
    assert_eq!(rig.counter("control_commands"), u64::from(number));
}

#[test]
fn pairs_when_the_host_takes_its_time_hold_up_nothing_else() {
    let mut rig = multi_queue(MQ | MERGE);
    rig.sockets[1].held.store(true, Ordering::SeqCst);
    rig.guest.write(COMMAND, &[4, 0, 2, 0]);
    rig.guest.write(ACK, &[0xee]);
    rig.rings[6].submit(&[Buf::Read(COMMAND, 4), Buf::Write(ACK, 1)]);
    rig.rings[6].kick();
    eventually("the change to begin", || {
        rig.sockets[1].changes.load(Ordering::SeqCst) > 1
    });
    // Frames pass meanwhile.
    rig.offer_rx(0, 300);
    rig.rings[0].kick();
    rig.wires[0].send(&frame(1, 200));
    assert_eq!(rig.rings[0].wait_used().len, 200);
    assert_eq!(rig.rings[6].try_used(), None);
    // Whoever suspends the device waits for the change, and the driver is answered.
    let sockets = rig.sockets.clone();
    let release = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        sockets[1].held.store(false, Ordering::SeqCst);
    });
    let positions = rig.net.suspend();
    release.join().unwrap();
    assert_eq!(rig.guest.read(ACK, 1), [0]);
    assert_eq!(enabled(&rig), [true, true, false]);
    assert!(positions.iter().all(|at| at.index != 6 || at.next_used == 1));
}

#[test]
fn start_when_nothing_changes_asks_nothing_of_the_tap() {
    let mut rig = multi_queue(MQ);
    let changes = |rig: &Rig| -> u32 { rig.sockets.iter().map(|s| s.changes.load(Ordering::SeqCst)).sum() };
    let before = changes(&rig);
    for _ in 0..20 {
        let positions = rig.net.suspend();
        rig.activate(&positions);
    }
    assert_eq!(changes(&rig), before);
    // A driver that wants something else each time is slowed down.
    let started = Instant::now();
    for round in 0..20 {
        rig.net.reset();
        rig.features ^= 1 << VIRTIO_NET_F_GUEST_CSUM;
        let guest = &rig.guest;
        let sizes = rig.net.queue_sizes().iter().enumerate();
        rig.rings = sizes
            .map(|(index, size)| guest.ring(index, *size, false))
            .collect();
        rig.activate(&[]);
        assert_eq!(changes(&rig), before + round + 1);
    }
    assert!(
        started.elapsed() >= Duration::from_millis(200),
        "{:?}",
        started.elapsed()
    );
}

#[test]
fn command_when_not_understood_is_answered_with_an_error() {
    let mut rig = multi_queue(MQ);
    for bad in [
        &[4u8, 0, 0, 0][..],
        &[4, 0, 4, 0],
        &[4, 0, 1, 0x80],
        &[4, 1, 1, 0],
        &[0, 0, 1, 0],
        &[4, 0, 1],
        &[4, 0, 2, 0, 0],
        &[4],
    ] {
        assert_eq!(command(&mut rig, 6, bad), 1, "{bad:?}");
    }
    // No room for an answer: nothing is done.
    rig.guest.write(COMMAND, &[4, 0, 2, 0]);
    assert_eq!(rig.rings[6].round_trip(&[Buf::Read(COMMAND, 4)]).len, 0);
    assert_eq!(rig.rings[6].round_trip(&[Buf::Write(ACK, 1)]).len, 1);
    assert_eq!(enabled(&rig), [true, false, false]);
    assert_eq!(rig.counter("control_errors"), 10);
}

#[test]
fn pairs_when_the_host_refuses_stay_as_they_were() {
    let mut rig = multi_queue(MQ);
    rig.sockets[2].refuse.store(true, Ordering::SeqCst);
    assert_eq!(command(&mut rig, 6, &[4, 0, 3, 0]), 1);
    assert_eq!(enabled(&rig), [true, false, false]);
    assert_eq!(command(&mut rig, 6, &[4, 0, 2, 0]), 0);
}

#[test]
fn control_queue_when_the_driver_knows_no_pairs_follows_the_first_pair() {
    let mut rig = multi_queue(1 << VIRTIO_NET_F_CTRL_VQ);
    assert_eq!(command(&mut rig, 2, &[4, 0, 2, 0]), 1);
    assert_eq!(command(&mut rig, 2, &[4, 0, 1, 0]), 0);
    let positions = rig.net.suspend();
    assert_eq!(
        positions.iter().map(|p| p.index).collect::<Vec<_>>(),
        [0, 1, 2, 3, 4, 5, 6]
    );
}

#[test]
fn reset_when_pairs_were_set_goes_back_to_one() {
    let mut rig = multi_queue(MQ);
    assert_eq!(command(&mut rig, 6, &[4, 0, 3, 0]), 0);
    rig.net.reset();
    let guest = &rig.guest;
    let sizes = rig.net.queue_sizes().iter().enumerate();
    rig.rings = sizes
        .map(|(index, size)| guest.ring(index, *size, false))
        .collect();
    rig.activate(&[]);
    assert_eq!(enabled(&rig), [true, false, false]);
}

#[test]
fn activate_when_offloads_are_negotiated_tells_the_tap() {
    let (csum, tso4, tso6) = (
        1 << VIRTIO_NET_F_GUEST_CSUM,
        1 << VIRTIO_NET_F_GUEST_TSO4,
        1 << VIRTIO_NET_F_GUEST_TSO6,
    );
    for (features, flags) in [
        (0, 0),
        (csum, 1),
        (csum | tso4, 3),
        (csum | tso4 | tso6, 7),
        (tso4, 0),
    ] {
        let rig = Rig::new(features);
        eventually("TUNSETOFFLOAD", || {
            rig.sockets[0].offload.load(Ordering::SeqCst) == flags
        });
    }
}

#[test]
fn configuration_space_tells_mac_pairs_and_mtu() {
    let config = NetConfig {
        mac: Some([2, 1, 2, 3, 4, 5]),
        mtu: Some(9000),
        queue_pairs: 2,
        ..net_config()
    };
    let net = device(&config, &[wire(4096).0, wire(4096).0]);
    let mut space = [0xff; 14];
    net.read_config(0, &mut space);
    assert_eq!(space, [2, 1, 2, 3, 4, 5, 1, 0, 2, 0, 0x28, 0x23, 0, 0]);
    assert_eq!(net.queue_sizes(), [64, 64, 64, 64, 16]);
    assert_eq!(
        net.features() & (MQ | 1 << VIRTIO_NET_F_MTU),
        MQ | 1 << VIRTIO_NET_F_MTU
    );
    let one = device(&net_config(), &[wire(4096).0]);
    assert_eq!(one.features() & (MQ | 1 << VIRTIO_NET_F_MTU), 0);
    assert_eq!(one.queue_sizes(), [64, 64]);
}

#[test]
fn mac_when_not_given_is_local_stable_and_different_for_other_taps() {
    let mac = |config: &NetConfig| {
        let mut mac = [0; 6];
        device(config, &[wire(4096).0]).read_config(0, &mut mac);
        mac
    };
    let mut other = net_config();
    other.tap.name = "tap1".to_owned();
    let mut elsewhere = net_config();
    elsewhere.tap.netns = Some("/run/netns/pod".into());
    assert_eq!(mac(&net_config()), mac(&net_config()));
    assert_eq!(mac(&net_config())[0], 2);
    assert_ne!(mac(&net_config()), mac(&other));
    assert_ne!(mac(&net_config()), mac(&elsewhere));
}
