//! Guests that break the rules: nothing they send may harm the host or other connections.

use std::io::{Read, Write};
use std::time::Duration;

use super::driver::{Driver, GUEST_CID};
use super::stack::{Stack, pattern};
use super::streams::{guest_connects, host_connects};
use crate::devices::virtio::test_ring::{BUFFERS, Buf, NEXT, WRITE, flood, survive_malformed_chains};
use crate::devices::virtio::vsock::packet::{HEADER_LEN, Header, Op, SHUTDOWN_SEND, TYPE_STREAM};
use crate::guest_log::recorder::assert_limited;

fn header(op: u16, src_port: u32, dst_port: u32) -> Header {
    Header {
        src_cid: u64::from(GUEST_CID),
        dst_cid: 2,
        src_port,
        dst_port,
        type_: TYPE_STREAM,
        op,
        buf_alloc: 1 << 18,
        ..Header::default()
    }
}

/// The device still does its work.
fn assert_works(mut driver: Driver) {
    // Answers to what was sent before are of no interest.
    let mut any = true;
    while std::mem::take(&mut any) {
        driver.settle();
        while driver.try_receive().is_some() {
            any = true;
        }
    }
    let mut stack = Stack::on(driver);
    let (mut stream, key) = guest_connects(&mut stack, 4242);
    stack.send_all(key, b"fine");
    let mut data = [0; 4];
    stream.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"fine");
}

#[test]
fn header_on_the_wire_is_as_specified() {
    let header = Header {
        src_cid: 0x0102_0304_0506_0708,
        dst_cid: 2,
        src_port: 0x1112_1314,
        dst_port: 0x2122_2324,
        len: 0x3132_3334,
        type_: 0x4142,
        op: 0x5152,
        flags: 0x6162_6364,
        buf_alloc: 0x7172_7374,
        fwd_cnt: 0x8182_8384,
    };
    let wire = header.to_wire();
    assert_eq!(wire.len(), 44);
    assert_eq!(wire[..10], [8, 7, 6, 5, 4, 3, 2, 1, 2, 0]);
    assert_eq!(wire[16..20], [0x14, 0x13, 0x12, 0x11]);
    assert_eq!(wire[28..32], [0x42, 0x41, 0x52, 0x51]);
    assert_eq!(wire[40..], [0x84, 0x83, 0x82, 0x81]);
    assert_eq!(Header::from_wire(&wire), header);
}

#[test]
fn packets_for_others_are_dropped_and_unknown_ones_refused() {
    let mut driver = Driver::new();
    for (src, dst) in [(4, 2), (3, 3), (3, 0), (3, u64::MAX), (0, 2), (2, 2)] {
        let mut packet = header(Op::Request as u16, 5, 6);
        (packet.src_cid, packet.dst_cid) = (src, dst);
        driver.send(packet, &[]);
    }
    // A refusal is never refused.
    driver.send(header(Op::Rst as u16, 5, 6), &[]);
    driver.expect_silence(Duration::from_millis(30));
    for op in [0, 2, 4, 5, 6, 7, 8, 0xffff] {
        driver.send(header(op, 5, 6), &[]);
        let answer = driver.receive().header;
        assert_eq!(
            (answer.op, answer.src_port, answer.dst_port),
            (Op::Rst as u16, 6, 5),
            "op {op}"
        );
    }
    // SEQPACKET, and types that do not exist.
    for type_ in [0, 2, 0xffff] {
        let mut packet = header(Op::Request as u16, 5, 6);
        packet.type_ = type_;
        driver.send(packet, &[]);
        let answer = driver.receive().header;
        assert_eq!((answer.op, answer.type_), (Op::Rst as u16, type_));
    }
    assert_works(driver);
}

