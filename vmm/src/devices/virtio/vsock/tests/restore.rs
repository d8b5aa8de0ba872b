//! Pauses, which nobody notices, and restores in another process, of which the guest is told.

use std::io::{Read, Write};
use std::time::Duration;

use super::driver::{Driver, GUEST_CID};
use super::stack::{PATIENCE, Stack, alongside, pattern};
use super::streams::{bounded, guest_connects, host_connects};
use crate::config::VsockConfig;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::state::{self, StateError};
use crate::devices::virtio::test_ring::TestGuest;
use crate::devices::virtio::vsock::packet::Op;
use crate::devices::virtio::vsock::state::VsockState;
use crate::devices::virtio::vsock::{Vsock, VsockError};

/// Long enough to see what should not happen.
const A_WHILE: Duration = Duration::from_millis(50);

fn with_event_buffers(event_idx: bool) -> Stack {
    let mut driver = Driver::with(None, event_idx);
    (0..8).for_each(|_| driver.post_event());
    Stack::on(driver)
}

/// What Linux does with a TRANSPORT_RESET.
fn take_event(stack: &mut Stack) {
    assert_eq!(stack.driver.wait_event(), 0);
    stack.sockets.clear();
    stack.driver.post_event();
}

#[test]
fn pause_when_streams_are_open_keeps_them_and_what_was_on_its_way() {
    for event_idx in [false, true] {
        let mut stack = with_event_buffers(event_idx);
        let (mut accepted, guest_key) = guest_connects(&mut stack, 1023);
        let (mut connected, host_key) = host_connects(&mut stack, 1024);
        for round in 0..3u8 {
            let data = pattern(50_000 + usize::from(round));
            let header = stack.header(guest_key, Op::Rw, 0, 4);
            // One packet is in the ring and its kick is lost with the pause.
            stack.driver.pause(|driver| {
                driver.send_without_kick(header, &[round; 4]);
                connected.write_all(&data).unwrap();
            });
            let mut got = [0; 4];
            accepted.read_exact(&mut got).unwrap();
            assert_eq!(got, [round; 4]);
            assert_eq!(stack.read_exact(host_key, data.len()), data);
        }
        // Host connections are not held back (Firecracker #6100): nothing was reset.
        let (mut new, key) = host_connects(&mut stack, 1025);
        new.write_all(b"new").unwrap();
        assert_eq!(stack.read_exact(key, 3), b"new");
        assert_eq!(stack.driver.event.try_used(), None);
        assert_eq!(stack.driver.handle.metrics().transport_resets, 0);
    }
}

#[test]
fn pause_when_calls_are_made_meanwhile_answers_them_later() {
    let mut stack = Stack::new();
    stack.listening.insert(1024);
    let handle = stack.driver.handle.clone();
    let mut thread = None;
    stack.driver.pause(|_| {
        thread = Some(std::thread::spawn(move || handle.connect(1024, PATIENCE)));
        std::thread::sleep(A_WHILE);
    });
    let thread = thread.unwrap();
    stack.wait("the connection", |_| thread.is_finished());
    thread.join().unwrap().unwrap();
}

