//! Features, configuration space and activation.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::state::ConsoleState;
use super::worker::{ConsoleWorker, Counters};
use super::{ConsoleInput, ConsoleLog, INPUT_CAPACITY};
use crate::devices::virtio::queue::served_queue::ServedQueue;
use crate::devices::virtio::state::{self, QueuePosition, StateError};
use crate::devices::virtio::{ActivateError, Activation, CHAIN_FEATURES, OnLoop, VirtioDevice};

/// receiveq(port0) and transmitq(port0), 5.3.2.
const QUEUE_SIZES: [u16; 2] = [64, 64];
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const ID: &str = "console";

/// The console device: one port.
///
/// VIRTIO_CONSOLE_F_EMERG_WRITE is not offered:
/// Linux has no driver for it (drivers/char/virtio_console.c, 6.12), its early output is the serial port's work.
#[derive(Debug)]
pub struct Console {
    log: ConsoleLog,
    input: ConsoleInput,
    counters: Arc<Counters>,
    running: Option<OnLoop<ConsoleWorker>>,
}

impl Console {
    /// A console that writes to `log`, and what is typed on it.
    ///
    /// # Errors
    /// There is no eventfd to be had.
    pub fn new(log: ConsoleLog) -> io::Result<(Self, ConsoleInput)> {
        let input = ConsoleInput::new()?;
        let console = Self {
            log,
            input: input.clone(),
            counters: Arc::default(),
            running: None,
        };
        Ok((console, input))
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
        let worker = ConsoleWorker::new(
            ServedQueue::take(&mut activation, ID, RECEIVE)?,
            ServedQueue::take(&mut activation, ID, TRANSMIT)?,
            self.log.clone(),
            self.input.clone(),
            self.counters.clone(),
        );
        self.running = Some(OnLoop::start(activation.io, worker)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.suspend();
    }

    fn suspend(&mut self) -> Vec<QueuePosition> {
        OnLoop::suspend(&mut self.running, ID)
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let input = self.input.pending().peek(INPUT_CAPACITY);
        state::encode(ID, &ConsoleState { input })
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        let state = ConsoleState::decode(ID, state)?;
        self.input.push(&state.input);
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("output_bytes", self.counters.output.get()),
            ("input_bytes", self.counters.input.get()),
            ("input_waiting", self.input.pending().len() as u64),
        ]
    }
}
