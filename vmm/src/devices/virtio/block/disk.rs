//! The host side of a disk: an open image, its size, and bounded vectored I/O on it.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;

use vm_memory::VolatileSlice;

use crate::config::BlockConfig;

/// Unit of addresses and of the capacity, whatever the disk's block size (5.2.6).
pub(super) const SECTOR: u64 = 512;
/// Linux' UIO_MAXIOV.
const MAX_SEGMENTS: usize = 1024;

/// A disk that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The image cannot be opened.
    #[error("disk {id}: cannot open {path:?} {mode}: {source}")]
    Open {
        /// Device id.
        id: String,
        /// Image.
        path: PathBuf,
        /// `read-only` or `read-write`.
        mode: &'static str,
        /// Cause.
        source: io::Error,
    },
    /// Neither a regular file nor a block device.
    #[error("disk {id}: {path:?} is neither a regular file nor a block device")]
    Type {
        /// Device id.
        id: String,
        /// Image.
        path: PathBuf,
    },
    /// Less than one sector.
    #[error("disk {id}: {path:?} has {size} bytes, a disk needs at least {SECTOR}")]
    Empty {
        /// Device id.
        id: String,
        /// Image.
        path: PathBuf,
        /// Size in bytes.
        size: u64,
    },
    /// Somebody else writes the image, or uses it while we want to write it.
    #[error("disk {id}: {path:?} is in use by another virtual machine or process")]
    Locked {
        /// Device id.
        id: String,
        /// Image.
        path: PathBuf,
    },
}

/// An open image.
#[derive(Debug)]
pub(super) struct Disk {
    file: File,
    sectors: u64,
    read_only: bool,
}

impl Disk {
    /// Opens and locks the image: many readers or one writer, by open file description (F_OFD_SETLK), so the lock
    /// lasts as long as the file is open and dies with the process.
    pub(super) fn open(config: &BlockConfig) -> Result<Self, BlockError> {
        let (id, path) = (config.id.clone(), config.path.clone());
        let open_error = |source| BlockError::Open {
            id: id.clone(),
            path: path.clone(),
            mode: if config.read_only {
                "read-only"
            } else {
                "read-write"
            },
            source,
        };
        // O_NONBLOCK: opening a FIFO by mistake must not hang. It has no meaning for files and disks.
        let mut file = OpenOptions::new()
            .read(true)
            .write(!config.read_only)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .map_err(open_error)?;
        let file_type = file.metadata().map_err(open_error)?.file_type();
        if !file_type.is_file() && !file_type.is_block_device() {
            return Err(BlockError::Type { id, path });
        }
        lock(&file, config)?;
        // Works for block devices, whose metadata has no size.
        let size = file.seek(SeekFrom::End(0)).map_err(open_error)?;
        if size < SECTOR {
            return Err(BlockError::Empty { id, path, size });
        }
        if !size.is_multiple_of(SECTOR) {
            tracing::warn!(device = %id, ?path, size, "disk size is not a multiple of {SECTOR}, the rest is not visible");
        }
        Ok(Self {
            file,
            sectors: size / SECTOR,
            read_only: config.read_only,
        })
    }

    /// Capacity in sectors.
    pub(super) fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether every change is refused.
    pub(super) fn read_only(&self) -> bool {
        self.read_only
    }

    /// Byte offset of a range, or `None` when it leaves the disk.
    pub(super) fn range(&self, sector: u64, len: u64) -> Option<u64> {
        let end = self.sectors.checked_mul(SECTOR)?;
        let start = sector.checked_mul(SECTOR)?;
        (start.checked_add(len)? <= end).then_some(start)
    }

    /// Reads into guest memory until every slice is full.
    pub(super) fn read(&self, slices: &[VolatileSlice], offset: u64) -> io::Result<()> {
        transfer(slices, offset, |segments, count, offset| {
            // SAFETY: each segment is guest memory that stays mapped while `slices` lives, and the kernel is the only
            // one to write it on our behalf; the guest seeing it half-written is the guest's affair.
            unsafe { libc::preadv64(self.file.as_raw_fd(), segments, count, offset) }
        })
    }

