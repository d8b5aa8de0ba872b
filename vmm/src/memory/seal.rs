//! Blocks of guest memory that must not be used, because the guest has not plugged them (virtio-mem).
//!
//! A memslot cannot be cut while vCPUs run, so it covers 128 MiB whose blocks come and go. What enforces the blocks is the
//! protection of the mapping below (mprotect(2), PROT_NONE). A vCPU that touches a sealed block ends its machine (KVM_RUN:
//! EFAULT), or finds no memory there, if KVM emulates the instruction; a system call on it fails with EFAULT.
//!
//! Left are the device threads, which read and write descriptors, rings and headers themselves. A guest can name a sealed
//! block to a device, or unplug one that a device is just using; neither may end the process, nor give the guest memory. So a
//! thread that faults on a sealed block is lent the page, and goes on. No more than [`STRAYS`] pages are lent at once: the
//! oldest is taken back, with its content, for the next. Whatever a guest does, the host's memory below its window is what is
//! plugged and [`STRAYS`] pages.
//!
//! The fault is a signal (SIGSEGV). What is not about a sealed block goes on to the handler there was before, Rust's report
//! of stack overflows included.

#![allow(unsafe_code)]

mod fault;
mod table;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::GuestMemory;

/// Bytes of a block: a huge page, so that what is plugged can be one.
pub const BLOCK: u64 = 2 << 20;
/// Pages lent at once: 1 MiB, more than the threads of a machine use in one instruction each.
pub const STRAYS: usize = 256;
/// Runs of open blocks. Each border between open and sealed is one of the kernel's mappings, of which a process has 65,530
/// (vm.max_map_count).
pub const MAX_RUNS: u64 = 8192;
const PAGE: usize = 4096;

/// A range of memory, sealed but for the blocks that were opened.
#[derive(Debug)]
pub struct Seal {
    area: Box<Area>,
    /// Keeps the mapping. Dropped after the area is forgotten.
    _memory: Arc<GuestMemory>,
}

/// What the handler of faults needs to know.
#[derive(Debug)]
struct Area {
    /// Address in this process, and bytes.
    start: usize,
    len: usize,
    /// A bit for each block: set if it is open.
    open: Vec<AtomicU64>,
    /// Open blocks, and runs of them.
    blocks: AtomicU64,
    runs: AtomicU64,
    /// Addresses of pages that are lent, 0 for none, in a ring.
    lent: [AtomicUsize; STRAYS],
    next: AtomicUsize,
    /// Pages lent since the beginning.
    strays: AtomicU64,
}

impl Seal {
    /// Seals `len` bytes at `start` of this process, multiples of [`BLOCK`] that `memory` maps. What is in them is kept.
    ///
    /// # Errors
    /// The kernel refused, or there are too many sealed ranges.
    pub fn new(memory: &Arc<GuestMemory>, start: usize, len: usize) -> io::Result<Self> {
        let blocks = len.div_ceil(BLOCK as usize);
        let area = Box::new(Area {
            start,
            len,
            open: (0..blocks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            blocks: AtomicU64::new(0),
            runs: AtomicU64::new(0),
            lent: [const { AtomicUsize::new(0) }; STRAYS],
            next: AtomicUsize::new(0),
            strays: AtomicU64::new(0),
        });
        fault::watch()?;
        table::insert(&area)?;
        let seal = Self {
            area,
            _memory: memory.clone(),
        };
        protect(start, len, libc::PROT_NONE)?;
        Ok(seal)
    }

    /// Opens `len` bytes at `offset`, all of them sealed blocks. What is in them is undefined.
    ///
    /// # Errors
    /// `InvalidInput` for blocks that do not exist or are open, `QuotaExceeded` when there are [`MAX_RUNS`], or what the kernel
    /// said; nothing is open then.
    pub fn open(&self, offset: u64, len: u64) -> io::Result<()> {
        let area = &*self.area;
        let blocks = area.check(offset, len, false)?;
        let (start, len) = (area.start + offset as usize, len as usize);
        let _handler = table::lock();
        let runs = area.runs_with(&blocks, 1, -1)?;
        area.take_back(start..start + len);
        protect(start, len, libc::PROT_READ | libc::PROT_WRITE)?;
        area.set(blocks, true, runs);
        Ok(())
    }

    /// Seals `len` bytes at `offset`, all of them open blocks, and frees their memory.
    ///
    /// # Errors
    /// As [`open`](Self::open); the blocks are open still. A failure to free memory that is sealed already is not told: the
    /// memory is freed when it is sealed the next time.
    pub fn close(&self, offset: u64, len: u64) -> io::Result<()> {
        let area = &*self.area;
        let blocks = area.check(offset, len, true)?;
        let (start, len) = (area.start + offset as usize, len as usize);
        {
            let _handler = table::lock();
            let runs = area.runs_with(&blocks, -1, 1)?;
            protect(start, len, libc::PROT_NONE)?;
            area.set(blocks, false, runs);
        }
        if let Err(error) = discard(start, len) {
            guest_log!(WARN, %error, "memory: sealed memory is not freed");
        }
        Ok(())
    }

    /// Whether all of the `len` bytes at `offset` are in open blocks.
    pub fn is_open(&self, offset: u64, len: u64) -> bool {
        let end = offset.checked_add(len.max(1));
        let Some(end) = end.filter(|end| *end <= self.area.len as u64) else {
            return false;
        };
        (offset / BLOCK..end.div_ceil(BLOCK)).all(|block| self.area.is_open(block))
    }

    /// Bytes of open blocks.
    pub fn open_bytes(&self) -> u64 {
        self.area.blocks.load(Ordering::Relaxed) * BLOCK
    }

    /// Pages lent to device threads since the beginning.
    pub fn strays(&self) -> u64 {
        self.area.strays.load(Ordering::Relaxed)
    }
}

impl Drop for Seal {
    /// Memory that outlives its machine is used by nobody the guest can direct.
    fn drop(&mut self) {
        let area = &*self.area;
        let _handler = table::lock();
        if let Err(error) = protect(area.start, area.len, libc::PROT_READ | libc::PROT_WRITE) {
            guest_log!(WARN, %error, "memory: a window stays sealed");
        }
        table::remove(area);
    }
}

/// The parts of the `len` bytes at `start` of this process that are sealed, in ascending order.
pub fn sealed_in(start: usize, len: usize) -> Vec<Range<usize>> {
    let mut sealed: Vec<Range<usize>> = Vec::new();
    let _handler = table::lock();
    table::each(|area| {
        for block in 0..(area.len as u64).div_ceil(BLOCK) {
            let at = area.start + (block * BLOCK) as usize;
            let inside = at >= start && at < start.saturating_add(len);
            if !inside || area.is_open(block) {
                continue;
            }
            match sealed.last_mut() {
                Some(last) if last.end == at => last.end = at + BLOCK as usize,
                _ => sealed.push(at..at + BLOCK as usize),
            }
        }
    });
    sealed
}

impl Area {
    fn is_open(&self, block: u64) -> bool {
        let word = usize::try_from(block / 64).ok().and_then(|at| self.open.get(at));
        word.is_some_and(|word| word.load(Ordering::Relaxed) >> (block % 64) & 1 != 0)
    }

