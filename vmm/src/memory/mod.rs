//! Guest physical memory.
//!
//! RAM and the windows above it are mapped once, at boot, as one [`GuestMemory`] that every device holds. Windows cost
//! nothing until they are touched, and the vCPUs see only the parts that are plugged ([`window`]). Descriptors may point into
//! a window (pages of a DAX file system are given to other devices). Blocks of the window of virtio-mem that are not plugged
//! are sealed ([`seal`]): neither vCPUs nor devices can make the host hold memory there. The window of virtio-pmem is bounded
//! by its configured size.

mod discard;
pub mod image;
pub mod layout;
mod memslots;
pub mod page_set;
pub(crate) mod pager;
pub(crate) mod seal;
pub(crate) mod userfaultfd;
pub(crate) mod window;
pub mod write_log;

use vm_memory::mmap::FromRangesError;
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryRegion, MemoryRegionAddress};

pub use discard::discard;
use layout::{MemoryLayout, RegionKind};
pub use memslots::set_memory;

use crate::kvm::IoctlError;

/// All guest memory, shared by the vCPU threads (through KVM) and the device workers.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// Guest memory cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host refused the address space.
    #[error("memory: cannot map {size_mib} MiB of guest RAM and windows: {source}")]
    Allocate {
        /// Requested size, windows included.
        size_mib: u64,
        /// Cause.
        source: FromRangesError,
    },
    /// A region of the layout is not mapped in this process.
    #[error("memory: nothing is mapped for guest address {0:#x}")]
    Unmapped(u64),
    /// KVM did not take it.
    #[error(transparent)]
    Ioctl(#[from] IoctlError),
}

/// Maps the regions of `layout`: anonymous, zeroed, lazily populated (MAP_NORESERVE).
///
/// # Errors
/// [`MemoryError::Allocate`] when the host has no address space or commit limit left.
#[allow(unsafe_code)]
pub fn allocate(layout: &MemoryLayout) -> Result<GuestMemory, MemoryError> {
    let fail = |source| MemoryError::Allocate {
        size_mib: layout.regions().iter().map(|region| region.size).sum::<u64>() >> 20,
        source,
    };
    let mut ranges = Vec::new();
    for region in layout.regions() {
        let len = usize::try_from(region.size).map_err(|_| fail(FromRangesError::InvalidGuestRegion))?;
        ranges.push((GuestAddress(region.start), len));
    }
    let memory = GuestMemory::from_ranges(&ranges).map_err(fail)?;
    for (region, description) in memory.iter().zip(layout.regions()) {
        let Ok(address) = region.get_host_address(MemoryRegionAddress(0)) else {
            continue;
        };
        keep_out_of_dumps(address as usize, region.len() as usize);
        if description.kind == RegionKind::Pmem {
            continue;
        }
        // SAFETY: the range is the mapping of `region`, which `memory` owns. The advice changes page sizes only, and a
        // kernel without transparent huge pages refuses it harmlessly.
        unsafe { libc::madvise(address.cast(), region.len() as usize, libc::MADV_HUGEPAGE) };
    }
    Ok(memory)
}

/// Leaves guest memory at `address` out of a core dump of this process: it is large, and not ours to show. For every new
/// mapping, also one over another.
#[allow(unsafe_code)]
pub fn keep_out_of_dumps(address: usize, len: usize) {
    // SAFETY: the advice changes nothing but a flag of whatever is mapped there. It cannot fail for a mapping that exists.
    unsafe { libc::madvise(address as *mut _, len, libc::MADV_DONTDUMP) };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether `VmFlags` of `/proc/self/smaps` say of all mappings in `len` bytes at `start` that they are not dumped.
    pub fn is_kept_out_of_dumps(start: u64, len: u64) -> bool {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let (mut covered, mut inside) = (0, false);
        for line in smaps.lines() {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            if let Some((from, to)) = range
                && let (Ok(from), Ok(to)) = (u64::from_str_radix(from, 16), u64::from_str_radix(to, 16))
            {
                inside = from < start + len && to > start;
                covered += if inside {
                    to.min(start + len) - from.max(start)
                } else {
                    0
                };
            }
            if inside && line.starts_with("VmFlags:") && !line.split(' ').any(|flag| flag == "dd") {
                return false;
            }
        }
        covered == len
    }

    #[test]
    fn memory_when_the_process_dumps_core_is_not_in_it() {
        let layout = MemoryLayout::with_windows(64 << 20, 128 << 20, 128 << 20);
        let memory = allocate(&layout).unwrap();
        let all = |memory: &GuestMemory| {
            memory.iter().all(|region| {
                let start = region.get_host_address(MemoryRegionAddress(0)).unwrap() as u64;
                is_kept_out_of_dumps(start, region.len())
            })
        };
        assert!(all(&memory));
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap();
        file.as_file().set_len(1 << 30).unwrap();
        image::map_private(&memory, &layout, file.as_file()).unwrap();
        assert!(all(&memory));
        let other = vec![1u8; 1 << 20];
        assert!(!is_kept_out_of_dumps(other.as_ptr() as u64, 1 << 20));
    }

    #[test]
    fn allocate_when_above_the_hole_has_two_regions() {
        let memory = allocate(&MemoryLayout::ram(3 << 30 | 64 << 20)).unwrap();
        assert_eq!(memory.num_regions(), 2);
        assert_eq!(memory.last_addr().0, layout::RAM_HIGH_START + (64 << 20) - 1);
    }

    #[test]
    fn allocate_when_there_are_windows_maps_them_too() {
        let layout = MemoryLayout::with_windows(64 << 20, 1 << 40, 1 << 30);
        let memory = allocate(&layout).unwrap();
        let mapped: Vec<_> = memory.iter().map(|r| (r.start_addr().0, r.len())).collect();
        let described: Vec<_> = layout.regions().iter().map(|r| (r.start, r.size)).collect();
        assert_eq!(mapped, described);
    }
}
