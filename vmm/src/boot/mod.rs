//! Loading a kernel: ELF or bzImage, entered by the 64-bit Linux boot protocol or by PVH.

mod bzimage;
mod cache;
mod config;
mod elf;
mod linux;
mod pvh;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

pub use self::config::BootConfig;
use crate::memory::{GuestMemory, layout};

const PAGE: u64 = 4096;

/// How the boot processor starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryPoint {
    /// 64-bit Linux boot protocol: long mode, RSI points to the zero page.
    Linux64(u64),
    /// PVH: protected mode without paging, EBX points to the start info.
    Pvh(u32),
}

/// The kernel, initramfs or command line cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be opened or read.
    #[error("{what} {path}: {source}")]
    File {
        /// "kernel" or "initramfs".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// A file has no content, or is not a regular file.
    #[error("{what} {path}: {problem}")]
    NotUsable {
        /// "kernel" or "initramfs".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: &'static str,
    },
    /// The file is something else.
    #[error("kernel {path}: not an x86-64 kernel: {size} bytes starting with {found}")]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// What was found instead.
        found: String,
    },
    /// The headers promise more than the file has.
    #[error("kernel {path}: truncated: {what} ends at byte {needed}, the file has {size}")]
    Truncated {
        /// The file.
        path: PathBuf,
        /// What is cut off.
        what: &'static str,
        /// Bytes needed.
        needed: u64,
        /// Bytes there.
        size: u64,
    },
    /// The headers contradict themselves.
    #[error("kernel {path}: {problem}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: KernelFault,
    },
    /// The compressed kernel could not be put into the cache.
    #[error("kernel cache {path}: {source}")]
    Cache {
        /// File or folder.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Kernel or initramfs do not fit in guest memory.
    #[error(
        "memory: {memory_mib} MiB is too small: the kernel ends at {} MiB and the initramfs has {} MiB",
        kernel_end.div_ceil(1 << 20), initramfs_size.div_ceil(1 << 20)
    )]
    MemoryTooSmall {
        /// Guest memory below the hole.
        memory_mib: u64,
        /// First address after the kernel.
        kernel_end: u64,
        /// Size of the initramfs in bytes.
        initramfs_size: u64,
    },
    /// The command line is too long.
    #[error("kernel command line: {0} bytes, at most {max} are possible", max = layout::CMDLINE_MAX - 1)]
    CmdlineTooLong(usize),
    /// The command line has a NUL byte.
    #[error("kernel command line: contains a NUL byte")]
    CmdlineNul,
    /// Guest memory refused a write.
    #[error("boot data at {address:#x}: {source}")]
    Write {
        /// Guest physical address.
        address: u64,
        /// Cause.
        source: GuestMemoryError,
    },
}

/// What is wrong with a file that looks like a kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelFault {
    /// ELF, for another processor.
    #[error("ELF file for another machine (class {class}, data {data}, machine {machine})")]
    OtherMachine {
        /// EI_CLASS.
        class: u8,
        /// EI_DATA.
        data: u8,
        /// e_machine.
        machine: u16,
    },
    /// ELF, and nothing to load.
    #[error("ELF file without loadable segments")]
    NoSegments,
    /// A number or size of program headers that no kernel has.
    #[error("{count} program headers of {size} bytes")]
    ProgramHeaders {
        /// e_phnum.
        count: u16,
        /// e_phentsize.
        size: u16,
    },
    /// A segment outside of where a kernel can be.
    #[error("segment at {start:#x}..{end:#x} cannot be loaded")]
    Segment {
        /// Guest physical address.
        start: u64,
        /// First address after it.
        end: u64,
    },
    /// Nowhere to begin.
    #[error("entry point {0:#x} is in no segment and there is no PVH note")]
    NoEntry(u64),
    /// A bzImage from before 2008.
    #[error("bzImage with boot protocol {0:#x}, older than 2.08")]
    OldProtocol(u16),
    /// A bzImage whose payload is damaged, too large or in an unknown format.
    #[error("bzImage: cannot decompress the kernel: {0}")]
    Compressed(io::Error),
}

/// Where the initramfs is in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Initramfs {
    address: u64,
    size: u64,
}

