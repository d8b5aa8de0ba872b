//! Guest physical memory.

pub mod layout;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::{Address, GuestAddress, GuestMemory as _, GuestMemoryRegion, MemoryRegionAddress};

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
    /// A file could not be mapped over guest memory.
    #[error("memory: cannot map {size:#x} bytes of a file at guest address {address:#x}: {source}")]
    MapFile {
        /// Guest physical address.
        address: u64,
        /// Length.
        size: u64,
        /// Cause.
        source: io::Error,
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

/// Replaces `size` bytes of guest RAM at `address` by a private mapping of `file` from `offset`.
///
/// Pages come from the page cache, shared by all guests that map the same file, until the guest writes to them. All three
/// numbers must be multiples of the page size and the file must hold the whole range; the file must not be truncated
/// while the guest runs (replace such files by rename).
///
/// # Errors
/// [`MemoryError::MapFile`] when the range is not inside one RAM region or the host refuses.
pub fn map_file(
    memory: &GuestMemory,
    address: u64,
    file: &File,
    offset: u64,
    size: u64,
) -> Result<(), MemoryError> {
    let fail = |source: io::Error| MemoryError::MapFile {
        address,
        size,
        source,
    };
    let invalid = |what: &str| fail(io::Error::new(io::ErrorKind::InvalidInput, what.to_owned()));
    let start = GuestAddress(address);
    let region = memory.find_region(start).ok_or_else(|| invalid("not RAM"))?;
    let last = start
        .checked_add(size.saturating_sub(1))
        .ok_or_else(|| invalid("address overflow"))?;
    if last > region.last_addr() {
        return Err(invalid("crosses the end of a RAM region"));
    }
    let host = memory
        .get_host_address(start)
        .map_err(|e| fail(io::Error::other(e.to_string())))?;
    let offset = libc::off_t::try_from(offset).map_err(|_| invalid("file offset overflow"))?;
    // SAFETY: the whole range lies inside one region owned by `memory` (checked above), so MAP_FIXED replaces only pages
    // of that mapping; they are unmapped together with the region. Guest RAM is never borrowed as Rust references.
    let mapped = unsafe {
        libc::mmap(
            host.cast(),
            size as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            offset,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(fail(io::Error::last_os_error()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn allocate_when_above_the_hole_has_two_regions() {
        let memory = allocate(3 << 30 | 64 << 20).unwrap();
        assert_eq!(memory.num_regions(), 2);
        assert_eq!(memory.last_addr().0, layout::RAM_HIGH_START + (64 << 20) - 1);
    }

    #[test]
    fn map_file_when_mapped_shows_the_file_and_keeps_writes_private() {
        let path = std::env::temp_dir().join(format!("dragonball-map-{}", std::process::id()));
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .unwrap();
        std::fs::remove_file(&path).unwrap();
        file.write_all(&[0x5a; 0x2000]).unwrap();
        let memory = allocate(64 << 20).unwrap();

        map_file(&memory, 0x10_0000, &file, 0x1000, 0x1000).unwrap();

        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x10_0fff)).unwrap(), 0x5a);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x10_1000)).unwrap(), 0);
        memory.write_obj(1u8, GuestAddress(0x10_0000)).unwrap();
        let mut first = [0u8; 1];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut first, 0x1000).unwrap();
        assert_eq!(first, [0x5a]);
    }

    #[test]
    fn map_file_when_outside_ram_is_refused() {
        let memory = allocate(64 << 20).unwrap();
        let file = File::open("/dev/zero").unwrap();
        assert!(map_file(&memory, 64 << 20, &file, 0, 0x1000).is_err());
        assert!(map_file(&memory, (64 << 20) - 0x1000, &file, 0, 0x2000).is_err());
    }
}
