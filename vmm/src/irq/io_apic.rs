//! The I/O APIC, in user space (KVM's split irqchip), edge-triggered only.
//!
//! KVM's own I/O APIC has 24 pins and no fast path: an irqfd on one of its pins is delivered by a kernel worker. Here every
//! pin whose redirection entry is unmasked becomes an MSI route of the GSI with the pin's number, so an irqfd is delivered
//! from the write itself (virt/kvm/eventfd.c, `irqfd_wakeup`), and there are as many pins as the machine needs. The guest
//! writes redirection entries a few times per driver, and each such write costs one exit; interrupts cost none.
//!
//! Registers: Intel 82093AA data sheet, section 3.

#![allow(unsafe_code)]

use std::fmt;
use std::ops::ControlFlow;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, kvm_irq_routing_entry};
use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::lifecycle::ExitReason;

/// Bytes of its register window.
pub const SIZE: u64 = 0x20;
/// Most pins: Linux numbers them with 7 bits in places (`MP_MAX_IOAPIC_PIN`).
pub const MAX_PINS: u8 = 120;

const REGISTER_SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;

const ID: u8 = 0;
const VERSION: u8 = 1;
const ARBITRATION: u8 = 2;
const FIRST_ENTRY: u8 = 0x10;
/// 82093AA; later versions have an EOI register, which edge-triggered interrupts do not need.
const VERSION_NUMBER: u32 = 0x11;

const ENTRY_VECTOR: u64 = 0xff;
const ENTRY_DELIVERY_MODE: u64 = 7 << 8;
const ENTRY_LOGICAL: u64 = 1 << 11;
const ENTRY_MASKED: u64 = 1 << 16;
/// Delivery status and remote IRR.
const ENTRY_READ_ONLY: u64 = 1 << 12 | 1 << 14;

const MSI_BASE: u32 = 0xfee0_0000;
const MSI_LOGICAL: u32 = 1 << 2;
const MSI_LOWEST_PRIORITY: u32 = 1 << 3;
const LOWEST_PRIORITY: u64 = 1 << 8;

/// What KVM is told.
pub trait Routing: Send + Sync {
    /// Replaces all routes.
    ///
    /// # Errors
    /// What KVM_SET_GSI_ROUTING says.
    fn set(&self, routes: &[kvm_irq_routing_entry]) -> Result<(), kvm_ioctls::Error>;

    /// The pin was unmasked: an edge that came meanwhile is lost, so whoever has something to say should say it again.
    fn unmasked(&self, pin: u8);
}

/// Saved registers cannot be taken over.
#[derive(Debug, thiserror::Error)]
pub enum IoApicStateError {
    /// They are of another machine.
    #[error("I/O APIC: {saved} pins saved, the machine has {present}")]
    Pins {
        /// Pins of the saved machine.
        saved: usize,
        /// Pins of this one.
        present: usize,
    },
    /// KVM refuses the routes.
    #[error("KVM_SET_GSI_ROUTING: {0}")]
    Routing(kvm_ioctls::Error),
}

/// The registers, as they are saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    id: u32,
    select: u8,
    /// One redirection entry per pin.
    entries: Vec<u64>,
}

/// The I/O APIC.
pub struct IoApic {
    registers: Mutex<IoApicState>,
    routing: Box<dyn Routing>,
}

impl fmt::Debug for IoApic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoApic").finish_non_exhaustive()
    }
}

impl IoApic {
    /// `pins` pins, at most [`MAX_PINS`], all masked.
    pub fn new(pins: u8, routing: Box<dyn Routing>) -> Self {
        let registers = IoApicState {
            id: 0,
            select: 0,
            entries: vec![ENTRY_MASKED; usize::from(pins.min(MAX_PINS))],
        };
        Self {
            registers: Mutex::new(registers),
            routing,
        }
    }

    fn lock(&self) -> MutexGuard<'_, IoApicState> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The registers.
    pub fn save(&self) -> IoApicState {
        self.lock().clone()
    }

    /// Takes over saved registers and tells KVM the routes.
    ///
    /// # Errors
    /// [`IoApicStateError`].
    pub fn restore(&self, state: IoApicState) -> Result<(), IoApicStateError> {
        let mut registers = self.lock();
        if state.entries.len() != registers.entries.len() {
            return Err(IoApicStateError::Pins {
                saved: state.entries.len(),
                present: registers.entries.len(),
            });
        }
        *registers = state;
        let routes = registers.routes();
        self.routing.set(&routes).map_err(IoApicStateError::Routing)
    }

