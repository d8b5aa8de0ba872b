//! The host side of a disk: an open, locked image, its size and its block sizes.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, OFlags, StatxFlags};

use super::config::BlockConfig;
use super::ring::RingFault;
use crate::devices::virtio::config::{OpenError, OpenErrorKind};
use crate::devices::virtio::image::{self, ImageError};

/// Unit of addresses and of the capacity, whatever the disk's block size (5.2.6).
pub(super) const SECTOR: u64 = 512;
/// Offsets and buffers every file system takes for direct I/O, when it does not say what it needs.
const SAFE_ALIGNMENT: u32 = 4096;

/// File systems in memory, as `statfs` names them (include/uapi/linux/magic.h).
const TMPFS_MAGIC: u64 = 0x0102_1994;
const RAMFS_MAGIC: u64 = 0x8584_58f6;

/// A disk that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The image cannot be opened, is none, or is in use.
    #[error("disk {id}: {source}")]
    Image {
        /// Device id.
        id: String,
        /// What is wrong with it.
        source: ImageError,
    },
    /// The host does not tell what it has to.
    #[error("disk {id}: {path:?}: {what}: {source}")]
    Measure {
        /// Device id.
        id: String,
        /// Image.
        path: PathBuf,
        /// What was asked.
        what: &'static str,
        /// Cause.
        source: io::Error,
    },
    /// Less than one block.
    #[error("disk {id}: {path:?} has {size} bytes, a disk needs at least {block_size}")]
    Empty {
        /// Device id.
        id: String,
        /// Image.
        path: PathBuf,
        /// Size in bytes.
        size: u64,
        /// Logical block size in bytes.
        block_size: u32,
    },
    /// The file system has no O_DIRECT.
    #[error(
        "disk {id}: {path:?} is on a file system without direct I/O, switch `direct` off or move the image: {source}"
    )]
    Direct {
        /// Device id.
        id: String,
        /// Image.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// io_uring was asked for by name, and is not there.
    #[error("disk {id}: this host has no io_uring for it ({reason}); use engine \"auto\" or \"sync\"")]
    NoIoUring {
        /// Device id.
        id: String,
        /// What is missing.
        reason: RingFault,
    },
    /// The rate limiter's timer.
    #[error("disk {id}: rate limiter: {source}")]
    RateLimiter {
        /// Device id.
        id: String,
        /// Cause.
        source: io::Error,
    },
}

impl From<BlockError> for OpenError {
    fn from(error: BlockError) -> Self {
        let kind = match &error {
            BlockError::Image { source, .. } => source.kind(),
            BlockError::Measure { source, .. } | BlockError::RateLimiter { source, .. } => {
                OpenErrorKind::of(source)
            }
            BlockError::Empty { .. } => OpenErrorKind::Unfit,
            BlockError::Direct { .. } | BlockError::NoIoUring { .. } => OpenErrorKind::Unsupported,
        };
        Self::new(kind, error)
    }
}

/// The other way to the image when it is open for direct I/O.
#[derive(Debug)]
struct Direct {
    /// What direct I/O needs of buffer addresses, in bytes.
    memory: u64,
    /// The same file through the page cache.
    buffered: File,
}

/// Which of the disk's two files a transfer uses; the value is its index among the ring's registered files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    /// As configured.
    Main = 0,
    /// Through the page cache.
    Buffered = 1,
}

/// An open image.
#[derive(Debug)]
pub(super) struct Disk {
    file: File,
    direct: Option<Direct>,
    sectors: AtomicU64,
    block_size: u32,
    physical_block_size: u32,
    read_only: bool,
}

impl Disk {
    /// Opens and locks the image.
    pub(super) fn open(config: &BlockConfig) -> Result<Self, BlockError> {
        let (id, path) = (config.id.clone(), config.path.clone());
        let measure = |what| {
            let (id, path) = (&id, &path);
            move |source| BlockError::Measure {
                id: id.clone(),
                path: path.clone(),
                what,
                source,
            }
        };
        let opened = image::open(&id, &path, config.read_only);
        let file = opened.map_err(|source| BlockError::Image {
            id: id.clone(),
            source,
        })?;
        let metadata = file.metadata().map_err(measure("fstat"))?;
        let is_device = metadata.file_type().is_block_device();
        let direct_error = |source| BlockError::Direct {
            id: id.clone(),
            path: path.clone(),
            source,
        };
        let sector = SECTOR as u32;
        let (mut block_size, mut physical) = (sector, u32::try_from(metadata.blksize()).unwrap_or(sector));
        if is_device {
            block_size = rustix::fs::ioctl_blksszget(&file).map_err(|e| measure("BLKSSZGET")(e.into()))?;
            physical = rustix::fs::ioctl_blkpbszget(&file).map_err(|e| measure("BLKPBSZGET")(e.into()))?;
        }
        let mut direct = None;
        if config.direct {
            let (way, offset) =
                go_direct(&file, is_device.then_some(block_size), config).map_err(direct_error)?;
            block_size = block_size.max(offset);
            direct = Some(way);
        }
        let disk = Self {
            file,
            direct,
            sectors: AtomicU64::new(0),
            block_size,
            physical_block_size: usable_physical(physical, block_size),
            read_only: config.read_only,
        };
        let size = disk.measure().map_err(measure("its size"))?;
        let whole = size - size % u64::from(block_size);
        if whole == 0 {
            return Err(BlockError::Empty {
                id,
                path,
                size,
                block_size,
            });
        }
        if size != whole {
            tracing::warn!(device = %id, ?path, size, block_size, "disk size is not a multiple of the block size, the rest is not visible");
        }
        disk.set_sectors(whole / SECTOR);
        Ok(disk)
    }

