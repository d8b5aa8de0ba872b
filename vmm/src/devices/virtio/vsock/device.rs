//! The device as the transport sees it.

use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::config::VsockConfig;
use super::error::VsockError;
use super::handle::VsockHandle;
use super::muxer::Muxer;
use super::shared::{Shared, lock};
use super::state::{VsockState, VsockStateError};
use super::transport_reset::EventQueue;
use super::uds::Endpoint;
use super::worker::{Transport, Worker};
use crate::descriptors::Budget;
use crate::devices::virtio::state::{self, QueuePosition, StateError};
use crate::devices::virtio::{ActivateError, Activation, Running, VirtioDevice, read_space};

pub(super) const ID: &str = "vsock";
/// rx, tx, event.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
/// Queues (virtio 1.2, 5.10.2).
pub(super) const RX: usize = 0;
pub(super) const TX: usize = 1;
pub(super) const EVENT: usize = 2;

/// The virtio-vsock device.
#[derive(Debug)]
pub struct Vsock {
    guest_cid: u64,
    shared: Arc<Shared>,
    worker: Arc<Mutex<Worker>>,
    running: Option<Running>,
    /// Activated since the last reset; suspended or not.
    driver_up: bool,
}

impl Vsock {
    /// Creates the device and the host's handle to it. Binds the Unix socket, if one is configured: clients that come
    /// before the guest's driver is up wait in its backlog.
    ///
    /// # Errors
    /// [`VsockError::Bind`] or [`VsockError::Create`].
    pub fn new(config: &VsockConfig) -> Result<(Self, VsockHandle), VsockError> {
        Self::with_descriptors(config, Budget::of_process())
    }

    /// As [`new`](Self::new); what the guest opens is taken from `descriptors`.
    pub(super) fn with_descriptors(
        config: &VsockConfig,
        descriptors: Arc<Budget>,
    ) -> Result<(Self, VsockHandle), VsockError> {
        let shared = Shared::new().map_err(|source| VsockError::Create {
            what: "an eventfd",
            source,
        })?;
        let shared = Arc::new(shared);
        let endpoint = config.uds_path.as_deref().map(Endpoint::bind).transpose()?;
        let guest_cid = u64::from(config.guest_cid);
        let muxer = Muxer::new(shared.clone(), guest_cid, endpoint, descriptors)?;
        let device = Self {
            guest_cid,
            shared: shared.clone(),
            worker: Arc::new(Mutex::new(Worker::new(muxer))),
            running: None,
            driver_up: false,
        };
        Ok((device, VsockHandle::new(shared)))
    }
}

impl VirtioDevice for Vsock {
    fn id(&self) -> &str {
        ID
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        // Stream sockets need no feature bit (virtio 1.2, 5.10.3). Both queues are used strictly in order.
        (1 << VIRTIO_F_VERSION_1) | (1 << VIRTIO_F_IN_ORDER) | (1 << VIRTIO_RING_F_EVENT_IDX)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_space(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let rx = activation.take_queue(ID, RX)?;
        let tx = activation.take_queue(ID, TX)?;
        let event = activation.take_queue(ID, EVENT)?;
        let transport = Transport {
            memory: activation.memory,
            rx: rx.queue,
            tx: tx.queue,
            kicks: [rx.kick, tx.kick],
            event: EventQueue {
                queue: event.queue,
                kick: event.kick,
            },
            interrupt: activation.interrupt,
        };
        lock(&self.worker)
            .start(transport, activation.confinement)
            .map_err(|source| ActivateError::Host {
                device: ID.to_owned(),
                what: "cannot watch the queues, or start the thread that connects",
                source,
            })?;
        match Running::start(activation.io, self.worker.clone()) {
            Ok(running) => {
                self.running = Some(running);
                self.driver_up = true;
                Ok(())
            }
            Err(error) => {
                lock(&self.worker).stop();
                Err(error.into())
            }
        }
    }

    /// Also on a suspended device: the guest has forgotten its connections either way.
    fn reset(&mut self) {
        if let Some(running) = self.running.take() {
            running.stop(ID);
        }
        if std::mem::take(&mut self.driver_up) {
            lock(&self.worker).stop();
        }
    }

    fn suspend(&mut self) -> Vec<QueuePosition> {
        let Some(running) = self.running.take() else {
            return Vec::new();
        };
        running.stop(ID);
        lock(&self.worker).suspend()
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        state::encode(
            ID,
            &VsockState {
                guest_cid: self.guest_cid,
                driver_up: self.driver_up,
                next_port: self.shared.next_port(),
            },
        )
    }

    /// The guest's connections have no host end any more. If its driver is up it is told so, before anything else, as
    /// soon as the device is activated; what was asked for meanwhile waits until the guest has taken note.
    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        let state: VsockState = state::decode(ID, state)?;
        state.check_cid(ID, self.guest_cid)?;
        if !self.shared.set_next_port(state.next_port) {
            return Err(StateError::invalid(ID, VsockStateError::Port(state.next_port)));
        }
        self.driver_up = state.driver_up;
        if state.driver_up {
            lock(&self.worker).expect_stale_guest();
        }
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let m = self.shared.counters.snapshot();
        vec![
            ("rx_packets", m.rx_packets),
            ("rx_bytes", m.rx_bytes),
            ("tx_packets", m.tx_packets),
            ("tx_bytes", m.tx_bytes),
            ("connections", m.connections),
            ("open_connections", m.open_connections),
            ("refused", m.refused),
            ("retries", m.retries),
            ("malformed", m.malformed),
            ("dropped_bytes", m.dropped_bytes),
            ("rx_stalls", m.rx_stalls),
            ("transport_resets", m.transport_resets),
        ]
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.reset();
        self.shared.stop();
    }
}
