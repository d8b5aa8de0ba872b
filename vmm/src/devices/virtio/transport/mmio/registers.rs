//! The registers of virtio-mmio slots as the guest reads them: memory behind a read-only memslot.
//!
//! A read of a register that leaves the guest costs it thousands of cycles, and Linux reads InterruptStatus in every
//! interrupt. So each slot has a page whose content is what a read would answer: KVM maps it into the guest, reads never
//! leave it, and writes do as before, because the memslot is read-only (KVM_MEM_READONLY: a write is an MMIO exit, or
//! reaches its ioeventfd). The transport writes the page anew whenever a register may have changed: after each write of
//! the driver, and when a device changes its configuration.
//!
//! InterruptStatus and ConfigGeneration live here and nowhere else. The guest cannot write the page, neither by itself nor
//! through a device: it is not part of [`GuestMemory`](crate::memory::GuestMemory).

#![allow(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::MmapRegion;

use crate::devices::virtio::interrupt::{CONFIG_BYTES, ConfigSpace};
use crate::memory::layout::VIRTIO_MMIO_SLOT_SIZE;

/// Offsets of the registers (virtio 1.2, 4.2.2), by the specification's names.
pub mod register {
    /// MagicValue.
    pub const MAGIC_VALUE: u64 = 0x00;
    /// Version.
    pub const VERSION: u64 = 0x04;
    /// DeviceID.
    pub const DEVICE_ID: u64 = 0x08;
    /// VendorID.
    pub const VENDOR_ID: u64 = 0x0c;
    /// DeviceFeatures.
    pub const DEVICE_FEATURES: u64 = 0x10;
    /// DeviceFeaturesSel.
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    /// DriverFeatures.
    pub const DRIVER_FEATURES: u64 = 0x20;
    /// DriverFeaturesSel.
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    /// QueueSel.
    pub const QUEUE_SEL: u64 = 0x30;
    /// QueueNumMax.
    pub const QUEUE_NUM_MAX: u64 = 0x34;
    /// QueueNum.
    pub const QUEUE_NUM: u64 = 0x38;
    /// QueueReady.
    pub const QUEUE_READY: u64 = 0x44;
    /// QueueNotify; the ioeventfds of a slot watch it.
    pub const QUEUE_NOTIFY: u64 = 0x50;
    /// InterruptStatus.
    pub const INTERRUPT_STATUS: u64 = 0x60;
    /// InterruptACK.
    pub const INTERRUPT_ACK: u64 = 0x64;
    /// Status.
    pub const STATUS: u64 = 0x70;
    /// QueueDescLow.
    pub const QUEUE_DESC_LOW: u64 = 0x80;
    /// QueueDescHigh.
    pub const QUEUE_DESC_HIGH: u64 = 0x84;
    /// QueueDriverLow: the avail ring.
    pub const QUEUE_DRIVER_LOW: u64 = 0x90;
    /// QueueDriverHigh.
    pub const QUEUE_DRIVER_HIGH: u64 = 0x94;
    /// QueueDeviceLow: the used ring.
    pub const QUEUE_DEVICE_LOW: u64 = 0xa0;
    /// QueueDeviceHigh.
    pub const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    /// SHMLenLow.
    pub const SHM_LEN_LOW: u64 = 0xb0;
    /// SHMLenHigh.
    pub const SHM_LEN_HIGH: u64 = 0xb4;
    /// SHMBaseLow.
    pub const SHM_BASE_LOW: u64 = 0xb8;
    /// SHMBaseHigh.
    pub const SHM_BASE_HIGH: u64 = 0xbc;
    /// ConfigGeneration.
    pub const CONFIG_GENERATION: u64 = 0xfc;
    /// The device's configuration space.
    pub const CONFIG: u64 = 0x100;
}

/// MagicValue.
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
/// Version.
const VERSION: u32 = 2;

const INTERRUPT_STATUS_WORD: usize = register::INTERRUPT_STATUS as usize / 4;
const CONFIG_GENERATION_WORD: usize = register::CONFIG_GENERATION as usize / 4;
const PAGE: usize = VIRTIO_MMIO_SLOT_SIZE as usize;
/// Registers of a slot.
const WORDS: usize = PAGE / size_of::<u32>();

/// A page for each slot of a machine. A page takes no memory before something is written to it.
#[derive(Debug)]
pub struct RegisterPages(MmapRegion);

impl RegisterPages {
    /// Pages for `slots` slots, all zeroes.
    ///
    /// # Errors
    /// The kernel refused the mapping.
    pub fn new(slots: u8) -> io::Result<Self> {
        let size = usize::from(slots.max(1)) * PAGE;
        MmapRegion::new(size).map(Self).map_err(io::Error::other)
    }

