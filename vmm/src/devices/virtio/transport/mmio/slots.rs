//! The virtio-mmio slots: fixed address windows, each empty or holding one device behind its transport.
//!
//! All slots are declared in the DSDT as `LNRO0005` devices inside an `ACPI0004` container. Their `_STA` reads a
//! presence bit in the shared page, so an empty slot costs the guest no exit at boot and can be filled later: set the
//! bit, then let the GED send a Bus Check to the container (proven on unmodified Linux 6.1 and 6.12).

use std::io;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use acpi_tables::{Aml, aml};

use super::MmioTransport;
use super::registers::{RegisterPages, Registers, register};
use crate::acpi::aml::Raw;
use crate::acpi::shared_page::{Bitmap, SharedPage, bit_path, status_method};
use crate::bus::BusDevice;
use crate::confinement::{Confinement, Delegate};
use crate::lifecycle::ExitReason;
use crate::memory::layout::{VIRTIO_MMIO_SLOT_SIZE, VIRTIO_MMIO_START};

/// Most slots of a machine: 64 devices to add, and those a machine has anyway.
pub const MAX_SLOTS: u8 = 96;
/// The container, as other devices name it.
pub const CONTAINER_PATH: &str = "\\_SB_.VIOC";

/// All slots of a machine.
#[derive(Debug)]
pub struct Slots {
    slots: Vec<Mutex<Option<MmioTransport>>>,
    registers: Arc<RegisterPages>,
    shared: Arc<SharedPage>,
    starter: Mutex<Option<Arc<Starter>>>,
}

/// A write of the status register that starts or stops a device.
#[derive(Debug)]
struct StatusWrite {
    slot: usize,
    value: u32,
}

/// Carries such writes out.
type Starter = Delegate<StatusWrite, ()>;

impl Slots {
    /// `count` empty slots, at most [`MAX_SLOTS`], whose registers the guest reads in `registers`.
    pub fn new(count: u8, registers: Arc<RegisterPages>, shared: Arc<SharedPage>) -> Self {
        let slots = (0..count.min(MAX_SLOTS)).map(|_| Mutex::new(None)).collect();
        Self {
            slots,
            registers,
            shared,
            starter: Mutex::default(),
        }
    }

    /// Lets devices be started and stopped by a thread `vmm-starter` when the guest writes a status register: threads that a
    /// vCPU's thread made would be confined as it is, and it may not make any. [`end_thread`](Self::end_thread) ends it.
    ///
    /// # Errors
    /// The host refuses the thread.
    pub fn start_on_a_thread(self: &Arc<Self>, confinement: Confinement) -> io::Result<()> {
        let slots = Arc::downgrade(self);
        let carry_out = move |StatusWrite { slot, value }| {
            if let Some(slots) = slots.upgrade() {
                slots.write_register(slot, register::STATUS, &value.to_le_bytes());
            }
        };
        let starter = Delegate::spawn(confinement, None, "vmm-starter", carry_out)?;
        *self.starter() = Some(Arc::new(starter));
        Ok(())
    }

    /// Ends the thread. No guest runs any more.
    pub fn end_thread(&self) {
        let starter = self.starter().take();
        drop(starter);
    }

    fn starter(&self) -> MutexGuard<'_, Option<Arc<Starter>>> {
        self.starter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_register(&self, slot: usize, offset: u64, data: &[u8]) {
        if let Some(mut slot) = self.lock(slot)
            && let Some(transport) = slot.as_mut()
        {
            transport.write(offset, data);
        }
    }

    /// The registers of a slot.
    ///
    /// # Errors
    /// There is no such slot.
    pub fn registers(&self, index: usize) -> io::Result<Registers> {
        self.registers.of_slot(index)
    }

