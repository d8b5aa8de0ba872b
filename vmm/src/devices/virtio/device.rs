//! What a virtio device is to the machine and to its transport.

use std::any::Any;
use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use super::interrupt::Interrupt;
use super::state::{QueuePosition, StateError};
use crate::confinement::Confinement;
use crate::io_loop::{IoLoop, IoLoopError};
use crate::memory::GuestMemory;

/// What every device that serves requests from chains of any shape offers.
pub const CHAIN_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// A device could not start working; the transport then sets DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The guest enabled fewer queues than the device needs.
    #[error("{device}: queue {index} was not set up by the driver")]
    QueueMissing {
        /// Device id from the configuration.
        device: String,
        /// Queue index.
        index: usize,
    },
    /// A host resource was refused.
    #[error("{device}: {what}: {source}")]
    Host {
        /// Device id from the configuration.
        device: String,
        /// What was attempted.
        what: &'static str,
        /// Cause.
        source: io::Error,
    },
    /// The I/O loop did not take the worker.
    #[error(transparent)]
    Loop(#[from] IoLoopError),
}

/// One queue as the driver configured it, frozen since DRIVER_OK.
#[derive(Debug)]
pub struct ActiveQueue {
    /// Index of the queue in the device.
    pub index: usize,
    /// Ring addresses, size and positions (not 0 on a device that was suspended or restored); EVENT_IDX already set from
    /// the negotiated features.
    pub queue: Queue,
    /// Signalled by the guest's QueueNotify write (an ioeventfd).
    pub kick: Arc<EventFd>,
}

/// Everything a device needs to run; given once, at DRIVER_OK.
#[derive(Debug)]
pub struct Activation {
    /// Guest RAM.
    pub memory: Arc<GuestMemory>,
    /// Features both sides agreed on.
    pub features: u64,
    /// The queues the driver made ready, in index order; all validated against guest memory.
    pub queues: Vec<ActiveQueue>,
    /// Interrupt of this device.
    pub interrupt: Interrupt,
    /// The loop on which workers run.
    pub io: IoLoop,
    /// What threads of the device's own give up.
    pub confinement: Confinement,
}

impl Activation {
    /// Takes queue `index` out, for `device` (its id, for the error).
    ///
    /// # Errors
    /// [`ActivateError::QueueMissing`] when the driver did not set it up.
    pub fn take_queue(&mut self, device: &str, index: usize) -> Result<ActiveQueue, ActivateError> {
        let at = self.queues.iter().position(|queue| queue.index == index);
        let at = at.ok_or_else(|| ActivateError::QueueMissing {
            device: device.to_owned(),
            index,
        })?;
        Ok(self.queues.remove(at))
    }
}

/// A guest read of the configuration space `space`; what lies beyond it reads as zero.
pub fn read_space(space: &[u8], offset: u64, data: &mut [u8]) {
    let present = usize::try_from(offset)
        .ok()
        .and_then(|offset| space.get(offset..));
    let mut bytes = present.unwrap_or_default().iter();
    for to in data {
        *to = bytes.next().copied().unwrap_or(0);
    }
}

/// A virtio device behind a transport.
///
/// The transport owns status, feature negotiation and queue registers; the device owns its configuration space and its
/// worker. Calls come one at a time (the transport holds the device's lock): those that start or stop the worker from threads
/// that may start others, those about the configuration space from vCPU threads, too.
///
/// [`Any`] lets the machine find the device's own type behind the trait, for what only that type can do (a disk's new
/// size, a balloon's target): `Machine::with_device`.
pub trait VirtioDevice: Any + Send {
    /// Device id of the configuration, unique in the VM; used in logs and metrics.
    fn id(&self) -> &str;

    /// Virtio device ID (virtio 1.2, section 5), e.g. 2 for block.
    fn device_type(&self) -> u32;

    /// Maximum size of each queue, in descriptors (powers of two); the length is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Offered feature bits. Must include VIRTIO_F_VERSION_1.
    fn features(&self) -> u64;

    /// Fills `data` from the configuration space at `offset`. Bytes beyond the space read as zero. What the guest sees is a
    /// copy of the first [`CONFIG_BYTES`](super::interrupt::CONFIG_BYTES): a change in a running device reaches it through
    /// [`Interrupt::config`].
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Guest write to the configuration space. Ignored unless the device has writable fields.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Starts the worker. Called at most once between resets.
    ///
    /// # Errors
    /// [`ActivateError`]; the device stays inactive.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops the worker. When this returns nothing of the device touches guest memory any more; the device can be
    /// activated again. A no-op on an inactive device.
    fn reset(&mut self);

    /// Stops the worker as [`reset`](Self::reset) does, but forgets nothing: requests already taken from a queue are
    /// finished and returned, requests not taken stay in the rings, and connections, leases and positions are kept for
    /// the next [`activate`](Self::activate). Returns where each queue given at activation stands; empty on an inactive
    /// device.
    fn suspend(&mut self) -> Vec<QueuePosition>;

    /// What the device knows beyond its configuration and its queues, encoded by its `state.rs` with
    /// [`state::encode`]; empty for a device that knows nothing more. Called while suspended or never activated.
    ///
    /// # Errors
    /// [`StateError::Unsupported`] for a state that cannot be carried into another process.
    fn save(&self) -> Result<Vec<u8>, StateError>;

    /// Takes over what [`save`](Self::save) gave, in a fresh device made from the same configuration, before it is
    /// activated. The bytes come from a file and are not trusted.
    ///
    /// # Errors
    /// [`StateError`]; the device is not used then.
    fn restore(&mut self, state: &[u8]) -> Result<(), StateError>;

    /// Counters for [`DeviceMetrics`](crate::vm::DeviceMetrics), by name, e.g. `("read_bytes", 4096)`.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}