    /// Address in this process, page-aligned.
    pub fn host_address(&self) -> u64 {
        self.0.as_ptr() as u64
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.0.size() as u64
    }

    /// The page of slot `slot`.
    ///
    /// # Errors
    /// There is no such slot.
    pub fn of_slot(self: &Arc<Self>, slot: usize) -> io::Result<Registers> {
        if slot >= self.0.size() / PAGE {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(Registers {
            pages: self.clone(),
            slot,
            config: Arc::default(),
        })
    }
}

/// The page of one slot.
#[derive(Debug, Clone)]
pub struct Registers {
    pages: Arc<RegisterPages>,
    slot: usize,
    /// Held while the configuration space is made and written: what was made last is what is shown.
    config: Arc<Mutex<()>>,
}

impl Registers {
    /// A page no guest sees.
    ///
    /// # Errors
    /// The kernel refused the mapping.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn unseen() -> io::Result<Self> {
        Arc::new(RegisterPages::new(1)?).of_slot(0)
    }

    fn words(&self) -> &[AtomicU32; WORDS] {
        let page = self.pages.0.as_ptr().wrapping_add(self.slot * PAGE);
        // SAFETY: the mapping has a whole page for `slot` (checked by `of_slot`), is page-aligned, lives as long as
        // `self`, and is only ever accessed through these atomics; the guest reads it and cannot write.
        unsafe { &*page.cast() }
    }

    fn word(&self, offset: u64) -> Option<&AtomicU32> {
        self.words().get(usize::try_from(offset / 4).ok()?)
    }

    /// InterruptStatus.
    pub fn interrupt_status(&self) -> &AtomicU32 {
        &self.words()[INTERRUPT_STATUS_WORD]
    }

    /// ConfigGeneration.
    pub fn config_generation(&self) -> &AtomicU32 {
        &self.words()[CONFIG_GENERATION_WORD]
    }

    /// Shows `value` at `offset`; registers are aligned to 4 bytes.
    pub fn show(&self, offset: u64, value: u32) {
        if let Some(word) = self.word(offset) {
            word.store(value, Ordering::SeqCst);
        }
    }

    /// Shows a slot without device: a driver that probes it leaves (device ID 0; virtio 1.2, 4.2.2).
    pub fn show_empty(&self) {
        for word in self.words() {
            word.store(0, Ordering::SeqCst);
        }
        self.show(register::MAGIC_VALUE, MAGIC);
        self.show(register::VERSION, VERSION);
    }

    /// Changes what is shown of the configuration space; returns whether it is something else now. `fill` gets what was shown
    /// before, runs under a lock of this page, and reads the device there: so the device's last change is what stays.
    pub fn show_config(&self, fill: &mut dyn FnMut(&mut ConfigSpace)) -> bool {
        let _last = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        let mut space: ConfigSpace = [0; CONFIG_BYTES];
        self.read(register::CONFIG, &mut space);
        let before = space;
        fill(&mut space);
        let mut at = register::CONFIG;
        for bytes in space.as_chunks::<4>().0 {
            self.show(at, u32::from_le_bytes(*bytes));
            at += 4;
        }
        space != before
    }

    /// What a guest reads at `offset` of the page, in any width.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in (0u64..).zip(data) {
            let offset = offset.saturating_add(index);
            let word = self.word(offset).map_or(0, |word| word.load(Ordering::SeqCst));
            *byte = (word >> (8 * (offset % 4))) as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read_when_beyond_the_slot_is_zero_and_slots_are_apart() {
        let pages = Arc::new(RegisterPages::new(2).unwrap());
        let [first, second] = [0, 1].map(|slot| pages.of_slot(slot).unwrap());
        assert!(pages.of_slot(2).is_err());
        first.show(0xffc, u32::MAX);
        second.show(0, 0x0403_0201);
        let mut data = [7; 8];
        first.read(0xffc, &mut data);
        assert_eq!(data, [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
        second.read(1, &mut data);
        assert_eq!(data, [2, 3, 4, 0, 0, 0, 0, 0]);
        second.read(u64::MAX - 3, &mut data[..3]);
        assert_eq!(data[..3], [0; 3]);
    }

    #[test]
    fn show_config_when_nothing_changes_says_so_and_fill_sees_what_was_shown() {
        let registers = Registers::unseen().unwrap();
        assert!(registers.show_config(&mut |space| space[CONFIG_BYTES - 1] = 5));
        assert!(!registers.show_config(&mut |space| assert_eq!(space[CONFIG_BYTES - 1], 5)));
        let mut last = [0];
        registers.read(register::CONFIG + CONFIG_BYTES as u64 - 1, &mut last);
        assert_eq!(last, [5]);
    }
}
