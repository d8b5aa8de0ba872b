//! FUSE messages in virtqueue chains (virtio 1.2, 5.11.6; `include/uapi/linux/fuse.h`).
//!
//! A request is copied out of guest memory once, as far as it is more than data to be written, and is bounded before
//! anything is allocated for it. fuse-backend-rs' `Server` would read the header again after any check of ours,
//! allocate what the guest says (FUSE_IOCTL: up to 4 GiB), and log whole requests; only its types are used.

use std::ffi::CStr;
use std::io::{self, Read, Write};

use fuse_backend_rs::abi::fuse_abi::{InHeader, OutHeader, WriteIn};
use fuse_backend_rs::api::filesystem::{ZeroCopyReader, ZeroCopyWriter};
use fuse_backend_rs::common::file_buf::FileVolatileSlice;
use fuse_backend_rs::common::file_traits::FileReadWriteVolatile;
use vm_memory::ByteValued;

use super::sys::errno;
use crate::devices::virtio::queue::chain::{Buffers, OutOfBuffer};
use crate::memory::GuestMemory;

/// Most data of one READ or WRITE in bytes, as told the guest: `max_pages` of 4 KiB.
pub(super) const MAX_DATA: u32 = 1 << 20;
/// Most bytes of a request that are not data to be written: an extended attribute (XATTR_SIZE_MAX) with its name, or
/// two paths, behind header and arguments.
const MAX_ARGUMENTS: u64 = (64 << 10) + (16 << 10);
/// Most descriptors of a chain: the data in pages, header and arguments. Also what one system call moves (IOV_MAX).
pub(super) const MAX_DESCRIPTORS: u16 = 1024;

const HEADER: usize = size_of::<InHeader>();
const ANSWER_HEADER: usize = size_of::<OutHeader>();

/// Numbers of `enum fuse_opcode`.
pub(super) mod opcode {
    use fuse_backend_rs::abi::fuse_abi::Opcode;

    macro_rules! opcodes {
        ($($name:ident = $opcode:ident,)*) => {
            $(pub(in super::super) const $name: u32 = Opcode::$opcode as u32;)*
        };
    }

    opcodes! {
        LOOKUP = Lookup,
        FORGET = Forget,
        GETATTR = Getattr,
        SETATTR = Setattr,
        READLINK = Readlink,
        SYMLINK = Symlink,
        MKNOD = Mknod,
        MKDIR = Mkdir,
        UNLINK = Unlink,
        RMDIR = Rmdir,
        RENAME = Rename,
        LINK = Link,
        OPEN = Open,
        READ = Read,
        WRITE = Write,
        STATFS = Statfs,
        RELEASE = Release,
        FSYNC = Fsync,
        SETXATTR = Setxattr,
        GETXATTR = Getxattr,
        LISTXATTR = Listxattr,
        REMOVEXATTR = Removexattr,
        FLUSH = Flush,
        INIT = Init,
        OPENDIR = Opendir,
        READDIR = Readdir,
        RELEASEDIR = Releasedir,
        FSYNCDIR = Fsyncdir,
        GETLK = Getlk,
        SETLK = Setlk,
        SETLKW = Setlkw,
        ACCESS = Access,
        CREATE = Create,
        INTERRUPT = Interrupt,
        DESTROY = Destroy,
        IOCTL = Ioctl,
        BATCH_FORGET = BatchForget,
        FALLOCATE = Fallocate,
        READDIRPLUS = Readdirplus,
        RENAME2 = Rename2,
        LSEEK = Lseek,
        COPY_FILE_RANGE = CopyFileRange,
    }

    // Newer than fuse-backend-rs.
    pub(in super::super) const SYNCFS: u32 = 50;
    pub(in super::super) const TMPFILE: u32 = 51;
    pub(in super::super) const STATX: u32 = 52;
}

