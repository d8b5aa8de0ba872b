//! COM1: a 16550 whose output goes to the console log. Only present when the configuration asks for it.

use std::io;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use acpi_tables::{Aml, aml};
use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::NoEvents;
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::devices::virtio::console::{ConsoleLog, PendingInput};
use crate::devices::virtio::state::StateError;
use crate::lifecycle::ExitReason;

/// First I/O port of COM1.
pub const PORT: u16 = 0x3f8;
/// Number of ports.
pub const PORTS: u16 = 8;
/// Line status of a UART whose output is always gone: transmitter empty and idle.
const LSR_IDLE: u8 = 0x60;
/// Interrupt identification: set while nothing is pending.
const IIR_NONE: u8 = 1;
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
pub struct Serial {
    uart: Mutex<Uart>,
    log: ConsoleLog,
    irqfd: Arc<EventFd>,
}

struct Uart {
    registers: vm_superio::Serial<Irq, NoEvents, LogWriter>,
    /// Input that does not fit into the receive FIFO yet.
    pending: PendingInput,
}

/// A state that is none of COM1.
#[derive(Debug, thiserror::Error)]
enum SerialStateError {
    #[error(
        "interrupt enable {interrupt_enable:#x}, line status {line_status:#x} with {fifo} bytes in the FIFO"
    )]
    Registers {
        interrupt_enable: u8,
        line_status: u8,
        fifo: usize,
    },
    #[error("{0} bytes of input")]
    Input(usize),
    #[error(transparent)]
    Uart(#[from] vm_superio::serial::Error<io::Error>),
}

/// Registers and input of COM1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    fifo: Vec<u8>,
    pending: Vec<u8>,
}

impl std::fmt::Debug for Serial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Serial").finish_non_exhaustive()
    }
}

impl Uart {
    /// Moves input into the FIFO as far as there is room. In loopback mode the line is cut, the input waits.
    fn refill(&mut self) {
        let room = self.registers.fifo_capacity();
        if room == 0 || self.pending.is_empty() {
            return;
        }
        match self.registers.enqueue_raw_bytes(&self.pending.peek(room)) {
            Ok(count) => self.pending.consume(count),
            Err(error) => guest_log!(DEBUG, ?error, "serial: input not delivered"),
        }
    }
}

