//! Which engine is taken, and what configurations are refused.

use std::process::Command;

use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;

use super::*;
use crate::devices::virtio::block::disk::Disk;
use crate::devices::virtio::block::ring;
use crate::devices::virtio::config::Knobs;

#[test]
fn engine_when_auto_is_io_uring_where_the_host_has_it_and_the_image_is_not_in_memory() {
    let uring = ring::available().is_ok();
    for (in_memory, expected) in [(false, uring), (true, false)] {
        assert_eq!(ring::choose("d", BlockEngine::Auto, in_memory).unwrap(), expected);
        assert!(!ring::choose("d", BlockEngine::Sync, in_memory).unwrap());
        match ring::choose("d", BlockEngine::IoUring, in_memory) {
            Ok(chosen) => assert!(chosen && uring),
            Err(error) => assert!(error.to_string().contains("no io_uring"), "{error}"),
        }
    }
}

#[test]
fn image_when_on_tmpfs_is_in_memory() {
    let dir = TempDir::new_with_prefix("/dev/shm/dragonball-blk").unwrap();
    let path = dir.as_path().join("image");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    assert!(Disk::open(&config(&path, true)).unwrap().in_memory());
    // Compared with what stat(1) says of another file, usually on a disk.
    let executable = std::env::current_exe().unwrap();
    let stat = Command::new("stat")
        .args(["-f", "-c", "%T"])
        .arg(&executable)
        .output()
        .unwrap();
    let in_memory = matches!(stat.stdout.trim_ascii(), b"tmpfs" | b"ramfs");
    assert_eq!(
        Disk::open(&config(&executable, true)).unwrap().in_memory(),
        in_memory
    );
    assert!(Block::new(&config(&path, true)).is_ok());
}

#[test]
fn block_config_when_out_of_range_is_refused() {
    let refused = |change: fn(&mut BlockConfig)| {
        let mut config = BlockConfig::new("d", "/x");
        change(&mut config);
        config.validate().unwrap_err().knob
    };
    assert!(BlockConfig::new("d", "/x").validate().is_ok());
    for change in [
        |c: &mut BlockConfig| c.queues = 0,
        |c: &mut BlockConfig| c.queues = 17,
    ] {
        assert_eq!(refused(change), "queues");
    }
    for change in [
        |c: &mut BlockConfig| c.queue_size = 8,
        |c: &mut BlockConfig| c.queue_size = 100,
        |c: &mut BlockConfig| c.queue_size = 2048,
        |c: &mut BlockConfig| c.queue_size = 0,
    ] {
        assert_eq!(refused(change), "queue_size");
    }
    for change in [
        |c: &mut BlockConfig| c.serial = Some(String::new()),
        |c: &mut BlockConfig| c.serial = Some("x".repeat(21)),
        |c: &mut BlockConfig| c.serial = Some("a\nb".into()),
    ] {
        assert_eq!(refused(change), "serial");
    }
}

#[test]
fn interrupts_when_the_driver_has_many_requests_under_way_are_fewer_and_none_is_lost() {
    for engine in [BlockEngine::Auto, BlockEngine::Sync] {
        // How few depends on the machine: on one that is busy with something else at the wrong moments, it may take
        // another attempt.
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (interrupts, requests) = interrupts_and_requests(engine);
            if interrupts <= requests / 2 {
                break;
            }
            assert!(
                Instant::now() < deadline,
                "{engine:?}: {interrupts} for {requests}"
            );
        }
    }
}

fn interrupts_and_requests(engine: BlockEngine) -> (u64, u64) {
    const ROUNDS: u64 = 50;
    const DEPTH: u64 = 16;
    let mut f = Fixture::new(engine, false);
    let mut interrupts = 0;
    for _ in 0..ROUNDS {
        for slot in 0..DEPTH {
            f.offer(0, slot, VIRTIO_BLK_T_IN, slot, 512);
            f.rings[0].kick_if_wanted(1);
        }
        let mut left = DEPTH;
        while left > 0 {
            if f.rings[0].try_used().is_some() {
                left -= 1;
            } else if f.rings[0].ask_for_interrupt(0) {
                interrupts += f.guest.wait_interrupt();
            }
        }
        // One alone, right after: it is held for a moment, and the end of that is all the driver waits for.
        assert!(f.rings[0].ask_for_interrupt(0));
        f.offer(0, 0, VIRTIO_BLK_T_IN, 0, 512);
        f.rings[0].kick_if_wanted(1);
        // The first may still be one for what was taken before it came.
        loop {
            interrupts += f.guest.wait_interrupt();
            if f.rings[0].try_used().is_some() {
                break;
            }
        }
    }
    let requests = ROUNDS * (DEPTH + 1);
    assert_eq!(f.counter("read_requests"), requests, "{engine:?}");
    (interrupts, requests)
}