    fn write_register(&self, value: u32) {
        let mut registers = self.lock();
        match registers.select {
            ID => registers.id = value & 0x0f00_0000,
            select => {
                let Some(pin) = registers.write_entry(select, value) else {
                    return;
                };
                let routes = registers.routes();
                if let Err(error) = self.routing.set(&routes) {
                    guest_log!(ERROR, pin, %error, "I/O APIC: KVM_SET_GSI_ROUTING failed, interrupts may be lost");
                }
                let unmasked = registers
                    .entries
                    .get(usize::from(pin))
                    .is_some_and(|e| e & ENTRY_MASKED == 0);
                drop(registers);
                if unmasked {
                    self.routing.unmasked(pin);
                }
            }
        }
    }
}

impl IoApicState {
    fn read_register(&self) -> u32 {
        match self.select {
            ID => self.id,
            VERSION => VERSION_NUMBER | (self.entries.len().saturating_sub(1) as u32) << 16,
            ARBITRATION => self.id,
            select => self.entry(select).map_or(u32::MAX, |entry| {
                if select & 1 == 0 {
                    *entry as u32
                } else {
                    (*entry >> 32) as u32
                }
            }),
        }
    }

    fn entry(&self, select: u8) -> Option<&u64> {
        self.entries
            .get(usize::from(select.checked_sub(FIRST_ENTRY)? / 2))
    }

    /// Writes half an entry. The pin, if the change matters to KVM: nothing does while a pin is masked.
    fn write_entry(&mut self, select: u8, value: u32) -> Option<u8> {
        let pin = select.checked_sub(FIRST_ENTRY)? / 2;
        let entry = self.entries.get_mut(usize::from(pin))?;
        let old = *entry;
        let value = u64::from(value);
        *entry = if select & 1 == 0 {
            old & !0xffff_ffff | value & !ENTRY_READ_ONLY
        } else {
            old & 0xffff_ffff | value << 32
        };
        let matters = *entry != old && (old & ENTRY_MASKED == 0 || *entry & ENTRY_MASKED == 0);
        matters.then_some(pin)
    }

    fn routes(&self) -> Vec<kvm_irq_routing_entry> {
        let pins = (0u32..).zip(&self.entries);
        pins.filter(|(_, entry)| **entry & ENTRY_MASKED == 0)
            .map(|(gsi, entry)| msi_route(gsi, *entry))
            .collect()
    }
}

/// The message an unmasked pin sends (Intel SDM 3A, section 11.11). Level-triggered entries are treated as edges: no
/// interrupt of the machine is described as level-triggered, and nothing would ever deassert it.
fn msi_route(gsi: u32, entry: u64) -> kvm_irq_routing_entry {
    let destination = (entry >> 56) as u32;
    let mut address = MSI_BASE | destination << 12;
    if entry & ENTRY_LOGICAL != 0 {
        address |= MSI_LOGICAL;
    }
    if entry & ENTRY_DELIVERY_MODE == LOWEST_PRIORITY {
        address |= MSI_LOWEST_PRIORITY;
    }
    let mut route = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    route.u.msi.address_lo = address;
    route.u.msi.address_hi = 0;
    route.u.msi.data = (entry & (ENTRY_VECTOR | ENTRY_DELIVERY_MODE)) as u32;
    route
}