#[test]
fn connection_whose_guest_breaks_the_protocol_is_reset() {
    let mut stack = Stack::new();
    let listener = stack.driver.handle.listen(1).unwrap();
    type Breach = (&'static str, fn(&mut Stack, (u32, u32)));
    let breaches: [Breach; 6] = [
        ("second REQUEST", |stack, key| stack.control(key, Op::Request, 0)),
        ("RESPONSE", |stack, key| stack.control(key, Op::Response, 0)),
        ("unknown operation", |stack, key| {
            let mut packet = stack.header(key, Op::Rw, 0, 0);
            packet.op = 99;
            stack.driver.send(packet, &[]);
        }),
        ("data after SHUTDOWN", |stack, key| {
            stack.control(key, Op::Shutdown, SHUTDOWN_SEND);
            let packet = stack.header(key, Op::Rw, 0, 1);
            stack.driver.send(packet, b"x");
        }),
        ("more than its credit", |stack, key| {
            let data = pattern(65536);
            for _ in 0..64 {
                let packet = stack.header(key, Op::Rw, 0, data.len() as u32);
                stack.driver.send(packet, &data);
            }
        }),
        ("payload that is not there", |stack, key| {
            let packet = stack.header(key, Op::Rw, 0, 1000);
            stack.driver.send(packet, &[1; 10]);
        }),
    ];
    for (what, breach) in breaches {
        let key = stack.connect(1).unwrap();
        let _stream = listener.accept_timeout(super::stack::PATIENCE).unwrap();
        let before = stack.driver.handle.metrics().malformed;
        breach(&mut stack, key);
        stack.wait_closed(key);
        assert!(stack.driver.handle.metrics().malformed > before, "{what}");
    }
    assert_works(stack.driver);
}

#[test]
fn host_connection_that_gets_the_wrong_answer_fails() {
    let mut driver = Driver::new();
    let handle = driver.handle.clone();
    let thread = std::thread::spawn(move || handle.connect(9, super::stack::PATIENCE));
    let request = driver.receive().header;
    driver.send(header(Op::Rw as u16, 9, request.src_port), &[]);
    // On a busy machine the device has asked again meanwhile.
    let answer = driver.receive_but(Op::Request);
    assert_eq!(answer.header.op, Op::Rst as u16);
    let error = thread.join().unwrap().unwrap_err();
    assert_eq!(error.to_string(), "vsock port 9: connection reset");
    assert_works(driver);
}

#[test]
fn malformed_tx_chains_come_back_and_do_no_harm() {
    let mut driver = Driver::new();
    survive_malformed_chains(&mut driver.tx);
    let metrics = driver.handle.metrics();
    assert!(metrics.malformed >= 10, "{metrics:?}");
    // Ring positions of the fake driver are no longer its own: start anew.
    driver.restart();
    assert_works(driver);
}

#[test]
fn malformed_rx_buffers_come_back_empty_and_in_order() {
    let mut driver = Driver::without_buffers();
    driver.send(header(Op::Request as u16, 5, 6), &[]);
    let (good, readable, small) = (BUFFERS, BUFFERS + 0x1000, BUFFERS + 0x2000);
    let heads = [
        driver.rx.submit(&[Buf::Read(readable, 4096)]),
        driver.rx.submit(&[Buf::Write(small, HEADER_LEN as u32)]),
        driver.rx.submit(&[Buf::Write(u64::MAX - 100, 4096)]),
        driver
            .rx
            .submit(&[Buf::Write(good, 4096), Buf::Read(readable, 10)]),
        driver.rx.submit(&[
            Buf::Write(good, 20),
            Buf::Write(good + 20, 10),
            Buf::Write(good + 30, 4000),
        ]),
    ];
    driver.rx.kick();
    let used: Vec<_> = heads.iter().map(|_| driver.rx.wait_used()).collect();
    for (index, head) in heads.into_iter().enumerate() {
        assert_eq!(used[index].head, head);
        let expected = if index == 4 { HEADER_LEN as u32 } else { 0 };
        assert_eq!(used[index].len, expected, "buffer {index}");
    }
    // The header went across three pieces.
    let bytes = driver.guest.read(good, HEADER_LEN);
    let answer = Header::from_wire(bytes[..].try_into().unwrap());
    assert_eq!((answer.op, answer.dst_port), (Op::Rst as u16, 5));
    driver.restart();
    assert_works(driver);
}

#[test]
fn rx_buffers_in_pieces_with_malformed_ones_between_carry_a_stream() {
    let mut driver = Driver::without_buffers();
    driver.post_awkward();
    let mut stack = Stack::on(driver);
    let (mut stream, key) = host_connects(&mut stack, 1024);
    let data = pattern(1_000_000);
    let sent = data.clone();
    let thread = std::thread::spawn(move || stream.write_all(&sent).map(|()| stream).unwrap());
    assert!(stack.read_exact(key, data.len()) == data);
    thread.join().unwrap();
    assert!(stack.driver.handle.metrics().malformed > 200);
}

#[test]
fn payload_in_many_pieces_is_put_together() {
    let mut stack = Stack::new();
    let (mut stream, key) = host_connects(&mut stack, 1024);
    let data = pattern(3000);
    let packet = stack.header(key, Op::Rw, 0, 3000);
    let mut bytes = packet.to_wire().to_vec();
    bytes.extend_from_slice(&data);
    // The header across two descriptors, the payload across three, and more room than the header says.
    bytes.extend_from_slice(b"trailing");
    stack
        .driver
        .send_raw(&bytes, &[(0, 10), (10, 100), (110, 2000), (2110, 942)]);
    let mut received = vec![0; 3000];
    stream.read_exact(&mut received).unwrap();
    assert!(received == data);
    // Header and payload in one descriptor, as Linux 6.2 and later do; and a payload of nothing.
    let packet = stack.header(key, Op::Rw, 0, 5);
    let mut bytes = packet.to_wire().to_vec();
    bytes.extend_from_slice(b"hello");
    stack.driver.send_raw(&bytes, &[(0, 49)]);
    let packet = stack.header(key, Op::Rw, 0, 0);
    stack.driver.send(packet, &[]);
    stream.read_exact(&mut received[..5]).unwrap();
    assert_eq!(&received[..5], b"hello");
}

#[test]
fn flood_of_refused_requests_without_rx_buffers_is_bounded_and_answered_later() {
    let mut driver = Driver::without_buffers();
    let total = 2000;
    let mut sent = 0;
    // The device takes packets until it has too many answers, then lets the tx queue wait.
    let stalled = |driver: &mut Driver| {
        if driver.reap() < 40 {
            return false;
        }
        driver.settle();
        driver.reap() >= 40
    };
    while sent < total && !stalled(&mut driver) {
        driver.send(header(Op::Request as u16, sent, 6), &[]);
        // Whether the device asked for it or not.
        driver.tx.kick();
        sent += 1;
    }
    assert!((256..=320).contains(&sent), "stalled after {sent}");
    driver.post_all();
    for expected in 0..total {
        while sent < total && driver.reap() < 40 {
            driver.send(header(Op::Request as u16, sent, 6), &[]);
            sent += 1;
        }
        let answer = driver.receive().header;
        assert_eq!((answer.op, answer.dst_port), (Op::Rst as u16, expected));
    }
    assert_works(driver);
}

#[test]
fn absurd_avail_indices_do_no_harm() {
    let mut driver = Driver::new();
    for index in [200, 5000, 0x8000, 0xffff] {
        driver.tx.set_avail_index(index);
        driver.tx.kick();
        driver.rx.set_avail_index(index);
        driver.rx.kick();
    }
    std::thread::sleep(Duration::from_millis(20));
    driver.restart();
    assert_works(driver);
}

#[test]
fn credit_lies_do_no_harm() {
    let mut stack = Stack::new();
    let (stream, key) = host_connects(&mut stack, 1024);
    let mut stream = stream;
    stream.set_nonblocking(true).unwrap();
    for (buf_alloc, fwd_cnt) in [
        (0, 0),
        (u32::MAX, 0),
        (u32::MAX, u32::MAX),
        (0, u32::MAX),
        (1, 0x8000_0000),
    ] {
        let mut packet = stack.header(key, Op::CreditUpdate, 0, 0);
        (packet.buf_alloc, packet.fwd_cnt) = (buf_alloc, fwd_cnt);
        stack.driver.send(packet, &[]);
        let _ = stream.write(&pattern(10_000));
        // The stack would complain about data beyond its own buffer: it has room for all of this.
        stack.run_for(Duration::from_millis(5));
    }
    assert_works(stack.driver);
}

/// splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// Mostly one of `usual`, sometimes anything.
    fn pick(&mut self, usual: &[u64]) -> u64 {
        if self.below(16) == 0 {
            self.next()
        } else {
            usual[self.below(usual.len() as u64) as usize]
        }
    }
}