    /// Size of the image now, in bytes.
    pub(super) fn measure(&self) -> io::Result<u64> {
        image::size(&self.file)
    }

    /// Whether the image's file system keeps files in memory only (tmpfs, ramfs). False when it cannot be found out.
    pub(super) fn in_memory(&self) -> bool {
        rustix::fs::fstatfs(&self.file)
            .is_ok_and(|fs| matches!(u64::try_from(fs.f_type), Ok(TMPFS_MAGIC | RAMFS_MAGIC)))
    }

    /// Capacity in sectors, as the guest knows it.
    pub(super) fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Acquire)
    }

    /// Changes the capacity.
    pub(super) fn set_sectors(&self, sectors: u64) {
        self.sectors.store(sectors, Ordering::Release);
    }

    /// Smallest unit the host likes, in bytes: a power of two, 512 or more.
    pub(super) fn block_size(&self) -> u32 {
        self.block_size
    }

    /// What the host writes without reading first, in bytes: `block_size` times a power of two.
    pub(super) fn physical_block_size(&self) -> u32 {
        self.physical_block_size
    }

    /// Whether every change is refused.
    pub(super) fn read_only(&self) -> bool {
        self.read_only
    }

    /// Byte offset of a range, or `None` when it leaves the disk.
    pub(super) fn range(&self, sector: u64, len: u64) -> Option<u64> {
        let end = self.sectors().checked_mul(SECTOR)?;
        let start = sector.checked_mul(SECTOR)?;
        (start.checked_add(len)? <= end).then_some(start)
    }

    /// Which file a transfer of `segments` at `offset` can use.
    ///
    /// What does not fit direct I/O goes through the page cache, which the kernel keeps coherent with direct I/O and which
    /// makes writes of parts of a block atomic; a bounce buffer of our own would have to lock blocks against each other.
    pub(super) fn route(&self, segments: &[libc::iovec], offset: u64) -> Route {
        let Some(direct) = &self.direct else {
            return Route::Main;
        };
        let len: u64 = segments.iter().map(|s| s.iov_len as u64).sum();
        let block = u64::from(self.block_size);
        // Some kernels take segments of a part of a block, others want each to be whole blocks.
        let fits = |s: &libc::iovec| {
            (s.iov_base as u64).is_multiple_of(direct.memory) && (s.iov_len as u64).is_multiple_of(block)
        };
        if offset.is_multiple_of(block) && len.is_multiple_of(block) && segments.iter().all(fits) {
            Route::Main
        } else {
            Route::Buffered
        }
    }

    /// The file of a route. Without direct I/O there is only one.
    pub(super) fn file(&self, route: Route) -> &File {
        match (&self.direct, route) {
            (Some(direct), Route::Buffered) => &direct.buffered,
            _ => &self.file,
        }
    }

    /// Whether transfers on `route` copy, and so keep the caller busy even if no device is waited for.
    pub(super) fn copies(&self, route: Route) -> bool {
        self.direct.is_none() || route == Route::Buffered
    }

    /// The files in the order of [`Route`].
    pub(super) fn descriptors(&self) -> [RawFd; 2] {
        [Route::Main, Route::Buffered].map(|route| self.file(route).as_raw_fd())
    }
}

/// The same file, whatever its path names by now, as a new open file description.
fn reopen(file: &File, read_only: bool) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(!read_only)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Switches `file` to direct I/O. Returns the other way to it and the alignment of offsets; `block_size` is a block
/// device's own.
fn go_direct(file: &File, block_size: Option<u32>, config: &BlockConfig) -> io::Result<(Direct, u32)> {
    let buffered = reopen(file, config.read_only)?;
    let flags = rustix::fs::fcntl_getfl(file)?;
    rustix::fs::fcntl_setfl(file, flags | OFlags::DIRECT)?;
    let (memory, offset) = direct_alignment(file, block_size.unwrap_or(SAFE_ALIGNMENT));
    let direct = Direct {
        memory: u64::from(memory),
        buffered,
    };
    Ok((direct, offset))
}

/// Alignment of memory and of offsets for direct I/O; `fallback` when the kernel (before 6.1) or the file system does not
/// say.
fn direct_alignment(file: &File, fallback: u32) -> (u32, u32) {
    let told = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    match told {
        Ok(told)
            if told.stx_dio_mem_align.is_power_of_two() && told.stx_dio_offset_align.is_power_of_two() =>
        {
            (
                told.stx_dio_mem_align,
                told.stx_dio_offset_align.max(SECTOR as u32),
            )
        }
        _ => (fallback, fallback),
    }
}

fn usable_physical(physical: u32, block_size: u32) -> u32 {
    // A network file system's block size may be a megabyte: that is a preference, no block.
    if physical.is_power_of_two() && (block_size..=0x1_0000).contains(&physical) {
        physical
    } else {
        block_size
    }
}
