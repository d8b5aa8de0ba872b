//! Features, configuration space, activation and resize.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, PoisonError};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::config::{BlockConfig, BlockEngine};
use super::disk::{BlockError, Disk, SECTOR};
use super::request::{MAX_DISCARD_SECTORS, MAX_RANGES, MAX_ZEROES_SECTORS};
use super::state::Unfinished;
use super::target::Target;
use super::throttle::{Throttle, ThrottleTimer};
use super::worker::intake::Stopped;
use super::worker::{Surroundings, Worker};
use super::{ring, state};
use crate::devices::virtio::state::{QueuePosition, StateError};
use crate::devices::virtio::{
    ActivateError, Activation, CHAIN_FEATURES, Interrupt, OnLoop, VirtioDevice, read_space,
};

/// Bytes of `struct virtio_blk_config` up to `write_zeroes_may_unmap` and its padding (5.2.4).
const CONFIG_BYTES: usize = 60;
/// Offset of its field `writeback`.
const WRITEBACK: u64 = 32;

/// A disk cannot take its image's new size.
#[derive(Debug, thiserror::Error)]
pub enum ResizeDiskError {
    /// The size cannot be read.
    #[error("disk {id}: cannot read the size of its image: {source}")]
    Measure {
        /// Device id.
        id: String,
        /// Cause.
        source: io::Error,
    },
    /// The image became smaller while a driver uses the disk.
    #[error(
        "disk {id}: its image has {new} bytes, the guest uses {old}: a disk in use only grows; unmount it and unbind its driver first, or make the image at least as large again"
    )]
    Shrunk {
        /// Device id.
        id: String,
        /// Capacity in bytes, which stays.
        old: u64,
        /// Whole blocks of the image, in bytes.
        new: u64,
    },
    /// Not even one block is left.
    #[error("disk {id}: its image has less than one block of {block_size} bytes")]
    Empty {
        /// Device id.
        id: String,
        /// Logical block size in bytes.
        block_size: u32,
    },
}

/// From DRIVER_OK to reset or suspend.
#[derive(Debug)]
struct Active {
    workers: Vec<Worker>,
    timer: Option<OnLoop<ThrottleTimer>>,
    interrupt: Interrupt,
    /// The driver may write the configuration field `writeback`.
    writeback_writable: bool,
}

/// A disk.
#[derive(Debug)]
pub struct Block {
    target: Arc<Target>,
    /// `Auto`: io_uring, or else synchronous.
    engine: BlockEngine,
    queue_sizes: Vec<u16>,
    /// What a suspended device has begun and not finished.
    unfinished: Vec<Unfinished>,
    active: Option<Active>,
}

/// Measures the image of a disk, which may take as long as the host's storage does.
#[derive(Debug)]
pub struct Gauge(Arc<Target>);

impl Gauge {
    /// Gives `take` the size of the image in bytes, for [`Block::resize`]. Who measures the same disk meanwhile waits, so that
    /// an older size never comes after a newer one.
    ///
    /// # Errors
    /// [`ResizeDiskError::Measure`].
    pub fn measure<T>(&self, take: impl FnOnce(u64) -> T) -> Result<T, ResizeDiskError> {
        let target = &self.0;
        let _only = target.measuring.lock().unwrap_or_else(PoisonError::into_inner);
        let size = target.disk.measure();
        let size = size.map_err(|source| ResizeDiskError::Measure {
            id: target.id.clone(),
            source,
        })?;
        Ok(take(size))
    }
}