/// Loads kernel, initramfs and command line and writes the boot data; returns where the boot processor starts.
///
/// # Errors
/// [`BootError`] naming the file and what is wrong with it.
pub fn load(
    config: &BootConfig,
    memory: &GuestMemory,
    memory_size: u64,
    rsdp: u64,
) -> Result<EntryPoint, BootError> {
    let kernel = open_kernel(config)?;
    let initramfs = match &config.initramfs {
        Some(path) => Some((path, open(path, "initramfs")?)),
        None => None,
    };
    let low_end = memory_size.min(layout::RAM_LOW_MAX);
    let too_small = |initramfs_size| BootError::MemoryTooSmall {
        memory_mib: memory_size >> 20,
        kernel_end: kernel.end,
        initramfs_size,
    };
    let initramfs_size = initramfs.as_ref().map_or(0, |(_, (_, size))| *size);
    // As high as possible below the hole, page aligned.
    let initramfs_start = low_end
        .checked_sub(initramfs_size)
        .map(|start| start / PAGE * PAGE)
        .filter(|start| *start >= kernel.end)
        .ok_or_else(|| too_small(initramfs_size))?;

    for segment in &kernel.segments {
        let range = (segment.offset, segment.size);
        load_file_range(memory, segment.address, &kernel.file, range)
            .map_err(file_error("kernel", &config.kernel))?;
    }
    let initramfs = match initramfs {
        Some((path, (file, size))) => {
            load_file_range(memory, initramfs_start, &file, (0, size))
                .map_err(file_error("initramfs", path))?;
            Some(Initramfs {
                address: initramfs_start,
                size,
            })
        }
        None => None,
    };
    write_cmdline(memory, &config.cmdline)?;
    match kernel.entry {
        EntryPoint::Linux64(_) => {
            linux::write_zero_page(memory, memory_size, rsdp, &config.cmdline, initramfs)?;
        }
        EntryPoint::Pvh(_) => pvh::write_start_info(memory, memory_size, rsdp, initramfs)?,
    }
    Ok(kernel.entry)
}

/// Opens the kernel: an ELF file as it is, a bzImage through the cache.
fn open_kernel(config: &BootConfig) -> Result<elf::Image, BootError> {
    let path = &config.kernel;
    let (file, size) = open(path, "kernel")?;
    if elf::is_elf(&file) {
        return elf::Image::open(path, file, size);
    }
    match bzimage::Header::read(path, &file, size)? {
        Some(header) => {
            let (cached_path, cached) = cache::extracted(&config.cache_dir, path, &file, &header)?;
            let size = cached.metadata().map_err(|source| BootError::Cache {
                path: cached_path.clone(),
                source,
            })?;
            elf::Image::open(&cached_path, cached, size.len())
        }
        None => Err(BootError::NotAKernel {
            path: path.clone(),
            size,
            found: describe_start(&file),
        }),
    }
}

/// Opens a regular, non-empty file and gives its size.
fn open(path: &Path, what: &'static str) -> Result<(File, u64), BootError> {
    let io_error = |source| BootError::File {
        what,
        path: path.to_owned(),
        source,
    };
    let unusable = |problem| BootError::NotUsable {
        what,
        path: path.to_owned(),
        problem,
    };
    let metadata = std::fs::metadata(path).map_err(io_error)?;
    if !metadata.is_file() {
        return Err(unusable("not a regular file"));
    }
    if metadata.len() == 0 {
        return Err(unusable("the file is empty"));
    }
    let file = File::open(path).map_err(io_error)?;
    Ok((file, metadata.len()))
}

fn describe_start(file: &File) -> String {
    let mut start = [0; 8];
    let read = file.read_at(&mut start, 0).unwrap_or(0);
    let start = start.get(..read).unwrap_or_default();
    if start
        .iter()
        .all(|b| b.is_ascii_graphic() || b.is_ascii_whitespace())
    {
        format!("{:?}", String::from_utf8_lossy(start))
    } else {
        start
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect::<Vec<_>>()
            .join(" ")
    }
}

/// Reads a range of `file` (offset and size) to `address`.
///
/// Not mapped over guest memory, though that would share pages between guests: 4 KiB pages of a file cost the guest up to
/// three nested page faults each, where huge pages of its own cost one. `ctr run` in the lab, mapped against read: 8,438
/// against 46 nested page faults, 228 against 180 million instructions to agent ready, 84 against 88 MB of Pss.
fn load_file_range(
    memory: &GuestMemory,
    address: u64,
    mut file: &File,
    (offset, size): (u64, u64),
) -> io::Result<()> {
    file.seek(SeekFrom::Start(offset))?;
    let length = usize::try_from(size).map_err(io::Error::other)?;
    let read = memory.read_exact_volatile_from(GuestAddress(address), &mut file.as_fd(), length);
    read.map_err(|error| match error {
        GuestMemoryError::IOError(error) => error,
        other => io::Error::other(other),
    })
}

fn write_cmdline(memory: &GuestMemory, cmdline: &str) -> Result<(), BootError> {
    if cmdline.len() >= layout::CMDLINE_MAX {
        return Err(BootError::CmdlineTooLong(cmdline.len()));
    }
    if cmdline.contains('\0') {
        return Err(BootError::CmdlineNul);
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    let address = layout::CMDLINE;
    memory
        .write_slice(&bytes, GuestAddress(address))
        .map_err(write_error(address))
}

fn write_error(address: u64) -> impl Fn(GuestMemoryError) -> BootError {
    move |source| BootError::Write { address, source }
}

fn file_error(what: &'static str, path: &Path) -> impl Fn(io::Error) -> BootError {
    move |source| BootError::File {
        what,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests;
