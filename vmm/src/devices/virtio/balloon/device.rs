//! Configuration space, features and activation.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use super::config::BalloonConfig;
use super::release::PAGE;
use super::state::BalloonState;
use super::statistics::{BalloonStatistics, Snapshot};
use super::worker::{BalloonWorker, Counters, Role};
use crate::confinement;
use crate::devices::virtio::queue::served_queue::ServedQueue;
use crate::devices::virtio::state::{QueuePosition, StateError};
use crate::devices::virtio::worker::queue_thread::QueueThread;
use crate::devices::virtio::{
    ActivateError, Activation, CHAIN_FEATURES, Interrupt, VirtioDevice, read_space,
};
use crate::memory::window::Windows;

/// VIRTIO_BALLOON_F_STATS_VQ.
const STATS_VQ: u64 = 1 << 1;
/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM.
const DEFLATE_ON_OOM: u64 = 1 << 2;
/// VIRTIO_BALLOON_F_REPORTING.
const REPORTING: u64 = 1 << 5;
/// Queues as numbered by the specification: inflate, deflate, statistics, free page hints (never used), reporting.
const QUEUE_SIZES: [u16; 5] = [128; 5];
/// `actual` in the configuration space.
const ACTUAL: u64 = 4;

/// The balloon does not get its new size, or cannot be asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BalloonError {
    /// The machine is stopped.
    #[error("balloon: the machine is {0}")]
    State(crate::lifecycle::VmState),
    /// There is no such device.
    #[error("balloon: the machine has no balloon device")]
    Missing,
    /// Larger than the guest.
    #[error("balloon {id}: {requested} bytes requested, the guest has {memory} bytes of memory")]
    TooLarge {
        /// Device id.
        id: String,
        /// Requested bytes.
        requested: u64,
        /// Bytes of RAM, plugged ones included.
        memory: u64,
    },
    /// No statistics yet, or none configured.
    #[error("balloon {id}: no statistics: {reason}")]
    NoStatistics {
        /// Device id.
        id: String,
        /// Why there are none.
        reason: &'static str,
    },
}

/// How large the balloon is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BalloonStatus {
    /// Bytes it should have.
    pub target: u64,
    /// Bytes the guest says it has.
    pub actual: u64,
}

/// What the device and its worker share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    statistics: Mutex<Option<Snapshot>>,
    /// What the device counts.
    pub(super) counters: Counters,
}

impl Shared {
    /// The last statistics.
    pub(super) fn statistics(&self) -> MutexGuard<'_, Option<Snapshot>> {
        self.statistics.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The balloon device.
#[derive(Debug)]
pub struct Balloon {
    config: BalloonConfig,
    windows: Windows,
    sizes: BalloonState,
    shared: Arc<Shared>,
    running: Option<(QueueThread<BalloonWorker>, Interrupt)>,
}

impl Balloon {
    /// An empty balloon for a guest whose memory is described by `windows`.
    pub fn new(config: &BalloonConfig, windows: &Windows) -> Self {
        Self {
            config: config.clone(),
            windows: windows.clone(),
            sizes: BalloonState { target: 0, actual: 0 },
            shared: Arc::default(),
            running: None,
        }
    }

    /// Asks the guest for a balloon of `bytes` (rounded down to 4 KiB), larger or smaller than it is. The guest follows when
    /// it can; see [`status`](Self::status).
    ///
    /// # Errors
    /// [`BalloonError::TooLarge`].
    pub fn set_target(&mut self, bytes: u64) -> Result<(), BalloonError> {
        let memory = self.windows.ram_bytes();
        let pages = u32::try_from(bytes / PAGE).ok().filter(|_| bytes <= memory);
        self.sizes.target = pages.ok_or_else(|| BalloonError::TooLarge {
            id: self.config.id.clone(),
            requested: bytes,
            memory,
        })?;
        // Without a driver the target is there when one starts.
        if let Some((_, interrupt)) = &self.running {
            interrupt.config(|space| self.read_config(0, space));
        }
        Ok(())
    }

    /// Target and size.
    pub fn status(&self) -> BalloonStatus {
        BalloonStatus {
            target: u64::from(self.sizes.target) * PAGE,
            actual: u64::from(self.sizes.actual) * PAGE,
        }
    }

    /// The last statistics of the guest.
    ///
    /// # Errors
    /// [`BalloonError::NoStatistics`] when they are not configured, or did not arrive yet.
    pub fn statistics(&self) -> Result<BalloonStatistics, BalloonError> {
        let none = |reason| BalloonError::NoStatistics {
            id: self.config.id.clone(),
            reason,
        };
        if self.config.statistics_interval_s == 0 {
            return Err(none("statistics_interval_s is 0"));
        }
        let statistics = self.shared.statistics();
        let snapshot = statistics.as_ref();
        snapshot
            .map(Snapshot::report)
            .ok_or_else(|| none("the guest has sent none yet"))
    }