impl Block {
    /// Opens and locks the image.
    ///
    /// # Errors
    /// [`BlockError`] when the image cannot be opened, is no disk, or is in use, or the host cannot do what was asked for.
    pub fn new(config: &BlockConfig) -> Result<Self, BlockError> {
        let disk = Disk::open(config)?;
        let engine = match ring::choose(&config.id, config.engine, disk.in_memory())? {
            true => config.engine,
            false => BlockEngine::Sync,
        };
        let throttle = config.rate_limiter.as_ref().map(Throttle::new).transpose();
        let throttle = throttle.map_err(|source| BlockError::RateLimiter {
            id: config.id.clone(),
            source,
        })?;
        let serial = config.serial.as_ref().unwrap_or(&config.id);
        Ok(Self {
            target: Arc::new(Target::new(config.id.clone(), disk, serial, throttle)),
            engine,
            queue_sizes: vec![config.queue_size; usize::from(config.queues)],
            unfinished: Vec::new(),
            active: None,
        })
    }

    /// What measures the image while the guest goes on using the disk.
    pub fn gauge(&self) -> Gauge {
        Gauge(self.target.clone())
    }

    /// Gives the disk `size`, what [`Gauge::measure`] said in bytes, and tells the guest, which has it at once. Returns the
    /// capacity in bytes.
    ///
    /// A disk in use only grows: its guest counts on every sector it has seen. Without a driver it takes any size.
    ///
    /// # Errors
    /// [`ResizeDiskError`]; the capacity is as before.
    pub fn resize(&mut self, size: u64) -> Result<u64, ResizeDiskError> {
        let disk = &self.target.disk;
        let id = || self.target.id.clone();
        let new = size - size % u64::from(disk.block_size());
        let old = disk.sectors() * SECTOR;
        if new == 0 {
            return Err(ResizeDiskError::Empty {
                id: id(),
                block_size: disk.block_size(),
            });
        }
        if new < old && self.active.is_some() {
            return Err(ResizeDiskError::Shrunk { id: id(), old, new });
        }
        if new != old {
            disk.set_sectors(new / SECTOR);
            if let Some(active) = &self.active {
                active.interrupt.config(|space| self.read_config(0, space));
            }
            tracing::info!(device = %self.target.id, old, new, "disk resized");
        }
        Ok(new)
    }

    /// `struct virtio_blk_config`; fields of features not offered are zero.
    fn config_space(&self) -> [u8; CONFIG_BYTES] {
        let disk = &self.target.disk;
        let mut space = [0; CONFIG_BYTES];
        let mut put = |at: usize, bytes: &[u8]| {
            for (to, from) in space.iter_mut().skip(at).zip(bytes) {
                *to = *from;
            }
        };
        put(0, &disk.sectors().to_le_bytes());
        // Data segments of one request: a chain has at most as many descriptors as the queue, two are header and status.
        let segments = self
            .queue_sizes
            .first()
            .map_or(0, |size| u32::from(size.saturating_sub(2)));
        put(12, &segments.to_le_bytes());
        put(20, &disk.block_size().to_le_bytes());
        // Topology: logical blocks per physical one (log2), alignment, smallest and best I/O in logical blocks.
        let exponent = (disk.physical_block_size() / disk.block_size()).trailing_zeros();
        put(24, &[exponent as u8, 0]);
        put(26, &(1u16 << exponent).to_le_bytes());
        put(WRITEBACK as usize, &[u8::from(self.target.writeback())]);
        put(34, &(self.queue_sizes.len() as u16).to_le_bytes());
        if disk.read_only() {
            return space;
        }
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        // discard_sector_alignment
        let alignment = u64::from(disk.physical_block_size().max(4096)) / SECTOR;
        put(44, &(alignment as u32).to_le_bytes());
        put(48, &MAX_ZEROES_SECTORS.to_le_bytes());
        put(52, &MAX_RANGES.to_le_bytes());
        // write_zeroes_may_unmap
        put(56, &[1]);
        space
    }

