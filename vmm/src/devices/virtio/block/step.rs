//! What a request asks of the host, in steps that either engine carries out one after the other.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use super::disk::{Disk, Route};
use crate::devices::virtio::chain::{Buffers, OutOfBuffer};
use crate::memory::GuestMemory;

/// Linux' UIO_MAXIOV.
const MAX_SEGMENTS: usize = 1024;
/// Bytes of zeroes written by one step, where the file system cannot make zeroes itself.
pub(super) const ZEROES_PER_STEP: u64 = 1 << 20;

/// A page of zeroes, aligned for direct I/O.
#[repr(align(4096))]
struct ZeroPage([u8; 4096]);
static ZERO_PAGE: ZeroPage = ZeroPage([0; 4096]);

/// Which way a transfer goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// From the disk.
    Read,
    /// To the disk.
    Write,
}

/// Bytes that move between the disk and memory, and how far they are.
///
/// It owns what the kernel works on: until the last system call or completion for it is back, it must not be dropped.
#[derive(Debug)]
pub(super) struct Transfer {
    direction: Direction,
    route: Route,
    /// Keeps the memory behind the segments mapped; `None` for the page of zeroes.
    _memory: Option<Arc<GuestMemory>>,
    segments: Vec<libc::iovec>,
    /// The first segment not moved yet.
    first: usize,
    offset: u64,
    left: u64,
}

// SAFETY: the pointers are into guest memory that `_memory` keeps mapped, or to a static; neither belongs to a thread.
unsafe impl Send for Transfer {}

impl Transfer {
    /// Moves `buffers`, which have at least one byte, from or to `offset`.
    pub(super) fn new(
        disk: &Disk,
        direction: Direction,
        memory: &Arc<GuestMemory>,
        buffers: &Buffers,
        offset: u64,
    ) -> Result<Self, OutOfBuffer> {
        let segments: Vec<_> = buffers
            .slices(memory)?
            .iter()
            .map(|slice| libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            })
            .collect();
        Ok(Self {
            direction,
            route: disk.route(&segments, offset),
            _memory: Some(memory.clone()),
            segments,
            first: 0,
            offset,
            left: buffers.len(),
        })
    }

    /// Writes `len` zeroes, at most [`ZEROES_PER_STEP`].
    fn zeroes(disk: &Disk, offset: u64, len: u64) -> Self {
        let page = ZERO_PAGE.0.len() as u64;
        let mut left = len.min(ZEROES_PER_STEP);
        let mut segments = Vec::new();
        while left > 0 {
            let now = left.min(page);
            segments.push(libc::iovec {
                // The kernel only reads it.
                iov_base: (&raw const ZERO_PAGE.0).cast_mut().cast(),
                iov_len: now as usize,
            });
            left -= now;
        }
        Self {
            direction: Direction::Write,
            route: disk.route(&segments, offset),
            _memory: None,
            segments,
            first: 0,
            offset,
            left: len.min(ZEROES_PER_STEP),
        }
    }

    /// Which way.
    pub(super) fn direction(&self) -> Direction {
        self.direction
    }

    /// Which file.
    pub(super) fn route(&self) -> Route {
        self.route
    }

    /// The segments to move next, at most [`MAX_SEGMENTS`].
    pub(super) fn segments(&self) -> &[libc::iovec] {
        let rest = self.segments.get(self.first..).unwrap_or_default();
        rest.get(..MAX_SEGMENTS).unwrap_or(rest)
    }

    /// Where on the disk they go, in bytes.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes not moved yet.
    pub(super) fn left(&self) -> u64 {
        self.left
    }

    /// Notes that `bytes` were moved; true when there is nothing left.
    fn advance(&mut self, disk: &Disk, bytes: u64) -> bool {
        let mut bytes = bytes.min(self.left);
        self.left -= bytes;
        self.offset += bytes;
        while let Some(segment) = self.segments.get_mut(self.first) {
            let len = segment.iov_len as u64;
            if bytes < len {
                // Below a usize length.
                segment.iov_base = segment.iov_base.cast::<u8>().wrapping_add(bytes as usize).cast();
                segment.iov_len -= bytes as usize;
                break;
            }
            bytes -= len;
            self.first += 1;
        }
        if self.left > 0 {
            // A short transfer may end anywhere.
            self.route = disk.route(self.segments.get(self.first..).unwrap_or_default(), self.offset);
        }
        self.left == 0
    }
}

/// What to do when a file system cannot do a fallocate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Otherwise {
    /// Nothing: it was a hint.
    Ignore,
    /// Write zeroes.
    WriteZeroes,
}