    /// What each queue the driver set up is for: the queues of the features it accepted, in the specification's order.
    ///
    /// By the specification the numbers are fixed (statistics 2, reporting 4); Linux leaves out queues of features it did
    /// not accept and numbers the rest without gaps (drivers/virtio/virtio_mmio.c, `queue_idx++`). The order is the same.
    fn roles(features: u64) -> Vec<Role> {
        let optional = [(STATS_VQ, Role::Statistics), (REPORTING, Role::Reporting)];
        let accepted = optional.into_iter().filter(|(bit, _)| features & bit != 0);
        [Role::Inflate, Role::Deflate]
            .into_iter()
            .chain(accepted.map(|(_, role)| role))
            .collect()
    }
}

impl VirtioDevice for Balloon {
    fn id(&self) -> &str {
        &self.config.id
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn queue_sizes(&self) -> &[u16] {
        let (base, _) = QUEUE_SIZES.split_at(2);
        if self.features() & (STATS_VQ | REPORTING) == 0 {
            base
        } else {
            &QUEUE_SIZES
        }
    }

    fn features(&self) -> u64 {
        let mut features = CHAIN_FEATURES;
        if self.config.deflate_on_oom {
            features |= DEFLATE_ON_OOM;
        }
        if self.config.reporting {
            features |= REPORTING;
        }
        if self.config.statistics_interval_s > 0 {
            features |= STATS_VQ;
        }
        features
    }

    /// `struct virtio_balloon_config` (5.5.4): le32 num_pages, le32 actual; the fields of features not offered are 0.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = [self.sizes.target.to_le_bytes(), self.sizes.actual.to_le_bytes()];
        read_space(space.as_flattened(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (ACTUAL, Ok(actual)) = (offset, <[u8; 4]>::try_from(data)) {
            self.sizes.actual = u32::from_le_bytes(actual);
        }
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let roles = Self::roles(activation.features);
        let mut queues = std::mem::take(&mut activation.queues);
        queues.sort_unstable_by_key(|queue| queue.index);
        if queues.len() < roles.len() {
            return Err(ActivateError::QueueMissing {
                device: self.config.id.clone(),
                index: queues.len(),
            });
        }
        let interrupt = activation.interrupt;
        let served = |queue| {
            ServedQueue::new(
                &self.config.id,
                queue,
                activation.memory.clone(),
                interrupt.clone(),
            )
        };
        let queues = roles.into_iter().zip(queues.into_iter().map(served)).collect();
        let host = |what, source| ActivateError::Host {
            device: self.config.id.clone(),
            what,
            source,
        };
        let interval = Duration::from_secs(self.config.statistics_interval_s.into());
        let worker = BalloonWorker::new(queues, self.windows.clone(), self.shared.clone(), interval)
            .map_err(|source| host("cannot start the timer of statistics", source))?;
        let thread = QueueThread::spawn(
            activation.confinement,
            confinement::Role::Balloon,
            "vmm-balloon",
            worker,
        )
        .map_err(|source| host("cannot start the worker's thread", source))?;
        self.running = Some((thread, interrupt));
        Ok(())
    }

    fn reset(&mut self) {
        self.suspend();
        // A driver that goes empties its balloon; one that crashed has forgotten it.
        self.sizes.actual = 0;
        *self.shared.statistics() = None;
    }

    fn suspend(&mut self) -> Vec<QueuePosition> {
        let worker = self
            .running
            .take()
            .and_then(|(thread, _)| thread.stop(&self.config.id));
        worker.map_or_else(Vec::new, BalloonWorker::finish)
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        self.sizes.save(&self.config.id)
    }

    /// The size of the guest's memory is checked later, by nobody: its plugged part may be restored after the balloon. A
    /// target is therefore checked against all the guest can have.
    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        let all: u64 = self.windows.layout().regions().iter().map(|r| r.size).sum();
        let max = u32::try_from(all / PAGE).unwrap_or(u32::MAX);
        self.sizes = BalloonState::restore(&self.config.id, state, max)?;
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut counters = self.shared.counters.all();
        counters.push(("target_bytes", self.status().target));
        counters.push(("actual_bytes", self.status().actual));
        counters
    }
}

impl Drop for Balloon {
    fn drop(&mut self) {
        self.suspend();
    }
}