#[test]
fn reset_when_suspended_ends_the_streams() {
    let mut stack = Stack::new();
    let (mut accepted, _) = guest_connects(&mut stack, 1023);
    stack.driver.device.suspend();
    stack.driver.device.reset();
    assert_eq!(accepted.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn restore_tells_the_guest_and_holds_packets_back_until_it_has_taken_note() {
    for event_idx in [false, true] {
        let mut stack = with_event_buffers(event_idx);
        let (_old, old_key) = host_connects(&mut stack, 1024);
        stack.driver.restore(|_| {});
        let handle = stack.driver.handle.clone();
        let thread = std::thread::spawn(move || handle.connect(1024, PATIENCE));
        // The event is in the queue, the guest has not looked (Firecracker #5882).
        stack.driver.expect_silence(A_WHILE);
        assert_eq!(stack.driver.wait_event(), 0);
        stack.driver.expect_silence(A_WHILE);
        assert!(!thread.is_finished());
        stack.sockets.clear();
        stack.driver.post_event();
        stack.wait("the connection", |_| thread.is_finished());
        let mut stream = bounded(thread.join().unwrap().unwrap());
        let key = stack.accept();
        // A process of the guest may still hold the old socket (Firecracker #5688).
        assert_ne!(key.1, old_key.1);
        stream.write_all(b"after").unwrap();
        assert_eq!(stack.read_exact(key, 5), b"after");
        assert_eq!(stack.driver.handle.metrics().transport_resets, 1);
        assert_eq!(stack.driver.event.try_used(), None);
    }
}

#[test]
fn restore_when_tx_packets_are_in_the_ring_takes_them_without_a_kick() {
    // Firecracker #5958: avail_event is behind the guest's index, so with EVENT_IDX no kick will ever come.
    let mut stack = with_event_buffers(true);
    let mut listener = None;
    let key = (60_000, 1023);
    let header = stack.header(key, Op::Request, 0, 0);
    stack.driver.restore(|driver| {
        driver.send_without_kick(header, &[]);
        listener = Some(driver.handle.listen(1023).unwrap());
    });
    let stream = listener.as_ref().unwrap().accept_timeout(PATIENCE);
    drop(stream.unwrap());
    take_event(&mut stack);
    assert_eq!(stack.connect(1023).map(|key| key.1), Some(1023));
}

#[test]
fn restore_when_the_guest_goes_on_with_old_streams_drops_their_packets_then_refuses_them() {
    let mut stack = with_event_buffers(true);
    let (_old, key) = guest_connects(&mut stack, 1023);
    stack.driver.restore(|_| {});
    for _ in 0..600 {
        stack.send_raw_data(key, b"lost");
    }
    stack.wait("the ring to be empty", |stack| stack.driver.reap() == 0);
    take_event(&mut stack);
    stack.driver.expect_silence(A_WHILE);
    let header = stack.header(key, Op::Rw, 0, 4);
    stack.driver.send(header, b"late");
    assert_eq!(stack.driver.receive().header.op, Op::Rst as u16);
}

#[test]
fn restore_when_repeated_tells_the_guest_each_time() {
    let mut stack = with_event_buffers(true);
    for _ in 0..3 {
        let (_stream, _) = host_connects(&mut stack, 1024);
        stack.driver.restore(|_| {});
        take_event(&mut stack);
    }
    // Before the guest has answered: the next process starts over.
    stack.driver.restore(|_| {});
    assert_eq!(stack.driver.wait_event(), 0);
    stack.driver.restore(|_| {});
    take_event(&mut stack);
    host_connects(&mut stack, 1024);
}

#[test]
fn restore_when_paused_before_the_answer_still_waits_for_it() {
    let mut stack = with_event_buffers(true);
    stack.driver.restore(|_| {});
    assert_eq!(stack.driver.wait_event(), 0);
    stack.driver.pause(|_| {});
    stack.listening.insert(1024);
    let handle = stack.driver.handle.clone();
    let error = alongside(&mut stack, move || handle.connect(1024, A_WHILE)).unwrap_err();
    assert!(matches!(error, VsockError::ConnectTimeout { .. }), "{error}");
    stack.driver.pause(|driver| driver.post_event());
    host_connects(&mut stack, 1024);
}

#[test]
fn restore_when_there_is_no_event_buffer_waits_for_one() {
    let mut stack = Stack::new();
    stack.driver.restore(|_| {});
    stack.driver.expect_silence(A_WHILE);
    stack.driver.survive_malformed_events();
    stack.driver.expect_silence(A_WHILE);
    stack.driver.post_event();
    take_event(&mut stack);
    host_connects(&mut stack, 1024);
}

#[test]
fn restore_when_the_event_ring_is_broken_harms_nobody_else() {
    let mut stack = Stack::new();
    stack.driver.restore(|_| {});
    stack.driver.event.set_avail_index(40_000);
    stack.driver.event.kick();
    stack.driver.expect_silence(A_WHILE);
    stack.driver.restart();
    host_connects(&mut stack, 1024);
}

#[test]
fn restore_when_the_driver_was_not_up_resets_nothing() {
    let config = VsockConfig {
        guest_cid: GUEST_CID,
        uds_path: None,
    };
    let (device, _handle) = Vsock::new(&config).unwrap();
    let state = device.save().unwrap();
    let (mut device, handle) = Vsock::new(&config).unwrap();
    device.restore(&state).unwrap();
    let mut stack = Stack::on(Driver::around(device, handle, true));
    host_connects(&mut stack, 1024);
    assert_eq!(stack.driver.handle.metrics().transport_resets, 0);
}

#[test]
fn restore_when_the_driver_starts_anew_does_not_hold_back() {
    let mut stack = with_event_buffers(true);
    stack.driver.restore(|_| {});
    assert_eq!(stack.driver.wait_event(), 0);
    stack.driver.restart();
    stack.sockets.clear();
    host_connects(&mut stack, 1024);
}

#[test]
fn restore_when_the_state_is_not_of_this_guest_is_refused() {
    let guest = TestGuest::new();
    let good = VsockState {
        guest_cid: u64::from(GUEST_CID),
        driver_up: true,
        next_port: 1 << 30,
    };
    let states = [
        VsockState {
            guest_cid: 4,
            ..good.clone()
        },
        VsockState {
            next_port: 1024,
            ..good.clone()
        },
        VsockState {
            next_port: u32::MAX,
            ..good
        },
    ];
    for bad in states {
        let (mut device, _handle) = Vsock::new(&VsockConfig {
            guest_cid: GUEST_CID,
            uds_path: None,
        })
        .unwrap();
        let error = device
            .restore(&state::encode("vsock", &bad).unwrap())
            .unwrap_err();
        assert!(matches!(error, StateError::Invalid { .. }), "{error}");
        assert!(device.restore(&[]).is_err());
        // Nothing of it was taken over.
        guest.activate(&mut device, 8, true);
        device.reset();
    }
}
