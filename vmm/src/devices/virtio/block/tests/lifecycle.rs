//! Reset, suspend, save and restore with requests outstanding; several queues; limits; resize.

use std::fs::File;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};

use super::*;
use crate::config::{RateLimiterConfig, TokenBucketConfig};
use crate::devices::virtio::block::device::ResizeDiskError;
use crate::devices::virtio::block::state::{BlockState, Unfinished};
use crate::devices::virtio::state::{self, StateError};
use crate::devices::virtio::test_ring::{INDIRECT, NEXT, PATIENCE, RINGS, WRITE, survive_malformed_chains};
use crate::devices::virtio::transport::mmio::interrupt::INTERRUPT_CONFIG;

on_each_engine![
    reset_when_requests_are_in_flight_leaves_memory_alone,
    suspend_when_requests_are_outstanding_loses_none,
    restore_when_in_a_new_device_goes_on_where_the_old_one_stood,
    restore_when_the_image_was_cut_is_refused,
    restore_when_the_image_grew_keeps_the_capacity,
    restore_when_bytes_are_invalid_is_refused,
    queues_when_several_are_served_all,
    queues_when_only_some_are_ready_are_served,
    request_when_over_the_limit_waits_for_its_turn,
    suspend_when_the_limiter_holds_a_request_puts_it_back,
    requests_when_more_than_the_queue_holds_are_all_answered,
    resize_when_the_image_grew_tells_the_guest,
    resize_when_the_image_shrank_depends_on_the_driver,
    writeback_when_negotiated_follows_the_driver,
    drop_when_active_unlocks_the_image_at_once,
];

const WRITEBACK_FEATURES: u64 = 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_CONFIG_WCE;
const LEN: u32 = 256 << 10;

/// Waits for `count` completions on `queue`.
fn collect(f: &mut Fixture, queue: usize, count: usize) {
    for _ in 0..count {
        f.rings[queue].wait_used();
    }
}