/// One system call, or io_uring operation.
#[derive(Debug)]
pub(super) enum Step {
    /// Move bytes.
    Move(Transfer),
    /// Make everything completed so far durable.
    Flush,
    /// fallocate(2).
    Allocate {
        mode: i32,
        offset: u64,
        len: u64,
        otherwise: Otherwise,
    },
}

/// What comes after a step.
#[derive(Debug)]
pub(super) enum Next {
    /// The step is done.
    Done,
    /// The same step again, for what is left.
    Again,
    /// Zeroes from here on: first the given step, then the rest of the range.
    Zeroes { step: Step, rest: (u64, u64) },
    /// The request has failed.
    Failed(io::Error),
}

impl Step {
    /// Gives the space of a range back; it reads as zeroes or as before.
    pub(super) fn discard(offset: u64, len: u64) -> Self {
        Self::Allocate {
            mode: libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            offset,
            len,
            // A hint (5.2.6): a file system without holes may ignore it.
            otherwise: Otherwise::Ignore,
        }
    }

    /// Makes a range read as zeroes; with `unmap` its space may be given back.
    pub(super) fn write_zeroes(offset: u64, len: u64, unmap: bool) -> Self {
        let how = if unmap {
            libc::FALLOC_FL_PUNCH_HOLE
        } else {
            libc::FALLOC_FL_ZERO_RANGE
        };
        Self::Allocate {
            mode: how | libc::FALLOC_FL_KEEP_SIZE,
            offset,
            len,
            otherwise: Otherwise::WriteZeroes,
        }
    }

    /// Writes the first zeroes of a range; the rest of the range is the second value.
    pub(super) fn zeroes(disk: &Disk, offset: u64, len: u64) -> (Self, (u64, u64)) {
        let transfer = Transfer::zeroes(disk, offset, len);
        let now = transfer.left();
        (Self::Move(transfer), (offset + now, len - now))
    }

    /// What a result of this step means.
    pub(super) fn judge(&mut self, disk: &Disk, result: io::Result<u64>) -> Next {
        match (self, result) {
            (_, Err(error)) if error.kind() == io::ErrorKind::Interrupted => Next::Again,
            (Self::Move(transfer), Ok(moved)) => {
                if moved == 0 {
                    // The range was checked against the capacity, so the file shrank.
                    Next::Failed(io::ErrorKind::UnexpectedEof.into())
                } else if transfer.advance(disk, moved) {
                    Next::Done
                } else {
                    Next::Again
                }
            }
            (
                Self::Allocate {
                    otherwise,
                    offset,
                    len,
                    ..
                },
                Err(error),
            ) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => match otherwise {
                Otherwise::Ignore => Next::Done,
                Otherwise::WriteZeroes => {
                    let (step, rest) = Self::zeroes(disk, *offset, *len);
                    Next::Zeroes { step, rest }
                }
            },
            (_, Ok(_)) => Next::Done,
            (_, Err(error)) => Next::Failed(error),
        }
    }

    /// Carries the step out, and waits for it. Returns the bytes moved.
    pub(super) fn perform(&self, disk: &Disk) -> io::Result<u64> {
        match self {
            Self::Move(transfer) => move_bytes(disk, transfer),
            Self::Flush => disk.file(Route::Main).sync_data().map(|()| 0),
            Self::Allocate {
                mode, offset, len, ..
            } => fallocate(disk, *mode, *offset, *len).map(|()| 0),
        }
    }
}

fn move_bytes(disk: &Disk, transfer: &Transfer) -> io::Result<u64> {
    let file = disk.file(transfer.route()).as_raw_fd();
    let segments = transfer.segments();
    let position = to_off(transfer.offset())?;
    // At most MAX_SEGMENTS.
    let count = segments.len() as libc::c_int;
    let moved = match transfer.direction() {
        // SAFETY: the segments are guest memory the transfer keeps mapped; the guest seeing them half-written is the
        // guest's affair.
        Direction::Read => unsafe { libc::preadv64(file, segments.as_ptr(), count, position) },
        // SAFETY: the segments are memory the transfer keeps mapped; the kernel only reads it.
        Direction::Write => unsafe { libc::pwritev64(file, segments.as_ptr(), count, position) },
    };
    u64::try_from(moved).map_err(|_| io::Error::last_os_error())
}

fn fallocate(disk: &Disk, mode: i32, offset: u64, len: u64) -> io::Result<()> {
    let (offset, len) = (to_off(offset)?, to_off(len)?);
    // SAFETY: no memory is passed.
    match unsafe { libc::fallocate64(disk.file(Route::Main).as_raw_fd(), mode, offset, len) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn to_off(value: u64) -> io::Result<i64> {
    i64::try_from(value).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}
