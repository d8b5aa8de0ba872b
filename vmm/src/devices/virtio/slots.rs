//! The virtio-mmio slots: fixed address windows, each empty or holding one device behind its transport.
//!
//! All slots are declared in the DSDT as `LNRO0005` devices inside an `ACPI0004` container. Their `_STA` reads a
//! presence bitmap here, so an empty slot costs the guest nothing at boot and can be filled later: set the bit, then
//! let the GED send a Bus Check to the container (proven on unmodified Linux 6.1 and 6.12).

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use acpi_tables::{Aml, aml};

use crate::bus::BusDevice;
use crate::devices::virtio::mmio::{self, MmioTransport};
use crate::memory::layout::{VIRTIO_MMIO_SLOT_SIZE, VIRTIO_MMIO_START};
use crate::vm::ExitReason;

/// First I/O port of the presence bitmap, 32 bits wide, read-only.
pub const PRESENCE_PORT: u16 = 0x620;
/// Number of ports of the bitmap.
pub const PRESENCE_PORTS: u16 = 4;
/// The container, as other devices name it.
pub const CONTAINER_PATH: &str = "\\_SB_.VIOC";

/// All slots of a machine; the virtio-mmio window and, through [`Presence`], the bitmap.
#[derive(Debug)]
pub struct Slots {
    slots: Vec<Mutex<Option<MmioTransport>>>,
    presence: AtomicU32,
}

impl Slots {
    /// `count` empty slots, at most 32 (the bitmap).
    pub fn new(count: u8) -> Self {
        let slots = (0..count.min(32)).map(|_| Mutex::new(None)).collect();
        Self {
            slots,
            presence: AtomicU32::new(0),
        }
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

    /// Index of the first empty slot.
    pub fn first_free(&self) -> Option<usize> {
        (0..self.slots.len()).find(|index| self.lock(*index).is_some_and(|slot| slot.is_none()))
    }

    /// Makes the slot visible (`_STA` = present) or invisible to the guest's next scan.
    pub fn set_present(&self, index: usize, present: bool) {
        let bit = 1u32
            .checked_shl(u32::try_from(index).unwrap_or(u32::MAX))
            .unwrap_or(0);
        if present {
            self.presence.fetch_or(bit, Ordering::SeqCst);
        } else {
            self.presence.fetch_and(!bit, Ordering::SeqCst);
        }
    }

    /// First address of a slot's window.
    pub fn address(index: usize) -> u64 {
        VIRTIO_MMIO_START + index as u64 * VIRTIO_MMIO_SLOT_SIZE
    }

    fn slot_at(&self, offset: u64) -> Option<(MutexGuard<'_, Option<MmioTransport>>, u64)> {
        let index = usize::try_from(offset / VIRTIO_MMIO_SLOT_SIZE).ok()?;
        Some((self.lock(index)?, offset % VIRTIO_MMIO_SLOT_SIZE))
    }
}

impl BusDevice for Slots {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.slot_at(offset) {
            Some((slot, register)) => match slot.as_ref() {
                Some(transport) => transport.read(register, data),
                None => mmio::read_empty(register, data),
            },
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> ControlFlow<ExitReason> {
        if let Some((mut slot, register)) = self.slot_at(offset)
            && let Some(transport) = slot.as_mut()
        {
            transport.write(register, data);
        }
        ControlFlow::Continue(())
    }
}

/// The presence bitmap as a register.
#[derive(Debug)]
pub struct Presence(pub std::sync::Arc<Slots>);

impl BusDevice for Presence {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let bitmap = self.0.presence.load(Ordering::SeqCst).to_le_bytes();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = start
                .checked_add(index)
                .and_then(|i| bitmap.get(i))
                .copied()
                .unwrap_or(0);
        }
    }

    fn write(&self, _offset: u64, _data: &[u8]) -> ControlFlow<ExitReason> {
        ControlFlow::Continue(())
    }
}

