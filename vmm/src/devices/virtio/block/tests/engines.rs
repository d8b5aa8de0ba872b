//! Which engine is taken, and what configurations are refused.

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
