//! Features, configuration space and activation.

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::ConsoleLog;
use super::worker::ConsoleWorker;
use crate::devices::virtio::state::{self, QueuePosition, StateError};
use crate::devices::virtio::{ActivateError, Activation, CHAIN_FEATURES, OnLoop, VirtioDevice};

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
    running: Option<OnLoop<ConsoleWorker>>,
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
        CHAIN_FEATURES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        // No feature that gives a field meaning is offered.
        data.fill(0);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let transmit = activation.take_queue(ID, TRANSMIT)?;
        let worker = ConsoleWorker::new(
            ID,
            transmit,
            activation.memory,
            activation.interrupt,
            self.log.clone(),
        );
        self.running = Some(OnLoop::start(activation.io, worker)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.suspend();
    }

    /// The receive queue is never looked at: it stays where the driver left it.
    fn suspend(&mut self) -> Vec<QueuePosition> {
        let running = self.running.take();
        running.map_or_else(Vec::new, |r| r.stop(ID, |worker| vec![worker.position()]))
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        Ok(Vec::new())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        state::expect_none(ID, state)
    }
}
