//! Typing on the guest's console.

use std::sync::Arc;

use crate::devices::serial::Serial;
use crate::devices::virtio::console::ConsoleInput;
use crate::vm::Vm;

/// The keyboard of a machine.
#[derive(Debug)]
pub(crate) enum Input {
    /// No console device.
    Off,
    /// virtio-console.
    Hvc(ConsoleInput),
    /// COM1.
    Serial(Arc<Serial>),
}

impl Vm {
    /// Types `bytes` on the guest's console and says how many of them were accepted. What the guest has not read yet is
    /// kept, up to a few kilobytes; the rest is not accepted and may be offered again later. Never blocks. Without a
    /// console nothing is accepted.
    pub fn console_input(&self, bytes: &[u8]) -> usize {
        match &self.input {
            Input::Off => 0,
            Input::Hvc(input) => input.push(bytes),
            Input::Serial(serial) => serial.input(bytes),
        }
    }
}
