//! What a machine needs of KVM before and beside its vCPUs: registers in memory, interrupt controllers, routes.

#![allow(unsafe_code)]

use std::sync::Arc;

use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, KvmIrqRouting, kvm_enable_cap, kvm_irq_routing_entry};
use kvm_ioctls::VmFd;

use crate::devices::ged::Ged;
use crate::devices::serial::{self, Serial};
use crate::devices::virtio::transport::mmio::registers::RegisterPages;
use crate::devices::virtio::transport::mmio::slots::{MAX_SLOTS, Slots};
use crate::irq::io_apic::Routing;
use crate::kvm::{IoctlError, ioctl_error};
use crate::memory::layout;
use crate::memory::window::{Memslot, Memslots, REGISTER_SLOT};
use crate::vm::error::BuildError;

/// Gives KVM a page of registers for each virtio-mmio slot a machine can have: read in memory, written as MMIO. Comes early
/// for the same reason as [`set_memory`](crate::memory::set_memory).
///
/// # Errors
/// [`BuildError::Host`], [`BuildError::Ioctl`].
pub fn set_registers(vm: &VmFd) -> Result<Arc<RegisterPages>, BuildError> {
    let pages = RegisterPages::new(MAX_SLOTS).map_err(|source| BuildError::Host {
        what: "registers of the virtio-mmio slots",
        source,
    })?;
    let memslot = Memslot {
        slot: REGISTER_SLOT,
        guest: layout::VIRTIO_MMIO_START,
        size: pages.size(),
        host: pages.host_address(),
        read_only: true,
    };
    // SAFETY: the range is one whole mapping owned by `pages`, which the machine keeps until its VmFd and vCPUs are gone. No
    // RAM is at these addresses.
    unsafe { vm.set(memslot) }.map_err(|source| IoctlError {
        ioctl: "KVM_SET_USER_MEMORY_REGION",
        source,
    })?;
    Ok(Arc::new(pages))
}

/// Makes the local APICs KVM's and leaves the I/O APIC to us; must come before the first vCPU.
///
/// # Errors
/// [`IoctlError`].
pub fn split_irqchip(vm: &VmFd) -> Result<(), IoctlError> {
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        ..Default::default()
    };
    // Pins whose EOI KVM reports: none, since no interrupt is level-triggered.
    cap.args[0] = 0;
    vm.enable_cap(&cap)
        .map_err(ioctl_error("KVM_ENABLE_CAP(KVM_CAP_SPLIT_IRQCHIP)"))
}

/// Where the I/O APIC's routes go, and who is asked again when a pin is unmasked.
pub struct Routes {
    /// The VM.
    pub vm: Arc<VmFd>,
    /// GSI and device.
    pub ged: (u32, Arc<Ged>),
    /// GSI of the first slot, and the slots: their GSIs are consecutive.
    pub slots: (u32, Arc<Slots>),
    /// COM1, if there is one.
    pub serial: Option<Arc<Serial>>,
}

impl Routing for Routes {
    fn set(&self, routes: &[kvm_irq_routing_entry]) -> Result<(), kvm_ioctls::Error> {
        let too_many = |_| kvm_ioctls::Error::new(libc::E2BIG);
        let routes = KvmIrqRouting::from_entries(routes).map_err(too_many)?;
        self.vm.set_gsi_routing(&routes)
    }

    fn unmasked(&self, pin: u8) {
        let gsi = u32::from(pin);
        if gsi == self.ged.0 {
            self.ged.1.repeat();
        } else if gsi == serial::GSI {
            if let Some(serial) = &self.serial {
                serial.repeat();
            }
        } else if let Some(slot) = gsi.checked_sub(self.slots.0) {
            self.slots.1.repeat_interrupt(slot as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;
    use crate::acpi::shared_page::SharedPage;
    use crate::bus::BusDevice;
    use crate::devices::ged::Event;
    use crate::devices::virtio::console::ConsoleLog;
    use crate::kvm;
    use crate::memory::allocate;
    use crate::memory::layout::MemoryLayout;

    #[test]
    fn unmasked_when_the_owner_of_the_pin_waits_to_be_heard_interrupts_again() {
        let eventfd = || Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let (ged_irq, serial_irq) = (eventfd(), eventfd());
        let memory = Arc::new(allocate(&MemoryLayout::ram(64 << 20)).unwrap());
        let pages = Arc::new(RegisterPages::new(1).unwrap());
        let ged = Arc::new(Ged::new(ged_irq.clone()));
        let serial = Arc::new(Serial::new(ConsoleLog::default(), serial_irq.clone()));
        let routes = Routes {
            vm: Arc::new(kvm::create_vm(&kvm::open().unwrap()).unwrap()),
            ged: (5, ged.clone()),
            slots: (
                6,
                Arc::new(Slots::new(0, pages, Arc::new(SharedPage::new(memory)))),
            ),
            serial: Some(serial.clone()),
        };
        let unmask_all = || (0..24).for_each(|pin| routes.unmasked(pin));
        unmask_all();
        assert!(
            serial_irq.read().is_err() && ged_irq.read().is_err(),
            "nothing to say"
        );
        // Both interrupt while their pins are masked.
        assert_eq!(serial.write(1, &[1]), ControlFlow::Continue(()));
        serial.input(b"x");
        ged.notify(Event::Slots).unwrap();
        assert_eq!((serial_irq.read().unwrap(), ged_irq.read().unwrap()), (1, 1));
        unmask_all();
        assert_eq!((serial_irq.read().unwrap(), ged_irq.read().unwrap()), (1, 1));
    }
}
