//! A page of guest memory that the machine writes and AML (or a driver) reads: which slots and processors are present,
//! which of them have news, and the generation of the machine.
//!
//! Memory costs the guest nothing to read, where a register costs an exit for every `_STA` at boot. What is read there is
//! advice for the guest; a guest that writes to it fools itself only, because the machine never reads it back.

use std::sync::{Arc, Mutex, PoisonError};

use acpi_tables::aml;
use vm_memory::{Bytes, GuestAddress};

use crate::memory::{GuestMemory, layout};

/// Where the page is.
pub const ADDRESS: u64 = layout::SHARED_PAGE;
/// Bytes of a bitmap: one bit for each of 256 things.
const BITMAP_BYTES: usize = 32;
/// Offset of the generation id.
const GENERATION: u64 = 0x100;

/// The bitmaps of the page, by index of the slot or vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Bitmap {
    /// virtio-mmio slots with a device.
    SlotPresent = 0,
    /// Processors the guest may use.
    CpuPresent = 1,
    /// Processors the guest shall look for (Device Check).
    CpuInsert = 2,
    /// Processors the guest shall give up (Eject Request).
    CpuEject = 3,
}

impl Bitmap {
    /// Guest physical address of its first byte.
    fn address(self) -> u64 {
        ADDRESS + (self as usize * BITMAP_BYTES) as u64
    }

    /// The operation region of the first `count` bits, as AML: called `name`, with one field of one bit each.
    pub fn write_aml(self, sink: &mut Vec<u8>, name: &str, letter: u8, count: u8) {
        use acpi_tables::Aml;
        let address = self.address() as u32;
        aml::OpRegion::new(
            name.into(),
            aml::OpRegionSpace::SystemMemory,
            &address,
            &(BITMAP_BYTES as u8),
        )
        .to_aml_bytes(sink);
        let fields = (0..count).map(|index| aml::FieldEntry::Named(bit_name(letter, index), 1));
        aml::Field::new(
            name.into(),
            aml::FieldAccessType::Byte,
            aml::FieldLockRule::NoLock,
            aml::FieldUpdateRule::Preserve,
            fields.collect(),
        )
        .to_aml_bytes(sink);
    }
}

/// `P01F`-style names: a letter and a hexadecimal number.
pub fn bit_name(letter: u8, index: u8) -> [u8; 4] {
    let digit = |n: u8| if n < 10 { b'0' + n } else { b'A' + (n - 10) };
    [letter, b'0', digit(index >> 4), digit(index & 0xf)]
}

/// [`bit_name`] as a path.
pub fn bit_path(letter: u8, index: u8) -> aml::Path {
    aml::Path::new(&String::from_utf8_lossy(&bit_name(letter, index)))
}

/// `_STA` of thing `index`: there, working and shown when its bit `P…` is set.
pub fn status_method(index: u8) -> Vec<u8> {
    use acpi_tables::Aml;
    let mut bytes = Vec::new();
    aml::Method::new(
        "_STA".into(),
        0,
        false,
        vec![
            &aml::If::new(&bit_path(b'P', index), vec![&aml::Return::new(&0x0fu8)]),
            &aml::Return::new(&aml::ZERO),
        ],
    )
    .to_aml_bytes(&mut bytes);
    bytes
}

/// The machine's side of the page.
#[derive(Debug)]
pub struct SharedPage {
    memory: Arc<GuestMemory>,
    bitmaps: Mutex<[[u8; BITMAP_BYTES]; 4]>,
}

impl SharedPage {
    /// The page in `memory`, all zeroes.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        Self {
            memory,
            bitmaps: Mutex::default(),
        }
    }

    /// Sets or clears a bit.
    pub fn set(&self, bitmap: Bitmap, index: u8, on: bool) {
        let mut bitmaps = self.bitmaps.lock().unwrap_or_else(PoisonError::into_inner);
        let position = usize::from(index / 8);
        let byte = bitmaps.get_mut(bitmap as usize).and_then(|b| b.get_mut(position));
        let Some(byte) = byte else { return };
        let bit = 1 << (index % 8);
        *byte = if on { *byte | bit } else { *byte & !bit };
        self.write(bitmap.address() + position as u64, &[*byte]);
    }

    /// Publishes the generation of the machine (see [`vmgenid`](crate::devices::vmgenid)).
    pub fn set_generation(&self, id: [u8; 16]) {
        self.write(ADDRESS + GENERATION, &id);
    }

    /// Guest physical address of the generation id.
    pub fn generation_address() -> u64 {
        ADDRESS + GENERATION
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        if let Err(error) = self.memory.write_slice(bytes, GuestAddress(address)) {
            // Every machine has memory there (config::MIN_MEMORY_MIB).
            guest_log!(ERROR, address, %error, "shared page: not memory");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_when_bits_change_writes_memory_from_its_own_copy() {
        let memory = Arc::new(crate::memory::allocate(&layout::MemoryLayout::ram(64 << 20)).unwrap());
        let page = SharedPage::new(memory.clone());
        let byte =
            |bitmap: Bitmap, at| -> u8 { memory.read_obj(GuestAddress(bitmap.address() + at)).unwrap() };
        page.set(Bitmap::SlotPresent, 17, true);
        page.set(Bitmap::CpuEject, 255, true);
        assert_eq!(
            (byte(Bitmap::SlotPresent, 2), byte(Bitmap::CpuEject, 31)),
            (2, 0x80)
        );
        // What the guest writes does not come back.
        memory.write_obj(0xffu8, GuestAddress(ADDRESS + 2)).unwrap();
        page.set(Bitmap::SlotPresent, 16, true);
        page.set(Bitmap::SlotPresent, 17, false);
        assert_eq!(byte(Bitmap::SlotPresent, 2), 1);
    }

    #[test]
    fn bit_name_when_two_digits_is_hexadecimal() {
        assert_eq!(&bit_name(b'V', 0), b"V000");
        assert_eq!(&bit_name(b'P', 0xfe), b"P0FE");
    }
}
