//! DISCARD and WRITE_ZEROES that are long: they count, and nobody waits for all of them.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_WRITE_ZEROES};
use vm_memory::Bytes;

use super::*;
use crate::config::{RateLimiterConfig, TokenBucketConfig};
use crate::devices::virtio::test_ring::{INDIRECT, NEXT, PATIENCE, WRITE};

on_each_engine![
    stop_when_hundreds_of_write_zeroes_are_in_flight_is_prompt,
    stop_when_hundreds_of_large_reads_are_in_flight_is_prompt,
    suspend_when_ranges_are_half_done_begins_them_anew,
    ranges_when_long_take_as_many_tokens_as_bytes,
];

/// Requests of the largest size in a queue of the usual one.
const REQUESTS: u16 = 256;
/// Ranges of one request.
const RANGES: usize = 16;

/// A driver with [`REQUESTS`] entries.
fn long_queue(f: &mut Fixture) {
    f.block.reset();
    f.rings = vec![f.guest.ring(0, REQUESTS, true)];
    f.activate_at(&[], 0);
}

/// Offers [`REQUESTS`] times the same request with `data`.
fn offer_all(f: &mut Fixture, kind: u32, data: &[(u64, u32, u16)]) {
    f.header(kind, 0);
    let table = BUFFERS + 0x2000;
    let ring = &mut f.rings[0];
    ring.descriptor_at(table, 0, HEADER, 16, NEXT, 1);
    let mut entry = 1;
    for (at, len, flags) in data {
        ring.descriptor_at(table, entry, *at, *len, NEXT | flags, entry + 1);
        entry += 1;
    }
    ring.descriptor_at(table, entry, STATUS, 1, WRITE, 0);
    for head in 0..REQUESTS {
        ring.descriptor(head, table, u32::from(entry + 1) * 16, INDIRECT, 0);
        ring.offer(head);
    }
    ring.kick();
}

/// Suspends, goes on, and resets, each without waiting for the requests on their way: they take many seconds.
fn stop_promptly(f: &mut Fixture) {
    let mut positions = f.block.suspend();
    assert!(positions[0].next_used < REQUESTS, "{positions:?}");

    // Saved and restored it goes on.
    let state = f.block.save().unwrap();
    f.block.restore(&state).unwrap();
    f.activate_at(&positions, 0);
    std::thread::sleep(Duration::from_millis(20));
    positions = f.block.suspend();
    assert!(positions[0].next_used < REQUESTS, "{positions:?}");
    f.activate_at(&positions, 0);
    f.block.reset();
    let returned = f.guest.memory.load(f.rings[0].used_index(), Ordering::SeqCst);
    let returned = u16::from_le(returned.unwrap());
    assert!(returned < REQUESTS, "{returned}");
    long_queue(f);
    assert_eq!(f.request(VIRTIO_BLK_T_IN, 0, &[Buf::Write(DATA, 512)]).1, OK);
}

fn stop_when_hundreds_of_write_zeroes_are_in_flight_is_prompt(engine: BlockEngine) {
    let (mut f, _dir) = Fixture::on_tmpfs(engine, |config| {
        File::options()
            .write(true)
            .open(&config.path)
            .unwrap()
            .set_len(16 << 20)
            .unwrap();
    });
    long_queue(&mut f);
    // 64 GiB, all to the same 16 MiB.
    let ranges = range(0, (16 << 20) / 512, 0).repeat(RANGES);
    f.guest.write(DATA, &ranges);
    offer_all(
        &mut f,
        VIRTIO_BLK_T_WRITE_ZEROES,
        &[(DATA, ranges.len() as u32, 0)],
    );
    std::thread::sleep(Duration::from_millis(20));
    stop_promptly(&mut f);
}

