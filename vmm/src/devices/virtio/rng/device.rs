//! Features and activation; the device has no configuration space.

use std::convert::Infallible;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::config::RngConfig;
use super::worker::RngWorker;
use crate::devices::virtio::queue::served_queue::ServedQueue;
use crate::devices::virtio::state::{self, QueuePosition, StateError};
use crate::devices::virtio::{ActivateError, Activation, CHAIN_FEATURES, OnLoop, VirtioDevice};

const QUEUE_SIZES: [u16; 1] = [64];

/// Nothing can go wrong when an entropy device is created: its source is a system call.
pub type RngError = Infallible;

/// The entropy device.
#[derive(Debug)]
pub struct Rng {
    id: String,
    running: Option<OnLoop<RngWorker>>,
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
        CHAIN_FEATURES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let worker = RngWorker::new(ServedQueue::take(&mut activation, &self.id, 0)?);
        self.running = Some(OnLoop::start(activation.io, worker)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.suspend();
    }

    fn suspend(&mut self) -> Vec<QueuePosition> {
        OnLoop::suspend(&mut self.running, &self.id)
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        Ok(Vec::new())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        state::expect_none(&self.id, state)
    }
}