#[test]
fn random_packets_do_no_harm() {
    for seed in 1..=4 {
        let mut random = Random(seed);
        let mut driver = Driver::new();
        let listener = driver.handle.listen(1).unwrap();
        let mut streams = Vec::new();
        for round in 0..5000 {
            let mut packet = header(random.pick(&[1, 2, 3, 4, 5, 5, 5, 6, 7]) as u16, 0, 0);
            packet.src_cid = random.pick(&[3]);
            packet.dst_cid = random.pick(&[2]);
            packet.src_port = random.pick(&[10, 11, 12]) as u32;
            packet.dst_port = random.pick(&[1, 1, 2]) as u32;
            packet.type_ = random.pick(&[1]) as u16;
            packet.flags = random.pick(&[0, 1, 2, 3]) as u32;
            packet.buf_alloc = random.pick(&[0, 1 << 18, 64]) as u32;
            packet.fwd_cnt = random.pick(&[0, 0, 100]) as u32;
            let payload = vec![round as u8; random.pick(&[0, 1, 100, 5000]) as usize % 10_000];
            packet.len = if random.below(8) == 0 {
                random.next() as u32
            } else {
                payload.len() as u32
            };
            driver.send(packet, &payload);
            while driver.try_receive().is_some() {}
            if let Ok(stream) = listener.accept_timeout(Duration::ZERO) {
                streams.push(stream);
                // Some are read, some closed, some left alone.
                if random.below(2) == 0 {
                    streams.swap_remove(random.below(streams.len() as u64) as usize);
                }
            }
        }
        drop(streams);
        drop(listener);
        let metrics = driver.handle.metrics();
        assert!(metrics.connections > 10 && metrics.malformed > 100, "{metrics:?}");
        assert_works(driver);
    }
}

