//! Giving guest memory back to the host.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;

use vm_memory::{Address, GuestAddress, GuestMemory as _, GuestMemoryRegion, MemoryRegionAddress};

use super::GuestMemory;

/// Frees the host pages behind `len` bytes at `address`, both multiples of the page size. What the guest reads there
/// afterwards depends on the backing: zeros in anonymous memory and in shared files (which get a hole, because the pages
/// belong to the file), the file's content in a private mapping of a file, of which only this process's copies are
/// freed. Nobody may rely on it: virtio-mem and virtio-balloon promise no content.
///
/// # Errors
/// What the kernel said, or `InvalidInput` for a range that is not guest memory; a part may be freed already.
pub fn discard(memory: &GuestMemory, address: u64, len: u64) -> io::Result<()> {
    let mut at = address;
    let mut left = len;
    while left > 0 {
        let not_memory = || {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{at:#x} is not guest memory"),
            )
        };
        let region = memory.find_region(GuestAddress(at)).ok_or_else(not_memory)?;
        let offset = at - region.start_addr().raw_value();
        let now = left.min(region.len() - offset);
        discard_in(region, offset, now)?;
        at = at.checked_add(now).ok_or_else(not_memory)?;
        left -= now;
    }
    Ok(())
}

fn discard_in(region: &vm_memory::GuestRegionMmap<()>, offset: u64, len: u64) -> io::Result<()> {
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let result = match region.file_offset() {
        Some(file) if region.flags() & libc::MAP_SHARED != 0 => {
            let start = i64::try_from(file.start() + offset).map_err(invalid)?;
            let how = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            let len = i64::try_from(len).map_err(invalid)?;
            // SAFETY: the descriptor is open; the call changes the file, not our address space.
            unsafe { libc::fallocate64(file.file().as_raw_fd(), how, start, len) }
        }
        _ => {
            let host = region
                .get_host_address(MemoryRegionAddress(offset))
                .map_err(io::Error::other)?;
            let len = usize::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
            // SAFETY: `len` bytes from `host` on are inside the region's mapping. The kernel replaces its pages; nothing
            // in this process holds a reference into guest memory.
            unsafe { libc::madvise(host.cast(), len, libc::MADV_DONTNEED) }
        }
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::FromRawFd;
    use std::os::unix::fs::MetadataExt;
    use vm_memory::{Bytes, FileOffset};

    const MIB: u64 = 1 << 20;

    fn resident(memory: &GuestMemory, address: u64, len: u64) -> usize {
        let host = memory.get_host_address(GuestAddress(address)).unwrap();
        let mut pages = vec![0u8; (len / 4096) as usize];
        // SAFETY: the range is mapped and `pages` has a byte for each page.
        let result = unsafe { libc::mincore(host.cast(), len as usize, pages.as_mut_ptr()) };
        assert_eq!(result, 0);
        pages.iter().filter(|page| **page & 1 != 0).count()
    }

    #[test]
    fn discard_when_anonymous_frees_exactly_the_range_across_regions() {
        let ranges = [(GuestAddress(0), MIB as usize), (GuestAddress(MIB), MIB as usize)];
        let memory = GuestMemory::from_ranges(&ranges).unwrap();
        memory
            .write_slice(&vec![1; 2 * MIB as usize], GuestAddress(0))
            .unwrap();
        discard(&memory, MIB - 8192, 3 * 4096).unwrap();
        assert_eq!(resident(&memory, MIB - 8192, 8192), 0);
        assert_eq!(resident(&memory, 0, MIB), 254);
        assert_eq!(resident(&memory, MIB, MIB), 255);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(MIB)).unwrap(), 0);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(MIB + 4096)).unwrap(), 1);
    }

    #[test]
    fn discard_when_a_shared_file_punches_a_hole() {
        // SAFETY: the name is a C string; the result is checked.
        let fd = unsafe { libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0);
        // SAFETY: `fd` was just opened and belongs to nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(MIB).unwrap();
        let range = (
            GuestAddress(0),
            MIB as usize,
            Some(FileOffset::new(file.try_clone().unwrap(), 0)),
        );
        let memory = GuestMemory::from_ranges_with_files([range]).unwrap();
        memory
            .write_slice(&vec![1; MIB as usize], GuestAddress(0))
            .unwrap();
        let before = file.metadata().unwrap().blocks();
        discard(&memory, 0, MIB / 2).unwrap();
        assert_eq!(file.metadata().unwrap().blocks(), before / 2);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0)).unwrap(), 0);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(MIB / 2)).unwrap(), 1);
    }

    #[test]
    fn discard_when_not_memory_is_an_error() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MIB as usize)]).unwrap();
        for (address, len) in [(MIB, 4096), (MIB - 4096, 8192), (u64::MAX - 4095, 8192)] {
            assert!(discard(&memory, address, len).is_err());
        }
        discard(&memory, MIB, 0).unwrap();
    }
}
