//! Which engine is taken, and what configurations are refused.

use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;

use super::*;
use crate::config::{ConfigError, DeviceConfig};
use crate::devices::virtio::block::ring;

#[test]
fn engine_when_auto_is_io_uring_where_the_host_has_it() {
    let (_dir, path) = image();
    let chosen = ring::choose("d", BlockEngine::Auto).unwrap();
    assert_eq!(chosen, ring::available().is_ok());
    assert!(!ring::choose("d", BlockEngine::Sync).unwrap());
    match ring::choose("d", BlockEngine::IoUring) {
        Ok(chosen) => assert!(chosen),
        Err(error) => assert!(error.to_string().contains("no io_uring"), "{error}"),
    }
    assert!(Block::new(&config(&path, true)).is_ok());
}

#[test]
fn block_config_when_out_of_range_is_refused() {
    let refused = |change: fn(&mut BlockConfig)| {
        let mut config = BlockConfig::new("d", "/x");
        change(&mut config);
        DeviceConfig::Block(config).validate().unwrap_err()
    };
    assert!(
        DeviceConfig::Block(BlockConfig::new("d", "/x"))
            .validate()
            .is_ok()
    );
    for change in [
        |c: &mut BlockConfig| c.queues = 0,
        |c: &mut BlockConfig| c.queues = 17,
    ] {
        assert!(matches!(refused(change), ConfigError::BlockQueues { .. }));
    }
    for change in [
        |c: &mut BlockConfig| c.queue_size = 8,
        |c: &mut BlockConfig| c.queue_size = 100,
        |c: &mut BlockConfig| c.queue_size = 2048,
        |c: &mut BlockConfig| c.queue_size = 0,
    ] {
        assert!(matches!(refused(change), ConfigError::BlockQueueSize { .. }));
    }
    for change in [
        |c: &mut BlockConfig| c.serial = Some(String::new()),
        |c: &mut BlockConfig| c.serial = Some("x".repeat(21)),
        |c: &mut BlockConfig| c.serial = Some("a\nb".into()),
    ] {
        assert!(matches!(refused(change), ConfigError::BlockSerial { .. }));
    }
}

#[test]
fn interrupts_when_the_driver_has_many_requests_under_way_are_fewer_and_none_is_lost() {
    const ROUNDS: u64 = 50;
    const DEPTH: u64 = 16;
    for engine in [BlockEngine::Auto, BlockEngine::Sync] {
        let mut f = Fixture::new(engine, false);
        let mut interrupts = 0;
        for _ in 0..ROUNDS {
            for slot in 0..DEPTH {
                f.offer(0, slot, VIRTIO_BLK_T_IN, slot, 512);
                f.rings[0].kick_if_wanted();
            }
            let mut left = DEPTH;
            while left > 0 {
                if f.rings[0].try_used().is_some() {
                    left -= 1;
                } else if f.rings[0].ask_for_interrupt() {
                    interrupts += f.guest.wait_interrupt();
                }
            }
            // One alone, right after: it is held for a moment, and the end of that is all the driver waits for.
            assert!(f.rings[0].ask_for_interrupt());
            f.offer(0, 0, VIRTIO_BLK_T_IN, 0, 512);
            f.rings[0].kick_if_wanted();
            interrupts += f.guest.wait_interrupt();
            assert!(f.rings[0].try_used().is_some(), "{engine:?}");
        }
        let requests = ROUNDS * (DEPTH + 1);
        assert_eq!(f.counter("read_requests"), requests, "{engine:?}");
        assert!(interrupts <= requests / 2, "{engine:?}: {interrupts}");
    }
}
