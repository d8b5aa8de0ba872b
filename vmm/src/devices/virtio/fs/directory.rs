//! Listings of directories: the host's entries (`struct linux_dirent64`, getdents64(2)), read ahead of the guest.
//!
//! Linux asks for a page of entries at a time. They are read from the host in larger pieces, and what is left over is
//! kept for the next request, so that going on needs no seek: file systems that sort (ext4) or cache (overlayfs) their
//! entries would do that again for each. It also makes positions work that lseek(2) does not take (beyond 2^63).

use std::ffi::CStr;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::sys;

/// Offset of the name: d_ino, d_off, d_reclen, d_type come before it.
const NAME: usize = 19;
/// Bytes of entries read from the host at a time.
const BUFFER: usize = 32 << 10;
/// Most directories of a share whose entries are kept between requests; of others they are read again.
const READ_AHEAD: usize = 256;

/// One entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Dirent<'a> {
    pub(super) inode: u64,
    /// Where the next entry starts.
    pub(super) offset: u64,
    pub(super) file_type: u8,
    pub(super) name: &'a CStr,
    /// Bytes of the record.
    len: usize,
}

/// The entries in what getdents64 returned.
#[derive(Debug)]
struct Dirents<'a>(&'a [u8]);

impl<'a> Iterator for Dirents<'a> {
    type Item = Dirent<'a>;

    fn next(&mut self) -> Option<Dirent<'a>> {
        let record = self.0;
        let len = usize::from(u16::from_ne_bytes(record.get(16..18)?.try_into().ok()?));
        let dirent = Dirent {
            inode: u64::from_ne_bytes(record.get(..8)?.try_into().ok()?),
            offset: u64::from_ne_bytes(record.get(8..16)?.try_into().ok()?),
            file_type: *record.get(18)?,
            name: CStr::from_bytes_until_nul(record.get(NAME..len)?).ok()?,
            len,
        };
        self.0 = record.get(len..)?;
        Some(dirent)
    }
}

/// Counts the listings of a share that keep entries.
#[derive(Debug, Default, Clone)]
pub(super) struct ReadAhead(Arc<AtomicUsize>);

/// The place of one listing among them.
#[derive(Debug)]
struct ReadAheadTicket(ReadAhead);

impl ReadAhead {
    fn take(&self) -> Option<ReadAheadTicket> {
        let ticket = ReadAheadTicket(self.clone());
        (self.0.fetch_add(1, Ordering::Relaxed) < READ_AHEAD).then_some(ticket)
    }
}

impl Drop for ReadAheadTicket {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How far an open directory is read.
#[derive(Debug, Default)]
pub(super) struct Listing {
    /// What the host gave last.
    entries: Vec<u8>,
    /// Bytes of `entries` the guest has.
    taken: usize,
    /// The position of the first entry it has not. The descriptor stands behind the last one.
    offset: u64,
    ticket: Option<ReadAheadTicket>,
}

impl Listing {
    /// Gives the entries of `directory` from `offset` on to `add` until it wants no more, or what was read is used up.
    /// `add` says whether it took the entry.
    ///
    /// # Errors
    /// What the host says, EINVAL for a position it does not know; an error of `add` unless it took entries before.
    pub(super) fn read(
        &mut self,
        directory: BorrowedFd,
        offset: u64,
        read_ahead: &ReadAhead,
        mut add: impl FnMut(Dirent<'_>) -> io::Result<bool>,
    ) -> io::Result<()> {
        if offset == 0 || offset != self.offset || self.taken >= self.entries.len() {
            self.fill(directory, offset)?;
        }
        let mut result = Ok(());
        let left = self.entries.get(self.taken..).unwrap_or_default();
        for (count, dirent) in Dirents(left).enumerate() {
            match add(dirent) {
                Ok(true) => {}
                Ok(false) => break,
                // Entries already taken must reach the guest, which counts their references.
                Err(error) => {
                    result = if count == 0 { Err(error) } else { Ok(()) };
                    break;
                }
            }
            self.taken += dirent.len;
            self.offset = dirent.offset;
        }
        self.keep(read_ahead);
        result
    }

    fn fill(&mut self, directory: BorrowedFd, offset: u64) -> io::Result<()> {
        let goes_on = offset != 0 && offset == self.offset && self.ticket.is_some();
        if !goes_on {
            sys::lseek(directory, offset, libc::SEEK_SET)?;
        }
        self.entries.resize(BUFFER, 0);
        let read = sys::getdents(directory, &mut self.entries);
        self.entries.truncate(*read.as_ref().unwrap_or(&0));
        (self.taken, self.offset) = (0, offset);
        read.map(drop)
    }

    /// Keeps what is left if there is room for it.
    fn keep(&mut self, read_ahead: &ReadAhead) {
        let at_end = self.entries.is_empty();
        if at_end || self.ticket.is_none() {
            self.ticket = (!at_end).then(|| read_ahead.take()).flatten();
        }
        if self.ticket.is_none() {
            *self = Self::default();
        }
    }
}