fn stop_when_hundreds_of_large_reads_are_in_flight_is_prompt(engine: BlockEngine) {
    let (mut f, _dir) = Fixture::on_tmpfs(engine, |config| {
        File::options()
            .write(true)
            .open(&config.path)
            .unwrap()
            .set_len(2 << 30)
            .unwrap();
    });
    long_queue(&mut f);
    // 1.75 GiB each, all to the same 8 MiB.
    let data = [(DATA, 8 << 20, WRITE); 224];
    offer_all(&mut f, VIRTIO_BLK_T_IN, &data);
    std::thread::sleep(Duration::from_millis(20));
    stop_promptly(&mut f);
}

fn suspend_when_ranges_are_half_done_begins_them_anew(engine: BlockEngine) {
    let (mut f, _dir) = Fixture::on_tmpfs(engine, |_| ());
    // Ten requests side by side, each of two ranges with a sector between; a read after them.
    let sectors = 800;
    for number in 0..10u64 {
        let (at, first) = (slot_address(number), number * 1604 + 1);
        f.header_at(at, VIRTIO_BLK_T_WRITE_ZEROES, 0);
        f.guest.write(at + 16, &[0xee]);
        let both = [range(first, sectors, 0), range(first + 801, sectors, 1)].concat();
        f.guest.write(at + 0x1000, &both);
        f.rings[0].submit(&[
            Buf::Read(at, 16),
            Buf::Read(at + 0x1000, 32),
            Buf::Write(at + 16, 1),
        ]);
    }
    f.offer(0, 10, VIRTIO_BLK_T_IN, 0, 512);
    f.rings[0].kick();
    let deadline = Instant::now() + PATIENCE;
    let mut done = 0;
    while done < 11 {
        assert!(Instant::now() < deadline);
        let positions = f.block.suspend();
        let state = f.block.save().unwrap();
        f.block.restore(&state).unwrap();
        f.activate_at(&positions, 0);
        std::thread::sleep(Duration::from_micros(200));
        while f.rings[0].try_used().is_some() {
            done += 1;
        }
    }
    for number in 0..10u64 {
        assert_eq!(f.outcome(number), OK);
        let first = number * 1604 + 1;
        for (from, until) in [(first, first + 800), (first + 801, first + 1601)] {
            let len = ((until - from) * 512) as usize;
            assert!(f.on_disk(from * 512, len).iter().all(|byte| *byte == 0));
            assert_eq!(f.on_disk(from * 512 - 1, 1), [pattern(from - 1)]);
            assert_eq!(f.on_disk(until * 512, 1), [pattern(until)]);
        }
    }
    assert_eq!(f.counter("write_zeroes_requests"), 10);
    assert_eq!(f.counter("write_zeroes_bytes"), 10 * 1600 * 512);
}

fn ranges_when_long_take_as_many_tokens_as_bytes(engine: BlockEngine) {
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        let mut f = Fixture::with(|config| {
            config.engine = engine;
            config.rate_limiter = Some(RateLimiterConfig {
                // 10 MiB/s.
                bandwidth: Some(TokenBucketConfig {
                    size: 1 << 20,
                    one_time_burst: 0,
                    refill_time_ms: 100,
                }),
                ops: None,
            });
        });
        f.guest.write(DATA, &range(0, (2 << 20) / 512, 0));
        let started = Instant::now();
        for _ in 0..3 {
            assert_eq!(f.request(kind, 0, &[Buf::Read(DATA, 16)]).1, OK);
        }
        // Each 2 MiB; the first passes at once, each of the others when the bucket is full again.
        let took = started.elapsed();
        assert!(took >= Duration::from_millis(390), "type {kind}: {took:?}");
        assert!(f.counter("throttled") >= 2);
        // What is refused costs nothing.
        f.guest.write(DATA, &range(0, u32::MAX, 0));
        let started = Instant::now();
        assert_eq!(f.request(kind, 0, &[Buf::Read(DATA, 16)]).1, IOERR);
        assert!(started.elapsed() < PATIENCE);
    }
}