    /// The blocks of `len` bytes at `offset`, if each exists and is open, or none is.
    fn check(&self, offset: u64, len: u64, open: bool) -> io::Result<Range<u64>> {
        let whole = len > 0 && offset.is_multiple_of(BLOCK) && len.is_multiple_of(BLOCK);
        let end = offset.checked_add(len).filter(|end| *end <= self.len as u64);
        let blocks = end.map(|end| offset / BLOCK..end / BLOCK);
        let fit = |blocks: &Range<u64>| whole && blocks.clone().all(|block| self.is_open(block) == open);
        blocks.filter(fit).ok_or(io::ErrorKind::InvalidInput.into())
    }

    /// Runs of open blocks after a change that adds `alone` of them, and `joined` for each side on which `blocks` touch an
    /// open block.
    fn runs_with(&self, blocks: &Range<u64>, alone: i64, joined: i64) -> io::Result<u64> {
        let before = blocks
            .start
            .checked_sub(1)
            .is_some_and(|block| self.is_open(block));
        let sides = i64::from(before) + i64::from(self.is_open(blocks.end));
        let runs = self.runs.load(Ordering::Relaxed);
        let after = runs.saturating_add_signed(alone + joined * sides);
        if after > runs && after > MAX_RUNS {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        Ok(after)
    }

    /// Under the table's lock.
    fn set(&self, blocks: Range<u64>, open: bool, runs: u64) {
        let count = blocks.end - blocks.start;
        for block in blocks {
            let word = usize::try_from(block / 64).ok().and_then(|at| self.open.get(at));
            if let Some(word) = word {
                word.fetch_xor(1 << (block % 64), Ordering::Relaxed);
            }
        }
        self.runs.store(runs, Ordering::Relaxed);
        match open {
            true => self.blocks.fetch_add(count, Ordering::Relaxed),
            false => self.blocks.fetch_sub(count, Ordering::Relaxed),
        };
    }

    /// Takes back the lent pages of `range`, which is about to be opened. Under the table's lock.
    fn take_back(&self, range: Range<usize>) {
        for lent in &self.lent {
            let page = lent.load(Ordering::Relaxed);
            if range.contains(&page) {
                lent.store(0, Ordering::Relaxed);
                // A zero page, as any other of the block.
                let _ = discard(page, PAGE);
            }
        }
    }

    /// Lends the page at `page`, which is inside, to the thread that faulted on it; false when that cannot be. Called by the
    /// handler of the signal, under the table's lock: system calls and atomics only.
    fn lend(&self, page: usize) -> bool {
        if self.is_open(((page - self.start) as u64) / BLOCK) {
            // Opened after the fault.
            return true;
        }
        let next = self.next.load(Ordering::Relaxed) % STRAYS;
        self.next.store(next + 1, Ordering::Relaxed);
        let Some(place) = self.lent.get(next) else {
            return false;
        };
        let oldest = place.swap(0, Ordering::Relaxed);
        if oldest != 0 && (protect(oldest, PAGE, libc::PROT_NONE).is_err() || discard(oldest, PAGE).is_err())
        {
            return false;
        }
        if protect(page, PAGE, libc::PROT_READ | libc::PROT_WRITE).is_err() {
            return false;
        }
        place.store(page, Ordering::Relaxed);
        self.strays.fetch_add(1, Ordering::Relaxed);
        true
    }
}

fn protect(start: usize, len: usize, protection: i32) -> io::Result<()> {
    // SAFETY: the range is inside guest memory that a `Seal` keeps mapped. Nothing in this process holds a reference into it,
    // and who faults on it is lent a page.
    match unsafe { libc::mprotect(start as *mut _, len, protection) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn discard(start: usize, len: usize) -> io::Result<()> {
    // SAFETY: as above; nobody counts on the content of sealed memory.
    match unsafe { libc::madvise(start as *mut _, len, libc::MADV_DONTNEED) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
