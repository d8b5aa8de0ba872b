//! Guest physical memory.

pub mod layout;

use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryRegion, MemoryRegionAddress};

/// All guest RAM, shared by the vCPU threads (through KVM) and the device workers.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// Guest memory cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host refused the address space.
    #[error("memory: cannot map {size_mib} MiB of guest RAM: {reason}")]
    Allocate {
        /// Requested size.
        size_mib: u64,
        /// Cause.
        reason: String,
    },
}

/// Maps `size` bytes of anonymous, zeroed, lazily populated guest RAM, with the hole below 4 GiB left out.
///
/// # Errors
/// [`MemoryError::Allocate`] when the host has no address space or commit limit left.
pub fn allocate(size: u64) -> Result<GuestMemory, MemoryError> {
    let fail = |reason: String| MemoryError::Allocate {
        size_mib: size >> 20,
        reason,
    };
    let mut ranges = Vec::new();
    for (start, len) in layout::ram_regions(size) {
        let len = usize::try_from(len).map_err(|e| fail(e.to_string()))?;
        ranges.push((GuestAddress(start), len));
    }
    let memory = GuestMemory::from_ranges(&ranges).map_err(|e| fail(e.to_string()))?;
    for region in memory.iter() {
        let Ok(address) = region.get_host_address(MemoryRegionAddress(0)) else {
            continue;
        };
        // SAFETY: the range is the mapping of `region`, which `memory` owns. The advice changes page sizes only, and a
        // kernel without transparent huge pages refuses it harmlessly.
        unsafe { libc::madvise(address.cast(), region.len() as usize, libc::MADV_HUGEPAGE) };
    }
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allocate_when_above_the_hole_has_two_regions() {
        let memory = allocate(3 << 30 | 64 << 20).unwrap();
        assert_eq!(memory.num_regions(), 2);
        assert_eq!(memory.last_addr().0, layout::RAM_HIGH_START + (64 << 20) - 1);
    }
}
