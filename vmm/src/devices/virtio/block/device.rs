//! Features, configuration space and activation.

use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::BlockError;
use super::disk::{Disk, SECTOR};
use super::request::{MAX_RANGE_SECTORS, MAX_RANGES, SERIAL_BYTES, Target};
use super::worker::BlockWorker;
use crate::config::BlockConfig;
use crate::devices::virtio::served_queue::ServedQueue;
use crate::devices::virtio::state::{self, QueuePosition, StateError};
use crate::devices::virtio::{ActivateError, Activation, CHAIN_FEATURES, VirtioDevice, read_space};

const QUEUE_SIZE: u16 = 256;
const QUEUE_SIZES: [u16; 1] = [QUEUE_SIZE];
/// Data segments of one request: a chain has at most as many descriptors as the queue, two are header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes of `struct virtio_blk_config` up to `write_zeroes_may_unmap` and its padding (5.2.4).
const CONFIG_BYTES: usize = 60;

/// A disk.
#[derive(Debug)]
pub struct Block {
    target: Arc<Target>,
    config: [u8; CONFIG_BYTES],
    worker: Option<BlockWorker>,
}

impl Block {
    /// Opens and locks the image.
    ///
    /// # Errors
    /// [`BlockError`] when the image cannot be opened, is no disk, or is in use.
    pub fn new(config: &BlockConfig) -> Result<Self, BlockError> {
        let disk = Disk::open(config)?;
        let mut serial = [0; SERIAL_BYTES];
        for (to, from) in serial.iter_mut().zip(config.id.bytes()) {
            *to = from;
        }
        Ok(Self {
            config: config_space(disk.sectors()),
            target: Arc::new(Target {
                disk,
                serial,
                id: config.id.clone(),
            }),
            worker: None,
        })
    }
}

/// `struct virtio_blk_config`; fields of features not offered are zero.
fn config_space(sectors: u64) -> [u8; CONFIG_BYTES] {
    let mut space = [0; CONFIG_BYTES];
    let mut put = |at: usize, bytes: &[u8]| {
        for (to, from) in space.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    };
    put(0, &sectors.to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    put(36, &MAX_RANGE_SECTORS.to_le_bytes());
    put(40, &MAX_RANGES.to_le_bytes());
    // discard_sector_alignment, in sectors: a 4 KiB page.
    put(44, &8u32.to_le_bytes());
    put(48, &MAX_RANGE_SECTORS.to_le_bytes());
    put(52, &MAX_RANGES.to_le_bytes());
    // write_zeroes_may_unmap
    put(56, &[1]);
    space
}

impl VirtioDevice for Block {
    fn id(&self) -> &str {
        &self.target.id
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let common =
            CHAIN_FEATURES | 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_FLUSH;
        if self.target.disk.read_only() {
            common | 1 << VIRTIO_BLK_F_RO
        } else {
            common | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_space(&self.config, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let queue = activation.take_queue(&self.target.id, 0)?;
        let queue = ServedQueue::new(&self.target.id, queue, activation.memory, activation.interrupt);
        let write_through = activation.features & (1 << VIRTIO_BLK_F_FLUSH) == 0;
        let worker = BlockWorker::spawn(self.target.clone(), queue, write_through).map_err(|source| {
            ActivateError::Host {
                device: self.target.id.clone(),
                what: "cannot start the worker thread",
                source,
            }
        })?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) {
        self.suspend();
    }

    fn suspend(&mut self) -> Vec<QueuePosition> {
        let worker = self.worker.take();
        worker.and_then(BlockWorker::stop).into_iter().collect()
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        Ok(Vec::new())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        state::expect_none(&self.target.id, state)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.reset();
    }
}
