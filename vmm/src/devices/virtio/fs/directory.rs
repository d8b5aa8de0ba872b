//! The host's directory entries (`struct linux_dirent64`, getdents64(2)).

use std::ffi::CStr;

/// Offset of the name: d_ino, d_off, d_reclen, d_type come before it.
const NAME: usize = 19;

/// One entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Dirent<'a> {
    pub(super) inode: u64,
    /// Where the next entry starts.
    pub(super) offset: u64,
    pub(super) file_type: u8,
    pub(super) name: &'a CStr,
}

/// The entries in what getdents64 returned.
#[derive(Debug)]
pub(super) struct Dirents<'a>(pub(super) &'a [u8]);

impl<'a> Iterator for Dirents<'a> {
    type Item = Dirent<'a>;

    fn next(&mut self) -> Option<Dirent<'a>> {
        let record = self.0;
        let len = u16::from_ne_bytes(record.get(16..18)?.try_into().ok()?);
        let dirent = Dirent {
            inode: u64::from_ne_bytes(record.get(..8)?.try_into().ok()?),
            offset: u64::from_ne_bytes(record.get(8..16)?.try_into().ok()?),
            file_type: *record.get(18)?,
            name: CStr::from_bytes_until_nul(record.get(NAME..usize::from(len))?).ok()?,
        };
        self.0 = record.get(usize::from(len)..)?;
        Some(dirent)
    }
}
