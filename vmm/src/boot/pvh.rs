//! The start info of a PVH boot (Xen public/arch-x86/hvm/start_info.h).

use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::{BootError, Initramfs, write_error};
use crate::memory::{GuestMemory, layout};

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
const MODULES: u64 = layout::PVH_START_INFO + 0x100;
const MEMORY_MAP: u64 = layout::PVH_START_INFO + 0x200;

/// Writes the start info to [`layout::PVH_START_INFO`], its tables behind it.
pub fn write_start_info(
    memory: &GuestMemory,
    memory_size: u64,
    rsdp: u64,
    initramfs: Option<Initramfs>,
) -> Result<(), BootError> {
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: rsdp,
        ..Default::default()
    };
    if let Some(Initramfs { address, size }) = initramfs {
        info.nr_modules = 1;
        info.modlist_paddr = MODULES;
        write(
            memory,
            MODULES,
            hvm_modlist_entry {
                paddr: address,
                size,
                ..Default::default()
            },
        )?;
    }
    info.memmap_paddr = MEMORY_MAP;
    let mut address = MEMORY_MAP;
    for range in layout::memory_map(memory_size) {
        let entry = hvm_memmap_table_entry {
            addr: range.start,
            size: range.size,
            type_: range.kind as u32,
            reserved: 0,
        };
        write(memory, address, entry)?;
        address += size_of::<hvm_memmap_table_entry>() as u64;
        info.memmap_entries += 1;
    }
    write(memory, layout::PVH_START_INFO, info)
}

fn write<T: ByteValued>(memory: &GuestMemory, address: u64, value: T) -> Result<(), BootError> {
    memory
        .write_obj(value, GuestAddress(address))
        .map_err(write_error(address))
}
