//! What a request asks of the host, in steps that either engine carries out one after the other.
//!
//! A step is short whatever the request is: who stops the worker waits for the steps in hand, not for the requests.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use super::disk::{Disk, Route};
use crate::devices::virtio::queue::chain::{Buffers, Iovecs, OutOfBuffer};
use crate::memory::GuestMemory;

/// Linux' UIO_MAXIOV.
const MAX_SEGMENTS: usize = 1024;
/// Bytes moved by one step, and the longest segment.
pub(super) const MOVE_PER_STEP: u64 = 4 << 20;
/// Bytes of zeroes written by one step, where the file system cannot make zeroes itself.
pub(super) const ZEROES_PER_STEP: u64 = 1 << 20;
/// Bytes made zero by one fallocate(2): a block device without such a command writes them.
pub(super) const ALLOCATE_PER_STEP: u64 = 8 << 20;
/// Bytes given back by one fallocate(2), which only changes the file system's own records.
pub(super) const DISCARD_PER_STEP: u64 = 32 << 20;

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

/// Longest list kept for the next request: Linux' requests have as many segments as SEG_MAX says, 254 on a queue of 256.
const KEPT_SEGMENTS: usize = 256;

/// Cuts segments longer than [`MOVE_PER_STEP`]. Pieces begin at multiples of that in their segment, so what was aligned for
/// direct I/O stays so.
fn cut(segments: &mut Iovecs) {
    let longest = MOVE_PER_STEP as usize;
    if segments.0.iter().all(|segment| segment.iov_len <= longest) {
        return;
    }
    for segment in std::mem::take(&mut segments.0) {
        for at in (0..segment.iov_len).step_by(longest) {
            segments.0.push(libc::iovec {
                iov_base: segment.iov_base.cast::<u8>().wrapping_add(at).cast(),
                iov_len: longest.min(segment.iov_len - at),
            });
        }
    }
}

/// Bytes that move between the disk and memory, and how far they are.
///
/// It owns what the kernel works on: until the last system call or completion for it is back, it must not be dropped.
#[derive(Debug)]
pub(super) struct Transfer {
    direction: Direction,
    /// Keeps the memory behind the segments mapped; `None` for the page of zeroes.
    _memory: Option<Arc<GuestMemory>>,
    segments: Iovecs,
    /// The first segment not moved yet.
    first: usize,
    offset: u64,
    left: u64,
    /// What is moved next: the number of segments, their bytes, and the file.
    count: usize,
    now: u64,
    route: Route,
}

impl Transfer {
    /// Moves `buffers`, which have at least one byte, from or to `offset`. `segments` is what an earlier request left.
    pub(super) fn new(
        disk: &Disk,
        direction: Direction,
        memory: &Arc<GuestMemory>,
        buffers: (&Buffers, (u64, u64)),
        offset: u64,
        mut segments: Iovecs,
    ) -> Result<Self, OutOfBuffer> {
        let (buffers, range) = buffers;
        segments.0.clear();
        let left = buffers.iovecs_of(memory, range, usize::MAX, &mut segments.0);
        if left != range.1 {
            // `Chain::parse` excludes it.
            return Err(OutOfBuffer {
                offset: range.0,
                wanted: usize::try_from(range.1).unwrap_or(usize::MAX),
                len: buffers.len(),
            });
        }
        cut(&mut segments);
        Ok(Self::start(
            disk,
            direction,
            Some(memory.clone()),
            segments,
            offset,
            left,
        ))
    }

    /// Writes `len` zeroes, at most [`ZEROES_PER_STEP`].
    pub(super) fn zeroes(disk: &Disk, offset: u64, len: u64, mut segments: Iovecs) -> Self {
        let page = ZERO_PAGE.0.len() as u64;
        let len = len.min(ZEROES_PER_STEP);
        let mut left = len;
        segments.0.clear();
        while left > 0 {
            let now = left.min(page);
            segments.0.push(libc::iovec {
                // The kernel only reads it.
                iov_base: (&raw const ZERO_PAGE.0).cast_mut().cast(),
                iov_len: now as usize,
            });
            left -= now;
        }
        Self::start(disk, Direction::Write, None, segments, offset, len)
    }