    /// Number of slots.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there is no slot at all.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// The slot's transport, locked against the guest. `None` when there is no such slot.
    pub fn lock(&self, index: usize) -> Option<MutexGuard<'_, Option<MmioTransport>>> {
        Some(
            self.slots
                .get(index)?
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        )
    }

    /// As [`lock`](Self::lock), and `None` when the slot is locked: its device may be busy with something that takes long.
    pub fn try_lock(&self, index: usize) -> Option<MutexGuard<'_, Option<MmioTransport>>> {
        match self.slots.get(index)?.try_lock() {
            Ok(slot) => Some(slot),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Makes the slot visible (`_STA` = present) or invisible to the guest's next scan.
    pub fn set_present(&self, index: usize, present: bool) {
        if let Ok(index) = u8::try_from(index) {
            self.shared.set(Bitmap::SlotPresent, index, present);
        }
    }

    /// Interrupts the guest again if the device of a slot still waits to be heard: an edge may have been lost while the pin
    /// was masked.
    pub fn repeat_interrupt(&self, index: usize) {
        if let Some(slot) = self.lock(index)
            && let Some(transport) = slot.as_ref()
        {
            transport.repeat_interrupt();
        }
    }

    /// First address of a slot's window.
    pub fn address(index: usize) -> u64 {
        VIRTIO_MMIO_START + index as u64 * VIRTIO_MMIO_SLOT_SIZE
    }
}

impl BusDevice for Slots {
    /// Never called by a guest: it reads the same from memory.
    fn read(&self, offset: u64, data: &mut [u8]) {
        let slot = usize::try_from(offset / VIRTIO_MMIO_SLOT_SIZE).unwrap_or(usize::MAX);
        match self.registers(slot) {
            Ok(registers) => registers.read(offset % VIRTIO_MMIO_SLOT_SIZE, data),
            Err(_) => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> ControlFlow<ExitReason> {
        let slot = usize::try_from(offset / VIRTIO_MMIO_SLOT_SIZE).unwrap_or(usize::MAX);
        let offset = offset % VIRTIO_MMIO_SLOT_SIZE;
        if MmioTransport::starts_or_stops(offset, data)
            && let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes)
            && let Some(starter) = self.starter().clone()
        {
            if starter.ask(StatusWrite { slot, value }).is_none() {
                guest_log!(ERROR, slot, "virtio-mmio: the thread that starts devices is gone");
            }
            return ControlFlow::Continue(());
        }
        self.write_register(slot, offset, data);
        ControlFlow::Continue(())
    }
}

/// Name of the platform device Linux makes of a slot.
pub fn acpi_name(index: usize) -> String {
    format!("LNRO0005:{index:02x}")
}

/// Writes the container with one device per entry of `gsis`.
pub fn write_aml(sink: &mut Vec<u8>, gsis: &[u32]) {
    let count = gsis.len().min(usize::from(MAX_SLOTS)) as u8;
    let mut body = Vec::new();
    Bitmap::SlotPresent.write_aml(&mut body, "SLTR", b'P', count);
    for (index, gsi) in (0..count).zip(gsis) {
        write_slot_aml(&mut body, index, *gsi);
    }
    let (hid, uid) = (
        aml::Name::new("_HID".into(), &"ACPI0004"),
        aml::Name::new("_UID".into(), &aml::ZERO),
    );
    aml::Device::new("VIOC".into(), vec![&hid, &uid, &Raw(&body)]).to_aml_bytes(sink);
}

fn write_slot_aml(sink: &mut Vec<u8>, index: u8, gsi: u32) {
    let base = u32::try_from(Slots::address(usize::from(index))).unwrap_or(0);
    aml::Device::new(
        bit_path(b'V', index),
        vec![
            &aml::Name::new("_HID".into(), &"LNRO0005"),
            &aml::Name::new("_UID".into(), &index),
            &aml::Name::new("_CCA".into(), &aml::ONE),
            &Raw(&status_method(index)),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::Memory32Fixed::new(true, base, VIRTIO_MMIO_SLOT_SIZE as u32),
                    &aml::Interrupt::new(true, true, false, false, gsi),
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
    fn read_when_the_slot_is_empty_again_shows_a_device_id_of_zero() {
        let memory =
            Arc::new(crate::memory::allocate(&crate::memory::layout::MemoryLayout::ram(64 << 20)).unwrap());
        let pages = Arc::new(RegisterPages::new(2).unwrap());
        let slots = Slots::new(2, pages, Arc::new(SharedPage::new(memory)));
        slots.registers(1).unwrap().show_empty();
        let mut data = [0; 4];
        slots.read(VIRTIO_MMIO_SLOT_SIZE, &mut data);
        assert_eq!(&data, b"virt");
        slots.read(VIRTIO_MMIO_SLOT_SIZE + 8, &mut data);
        assert_eq!(data, [0; 4]);
        slots.read(2 * VIRTIO_MMIO_SLOT_SIZE, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
}