impl BusDevice for IoApic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            REGISTER_SELECT => u32::from(self.lock().select),
            WINDOW => self.lock().read_register(),
            _ => 0,
        };
        data.fill(0);
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> ControlFlow<ExitReason> {
        // The registers are 32 bits wide; other widths are ignored.
        if let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) {
            match offset {
                REGISTER_SELECT => self.lock().select = value as u8,
                WINDOW => self.write_register(value),
                _ => {}
            }
        }
        ControlFlow::Continue(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// GSI, address and data of each route.
    type Routes = Vec<(u32, u32, u32)>;

    #[derive(Default, Clone)]
    struct Kvm(Arc<Mutex<(Vec<Routes>, Vec<u8>)>>);

    impl Routing for Kvm {
        fn set(&self, routes: &[kvm_irq_routing_entry]) -> Result<(), kvm_ioctls::Error> {
            let routes = routes
                .iter()
                // SAFETY: plain integers, and the entries are MSI routes.
                .map(|r| unsafe { (r.gsi, r.u.msi.address_lo, r.u.msi.data) });
            self.0.lock().unwrap().0.push(routes.collect());
            Ok(())
        }

        fn unmasked(&self, pin: u8) {
            self.0.lock().unwrap().1.push(pin);
        }
    }

    fn io_apic(pins: u8) -> (IoApic, Kvm) {
        let kvm = Kvm::default();
        (IoApic::new(pins, Box::new(kvm.clone())), kvm)
    }

    fn write(apic: &IoApic, register: u8, value: u32) {
        let _ = apic.write(REGISTER_SELECT, &u32::from(register).to_le_bytes());
        let _ = apic.write(WINDOW, &value.to_le_bytes());
    }

    fn read(apic: &IoApic, register: u8) -> u32 {
        let _ = apic.write(REGISTER_SELECT, &u32::from(register).to_le_bytes());
        let mut data = [0; 4];
        apic.read(WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn version_when_read_tells_the_number_of_pins() {
        let (apic, _) = io_apic(70);
        assert_eq!(read(&apic, VERSION), 69 << 16 | 0x11);
        assert_eq!(read(&apic, FIRST_ENTRY + 2 * 69), ENTRY_MASKED as u32);
        assert_eq!(read(&apic, FIRST_ENTRY + 2 * 70), u32::MAX);
    }

    #[test]
    fn entry_when_unmasked_becomes_a_route_and_the_device_is_asked() {
        let (apic, kvm) = io_apic(24);
        write(&apic, FIRST_ENTRY + 2 * 6 + 1, 3 << 24);
        assert!(kvm.0.lock().unwrap().0.is_empty(), "still masked");
        write(&apic, FIRST_ENTRY + 2 * 6, 0x31);
        assert_eq!(kvm.0.lock().unwrap().0, [vec![(6, 0xfee0_3000, 0x31)]]);
        assert_eq!(kvm.0.lock().unwrap().1, [6]);
        // The same again changes nothing; masking takes the route away.
        write(&apic, FIRST_ENTRY + 2 * 6, 0x31);
        write(&apic, FIRST_ENTRY + 2 * 6, 0x1_0031);
        assert_eq!(kvm.0.lock().unwrap().0.len(), 2);
        assert_eq!(kvm.0.lock().unwrap().0[1], vec![]);
        assert_eq!(kvm.0.lock().unwrap().1, [6]);
    }

    #[test]
    fn entry_when_logical_and_lowest_priority_sets_the_address_bits() {
        let (apic, kvm) = io_apic(24);
        write(&apic, FIRST_ENTRY + 1, 0xff << 24);
        write(&apic, FIRST_ENTRY, 1 << 11 | 1 << 8 | 0x40);
        assert_eq!(kvm.0.lock().unwrap().0, [vec![(0, 0xfeef_f00c, 0x140)]]);
    }

    #[test]
    fn restore_when_saved_gives_the_same_registers_and_routes() {
        let (apic, _) = io_apic(24);
        write(&apic, FIRST_ENTRY + 2 * 9, 0x55);
        write(&apic, ID, 5 << 24);
        let (other, kvm) = io_apic(24);
        other.restore(apic.save()).unwrap();
        assert_eq!(read(&other, ID), 5 << 24);
        assert_eq!(kvm.0.lock().unwrap().0, [vec![(9, 0xfee0_0000, 0x55)]]);
        assert!(io_apic(30).0.restore(apic.save()).is_err());
    }

    mod properties {
        use proptest::prelude::*;

        use super::*;

        proptest! {
            #[test]
            fn registers_when_written_at_random_keep_routes_inside_the_pins(
                writes in prop::collection::vec((0u64..0x24, any::<u32>(), 0usize..9), 0..200)
            ) {
                let (apic, kvm) = io_apic(30);
                for (offset, value, width) in writes {
                    let bytes = u64::from(value).to_le_bytes();
                    let _ = apic.write(offset, &bytes[..width.min(8)]);
                    let mut data = vec![0; width];
                    apic.read(offset, &mut data);
                }
                for routes in &kvm.0.lock().unwrap().0 {
                    prop_assert!(routes.iter().all(|(gsi, address, _)| *gsi < 30 && *address >> 20 == 0xfee));
                }
            }
        }
    }
}
