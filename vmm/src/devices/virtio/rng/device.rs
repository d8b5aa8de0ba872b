//! Features and activation; the device has no configuration space.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use event_manager::SubscriberId;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::worker::RngWorker;
use crate::config::RngConfig;
use crate::devices::virtio::{ActivateError, Activation, VirtioDevice};
use crate::io_loop::IoLoop;

const QUEUE_SIZES: [u16; 1] = [64];

/// Nothing can go wrong when an entropy device is created: its source is a system call.
pub type RngError = Infallible;

/// The entropy device.
#[derive(Debug)]
pub struct Rng {
    id: String,
    running: Option<(IoLoop, SubscriberId)>,
}

impl Rng {
    /// An entropy device fed by getrandom(2), i.e. the host's urandom pool.
    ///
    /// # Errors
    /// None.
    pub fn new(config: &RngConfig) -> Result<Self, RngError> {
        Ok(Self {
            id: config.id.clone(),
            running: None,
        })
    }
}

impl VirtioDevice for Rng {
    fn id(&self) -> &str {
        &self.id
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            memory,
            queues,
            interrupt,
            io,
            ..
        } = activation;
        let queue = queues.into_iter().find(|queue| queue.index == 0);
        let queue = queue.ok_or_else(|| ActivateError::QueueMissing {
            device: self.id.clone(),
            index: 0,
        })?;
        let worker = RngWorker::new(&self.id, queue, memory, interrupt);
        let subscriber = io.add(Arc::new(Mutex::new(worker)))?;
        self.running = Some((io, subscriber));
        Ok(())
    }

    fn reset(&mut self) {
        if let Some((io, subscriber)) = self.running.take()
            && let Err(error) = io.remove(subscriber)
        {
            // The loop has ended, so it calls nothing any more.
            tracing::debug!(device = %self.id, %error, "virtio: reset after the loop");
        }
    }
}