    /// Writes guest memory to the disk, all of it.
    pub(super) fn write(&self, slices: &[VolatileSlice], offset: u64) -> io::Result<()> {
        transfer(slices, offset, |segments, count, offset| {
            // SAFETY: each segment is guest memory that stays mapped while `slices` lives; the kernel only reads it.
            unsafe { libc::pwritev64(self.file.as_raw_fd(), segments, count, offset) }
        })
    }

    /// Makes everything written so far durable.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Gives the space of a range back; it reads as zeroes or as before.
    pub(super) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.fallocate(
            libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            offset,
            len,
        ) {
            // A hint (5.2.6): a file system without holes may ignore it.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
            result => result,
        }
    }

    /// Makes a range read as zeroes; with `unmap` its space may be given back.
    pub(super) fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let how = if unmap {
            libc::FALLOC_FL_PUNCH_HOLE
        } else {
            libc::FALLOC_FL_ZERO_RANGE
        };
        self.fallocate(how | libc::FALLOC_FL_KEEP_SIZE, offset, len)
    }

    fn fallocate(&self, mode: i32, offset: u64, len: u64) -> io::Result<()> {
        let invalid = |_| io::Error::from_raw_os_error(libc::EINVAL);
        let offset = i64::try_from(offset).map_err(invalid)?;
        let len = i64::try_from(len).map_err(invalid)?;
        // SAFETY: no memory is passed.
        match unsafe { libc::fallocate64(self.file.as_raw_fd(), mode, offset, len) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn lock(file: &File, config: &BlockConfig) -> Result<(), BlockError> {
    let kind = if config.read_only {
        libc::F_RDLCK
    } else {
        libc::F_WRLCK
    };
    // SAFETY: all-zero is a valid `flock`: the whole file, pid 0 as open file description locks require.
    let mut range: libc::flock64 = unsafe { std::mem::zeroed() };
    range.l_type = kind as i16;
    range.l_whence = libc::SEEK_SET as i16;
    // SAFETY: `range` outlives the call, the descriptor is open.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw mut range) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) {
        return Err(BlockError::Locked {
            id: config.id.clone(),
            path: config.path.clone(),
        });
    }
    tracing::warn!(device = %config.id, path = ?config.path, %error, "disk: the file system has no locks");
    Ok(())
}

/// Calls `io` until all of `slices` is moved. Running into the end of the file is an error: the range was checked
/// against the capacity, so the file shrank.
fn transfer(
    slices: &[VolatileSlice],
    mut offset: u64,
    io: impl Fn(*const libc::iovec, libc::c_int, i64) -> isize,
) -> io::Result<()> {
    let guards: Vec<_> = slices.iter().map(|slice| slice.ptr_guard_mut()).collect();
    let mut segments: Vec<libc::iovec> = guards
        .iter()
        .zip(slices)
        .map(|(guard, slice)| libc::iovec {
            iov_base: guard.as_ptr().cast(),
            iov_len: slice.len(),
        })
        .collect();
    let mut rest = segments.as_mut_slice();
    while !rest.is_empty() {
        let position = i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
        let count = rest.len().min(MAX_SEGMENTS);
        let moved = io(rest.as_ptr(), count as libc::c_int, position);
        let Ok(moved) = usize::try_from(moved) else {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        };
        if moved == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        offset += moved as u64;
        rest = advance(rest, moved);
    }
    Ok(())
}

/// Drops the first `bytes` bytes of a list of non-empty segments.
fn advance(mut segments: &mut [libc::iovec], mut bytes: usize) -> &mut [libc::iovec] {
    while bytes > 0 {
        let Some((first, _)) = segments.split_first_mut() else {
            break;
        };
        if bytes < first.iov_len {
            first.iov_base = first.iov_base.cast::<u8>().wrapping_add(bytes).cast();
            first.iov_len -= bytes;
            break;
        }
        bytes -= first.iov_len;
        segments = segments.get_mut(1..).unwrap_or_default();
    }
    segments
}
