//! Configuration space, features and activation.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;

use super::handle::{MemHandle, Shared};
use super::region::Region;
use super::state::{self, MemStateError};
use super::worker::{Counters, MemWorker};
use crate::confinement::Role;
use crate::devices::virtio::queue::served_queue::ServedQueue;
use crate::devices::virtio::state::{QueuePosition, StateError};
use crate::devices::virtio::worker::queue_thread::QueueThread;
use crate::devices::virtio::{ActivateError, Activation, CHAIN_FEATURES, VirtioDevice};
use crate::memory::window::Window;

const QUEUE_SIZES: [u16; 1] = [64];
/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE: the driver must not even read unplugged blocks (5.15.3).
pub(super) const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// The device with the hotpluggable memory of a machine.
#[derive(Debug)]
pub struct Mem {
    id: String,
    pub(super) shared: Arc<Shared>,
    counters: Arc<Counters>,
    running: Option<QueueThread<MemWorker>>,
}

impl Mem {
    /// A device over all of `window`, of which the guest may have `limit` bytes.
    pub fn new(id: &str, window: Arc<Window>, limit: u64) -> Self {
        Self {
            id: id.to_owned(),
            shared: Arc::new(Shared::new(Region::new(window, limit))),
            counters: Arc::default(),
            running: None,
        }
    }

    /// The host's side of the device.
    pub fn handle(&self) -> MemHandle {
        MemHandle::new(self.shared.clone())
    }

    fn gone(&self) -> StateError {
        StateError::unsupported(&self.id, MemStateError::Ended)
    }
}

impl VirtioDevice for Mem {
    fn id(&self) -> &str {
        &self.id
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        CHAIN_FEATURES | UNPLUGGED_INACCESSIBLE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.shared.read_config(offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let host = |what, source| ActivateError::Host {
            device: self.id.clone(),
            what,
            source,
        };
        if activation.features & UNPLUGGED_INACCESSIBLE == 0 {
            // Such a driver may read unplugged blocks, where nothing answers (Linux before 5.16).
            let source = io::Error::from(io::ErrorKind::Unsupported);
            return Err(host("driver without UNPLUGGED_INACCESSIBLE", source));
        }
        let queue = ServedQueue::take(&mut activation, &self.id, 0)?;
        let interrupt = activation.interrupt;
        let worker = MemWorker::new(
            queue,
            interrupt.clone(),
            self.shared.clone(),
            self.counters.clone(),
        );
        let thread = QueueThread::spawn(activation.confinement, Role::Mem, "vmm-mem", worker)
            .map_err(|source| host("cannot start the worker's thread", source))?;
        self.running = Some(thread);
        self.shared.update(|state| state.interrupt = Some(interrupt));
        Ok(())
    }

    /// Blocks stay plugged: the guest may use them until it unplugs them, which Linux does first when its driver starts
    /// again (5.15.5.1).
    fn reset(&mut self) {
        self.suspend();
    }

    fn suspend(&mut self) -> Vec<QueuePosition> {
        let Some(running) = self.running.take() else {
            return Vec::new();
        };
        let worker = running.stop(&self.id);
        self.shared.update(|state| state.interrupt = None);
        worker.map_or_else(Vec::new, |worker| vec![worker.position()])
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let state = self.shared.lock();
        let region = state.region.as_ref().ok_or_else(|| self.gone())?;
        state::save(&self.id, region)
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        let mut state = self.shared.lock();
        let region = state.region.as_mut().ok_or_else(|| self.gone())?;
        state::restore(&self.id, region, bytes)
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let state = self.shared.lock();
        let region = state.region.as_ref();
        let mut counters = self.counters.all();
        counters.push(("plugged_bytes", region.map_or(0, Region::plugged)));
        counters.push(("requested_bytes", region.map_or(0, Region::requested)));
        counters.push(("stray_pages", region.map_or(0, Region::strays)));
        counters
    }
}

impl Drop for Mem {
    /// Ends waiting resizes. The window goes with the machine.
    fn drop(&mut self) {
        self.suspend();
        self.shared.update(|state| state.region = None);
    }
}