impl Serial {
    /// `irqfd` is bound to [`GSI`].
    pub fn new(log: ConsoleLog, irqfd: Arc<EventFd>) -> Self {
        let registers = vm_superio::Serial::new(Irq(irqfd.clone()), LogWriter(log.clone()));
        Self {
            uart: Mutex::new(Uart {
                registers,
                pending: PendingInput::default(),
            }),
            log,
            irqfd,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Types `bytes` and says how many of them were accepted: those that fit beside what the guest has not read yet
    /// (the FIFO and [`INPUT_CAPACITY`](crate::devices::virtio::console::INPUT_CAPACITY) bytes behind it). The guest is
    /// interrupted if it wants to be.
    pub fn input(&self, bytes: &[u8]) -> usize {
        let mut uart = self.lock();
        let count = uart.pending.push(bytes);
        uart.refill();
        count
    }

    /// Interrupts again if an interrupt is pending: an edge was lost while the pin was masked, and the UART raises no other
    /// until the guest has looked.
    pub fn repeat(&self) {
        let pending = self.lock().registers.state().interrupt_identification & IIR_NONE == 0;
        if pending && let Err(error) = self.irqfd.write(1) {
            guest_log!(ERROR, %error, "serial: cannot write the irqfd");
        }
    }

    /// The registers and the input the guest has not read. No vCPU may run.
    pub fn save_state(&self) -> SerialState {
        let uart = self.lock();
        let state = uart.registers.state();
        SerialState {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            fifo: state.in_buffer,
            pending: uart.pending.peek(usize::MAX),
        }
    }

    /// Takes over what [`save_state`](Self::save_state) gave; the value comes from a file and is not trusted.
    ///
    /// An interrupt that was pending is raised again: without it the guest waits for ever, because the UART raises none
    /// while one is pending (Firecracker's issue 5764). So this comes **after the interrupt controller's state is
    /// restored**, which would otherwise take it back.
    ///
    /// # Errors
    /// [`StateError::Invalid`]; nothing has changed.
    pub fn restore_state(&self, state: &SerialState) -> Result<(), StateError> {
        let invalid = |error: SerialStateError| StateError::invalid("COM1", error);
        let has_data = u8::from(!state.fifo.is_empty());
        if state.interrupt_enable & !0xf != 0 || state.line_status != LSR_IDLE | has_data {
            return Err(invalid(SerialStateError::Registers {
                interrupt_enable: state.interrupt_enable,
                line_status: state.line_status,
                fifo: state.fifo.len(),
            }));
        }
        let mut pending = PendingInput::default();
        if pending.push(&state.pending) != state.pending.len() {
            return Err(invalid(SerialStateError::Input(state.pending.len())));
        }
        let [baud_divisor_low, baud_divisor_high] = state.divisor;
        let registers = vm_superio::serial::SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.fifo.clone(),
        };
        let (irq, log) = (Irq(self.irqfd.clone()), LogWriter(self.log.clone()));
        let registers = vm_superio::Serial::from_state(&registers, irq, NoEvents, log)
            .map_err(|error| invalid(error.into()))?;
        *self.lock() = Uart { registers, pending };
        Ok(())
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (Ok(offset), Some(first)) = (u8::try_from(offset), data.first_mut()) {
            let mut uart = self.lock();
            *first = uart.registers.read(offset);
            uart.refill();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> ControlFlow<ExitReason> {
        let Ok(offset) = u8::try_from(offset) else {
            return ControlFlow::Continue(());
        };
        let mut uart = self.lock();
        // More than one byte is a string instruction: the same register again and again.
        for value in data {
            if let Err(error) = uart.registers.write(offset, *value) {
                guest_log!(DEBUG, ?error, "serial: write failed");
            }
        }
        // Loopback mode may have ended.
        uart.refill();
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

    fn serial() -> (Serial, Arc<EventFd>) {
        let irqfd = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        (Serial::new(ConsoleLog::default(), irqfd.clone()), irqfd)
    }

    fn read(serial: &Serial, offset: u64) -> u8 {
        let mut data = [0];
        serial.read(offset, &mut data);
        data[0]
    }

    fn write(serial: &Serial, offset: u64, value: u8) {
        assert_eq!(serial.write(offset, &[value]), ControlFlow::Continue(()));
    }

    fn read_all(serial: &Serial) -> Vec<u8> {
        std::iter::from_fn(|| (read(serial, 5) & 1 != 0).then(|| read(serial, 0))).collect()
    }

    #[test]
    fn input_when_typed_interrupts_and_is_read_in_order() {
        let (serial, irqfd) = serial();
        // Received data interrupt.
        write(&serial, 1, 1);
        let text: Vec<u8> = (0..200).collect();
        assert_eq!(serial.input(&text), 200);
        assert_eq!(irqfd.read().unwrap(), 1);
        assert_eq!(read(&serial, 2) & 0xf, 4);
        assert_eq!(read_all(&serial), text);
        assert_eq!(serial.input(b"x"), 1);
        assert!(irqfd.read().unwrap() > 0);
    }

    #[test]
    fn input_when_the_guest_does_not_read_is_bounded() {
        let (serial, _irqfd) = serial();
        let accepted: usize = (0..10).map(|_| serial.input(&[b'x'; 1000])).sum();
        assert!((4096..=4096 + 64).contains(&accepted), "{accepted}");
        assert_eq!(serial.input(b"x"), 0);
        assert_eq!(read_all(&serial).len(), accepted);
    }

    #[test]
    fn input_when_in_loopback_mode_waits() {
        let (serial, _irqfd) = serial();
        write(&serial, 4, 0x10);
        assert_eq!(serial.input(b"later"), 5);
        write(&serial, 0, b'l');
        assert_eq!(read(&serial, 0), b'l');
        write(&serial, 4, 0x08);
        assert_eq!(read_all(&serial), b"later");
    }

    #[test]
    fn restore_when_a_transmit_interrupt_was_pending_raises_it_again() {
        let (old, old_irqfd) = serial();
        // Transmitter empty interrupt, pending since the guest wrote a byte and has not looked.
        write(&old, 1, 2);
        write(&old, 0, b'a');
        assert!(old_irqfd.read().unwrap() > 0);
        let (new, irqfd) = serial();
        new.restore_state(&old.save_state()).unwrap();
        assert!(irqfd.read().unwrap() > 0);
        assert_eq!(read(&new, 2) & 0xf, 2);
        // And the next byte raises the next one.
        write(&new, 0, b'b');
        assert!(irqfd.read().unwrap() > 0);
    }

    #[test]
    fn repeat_when_an_edge_was_lost_interrupts_until_the_guest_has_looked() {
        let (serial, irqfd) = serial();
        serial.repeat();
        assert!(irqfd.read().is_err(), "nothing is pending");
        write(&serial, 1, 1);
        serial.input(b"x");
        // The pin was masked: this edge went nowhere.
        assert_eq!(irqfd.read().unwrap(), 1);
        serial.repeat();
        assert_eq!(irqfd.read().unwrap(), 1);
        assert_eq!(read(&serial, 2) & 0xf, 4);
        serial.repeat();
        assert!(irqfd.read().is_err());
    }

    #[test]
    fn restore_keeps_registers_and_input() {
        let (old, _) = serial();
        write(&old, 7, 0x5a);
        write(&old, 1, 1);
        let text = [b'q'; 300];
        old.input(&text);
        let state = old.save_state();
        let bytes = postcard::to_stdvec(&state).unwrap();
        let (new, irqfd) = serial();
        new.restore_state(&postcard::from_bytes(&bytes).unwrap()).unwrap();
        assert_eq!(new.save_state(), state);
        assert!(irqfd.read().unwrap() > 0);
        assert_eq!(read(&new, 7), 0x5a);
        assert_eq!(read_all(&new), text);
    }

    #[test]
    fn restore_when_the_state_makes_no_sense_is_refused() {
        let (serial, _irqfd) = serial();
        let good = serial.save_state();
        let changes: [fn(&mut SerialState); 5] = [
            |s| s.fifo = vec![0; 65],
            |s| s.fifo = vec![0; 1],
            |s| s.line_status = 0,
            |s| s.interrupt_enable = 0xff,
            |s| s.pending = vec![0; 5000],
        ];
        for change in changes {
            let mut bad = good.clone();
            change(&mut bad);
            assert!(serial.restore_state(&bad).is_err(), "{bad:?}");
        }
        assert_eq!(serial.save_state(), good);
    }
}