/// Makes the next reads of the image wait for the host's disk.
fn forget_cached_pages(path: &Path) {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

fn reset_when_requests_are_in_flight_leaves_memory_alone(engine: BlockEngine) {
    let mut f = Fixture::new(engine, false);
    for round in 0..20 {
        forget_cached_pages(&f.path);
        for slot in 0..20 {
            f.offer(0, slot, VIRTIO_BLK_T_IN, slot * 512, LEN);
        }
        f.rings[0].kick();
        if round % 2 == 1 {
            std::thread::yield_now();
        }
        f.block.reset();
        // The driver takes its memory back: whatever was in flight must be over.
        let start = slot_address(0);
        let len = (slot_address(20) - start) as usize;
        f.guest.write(start, &vec![0x77; len]);
        let used = f.guest.read(RINGS, 0x1_0000);
        std::thread::sleep(Duration::from_millis(2));
        assert!(
            f.guest.read(start, len).iter().all(|b| *b == 0x77),
            "round {round}"
        );
        assert_eq!(f.guest.read(RINGS, 0x1_0000), used);
        f.rings = f.guest.activate(&mut f.block, 64, true);
    }
    assert_eq!(f.request(VIRTIO_BLK_T_IN, 0, &[Buf::Write(DATA, 512)]).1, OK);
}

fn suspend_when_requests_are_outstanding_loses_none(engine: BlockEngine) {
    let mut f = Fixture::new(engine, false);
    for round in 0..10u64 {
        for slot in 0..20 {
            f.offer(0, slot, VIRTIO_BLK_T_IN, slot * 512 + round, LEN);
        }
        f.rings[0].kick();
        let positions = f.block.suspend();
        assert_eq!(positions.len(), 1);
        // What the driver offered meanwhile is found without a kick, also without one the old worker did not get to.
        let _ = f.rings[0].kick.read();
        f.offer(0, 20, VIRTIO_BLK_T_IN, 20 * 512 + round, LEN);
        assert_eq!(taken_and_not_returned(&positions), unfinished(&f.block));
        f.activate_at(&positions, 0);
        collect(&mut f, 0, 21);
        for slot in 0..21 {
            assert_eq!(f.outcome(slot), OK, "round {round} slot {slot}");
            let data = f.guest.read(slot_address(slot) + 0x1000, LEN as usize);
            assert_eq!(data[0], pattern(slot * 512 + round));
            assert_eq!(
                data[LEN as usize - 1],
                pattern(slot * 512 + round + u64::from(LEN) / 512 - 1)
            );
        }
    }
    assert_eq!(f.counter("read_requests"), 210);
    assert_eq!(f.counter("read_bytes"), 210 * u64::from(LEN));
}

/// Requests the device has begun and will begin anew.
fn unfinished(block: &Block) -> usize {
    let state: BlockState = state::decode("d", &block.save().unwrap()).unwrap();
    state.unfinished.iter().map(|queue| queue.heads.len()).sum()
}

fn taken_and_not_returned(positions: &[QueuePosition]) -> usize {
    let of_queue = |at: &QueuePosition| usize::from(at.next_avail.wrapping_sub(at.next_used));
    positions.iter().map(of_queue).sum()
}

fn restore_when_in_a_new_device_goes_on_where_the_old_one_stood(engine: BlockEngine) {
    let mut f = Fixture::new(engine, false);
    f.block.reset();
    f.rings = vec![f.guest.ring(0, 64, true)];
    f.activate_at(&[], WRITEBACK_FEATURES);
    f.block.write_config(32, &[0]);
    for slot in 0..20 {
        f.offer(0, slot, VIRTIO_BLK_T_IN, slot, 512);
    }
    f.rings[0].kick();
    let positions = f.block.suspend();
    let state = f.block.save().unwrap();
    let mut fresh = config(&f.path, false);
    fresh.engine = engine;
    f.block = {
        // The image is locked by the old device.
        let other = image();
        drop(std::mem::replace(
            &mut f.block,
            Block::new(&config(&other.1, false)).unwrap(),
        ));
        anew(&fresh)
    };

    f.block.restore(&state).unwrap();
    f.activate_at(&positions, WRITEBACK_FEATURES);

    collect(&mut f, 0, 20);
    assert!((0..20).all(|slot| f.outcome(slot) == OK));
    let mut writeback = [9];
    f.block.read_config(32, &mut writeback);
    assert_eq!(writeback, [0]);
}

fn restored(engine: BlockEngine, bytes: &[u8], image_len: u64) -> Result<u64, StateError> {
    let (_dir, path) = image();
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(image_len)
        .unwrap();
    let mut config = config(&path, false);
    config.engine = engine;
    let mut block = Block::new(&config).unwrap();
    block.restore(bytes)?;
    Ok(capacity(&block))
}

fn capacity(block: &Block) -> u64 {
    let mut bytes = [0; 8];
    block.read_config(0, &mut bytes);
    u64::from_le_bytes(bytes) * 512
}

fn saved(engine: BlockEngine) -> Vec<u8> {
    let mut f = Fixture::new(engine, false);
    f.block.suspend();
    f.block.save().unwrap()
}

fn restore_when_the_image_was_cut_is_refused(engine: BlockEngine) {
    let error = restored(engine, &saved(engine), 4 << 20).unwrap_err().to_string();
    assert!(
        error.contains("disk-with-a-long-name") && error.contains("16384 sectors") && error.contains("8192"),
        "{error}"
    );
}

fn restore_when_the_image_grew_keeps_the_capacity(engine: BlockEngine) {
    assert_eq!(restored(engine, &saved(engine), 16 << 20).unwrap(), 8 << 20);
}

fn restore_when_bytes_are_invalid_is_refused(engine: BlockEngine) {
    let state = saved(engine);
    for bytes in [
        &[][..],
        &state[..state.len() - 1],
        &[&state[..], &[0]].concat(),
        &[0xff; 40],
    ] {
        assert!(restored(engine, bytes, 8 << 20).is_err(), "{bytes:?}");
    }
    let state = |sectors, unfinished: &[(u16, &[u16])]| {
        let unfinished = unfinished.iter().map(|(queue, heads)| Unfinished {
            queue: *queue,
            heads: heads.to_vec(),
        });
        let state = BlockState {
            sectors,
            writeback: true,
            limiter: None,
            unfinished: unfinished.collect(),
        };
        postcard::to_stdvec(&state).unwrap()
    };
    assert!(restored(engine, &state(8, &[(0, &[0, 255])]), 8 << 20).is_ok());
    for (sectors, unfinished) in [
        (0, &[][..]),
        (8, &[(0, &[256][..])]),
        (8, &[(1, &[0][..])]),
        (8, &[(0, &[3, 4, 3][..])]),
        (8, &[(0, &[3][..]), (0, &[4][..])]),
    ] {
        let state = state(sectors, unfinished);
        assert!(
            restored(engine, &state, 8 << 20).is_err(),
            "{sectors} {unfinished:?}"
        );
    }
}

fn queues_when_several_are_served_all(engine: BlockEngine) {
    let mut f = Fixture::with(|config| {
        config.engine = engine;
        config.queues = 4;
    });
    assert_eq!(f.rings.len(), 4);
    for slot in 0..40 {
        f.offer(slot as usize % 4, slot, VIRTIO_BLK_T_IN, slot, 4096);
    }
    f.rings.iter().for_each(TestRing::kick);
    for queue in 0..4 {
        collect(&mut f, queue, 10);
    }
    for slot in 0..40 {
        assert_eq!(f.outcome(slot), OK);
        assert_eq!(f.guest.read(slot_address(slot) + 0x1000, 1), [pattern(slot)]);
    }
    let positions = f.block.suspend();
    assert_eq!(
        positions.iter().map(|p| p.index).collect::<Vec<_>>(),
        [0, 1, 2, 3]
    );
    assert!(positions.iter().all(|p| (p.next_avail, p.next_used) == (10, 10)));
    f.rings = f.guest.activate(&mut f.block, 64, false);
    for ring in &mut f.rings {
        survive_malformed_chains(ring);
    }
}

fn queues_when_only_some_are_ready_are_served(engine: BlockEngine) {
    let mut f = Fixture::with(|config| {
        config.engine = engine;
        config.queues = 16;
    });
    f.block.reset();
    f.rings = vec![f.guest.ring(0, 64, true), f.guest.ring(5, 64, true)];
    f.activate_at(&[], 0);
    f.offer(1, 0, VIRTIO_BLK_T_IN, 3, 512);
    f.rings[1].kick();
    collect(&mut f, 1, 1);
    assert_eq!(f.outcome(0), OK);
    assert_eq!(f.block.suspend().len(), 2);
}

fn limited(engine: BlockEngine, refill_time_ms: u64) -> Fixture {
    Fixture::with(|config| {
        config.engine = engine;
        config.queues = 2;
        config.rate_limiter = Some(RateLimiterConfig {
            bandwidth: None,
            ops: Some(TokenBucketConfig {
                size: 4,
                one_time_burst: 0,
                refill_time_ms,
            }),
        });
    })
}

fn request_when_over_the_limit_waits_for_its_turn(engine: BlockEngine) {
    let mut f = limited(engine, 40);
    let started = Instant::now();
    for slot in 0..24 {
        f.offer(slot as usize % 2, slot, VIRTIO_BLK_T_IN, slot, 512);
    }
    f.rings.iter().for_each(TestRing::kick);
    collect(&mut f, 0, 12);
    collect(&mut f, 1, 12);
    // 20 beyond the first 4 at 100 per second.
    assert!(
        started.elapsed() >= Duration::from_millis(190),
        "{:?}",
        started.elapsed()
    );
    assert!((0..24).all(|slot| f.outcome(slot) == OK));
    assert!(f.counter("throttled") > 0);
}

fn suspend_when_the_limiter_holds_a_request_puts_it_back(engine: BlockEngine) {
    // One token in 15 minutes.
    let mut f = limited(engine, 3_600_000);
    for slot in 0..10 {
        f.offer(0, slot, VIRTIO_BLK_T_IN, slot, 512);
    }
    f.rings[0].kick();
    collect(&mut f, 0, 4);
    let deadline = Instant::now() + PATIENCE;
    while f.counter("throttled") == 0 {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
    let positions = f.block.suspend();
    assert_eq!((positions[0].next_avail, positions[0].next_used), (4, 4));
    assert_eq!((f.outcome(3), f.outcome(4)), (OK, 0xee));
    // What is left of the bucket is saved with the rest.
    let state = f.block.save().unwrap();
    f.block.restore(&state).unwrap();
    f.activate_at(&positions, 0);
    let held = f.block.suspend();
    assert!(held[0].next_avail <= 5, "{held:?}");
}

fn requests_when_more_than_the_queue_holds_are_all_answered(engine: BlockEngine) {
    let mut f = Fixture::new(engine, false);
    f.block.reset();
    // The smallest queue: 16 requests of one indirect descriptor each, again and again before the others are back.
    f.rings = vec![f.guest.ring(0, 16, true)];
    f.activate_at(&[], 0);
    let mut outstanding = 0;
    for request in 0..400u64 {
        let (slot, table) = (request % 16, BUFFERS + 0x8000 + request % 16 * 64);
        if outstanding == 16 {
            f.rings[0].wait_used();
            outstanding -= 1;
        }
        let at = slot_address(slot);
        f.header_at(at, VIRTIO_BLK_T_IN, request);
        let ring = &mut f.rings[0];
        ring.descriptor_at(table, 0, at, 16, NEXT, 1);
        ring.descriptor_at(table, 1, at + 0x1000, 4096, NEXT | WRITE, 2);
        ring.descriptor_at(table, 2, at + 16, 1, WRITE, 0);
        ring.descriptor(slot as u16, table, 48, INDIRECT, 0);
        ring.offer(slot as u16);
        ring.kick();
        outstanding += 1;
    }
    collect(&mut f, 0, outstanding);
    assert_eq!(f.counter("read_requests"), 400);
}

fn set_image_len(f: &Fixture, len: u64) {
    File::options()
        .write(true)
        .open(&f.path)
        .unwrap()
        .set_len(len)
        .unwrap();
}

fn resize_when_the_image_grew_tells_the_guest(engine: BlockEngine) {
    let mut f = Fixture::new(engine, false);
    assert_eq!(resize(&mut f.block).unwrap(), 8 << 20);
    assert_eq!(f.guest.status() & INTERRUPT_CONFIG, 0);
    set_image_len(&f, 12 << 20);
    let beyond = (12 << 20) / 512 - 1;
    assert_eq!(
        f.request(VIRTIO_BLK_T_IN, beyond, &[Buf::Write(DATA, 512)]).1,
        IOERR
    );

    assert_eq!(resize(&mut f.block).unwrap(), 12 << 20);

    assert_ne!(f.guest.status() & INTERRUPT_CONFIG, 0);
    assert_eq!(capacity(&f.block), 12 << 20);
    assert_eq!(f.request(VIRTIO_BLK_T_IN, beyond, &[Buf::Write(DATA, 512)]).1, OK);
}

fn resize_when_the_image_shrank_depends_on_the_driver(engine: BlockEngine) {
    let mut f = Fixture::new(engine, false);
    set_image_len(&f, 4 << 20);
    let error = resize(&mut f.block).unwrap_err();
    assert!(
        matches!(error, ResizeDiskError::Shrunk { old, new, .. } if (old, new) == (8 << 20, 4 << 20)),
        "{error}"
    );
    assert_eq!(capacity(&f.block), 8 << 20);
    f.block.reset();
    assert_eq!(resize(&mut f.block).unwrap(), 4 << 20);
    assert_eq!(capacity(&f.block), 4 << 20);
    set_image_len(&f, 100);
    assert!(matches!(resize(&mut f.block), Err(ResizeDiskError::Empty { .. })));
    assert_eq!(capacity(&f.block), 4 << 20);
}

fn writeback_when_negotiated_follows_the_driver(engine: BlockEngine) {
    let mut f = Fixture::new(engine, false);
    let writeback = |f: &Fixture| {
        let mut byte = [9];
        f.block.read_config(32, &mut byte);
        byte[0]
    };
    // The driver took neither FLUSH nor CONFIG_WCE.
    assert_eq!(writeback(&f), 0);
    f.block.write_config(32, &[1]);
    assert_eq!(writeback(&f), 0);
    for (features, expected) in [(1 << VIRTIO_BLK_F_FLUSH, 1), (WRITEBACK_FEATURES, 0)] {
        f.block.reset();
        f.rings = vec![f.guest.ring(0, 64, true)];
        f.activate_at(&[], features);
        assert_eq!(writeback(&f), 1);
        f.block.write_config(32, &[0]);
        assert_eq!(writeback(&f), expected);
        f.guest.write(DATA, &[0x42; 512]);
        assert_eq!(f.request(VIRTIO_BLK_T_OUT, 1, &[Buf::Read(DATA, 512)]).1, OK);
        assert_eq!(f.on_disk(512, 512), [0x42; 512]);
    }
}

fn drop_when_active_unlocks_the_image_at_once(engine: BlockEngine) {
    let mut f = Fixture::new(engine, false);
    let (_dir, path) = image();
    let mut config = config(&path, false);
    config.engine = engine;
    config.queues = 4;
    for _ in 0..20 {
        f.block = anew(&config);
        f.rings = f.guest.activate(&mut f.block, 64, true);
        f.rings[3].kick();
        f.block = anew(&super::config(&f.path, false));
    }
}

/// As `Vm::resize_disk` does it.
fn resize(block: &mut Block) -> Result<u64, ResizeDiskError> {
    block.gauge().measure(|size| block.resize(size))?
}
