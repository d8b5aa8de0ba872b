//! The knobs of a disk.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Block;
use crate::devices::virtio::config::{Complete, KnobError, Knobs, OpenError, Opened};
use crate::rate_limiter::RateLimiterConfig;

/// A disk backed by a raw image file or a block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockConfig {
    /// Device id.
    pub id: String,
    /// Raw image file or block device.
    pub path: PathBuf,
    /// Refuse writes, on the host, whatever the driver negotiated.
    #[serde(default)]
    pub read_only: bool,
    /// How the host does the I/O.
    #[serde(default)]
    pub engine: BlockEngine,
    /// Request queues, 1..=[`MAX_BLOCK_QUEUES`]; a guest uses at most one per vCPU.
    #[serde(default = "one_queue")]
    pub queues: u8,
    /// Descriptors per queue: a power of two, 16..=1024. Two less is the most data segments of a request.
    #[serde(default = "default_queue_size")]
    pub queue_size: u16,
    /// Go around the host's page cache (O_DIRECT).
    #[serde(default)]
    pub direct: bool,
    /// What the guest reads as the disk's serial, 1 to 20 printable ASCII characters; `None`: the start of `id`.
    #[serde(default)]
    pub serial: Option<String>,
    /// Limits on the requests and bytes of all queues together; `None`: none.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiterConfig>,
}

/// Most queues of a disk.
pub const MAX_BLOCK_QUEUES: u8 = 16;

fn one_queue() -> u8 {
    1
}

fn default_queue_size() -> u16 {
    256
}

impl BlockConfig {
    /// A writable disk with one queue of 256 entries, through the host's page cache, without limits.
    pub fn new(id: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self {
            id: id.into(),
            path: path.into(),
            read_only: false,
            engine: BlockEngine::default(),
            queues: one_queue(),
            queue_size: default_queue_size(),
            direct: false,
            serial: None,
            rate_limiter: None,
        }
    }
}

impl Knobs for BlockConfig {
    fn id(&self) -> &str {
        &self.id
    }

    fn validate(&self) -> Result<(), KnobError> {
        let error =
            |knob, value: &dyn std::fmt::Debug, need| Err(KnobError::new(&self.id, knob, value, need));
        if self.queues == 0 || self.queues > MAX_BLOCK_QUEUES {
            return error("queues", &self.queues, format!("1 to {MAX_BLOCK_QUEUES}"));
        }
        if !self.queue_size.is_power_of_two() || !(16..=1024).contains(&self.queue_size) {
            return error(
                "queue_size",
                &self.queue_size,
                "a power of two from 16 to 1024".to_owned(),
            );
        }
        if let Some(serial) = &self.serial
            && (serial.is_empty()
                || serial.len() > 20
                || !serial.bytes().all(|b| b.is_ascii_graphic() || b == b' '))
        {
            return error("serial", serial, "1 to 20 printable ASCII characters".to_owned());
        }
        let limiter = self.rate_limiter.as_ref();
        limiter.map_or(Ok(()), |limiter| {
            KnobError::check_limiter(&self.id, "rate_limiter", limiter)
        })
    }

    fn open(&self) -> Result<Box<dyn Opened>, OpenError> {
        Ok(Complete::opened(Block::new(self)?))
    }
}

/// How the host does a disk's I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BlockEngine {
    /// io_uring where the kernel has it, else synchronous; for an image on tmpfs or ramfs, which io_uring can only serve by
    /// a thread of its own, synchronous.
    #[default]
    Auto,
    /// io_uring on the I/O loop: many requests at once, in any order. An error on a host without it.
    #[serde(rename = "io_uring")]
    IoUring,
    /// Blocking system calls, one at a time, on one thread per queue.
    Sync,
}