#[test]
fn random_rings_do_no_harm() {
    for seed in 1..=8 {
        let mut random = Random(seed);
        let mut driver = Driver::without_buffers();
        let _listener = driver.handle.listen(1).unwrap();
        // Descriptors, rings and packets are whatever they are.
        for _ in 0..2000 {
            let address = random.pick(&[BUFFERS, BUFFERS + 0x1000, 0x80_0000, (16 << 20) - 20]);
            let len = random.pick(&[44, 60, 4096, 65580, 0]) as u32;
            let flags =
                random.pick(&[0, u64::from(NEXT), u64::from(WRITE), u64::from(NEXT | WRITE), 4]) as u16;
            let (index, next) = (random.below(128) as u16, random.below(130) as u16);
            let head = random.pick(&[0, 1, 2, 64, 127]) as u16;
            let ring = if random.below(2) == 0 {
                &mut driver.rx
            } else {
                &mut driver.tx
            };
            ring.descriptor(index, address, len, flags, next);
            ring.offer(head);
            ring.kick();
            let mut packet = header(random.pick(&[1, 3, 4, 5, 6, 7]) as u16, 5, 1);
            packet.len = random.pick(&[0, 10, 5000]) as u32;
            driver.guest.write(BUFFERS, &packet.to_wire());
        }
        driver.restart();
        driver.rx.kick();
        assert_works(driver);
    }
}

#[test]
fn chains_when_they_flood_the_log_are_told_of_a_few_times() {
    let mut driver = Driver::without_buffers();
    let messages = ["vsock: malformed tx packet", "vsock: cannot return a tx buffer"];
    assert_limited(&messages, 300, || flood(&mut driver.tx, 300));
    let messages = ["vsock: malformed rx buffer", "vsock: cannot return an rx buffer"];
    assert_limited(&messages, 300, || {
        for _ in 0..3 {
            let before = driver.handle.metrics().malformed;
            (0..100).for_each(|head| driver.rx.offer(0xff00 + head));
            // Its refusal needs an rx buffer.
            driver.send(header(Op::Request as u16, 5, 6), &[]);
            driver.tx.kick();
            driver.rx.kick();
            while driver.handle.metrics().malformed < before + 100 {
                std::thread::yield_now();
            }
        }
    });
    assert_limited(&["vsock: the driver broke a ring"], 30, || {
        driver.tx.set_avail_index(5000);
        for _ in 0..100 {
            driver.tx.kick();
            driver.settle();
        }
    });
    driver.restart();
    assert_works(driver);
}
