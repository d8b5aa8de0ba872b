//! Credit both ways, back-pressure, and much data.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::driver::Driver;
use super::stack::{Key, PATIENCE, Stack, pattern};
use super::streams::{guest_connects, host_connects};
use crate::devices::virtio::vsock::packet::Op;

/// Enough to go around every buffer many times.
pub(super) const MUCH: usize = 20 << 20;

/// Sends `data` from the guest while `reader` collects it on the host.
fn guest_sends(stack: &mut Stack, key: Key, mut reader: UnixStream, data: &[u8]) -> Vec<u8> {
    let len = data.len();
    let thread = std::thread::spawn(move || {
        let mut all = vec![0; len];
        reader.read_exact(&mut all).unwrap();
        (reader, all)
    });
    stack.send_all(key, data);
    stack.wait("the reader", |_| thread.is_finished());
    thread.join().unwrap().1
}

#[test]
fn guest_sends_20_mib_without_loss() {
    let mut stack = Stack::new();
    let (stream, key) = host_connects(&mut stack, 1024);
    let data = pattern(MUCH);
    assert!(guest_sends(&mut stack, key, stream, &data) == data);
    assert_eq!(stack.driver.handle.metrics().tx_bytes, MUCH as u64);
}

#[test]
fn host_sends_20_mib_without_loss() {
    let mut stack = Stack::new();
    let (mut stream, key) = host_connects(&mut stack, 1024);
    let data = pattern(MUCH);
    let sent = data.clone();
    let thread = std::thread::spawn(move || stream.write_all(&sent).map(|()| stream).unwrap());
    let received = stack.read_exact(key, MUCH);
    assert!(received == data);
    thread.join().unwrap();
    // Packets are as large as the guest's buffers (4,052 bytes of payload) while there is enough to send.
    let packets = stack.driver.handle.metrics().rx_packets;
    assert!(packets < 2 * (MUCH as u64) / 4052, "{packets} packets");
}

#[test]
fn both_directions_at_once_do_not_lock_up() {
    let mut stack = Stack::new();
    let (stream, key) = guest_connects(&mut stack, 1024);
    let data = pattern(4 << 20);
    let (mut reader, mut writer) = (stream.try_clone().unwrap(), stream);
    let upload = data.clone();
    let write = std::thread::spawn(move || writer.write_all(&upload).unwrap());
    let len = data.len();
    let read = std::thread::spawn(move || {
        let mut all = vec![0; len];
        reader.read_exact(&mut all).unwrap();
        all
    });
    let (mut sent, mut received) = (0, Vec::new());
    stack.wait("both transfers", |stack| {
        sent += stack.send_some(key, &data[sent..]);
        received.extend(stack.read(key));
        sent == len && received.len() == len && write.is_finished() && read.is_finished()
    });
    assert!(received == data);
    assert!(read.join().unwrap() == data);
}

#[test]
fn host_data_when_guest_has_no_credit_waits_and_asks_once() {
    let mut stack = Stack::new();
    stack.listening.insert(1024);
    let (mut stream, key) = host_connects(&mut stack, 1024);
    let buf_alloc = stack.sockets[&key].buf_alloc as usize;
    let data = pattern(2 * buf_alloc);
    let sent = data.clone();
    let thread = std::thread::spawn(move || stream.write_all(&sent).map(|()| stream).unwrap());
    // The guest's application does not read: exactly the announced buffer arrives (the stack checks "not more").
    stack.wait("a full buffer", |stack| {
        stack.sockets[&key].received.len() == buf_alloc
    });
    stack.run_for(Duration::from_millis(50));
    assert_eq!(stack.sockets[&key].received.len(), buf_alloc);
    let asked = stack
        .log
        .iter()
        .filter(|header| header.op == Op::CreditRequest as u16)
        .count();
    assert_eq!(asked, 1);
    assert!(stack.read_exact(key, 2 * buf_alloc) == data);
    thread.join().unwrap();
}