/// A message that is none, or whose answer does not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum MessageError {
    /// Not even a header.
    #[error("request of {len} bytes")]
    NoHeader {
        /// Device-readable bytes of the chain.
        len: u64,
    },
    /// The header's length is not that of a request in this chain.
    #[error("opcode {opcode}: length {claimed} in a request of {len} bytes")]
    Length {
        /// Operation.
        opcode: u32,
        /// What the header says.
        claimed: u32,
        /// Device-readable bytes of the chain.
        len: u64,
    },
    /// More than any request of this kind needs.
    #[error("opcode {opcode}: {len} bytes of arguments, at most {MAX_ARGUMENTS}")]
    TooLong {
        /// Operation.
        opcode: u32,
        /// Bytes behind the header.
        len: u64,
    },
    /// Arguments that end too early, or a name without its end.
    #[error("opcode {opcode}: arguments cut short")]
    Arguments {
        /// Operation.
        opcode: u32,
    },
    /// The chain has too few device-writable bytes.
    #[error("no room for an answer: {0}")]
    Room(#[from] OutOfBuffer),
}

/// A request, copied out of guest memory.
pub(super) struct Request<'m> {
    pub(super) header: InHeader,
    arguments: Vec<u8>,
    /// What a WRITE writes, in guest memory.
    data: Buffers,
    memory: &'m GuestMemory,
}

/// Copies the header of the request in `readable`.
pub(super) fn read_header(memory: &GuestMemory, readable: &Buffers) -> Result<InHeader, MessageError> {
    let mut header = InHeader::default();
    let len = readable.len();
    readable
        .read(memory, 0, header.as_mut_slice())
        .map_err(|_| MessageError::NoHeader { len })?;
    Ok(header)
}

impl<'m> Request<'m> {
    /// Copies what follows `header` in `readable`.
    pub(super) fn read(
        header: InHeader,
        memory: &'m GuestMemory,
        readable: &Buffers,
    ) -> Result<Self, MessageError> {
        let len = readable.len();
        let InHeader {
            opcode, len: claimed, ..
        } = header;
        let behind = u64::from(claimed)
            .checked_sub(HEADER as u64)
            .filter(|_| u64::from(claimed) <= len)
            .ok_or(MessageError::Length { opcode, claimed, len })?;
        let copied = match opcode {
            opcode::WRITE => behind.min(size_of::<WriteIn>() as u64),
            _ => behind,
        };
        if copied > MAX_ARGUMENTS {
            return Err(MessageError::TooLong { opcode, len: behind });
        }
        let mut arguments = vec![0; copied as usize];
        readable.read(memory, HEADER as u64, &mut arguments)?;
        Ok(Self {
            header,
            arguments,
            data: readable.sub(HEADER as u64 + copied, behind - copied),
            memory,
        })
    }

    /// What follows the header.
    pub(super) fn arguments(&self) -> Arguments<'_> {
        Arguments {
            opcode: self.header.opcode,
            rest: &self.arguments,
        }
    }

    /// What a WRITE writes.
    pub(super) fn data(&self) -> GuestData<'_> {
        GuestData {
            buffers: &self.data,
            memory: self.memory,
        }
    }
}

/// The arguments of a request, taken one by one.
pub(super) struct Arguments<'a> {
    opcode: u32,
    rest: &'a [u8],
}

impl<'a> Arguments<'a> {
    /// The next structure.
    pub(super) fn take<T: ByteValued + Default>(&mut self) -> Result<T, MessageError> {
        let mut value = T::default();
        let (now, rest) = self.rest.split_at_checked(size_of::<T>()).ok_or(self.short())?;
        value.as_mut_slice().copy_from_slice(now);
        self.rest = rest;
        Ok(value)
    }

    /// The next name, up to its NUL.
    pub(super) fn name(&mut self) -> Result<&'a CStr, MessageError> {
        let name = CStr::from_bytes_until_nul(self.rest).map_err(|_| self.short())?;
        self.rest = self.rest.get(name.count_bytes() + 1..).unwrap_or_default();
        Ok(name)
    }

    /// The next `len` bytes.
    pub(super) fn bytes(&mut self, len: u32) -> Result<&'a [u8], MessageError> {
        let (now, rest) = self.rest.split_at_checked(len as usize).ok_or(self.short())?;
        self.rest = rest;
        Ok(now)
    }

    fn short(&self) -> MessageError {
        MessageError::Arguments { opcode: self.opcode }
    }
}

