//! COM1: a 16550 whose output goes to the console log. Only present when the configuration asks for it.

use std::io;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};

use acpi_tables::{Aml, aml};
use vm_superio::Trigger;
use vm_superio::serial::NoEvents;
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::devices::virtio::console::ConsoleLog;
use crate::vm::ExitReason;

/// First I/O port of COM1.
pub const PORT: u16 = 0x3f8;
/// Number of ports.
pub const PORTS: u16 = 8;
/// Interrupt of COM1: the kernel's early console setup knows no other.
pub const GSI: u32 = 4;

struct Irq(Arc<EventFd>);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.write(1)
    }
}

struct LogWriter(ConsoleLog);

impl io::Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The UART.
pub struct Serial(Mutex<vm_superio::Serial<Irq, NoEvents, LogWriter>>);

impl std::fmt::Debug for Serial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Serial").finish_non_exhaustive()
    }
}

impl Serial {
    /// `irqfd` is bound to [`GSI`].
    pub fn new(log: ConsoleLog, irqfd: Arc<EventFd>) -> Self {
        Self(Mutex::new(vm_superio::Serial::new(Irq(irqfd), LogWriter(log))))
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (Ok(offset), Some(first)) = (u8::try_from(offset), data.first_mut()) {
            *first = self.0.lock().unwrap_or_else(PoisonError::into_inner).read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> ControlFlow<ExitReason> {
        let Ok(offset) = u8::try_from(offset) else {
            return ControlFlow::Continue(());
        };
        let mut serial = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // More than one byte is a string instruction: the same register again and again.
        for value in data {
            if let Err(error) = serial.write(offset, *value) {
                tracing::debug!(?error, "serial: write failed");
            }
        }
        ControlFlow::Continue(())
    }
}

/// Writes the ACPI device `PNP0501`.
pub fn write_aml(sink: &mut Vec<u8>) {
    aml::Device::new(
        "COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &aml::ONE),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::Interrupt::new(true, true, false, false, GSI),
                    &aml::IO::new(PORT, PORT, 1, PORTS as u8),
                ]),
            ),
        ],
    )
    .to_aml_bytes(sink);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn write_when_data_register_reaches_the_log() {
        let log = ConsoleLog::default();
        let serial = Serial::new(log.clone(), Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()));
        for byte in b"hello\n" {
            assert_eq!(serial.write(0, &[*byte]), ControlFlow::Continue(()));
        }
        assert_eq!(log.tail(1), ["hello"]);
    }

    #[test]
    fn read_when_line_status_says_ready_to_send() {
        let serial = Serial::new(
            ConsoleLog::default(),
            Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()),
        );
        let mut data = [0];
        serial.read(5, &mut data);
        assert_eq!(data[0] & 0x60, 0x60);
    }
}