    fn start(
        disk: &Disk,
        direction: Direction,
        memory: Option<Arc<GuestMemory>>,
        segments: Iovecs,
        offset: u64,
        left: u64,
    ) -> Self {
        let mut transfer = Self {
            direction,
            _memory: memory,
            segments,
            first: 0,
            offset,
            left,
            count: 0,
            now: 0,
            route: Route::Main,
        };
        transfer.prepare(disk);
        transfer
    }

    /// Chooses what is moved next: as many segments as one call takes, [`MOVE_PER_STEP`] bytes at most.
    fn prepare(&mut self, disk: &Disk) {
        (self.count, self.now) = (0, 0);
        let rest = self.segments.0.get(self.first..).unwrap_or_default();
        for segment in rest.iter().take(MAX_SEGMENTS) {
            let with = self.now + segment.iov_len as u64;
            if self.count > 0 && with > MOVE_PER_STEP {
                break;
            }
            (self.count, self.now) = (self.count + 1, with);
        }
        self.route = disk.route(self.segments(), self.offset);
    }

    /// Which way.
    pub(super) fn direction(&self) -> Direction {
        self.direction
    }

    /// Which file.
    pub(super) fn route(&self) -> Route {
        self.route
    }

    /// The segments to move next, at most [`MAX_SEGMENTS`] and at least one.
    pub(super) fn segments(&self) -> &[libc::iovec] {
        let rest = self.segments.0.get(self.first..).unwrap_or_default();
        rest.get(..self.count).unwrap_or(rest)
    }

    /// Where on the disk they go, in bytes.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// Their bytes, at most [`MOVE_PER_STEP`].
    pub(super) fn now(&self) -> u64 {
        self.now
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
        while let Some(segment) = self.segments.0.get_mut(self.first) {
            let len = segment.iov_len as u64;
            if bytes < len {
                // Below a usize length. A short transfer may end anywhere.
                segment.iov_base = segment.iov_base.cast::<u8>().wrapping_add(bytes as usize).cast();
                segment.iov_len -= bytes as usize;
                break;
            }
            bytes -= len;
            self.first += 1;
        }
        if self.left > 0 {
            self.prepare(disk);
        }
        self.left == 0
    }

    /// Its list, for the next request.
    pub(super) fn into_segments(self) -> Iovecs {
        let mut segments = self.segments;
        segments.0.clear();
        // One that grew beyond what is usual is given back.
        segments.0.shrink_to(KEPT_SEGMENTS);
        segments
    }
}

/// One system call, or io_uring operation, that takes a short time.
#[derive(Debug)]
pub(super) enum Step {
    /// Move bytes.
    Move(Transfer),
    /// Make everything completed so far durable.
    Flush,
    /// fallocate(2).
    Allocate { mode: i32, offset: u64, len: u64 },
}

/// What comes after a step.
#[derive(Debug)]
pub(super) enum Next {
    /// The step is done.
    Done,
    /// The same step again, for what is left.
    Again,
    /// The file system cannot do it.
    Unsupported,
    /// The request has failed.
    Failed(io::Error),
}

impl Step {
    /// Gives the space of a range back; it reads as zeroes or as before.
    pub(super) fn discard(offset: u64, len: u64) -> Self {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let len = len.min(DISCARD_PER_STEP);
        Self::Allocate { mode, offset, len }
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
            len: len.min(ALLOCATE_PER_STEP),
        }
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
            (Self::Allocate { .. }, Err(error)) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                Next::Unsupported
            }
            (_, Ok(_)) => Next::Done,
            (_, Err(error)) => Next::Failed(error),
        }
    }

    /// Bytes of guest memory or of zeroes it moves.
    pub(super) fn bytes_moved(&self) -> u64 {
        match self {
            Self::Move(transfer) => transfer.now(),
            Self::Flush | Self::Allocate { .. } => 0,
        }
    }

    /// Carries the step out, and waits for it. Returns the bytes moved.
    pub(super) fn perform(&self, disk: &Disk) -> io::Result<u64> {
        match self {
            Self::Move(transfer) => move_bytes(disk, transfer),
            Self::Flush => disk.file(Route::Main).sync_data().map(|()| 0),
            Self::Allocate { mode, offset, len } => fallocate(disk, *mode, *offset, *len).map(|()| 0),
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