/// Name of the platform device Linux makes of a slot.
pub fn acpi_name(index: usize) -> String {
    format!("LNRO0005:{index:02x}")
}

/// Writes the container with one device per entry of `gsis`.
pub fn write_aml(sink: &mut Vec<u8>, gsis: &[u32]) {
    let mut fields = Vec::new();
    let mut devices = Vec::new();
    for (index, gsi) in (0u8..32).zip(gsis) {
        fields.push(aml::FieldEntry::Named(slot_name(b'P', index), 1));
        write_slot_aml(&mut devices, index, *gsi);
    }
    let (hid, uid) = (
        aml::Name::new("_HID".into(), &"ACPI0004"),
        aml::Name::new("_UID".into(), &aml::ZERO),
    );
    let region = aml::OpRegion::new("SLTR".into(), aml::OpRegionSpace::SystemIO, &PRESENCE_PORT, &4u8);
    let field = aml::Field::new(
        "SLTR".into(),
        aml::FieldAccessType::DWord,
        aml::FieldLockRule::NoLock,
        aml::FieldUpdateRule::Preserve,
        fields,
    );
    let devices = Raw(devices);
    aml::Device::new("VIOC".into(), vec![&hid, &uid, &region, &field, &devices]).to_aml_bytes(sink);
}

fn write_slot_aml(sink: &mut Vec<u8>, index: u8, gsi: u32) {
    let name = |letter| aml::Path::new(&String::from_utf8_lossy(&slot_name(letter, index)));
    let base = u32::try_from(Slots::address(usize::from(index))).unwrap_or(0);
    aml::Device::new(
        name(b'V'),
        vec![
            &aml::Name::new("_HID".into(), &"LNRO0005"),
            &aml::Name::new("_UID".into(), &index),
            &aml::Name::new("_CCA".into(), &aml::ONE),
            &aml::Method::new(
                "_STA".into(),
                0,
                false,
                vec![
                    &aml::If::new(&name(b'P'), vec![&aml::Return::new(&0x0fu8)]),
                    &aml::Return::new(&aml::ZERO),
                ],
            ),
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

/// `V000`-style names, hexadecimal.
fn slot_name(letter: u8, index: u8) -> [u8; 4] {
    let digit = |n: u8| if n < 10 { b'0' + n } else { b'A' + (n - 10) };
    [letter, b'0', digit(index >> 4), digit(index & 0xf)]
}

/// AML that is already encoded.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn read_when_the_slot_is_empty_shows_a_device_id_of_zero() {
        let slots = Slots::new(2);
        let mut data = [0; 4];
        slots.read(VIRTIO_MMIO_SLOT_SIZE, &mut data);
        assert_eq!(&data, b"virt");
        slots.read(VIRTIO_MMIO_SLOT_SIZE + 8, &mut data);
        assert_eq!(data, [0; 4]);
        slots.read(2 * VIRTIO_MMIO_SLOT_SIZE, &mut data);
        assert_eq!(data, [0xff; 4]);
    }

    #[test]
    fn presence_when_bits_change_follows_them() {
        let slots = Arc::new(Slots::new(20));
        let presence = Presence(slots.clone());
        slots.set_present(0, true);
        slots.set_present(17, true);
        slots.set_present(99, true);
        let mut data = [0; 4];
        presence.read(0, &mut data);
        assert_eq!(u32::from_le_bytes(data), 1 | 1 << 17);
        slots.set_present(0, false);
        let mut byte = [0; 1];
        presence.read(2, &mut byte);
        assert_eq!(byte, [2]);
        presence.read(9, &mut byte);
        assert_eq!(byte, [0]);
    }

    #[test]
    fn slot_name_when_two_digits_is_hexadecimal() {
        assert_eq!(&slot_name(b'V', 0), b"V000");
        assert_eq!(&slot_name(b'P', 0x1f), b"P01F");
    }
}
