//! The zero page of the 64-bit Linux boot protocol (Linux Documentation/arch/x86/boot.rst, zero-page.rst).

#![allow(unsafe_code)]

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::{BootError, Initramfs, write_error};
use crate::memory::{GuestMemory, layout};

const BOOT_FLAG: u16 = 0xaa55;
const HEADER: u32 = u32::from_le_bytes(*b"HdrS");
/// Protocol 2.12, the first with a 64-bit entry point.
const VERSION: u16 = 0x020c;
const LOADER_UNDEFINED: u8 = 0xff;
const KERNEL_ALIGNMENT: u32 = 0x100_0000;

/// `boot_params` as bytes.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct ZeroPage(boot_params);

// SAFETY: a C structure of integers, without padding that matters: the guest may see every byte of it.
unsafe impl ByteValued for ZeroPage {}

/// Writes the zero page to [`layout::ZERO_PAGE`].
pub fn write_zero_page(
    memory: &GuestMemory,
    memory_size: u64,
    rsdp: u64,
    cmdline: &str,
    initramfs: Option<Initramfs>,
) -> Result<(), BootError> {
    let mut page = ZeroPage::default();
    let params = &mut page.0;
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER;
    params.hdr.version = VERSION;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.cmdline_size = cmdline.len() as u32;
    params.acpi_rsdp_addr = rsdp;
    if let Some(Initramfs { address, size }) = initramfs {
        // Below the hole, so 32 bits are enough.
        params.hdr.ramdisk_image = address as u32;
        params.hdr.ramdisk_size = size as u32;
    }
    let map = layout::memory_map(memory_size);
    params.e820_entries = map.len() as u8;
    for (entry, range) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry {
            addr: range.start,
            size: range.size,
            type_: range.kind as u32,
        };
    }
    let address = layout::ZERO_PAGE;
    memory
        .write_obj(page, GuestAddress(address))
        .map_err(write_error(address))
}
