//! Which pages of guest memory were written since a moment, by whomever: vCPUs, devices, system calls of this process,
//! io_uring. KVM's dirty log sees the vCPUs only.
//!
//! The host kernel keeps the log in the page tables. A page is write-protected by userfaultfd in asynchronous mode, and
//! the first write takes the protection away without asking anybody; PAGEMAP_SCAN finds the pages without it, and protects
//! them again (Documentation/admin-guide/mm/pagemap.rst, Linux 6.7). That costs a fault for the first write to each page
//! after every [`restart`](WriteLog::restart), and splits the huge pages that are written.
//!
//! Only pages the machine *owns* are protected: private to it, in memory or swapped out. The others (never touched, or
//! pages of the file below a private mapping) have nothing to protect, and show up as owned and unprotected once they are
//! written. What was owned at the restart and is not any more was discarded. So a page is as it was if
//!
//! - it is owned and protected, or
//! - it is not owned now, and was not then,
//!
//! and in all other cases it may differ.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use super::GuestMemory;
use super::image;
use super::layout::{MemoryLayout, RegionKind};
use super::page_set::{PAGE, PageSet};
use super::userfaultfd::{Userfaultfd, Watch};
use crate::interrupted;

/// linux/fs.h: `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
/// Ranges taken from the kernel at a time.
const RANGES: usize = 1024;

/// struct pm_scan_arg
#[repr(C)]
#[derive(Default)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// struct page_region
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Range {
    start: u64,
    end: u64,
    categories: u64,
}

/// What was written cannot be said.
#[derive(Debug, thiserror::Error)]
pub enum WriteLogError {
    /// The kernel is too old.
    #[error("this kernel keeps no log of writes (needs Linux 6.7): {0}")]
    NotSupported(#[source] io::Error),
    /// The kernel does not let this process have it.
    #[error(
        "no userfaultfd for the log of writes (sysctl vm.unprivileged_userfaultfd, /dev/userfaultfd): {0}"
    )]
    Refused(#[source] io::Error),
    /// The memory cannot be watched.
    #[error("userfaultfd of guest memory at {address:#x}, {len:#x} bytes: {source}")]
    Register {
        /// Address in this process.
        address: u64,
        /// Bytes.
        len: u64,
        /// Cause.
        source: io::Error,
    },
    /// Something else was mapped there, which the log knows nothing of.
    #[error("guest memory at {address:#x} was mapped anew since the log of writes was started")]
    Remapped {
        /// Address in this process.
        address: u64,
    },
    /// The page tables cannot be read.
    #[error("PAGEMAP_SCAN of {len:#x} bytes at {address:#x}: {source}")]
    Scan {
        /// Address in this process.
        address: u64,
        /// Bytes.
        len: u64,
        /// Cause.
        source: io::Error,
    },
    /// The log was never started, or after another save.
    #[error("the log of writes was not started with this save")]
    OtherSave,
}

/// What is read where the machine owns no page.
#[derive(Debug, Clone)]
pub enum Beneath {
    /// Zeros: anonymous memory.
    Zeros,
    /// A file, mapped privately.
    File,
    /// What a [pager](super::pager::Pager) brings in; its descriptor, which watches writes as well.
    Pager(Arc<Userfaultfd>),
}

/// A part of guest memory whose writes are logged.
#[derive(Debug, Clone, Copy)]
struct Region {
    /// Address in this process.
    address: u64,
    /// Bytes.
    len: u64,
    /// Number of its first page in a memory file.
    first_page: u64,
}

/// The log of one machine's RAM and virtio-mem window. The window of virtio-pmem is not logged: files come and go there.
#[derive(Debug)]
pub struct WriteLog {
    /// Keeps the mappings.
    _memory: Arc<GuestMemory>,
    /// Of a memory file.
    pages: u64,
    regions: Vec<Region>,
    beneath: Beneath,
    pagemap: File,
    /// Present when the regions are registered.
    registered: Option<Arc<Userfaultfd>>,
    /// The save since which writes are known, and the pages that were owned then.
    since: Option<([u8; 16], PageSet)>,
}

impl WriteLog {
    /// A log that has not been started; nothing costs anything yet. `memory` was allocated for `layout`.
    ///
    /// # Errors
    /// /proc/self/pagemap cannot be opened.
    pub fn new(memory: &Arc<GuestMemory>, layout: &MemoryLayout, beneath: Beneath) -> io::Result<Self> {
        let regions = image::places(memory, layout)?
            .iter()
            .filter(|place| place.kind != RegionKind::Pmem)
            .map(|place| Region {
                address: place.host as u64,
                len: place.len as u64,
                first_page: place.offset / PAGE,
            })
            .collect();
        let registered = match &beneath {
            Beneath::Pager(uffd) => Some(uffd.clone()),
            Beneath::Zeros | Beneath::File => None,
        };
        Ok(Self {
            _memory: memory.clone(),
            pages: image::file_size(layout) / PAGE,
            regions,
            beneath,
            pagemap: File::open("/proc/self/pagemap")?,
            registered,
            since: None,
        })
    }

