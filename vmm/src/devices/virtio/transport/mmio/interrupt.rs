//! A slot's interrupt: status bits in its registers, then the irqfd.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmm_sys_util::eventfd::EventFd;

use super::registers::Registers;
use crate::devices::virtio::interrupt::{ConfigSpace, Notify};

/// Bit 0 of InterruptStatus: used buffers (virtio 1.2, 4.2.2).
pub const INTERRUPT_USED_RING: u32 = 1;
/// Bit 1 of InterruptStatus: the device configuration changed (virtio 1.2, 4.2.2).
pub const INTERRUPT_CONFIG: u32 = 2;

/// The registers of a slot and its interrupt line.
#[derive(Debug, Clone)]
pub struct SlotInterrupt {
    registers: Registers,
    irqfd: Arc<EventFd>,
}

impl SlotInterrupt {
    /// `registers` are those of the slot, `irqfd` is bound to its GSI.
    pub fn new(registers: Registers, irqfd: Arc<EventFd>) -> Self {
        Self { registers, irqfd }
    }

    /// The slot's registers, InterruptStatus and ConfigGeneration among them.
    pub fn registers(&self) -> &Registers {
        &self.registers
    }

    /// Sends the interrupt again if the driver has not acknowledged the last one.
    pub fn repeat(&self) {
        if self.registers.interrupt_status().load(Ordering::SeqCst) != 0 {
            self.trigger();
        }
    }

    fn signal(&self, bit: u32) {
        let status = self.registers.interrupt_status();
        status.fetch_or(bit, Ordering::SeqCst);
        self.trigger();
    }

    fn trigger(&self) {
        if let Err(error) = self.irqfd.write(1) {
            guest_log!(ERROR, %error, "virtio: cannot write the irqfd");
        }
    }
}

impl Notify for SlotInterrupt {
    /// One bit for all queues.
    fn used(&self, _queue: usize) {
        self.signal(INTERRUPT_USED_RING);
    }

    fn show_config(&self, fill: &mut dyn FnMut(&mut ConfigSpace)) -> bool {
        self.registers.show_config(fill)
    }

    fn config(&self) {
        self.registers.config_generation().fetch_add(1, Ordering::SeqCst);
        self.signal(INTERRUPT_CONFIG);
    }
}