#[test]
fn guest_data_when_host_reads_slowly_is_held_back_by_credit() {
    let mut stack = Stack::new();
    let (mut stream, key) = host_connects(&mut stack, 1024);
    let buf_alloc = stack.sockets[&key].peer_buf_alloc as usize;
    let data = pattern(4 << 20);
    let mut sent = 0;
    // Nobody reads: the guest runs out of credit, with the device's buffer and the socket pair full.
    loop {
        stack.run_for(Duration::from_millis(5));
        let more = stack.send_some(key, &data[sent..]);
        if more == 0 {
            break;
        }
        sent += more;
    }
    assert!(sent >= buf_alloc && sent < data.len(), "{sent} bytes");
    let updates = |stack: &Stack| {
        stack
            .log
            .iter()
            .filter(|header| header.op == Op::CreditUpdate as u16)
            .count()
    };
    let before = updates(&stack);
    // A slow reader: the guest continues at its pace, in order and complete.
    let len = data.len();
    let thread = std::thread::spawn(move || {
        let mut all = Vec::new();
        let mut chunk = vec![0; 30_000];
        while all.len() < len {
            let count = stream.read(&mut chunk).unwrap();
            all.extend_from_slice(&chunk[..count]);
            std::thread::sleep(Duration::from_micros(200));
        }
        (stream, all)
    });
    stack.send_all(key, &data[sent..]);
    stack.wait("the reader", |_| thread.is_finished());
    assert!(thread.join().unwrap().1 == data);
    let updates = updates(&stack) - before;
    // An update per half of the buffer, not per read.
    assert!(
        (1..=len / (buf_alloc / 2) + 2).contains(&updates),
        "{updates} credit updates"
    );
}

#[test]
fn credit_request_is_answered() {
    let mut stack = Stack::new();
    let (_stream, key) = host_connects(&mut stack, 1024);
    stack.send_all(key, b"some");
    stack.control(key, Op::CreditRequest, 0);
    stack.wait("the update", |stack| {
        stack
            .log
            .last()
            .is_some_and(|header| header.op == Op::CreditUpdate as u16)
    });
    assert_eq!(stack.log.last().unwrap().fwd_cnt, 4);
    assert_eq!(stack.sockets[&key].credit(), stack.sockets[&key].peer_buf_alloc);
}

#[test]
fn stream_whose_reader_is_stuck_does_not_disturb_others() {
    let mut stack = Stack::new();
    let (stuck, stuck_key) = host_connects(&mut stack, 1024);
    let mut sent = 0;
    let data = pattern(1 << 20);
    loop {
        stack.run_for(Duration::from_millis(5));
        let more = stack.send_some(stuck_key, &data[sent..]);
        if more == 0 {
            break;
        }
        sent += more;
    }
    let (stream, key) = guest_connects(&mut stack, 1023);
    assert!(guest_sends(&mut stack, key, stream, &data) == data);
    // And does not keep the device from going away.
    drop(stack);
    let mut rest = Vec::new();
    let mut stuck = stuck;
    stuck.set_nonblocking(false).unwrap();
    stuck.read_to_end(&mut rest).unwrap();
    assert!(data.starts_with(&rest) && !rest.is_empty());
}

#[test]
fn rx_queue_when_it_was_empty_goes_on_after_new_buffers() {
    for event_idx in [false, true] {
        let driver = Driver::with(None, event_idx);
        let mut stack = Stack::on(driver);
        let (mut stream, key) = host_connects(&mut stack, 1024);
        let data = pattern(1 << 20);
        let sent = data.clone();
        let thread = std::thread::spawn(move || stream.write_all(&sent).map(|()| stream).unwrap());
        // The guest's kernel does nothing: all its buffers get used, and the device waits for more.
        let stalls = stack.driver.handle.metrics().rx_stalls;
        let deadline = std::time::Instant::now() + PATIENCE;
        // The announced buffer is smaller than the ring: let it be as large as the data.
        stack.sockets.get_mut(&key).unwrap().buf_alloc = 1 << 20;
        stack.control(key, Op::CreditUpdate, 0);
        while stack.driver.handle.metrics().rx_stalls == stalls {
            assert!(std::time::Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(stack.read_exact(key, data.len()) == data);
        thread.join().unwrap();
    }
}

#[test]
fn interrupts_are_per_batch_not_per_packet() {
    for event_idx in [false, true] {
        let mut stack = Stack::on(Driver::with(None, event_idx));
        let (mut stream, key) = host_connects(&mut stack, 1024);
        let before = (stack.driver.handle.metrics().rx_packets, stack.driver.interrupts);
        // 40 packets' worth, written in one go.
        stream.write_all(&pattern(160_000)).unwrap();
        stack.read_exact(key, 160_000);
        let packets = stack.driver.handle.metrics().rx_packets - before.0;
        let interrupts = stack.driver.interrupts - before.1;
        assert!(
            interrupts < packets / 2,
            "{interrupts} interrupts for {packets} packets"
        );
    }
}