    /// Declares that all that is beneath is the memory of the save `id`, and that the machine owns nothing yet but copies of
    /// it (a pager protects those). This costs nothing: a page that is owned was written.
    pub fn start_at_source(&mut self, id: [u8; 16]) {
        self.since = Some((id, self.no_pages()));
    }

    /// Forgets what was written: memory is now as it is in the save `id`. No vCPU and no device may write meanwhile.
    ///
    /// # Errors
    /// [`WriteLogError`]; nothing is known then until the next restart.
    pub fn restart(&mut self, id: [u8; 16]) -> Result<(), WriteLogError> {
        self.since = None;
        match &self.registered {
            Some(uffd) => {
                // What is discarded and brought in again has the content of the source, not of this save.
                uffd.stop_protecting();
            }
            None => self.registered = Some(self.register()?),
        }
        for region in &self.regions {
            self.scan(*region, Purpose::Protect, |_, _| {})?;
        }
        let mut owned = self.no_pages();
        for region in &self.regions {
            self.scan(*region, Purpose::Look, |pages, categories| {
                if categories & PAGE_IS_FILE == 0 {
                    owned.insert(pages);
                }
            })?;
        }
        self.since = Some((id, owned));
        Ok(())
    }

    /// The pages that may differ from the save `id`, by their number in a memory file.
    ///
    /// # Errors
    /// [`WriteLogError`].
    pub fn written_since(&self, id: [u8; 16]) -> Result<PageSet, WriteLogError> {
        let owned_then = match &self.since {
            Some((since, owned)) if *since == id => owned,
            _ => return Err(WriteLogError::OtherSave),
        };
        // What is not owned now differs if it was owned then.
        let mut written = owned_then.clone();
        for region in &self.regions {
            self.scan(*region, Purpose::Look, |pages, categories| {
                if categories & PAGE_IS_FILE != 0 {
                    return;
                }
                if categories & PAGE_IS_WRITTEN != 0 || self.may_be_discarded(categories) {
                    written.insert(pages);
                } else {
                    written.remove(pages);
                }
            })?;
        }
        Ok(written)
    }

    /// In a private mapping of a file the kernel keeps the protection of a page that is discarded in a marker, which looks
    /// like a page that is swapped out (mm/memory.c, `zap_install_uffd_wp_if_needed`).
    fn may_be_discarded(&self, categories: u64) -> bool {
        categories & PAGE_IS_SWAPPED != 0 && matches!(self.beneath, Beneath::File)
    }

    fn no_pages(&self) -> PageSet {
        PageSet::new(self.pages)
    }

    fn register(&self) -> Result<Arc<Userfaultfd>, WriteLogError> {
        let uffd = Userfaultfd::open(Watch::Writes).map_err(|error| match error.kind() {
            io::ErrorKind::Unsupported => WriteLogError::NotSupported(error),
            _ => WriteLogError::Refused(error),
        })?;
        for Region { address, len, .. } in self.regions.iter().copied() {
            uffd.register(address, len)
                .map_err(|source| WriteLogError::Register { address, len, source })?;
        }
        Ok(Arc::new(uffd))
    }

    /// Calls `found` for the ranges of `region` that are there, owned or not, with what they are.
    fn scan(
        &self,
        region: Region,
        purpose: Purpose,
        mut found: impl FnMut(std::ops::Range<u64>, u64),
    ) -> Result<(), WriteLogError> {
        let mut ranges = vec![Range::default(); RANGES];
        let mut argument = ScanArgument {
            size: size_of::<ScanArgument>() as u64,
            start: region.address,
            end: region.address + region.len,
            vec: ranges.as_mut_ptr() as u64,
            vec_len: RANGES as u64,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: PAGE_IS_WRITTEN | PAGE_IS_FILE | PAGE_IS_SWAPPED,
            ..ScanArgument::default()
        };
        if self.registered.is_some() {
            // Registrations go with a mapping.
            argument.flags |= PM_SCAN_CHECK_WPASYNC;
        }
        if purpose == Purpose::Protect {
            argument.flags |= PM_SCAN_WP_MATCHING;
            argument.category_mask = PAGE_IS_WRITTEN | PAGE_IS_FILE;
            argument.category_inverted = PAGE_IS_FILE;
        }
        while argument.start < argument.end {
            let count = interrupted::again_libc(|| {
                // SAFETY: `argument` is the structure the request takes; the ranges it points to live as long as the loop.
                let count = unsafe { libc::ioctl(self.pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
                count as isize
            });
            let count = count.map_err(|source| scan_error(&argument, source))?;
            for range in ranges.iter().take(count) {
                let page = |address: u64| region.first_page + (address - region.address) / PAGE;
                found(page(range.start)..page(range.end), range.categories);
            }
            argument.start = argument.walk_end;
        }
        Ok(())
    }
}

/// What a scan is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Look,
    /// Owned pages are protected.
    Protect,
}

fn scan_error(argument: &ScanArgument, source: io::Error) -> WriteLogError {
    match source.raw_os_error() {
        Some(libc::ENOTTY) => WriteLogError::NotSupported(source),
        Some(libc::EPERM) => WriteLogError::Remapped {
            address: argument.start,
        },
        _ => WriteLogError::Scan {
            address: argument.start,
            len: argument.end - argument.start,
            source,
        },
    }
}

#[cfg(test)]
mod tests;
