//! Features, configuration space and activation.

use std::sync::{Arc, Mutex};

use event_manager::SubscriberId;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::ConsoleLog;
use super::worker::ConsoleWorker;
use crate::devices::virtio::{ActivateError, Activation, VirtioDevice};
use crate::io_loop::IoLoop;

/// receiveq(port0) and transmitq(port0), 5.3.2.
const QUEUE_SIZES: [u16; 2] = [64, 64];
const TRANSMIT: usize = 1;
const ID: &str = "console";

/// The console device: one port, output only.
///
/// The guest's receive buffers stay in its queue; nothing is ever typed. VIRTIO_CONSOLE_F_EMERG_WRITE is not offered:
/// Linux has no driver for it (drivers/char/virtio_console.c, 6.12), its early output is the serial port's work.
#[derive(Debug)]
pub struct Console {
    log: ConsoleLog,
    running: Option<(IoLoop, SubscriberId)>,
}

impl Console {
    /// A console that writes to `log`.
    pub fn new(log: ConsoleLog) -> Self {
        Self { log, running: None }
    }
}

impl VirtioDevice for Console {
    fn id(&self) -> &str {
        ID
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        // No feature that gives a field meaning is offered.
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
        let transmit = queues.into_iter().find(|queue| queue.index == TRANSMIT);
        let transmit = transmit.ok_or_else(|| ActivateError::QueueMissing {
            device: ID.to_owned(),
            index: TRANSMIT,
        })?;
        let worker = ConsoleWorker::new(ID, transmit, memory, interrupt, self.log.clone());
        let subscriber = io.add(Arc::new(Mutex::new(worker)))?;
        self.running = Some((io, subscriber));
        Ok(())
    }

    fn reset(&mut self) {
        if let Some((io, subscriber)) = self.running.take()
            && let Err(error) = io.remove(subscriber)
        {
            // The loop has ended, so it calls nothing any more.
            tracing::debug!(device = ID, %error, "virtio: reset after the loop");
        }
    }
}
