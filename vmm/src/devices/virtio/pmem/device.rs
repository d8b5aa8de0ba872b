//! Configuration space and activation.

use std::fs::File;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_PMEM;

use super::file::{PmemError, PmemFile};
use super::state::{self, PmemStateError};
use super::worker::{Counters, PmemWorker};
use crate::confinement::Role;
use crate::devices::virtio::queue::served_queue::ServedQueue;
use crate::devices::virtio::state::{QueuePosition, StateError};
use crate::devices::virtio::worker::queue_thread::{Aside, QueueThread};
use crate::devices::virtio::{ActivateError, Activation, CHAIN_FEATURES, VirtioDevice, read_space};
use crate::memory::window::{FileMapping, FilePlace, Windows};

const QUEUE_SIZES: [u16; 1] = [64];

/// The worker's thread, and what stops it while it waits for the disk.
#[derive(Debug)]
struct Running {
    thread: QueueThread<PmemWorker>,
    aside: Arc<Aside<QueuePosition>>,
}

/// A file in guest memory.
#[derive(Debug)]
pub struct Pmem {
    id: String,
    mapping: FileMapping,
    /// Keeps the lock, too.
    file: Arc<File>,
    read_only: bool,
    counters: Arc<Counters>,
    running: Option<Running>,
}

impl Pmem {
    /// Puts `file` into the pmem window of `windows`, where it stays as long as the device exists.
    ///
    /// # Errors
    /// [`PmemError::Window`].
    pub fn new(file: PmemFile, windows: &Windows) -> Result<Self, PmemError> {
        Self::at(file, windows, FilePlace::FirstGap)
    }

    /// Puts `file` where the device was that gave `state` (see [`VirtioDevice::save`]): the guest knows the address. Mapped
    /// anywhere else first, it could be in the way of itself or of another device.
    ///
    /// # Errors
    /// [`PmemError::State`], [`PmemError::Window`].
    pub fn at_saved_place(file: PmemFile, windows: &Windows, state: &[u8]) -> Result<Self, PmemError> {
        let start = state::saved_start(file.id(), file.device_size(), state)?;
        Self::at(file, windows, FilePlace::Address(start))
    }

    fn at(file: PmemFile, windows: &Windows, place: FilePlace) -> Result<Self, PmemError> {
        let id = file.id().to_owned();
        let (mapping, file, read_only) = file.map(windows, place)?;
        Ok(Self {
            id,
            mapping,
            file: Arc::new(file),
            read_only,
            counters: Arc::default(),
            running: None,
        })
    }
}

impl VirtioDevice for Pmem {
    fn id(&self) -> &str {
        &self.id
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_PMEM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        CHAIN_FEATURES
    }

    /// `struct virtio_pmem_config` (5.19.4): le64 start, le64 size.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = [self.mapping.start(), self.mapping.size()].map(u64::to_le_bytes);
        read_space(space.as_flattened(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let queue = ServedQueue::take(&mut activation, &self.id, 0)?;
        // What a guest wrote to a read-only file is not in it: there is nothing to flush.
        let file = (!self.read_only).then(|| self.file.clone());
        let worker = PmemWorker::new(queue, file, self.counters.clone());
        let aside = worker.aside();
        let thread =
            QueueThread::spawn(activation.confinement, Role::Pmem, "vmm-pmem", worker).map_err(|source| {
                ActivateError::Host {
                    device: self.id.clone(),
                    what: "cannot start the worker's thread",
                    source,
                }
            })?;
        self.running = Some(Running { thread, aside });
        Ok(())
    }

    fn reset(&mut self) {
        self.suspend();
    }

    fn suspend(&mut self) -> Vec<QueuePosition> {
        let Some(Running { thread, aside }) = self.running.take() else {
            return Vec::new();
        };
        // A flush is not waited for: it begins anew with the next activation. The file stays open, and locked, until it ends.
        match thread.stop_unless(&self.id, &aside) {
            Ok(worker) => worker.map_or_else(Vec::new, |worker| vec![worker.position()]),
            Err(standing) => vec![standing],
        }
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        state::save(&self.id, &self.mapping)
    }

    /// The device is where it was from the beginning ([`Pmem::at_saved_place`]).
    fn restore(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        let start = state::saved_start(&self.id, self.mapping.size(), bytes)?;
        if start == self.mapping.start() {
            return Ok(());
        }
        let error = PmemStateError::Place {
            saved: start,
            present: self.mapping.start(),
        };
        Err(StateError::invalid(&self.id, error))
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.counters.all()
    }
}

impl Drop for Pmem {
    fn drop(&mut self) {
        self.suspend();
    }
}