/// Where the answer goes.
pub(super) struct Room<'m> {
    buffers: &'m Buffers,
    memory: &'m GuestMemory,
    unique: u64,
}

impl<'m> Room<'m> {
    /// The room for the answer to the request with this header.
    pub(super) fn new(memory: &'m GuestMemory, buffers: &'m Buffers, header: &InHeader) -> Self {
        Self {
            buffers,
            memory,
            unique: header.unique,
        }
    }

    /// Bytes there are behind the header.
    pub(super) fn len(&self) -> u64 {
        self.buffers.len().saturating_sub(ANSWER_HEADER as u64)
    }

    /// The room behind the header, at most `len` bytes of it, for data that comes straight from a file.
    pub(super) fn data(&self, len: u64) -> Buffers {
        self.buffers.sub(ANSWER_HEADER as u64, len)
    }

    /// Writes an answer with `body`; returns its bytes.
    pub(super) fn answer(&self, body: &[u8]) -> Result<u32, MessageError> {
        self.buffers.write(self.memory, ANSWER_HEADER as u64, body)?;
        self.finish(body.len())
    }

    /// Writes the header of an answer whose `len` bytes are there already; returns the bytes of both.
    pub(super) fn finish(&self, len: usize) -> Result<u32, MessageError> {
        self.header(len, 0)
    }

    /// Writes the error `number`, an errno; returns the answer's bytes.
    pub(super) fn error(&self, number: i32) -> Result<u32, MessageError> {
        self.header(0, -number)
    }

    fn header(&self, len: usize, error: i32) -> Result<u32, MessageError> {
        // No answer is longer than MAX_DATA.
        let len = (ANSWER_HEADER + len) as u32;
        let header = OutHeader {
            len,
            error,
            unique: self.unique,
        };
        self.buffers.write(self.memory, 0, header.as_slice())?;
        Ok(len)
    }
}

/// A part of guest memory that files are read into and written from without a copy, in one system call each.
pub(super) struct GuestData<'m> {
    buffers: &'m Buffers,
    memory: &'m GuestMemory,
}

impl<'m> GuestData<'m> {
    pub(super) fn new(memory: &'m GuestMemory, buffers: &'m Buffers) -> Self {
        Self { buffers, memory }
    }

    fn slices(&self, count: usize) -> io::Result<Vec<FileVolatileSlice<'m>>> {
        let part = self.buffers.sub(0, (count as u64).min(MAX_DATA.into()));
        let slices = part.slices(self.memory).map_err(|_| errno(libc::EFAULT))?;
        let slices = slices.iter().take(usize::from(MAX_DESCRIPTORS));
        Ok(slices.map(FileVolatileSlice::from_volatile_slice).collect())
    }
}

impl ZeroCopyReader for GuestData<'_> {
    fn read_to(&mut self, file: &mut dyn FileReadWriteVolatile, count: usize, at: u64) -> io::Result<usize> {
        file.write_vectored_at_volatile(&self.slices(count)?, at)
    }
}

impl ZeroCopyWriter for GuestData<'_> {
    fn write_from(
        &mut self,
        file: &mut dyn FileReadWriteVolatile,
        count: usize,
        at: u64,
    ) -> io::Result<usize> {
        file.read_vectored_at_volatile(&self.slices(count)?, at)
    }

    fn available_bytes(&self) -> usize {
        self.buffers.len() as usize
    }
}

// The traits above want these too; the share only moves whole files.
impl Read for GuestData<'_> {
    fn read(&mut self, _buffer: &mut [u8]) -> io::Result<usize> {
        Err(errno(libc::EOPNOTSUPP))
    }
}

impl Write for GuestData<'_> {
    fn write(&mut self, _data: &[u8]) -> io::Result<usize> {
        Err(errno(libc::EOPNOTSUPP))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