    fn start(&self, activation: Activation) -> Result<Active, ActivateError> {
        let mut active = Active {
            workers: Vec::new(),
            timer: None,
            interrupt: activation.interrupt.clone(),
            writeback_writable: has(activation.features, VIRTIO_BLK_F_CONFIG_WCE)
                && has(activation.features, VIRTIO_BLK_F_FLUSH),
        };
        let around = Surroundings {
            target: self.target.clone(),
            memory: activation.memory,
            interrupt: activation.interrupt,
            io: activation.io,
            confinement: activation.confinement,
        };
        for queue in activation.queues {
            let of_queue = |unfinished: &&Unfinished| usize::from(unfinished.queue) == queue.index;
            let unfinished = self.unfinished.iter().find(of_queue);
            let heads = unfinished.map_or_else(VecDeque::new, |unfinished| unfinished.heads.clone().into());
            match Worker::start(&around, queue, heads, self.engine) {
                Ok(worker) => active.workers.push(worker),
                Err(error) => {
                    active.stop(&self.target.id);
                    return Err(error);
                }
            }
        }
        if let Some(throttle) = &self.target.throttle {
            match OnLoop::start(around.io, ThrottleTimer::new(throttle.clone())) {
                Ok(timer) => active.timer = Some(timer),
                Err(error) => {
                    active.stop(&self.target.id);
                    return Err(error.into());
                }
            }
        }
        Ok(active)
    }
}

impl Active {
    fn stop(self, device: &str) -> Vec<Stopped> {
        if let Some(timer) = self.timer {
            timer.stop(device, |_| ());
        }
        self.workers
            .into_iter()
            .filter_map(|worker| worker.stop(device))
            .collect()
    }
}

fn has(features: u64, bit: u32) -> bool {
    features & 1 << bit != 0
}

impl VirtioDevice for Block {
    fn id(&self) -> &str {
        &self.target.id
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        let mut features = CHAIN_FEATURES
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH;
        if self.queue_sizes.len() > 1 {
            features |= 1 << VIRTIO_BLK_F_MQ;
        }
        if self.target.disk.read_only() {
            features | 1 << VIRTIO_BLK_F_RO
        } else {
            features
                | 1 << VIRTIO_BLK_F_DISCARD
                | 1 << VIRTIO_BLK_F_WRITE_ZEROES
                | 1 << VIRTIO_BLK_F_CONFIG_WCE
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_space(&self.config_space(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let writable = self.active.as_ref().is_some_and(|a| a.writeback_writable);
        if let (WRITEBACK, [value], true) = (offset, data, writable) {
            self.target.set_writeback(*value != 0);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if activation.queues.is_empty() {
            return Err(ActivateError::QueueMissing {
                device: self.target.id.clone(),
                index: 0,
            });
        }
        // Without CONFIG_WCE the cache is write-back exactly if the driver can flush it (5.2.6.2). With it the field counts,
        // and is on after a reset and as it was after a suspend.
        if !has(activation.features, VIRTIO_BLK_F_FLUSH) {
            self.target.set_writeback(false);
        } else if !has(activation.features, VIRTIO_BLK_F_CONFIG_WCE) {
            self.target.set_writeback(true);
        }
        self.active = Some(self.start(activation)?);
        self.unfinished.clear();
        Ok(())
    }

    fn reset(&mut self) {
        self.suspend();
        // The driver gives up what it has not seen come back.
        self.unfinished.clear();
        self.target.set_writeback(true);
    }

    fn suspend(&mut self) -> Vec<QueuePosition> {
        let Some(active) = self.active.take() else {
            return Vec::new();
        };
        let stopped = active.stop(&self.target.id);
        let unfinished = stopped.iter().filter(|queue| !queue.unfinished.is_empty());
        self.unfinished = unfinished
            .map(|queue| Unfinished {
                queue: queue.position.index,
                heads: queue.unfinished.clone(),
            })
            .collect();
        stopped.into_iter().map(|queue| queue.position).collect()
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        state::save(&self.target, &self.unfinished)
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        self.unfinished = state::restore(&self.target, &self.queue_sizes, bytes)?;
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut counters = self.target.counters.snapshot();
        if let Some(throttle) = &self.target.throttle {
            counters.push(("throttled", throttle.throttled()));
        }
        counters
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.reset();
    }
}
