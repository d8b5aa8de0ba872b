//! Guest memory as KVM's memslots.

#![allow(unsafe_code)]

use std::io;

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{GuestAddress, GuestMemory as _};

use super::layout::{self, MemoryLayout, Region, RegionKind};
use super::window::{Memslot, Memslots};
use super::{GuestMemory, MemoryError};
use crate::kvm::{IoctlError, ioctl_error};

/// Gives KVM all RAM of `layout`; windows are plugged piece by piece ([`Memslots`]). Slow once an irqchip or
/// ioeventfd exists (Linux 6.18 and later), so it comes first.
///
/// # Errors
/// [`MemoryError::Ioctl`], [`MemoryError::Unmapped`].
pub fn set_memory(vm: &VmFd, memory: &GuestMemory, layout: &MemoryLayout) -> Result<(), MemoryError> {
    // KVM's own memslots, needed by Intel CPUs.
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(ioctl_error("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.set_tss_address(layout::KVM_TSS)
        .map_err(ioctl_error("KVM_SET_TSS_ADDR"))?;
    let ram = |region: &&Region| region.kind == RegionKind::Ram;
    for (slot, region) in (0u32..).zip(layout.regions().iter().filter(ram)) {
        let host = memory
            .get_host_address(GuestAddress(region.start))
            .map_err(|_| MemoryError::Unmapped(region.start))?;
        let memslot = Memslot {
            slot,
            guest: region.start,
            size: region.size,
            host: host as u64,
            read_only: false,
        };
        // SAFETY: the range is one whole mapping owned by `memory`, which outlives the VM: the machine drops its VmFd
        // and vCPUs first. Regions do not overlap.
        unsafe { vm.set(memslot) }.map_err(|source| IoctlError {
            ioctl: "KVM_SET_USER_MEMORY_REGION",
            source,
        })?;
    }
    Ok(())
}

impl Memslots for VmFd {
    unsafe fn set(&self, memslot: Memslot) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot: memslot.slot,
            flags: if memslot.read_only { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: memslot.guest,
            memory_size: memslot.size,
            userspace_addr: memslot.host,
        };
        // SAFETY: the caller keeps the range mapped and slots apart.
        unsafe { self.set_user_memory_region(region) }
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }
}
