//! One request: parsed from its chain, checked, turned into steps, answered (virtio 1.2, section 5.2.6).

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Bytes, GuestAddress};

use super::disk::{Disk, SECTOR};
use super::ranges::{Range, Ranges};
use super::step::{Direction, Next, Step, Transfer};
use super::target::{SERIAL_BYTES, Target};
use crate::devices::virtio::queue::chain::{Buffers, Chain, Iovecs, OutOfBuffer};
use crate::memory::GuestMemory;

/// `struct virtio_blk_req`: type, reserved, sector.
const HEADER_BYTES: u64 = 16;
/// `struct virtio_blk_discard_write_zeroes`: sector, number of sectors, flags.
const RANGE_BYTES: u64 = 16;
/// `unmap` in its flags.
const RANGE_UNMAP: u32 = 1;
/// Ranges in one DISCARD or WRITE_ZEROES.
pub(super) const MAX_RANGES: u32 = 16;
/// Sectors of one range of a DISCARD: 128 MiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 18;
/// Sectors of one range of a WRITE_ZEROES: 16 MiB, because they may really have to be written.
pub(super) const MAX_ZEROES_SECTORS: u32 = 1 << 15;
// The rate limiter counts all bytes of a request: it knows operations of less than 4 GiB.
const _: () = assert!(MAX_RANGES as u64 * MAX_DISCARD_SECTORS as u64 * SECTOR <= u32::MAX as u64);
const _: () = assert!(MAX_ZEROES_SECTORS <= MAX_DISCARD_SECTORS);

/// Why a request failed; becomes its status byte.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    /// The request's buffers do not fit its type.
    #[error("malformed: {0}")]
    Malformed(&'static str),
    /// Outside the disk.
    #[error("{len} bytes at sector {sector} are beyond the end of the disk")]
    Range { sector: u64, len: u64 },
    /// A change to a read-only disk.
    #[error("the disk is read-only")]
    ReadOnly,
    /// A type or flag nobody offered.
    #[error("type {0:#x} with flags {1:#x} is not supported")]
    Unsupported(u32, u32),
    /// Buffers that vanished.
    #[error(transparent)]
    Buffer(#[from] OutOfBuffer),
    /// The host's refusal.
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl RequestError {
    fn status(&self) -> u8 {
        let status = match self {
            Self::Unsupported(..) => VIRTIO_BLK_S_UNSUPP,
            Self::Io(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => VIRTIO_BLK_S_UNSUPP,
            _ => VIRTIO_BLK_S_IOERR,
        };
        status as u8
    }
}

/// Lists a request needed, kept so that the next one needs no new ones.
#[derive(Debug, Default)]
pub(super) struct Spare {
    segments: Iovecs,
    ranges: Vec<Range>,
}

/// A request on its way; it owns everything the host's kernel needs for it.
#[derive(Debug)]
pub(super) struct Request {
    head: u16,
    memory: Arc<GuestMemory>,
    /// Where the status byte goes.
    status: GuestAddress,
    /// Request type of the header.
    kind: u32,
    /// Bytes moved or covered.
    bytes: u64,
    /// Bytes before the status that are written if all goes well.
    written: u32,
    /// What is in hand.
    step: Option<Step>,
    /// What is left of a DISCARD or WRITE_ZEROES, the step in hand included.
    ranges: Ranges,
    /// Make it durable in the end.
    flush: bool,
    /// The list no step has.
    segments: Iovecs,
    outcome: Result<(), RequestError>,
}

impl Request {
    /// Checks the request in `chain`. When there is no byte for a status `spare` comes back: nothing is done, and the chain
    /// goes back with length 0.
    pub(super) fn new(
        target: &Target,
        memory: &Arc<GuestMemory>,
        head: u16,
        chain: &Chain,
        spare: Spare,
    ) -> Result<Self, Spare> {
        // The status is the last device-writable byte, the data is what is before it.
        let Some(status) = chain.writable.last() else {
            return Err(spare);
        };
        let mut request = Self {
            head,
            memory: memory.clone(),
            status: GuestAddress(status),
            kind: 0,
            bytes: 0,
            written: 0,
            step: None,
            ranges: Ranges::new(spare.ranges),
            flush: false,
            segments: spare.segments,
            outcome: Ok(()),
        };
        if let Err(error) = request.plan(target, chain) {
            request.bytes = 0;
            request.fail(error);
        }
        Ok(request)
    }

    /// Head descriptor of its chain.
    pub(super) fn head(&self) -> u16 {
        self.head
    }

    /// Bytes it moves, or changes without moving them, for the rate limiter.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether it may take many steps: those that come after it should not wait for all of them.
    pub(super) fn is_bulk(&self) -> bool {
        matches!(self.kind, VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES)
    }

    /// What is to be done now; `None` when the request can be answered.
    pub(super) fn step(&self) -> Option<&Step> {
        self.step.as_ref()
    }

    /// Takes in the result of the step in hand.
    pub(super) fn step_done(&mut self, disk: &Disk, result: io::Result<u64>) {
        let Some(step) = &mut self.step else {
            return;
        };
        match step.judge(disk, result) {
            Next::Again => {}
            Next::Done => {
                self.ranges.advance();
                self.go_on();
            }
            Next::Unsupported => self.do_otherwise(disk),
            Next::Failed(error) => self.fail(error.into()),
        }
    }

    /// What to do when the file system has no such fallocate(2).
    fn do_otherwise(&mut self, disk: &Disk) {
        if self.kind == VIRTIO_BLK_T_WRITE_ZEROES {
            // This part is written. For the next the file system may have an answer.
            let segments = std::mem::take(&mut self.segments);
            self.step = self.ranges.write_part(disk, segments).map(Step::Move);
        } else {
            // A hint (5.2.6): a file system without holes may ignore it.
            self.ranges.clear();
            self.go_on();
        }
    }

    /// Puts the next step in hand.
    fn go_on(&mut self) {
        if let Some(Step::Move(transfer)) = self.step.take() {
            self.segments = transfer.into_segments();
        }
        self.step = self.ranges.next_step(self.kind == VIRTIO_BLK_T_DISCARD);
        if self.step.is_none() && std::mem::take(&mut self.flush) {
            self.step = Some(Step::Flush);
        }
    }

    fn fail(&mut self, error: RequestError) {
        self.ranges.clear();
        self.flush = false;
        self.outcome = Err(error);
        self.go_on();
    }

    /// Writes the status and counts. Returns the bytes written into the chain, and what the next request can use.
    pub(super) fn answer(self, target: &Target) -> (u32, Spare) {
        target.counters.add(self.kind, self.bytes, self.outcome.is_ok());
        let (status, written) = match &self.outcome {
            Ok(()) => (VIRTIO_BLK_S_OK as u8, self.written),
            Err(error) => {
                match error {
                    RequestError::Io(_) => {
                        guest_log!(WARN, device = %target.id, %error, "block: request failed");
                    }
                    _ => guest_log!(DEBUG, device = %target.id, %error, "block: request refused"),
                }
                (error.status(), 0)
            }
        };
        let written = match self.memory.write_obj(status, self.status) {
            Ok(()) => written.saturating_add(1),
            Err(error) => {
                guest_log!(DEBUG, device = %target.id, %error, "block: no status written");
                0
            }
        };
        let spare = Spare {
            segments: self.segments,
            ranges: self.ranges.into_list(),
        };
        (written, spare)
    }

    /// The first step, from what is in `chain`.
    fn plan(&mut self, target: &Target, chain: &Chain) -> Result<(), RequestError> {
        let outgoing = &chain.readable;
        let mut header = [0; HEADER_BYTES as usize];
        outgoing.read(&self.memory, 0, &mut header)?;
        let (kind, sector) = (le_u32(&header, 0), le_u64(&header, 8));
        self.kind = kind;
        // Both are at least what is taken off: there is a status, and a header was read.
        let data = (HEADER_BYTES, outgoing.len().saturating_sub(HEADER_BYTES));
        let room = (0, chain.writable.len().saturating_sub(1));
        let disk = &target.disk;
        match kind {
            VIRTIO_BLK_T_IN => {
                expect_empty(data, "a read with data for the device")?;
                self.transfer(disk, Direction::Read, (&chain.writable, room), sector)?;
                // Chains are shorter than 2³² bytes.
                self.written = u32::try_from(self.bytes).unwrap_or(u32::MAX);
            }
            VIRTIO_BLK_T_OUT => {
                expect_empty(room, "a write with room for data")?;
                writable(disk)?;
                self.transfer(disk, Direction::Write, (outgoing, data), sector)?;
                self.flush = !target.writeback();
            }
            VIRTIO_BLK_T_FLUSH => {
                if !disk.read_only() {
                    self.step = Some(Step::Flush);
                }
            }
            VIRTIO_BLK_T_GET_ID => {
                if room.1 < SERIAL_BYTES as u64 {
                    return Err(RequestError::Malformed("no room for the serial"));
                }
                chain.writable.write(&self.memory, 0, &target.serial)?;
                self.written = SERIAL_BYTES as u32;
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                writable(disk)?;
                expect_empty(room, "ranges with room for data")?;
                self.take_ranges(disk, outgoing, data)?;
                // Without a write-back cache a write must be durable when it completes (5.2.6.2).
                self.flush = !target.writeback();
                self.go_on();
            }
            _ => return Err(RequestError::Unsupported(kind, 0)),
        }
        Ok(())
    }

    fn transfer(
        &mut self,
        disk: &Disk,
        direction: Direction,
        data: (&Buffers, (u64, u64)),
        sector: u64,
    ) -> Result<(), RequestError> {
        let (_, (_, len)) = data;
        let offset = data_range(disk, sector, len)?;
        let segments = std::mem::take(&mut self.segments);
        let transfer = Transfer::new(disk, direction, &self.memory, data, offset, segments)?;
        self.bytes = len;
        self.step = Some(Step::Move(transfer));
        Ok(())
    }

    fn take_ranges(&mut self, disk: &Disk, outgoing: &Buffers, data: (u64, u64)) -> Result<(), RequestError> {
        let kind = self.kind;
        let (start, len) = data;
        let count = len / RANGE_BYTES;
        if count == 0 || count > u64::from(MAX_RANGES) || !len.is_multiple_of(RANGE_BYTES) {
            return Err(RequestError::Malformed("bad number of ranges"));
        }
        for index in 0..count {
            let mut range = [0; RANGE_BYTES as usize];
            outgoing.read(&self.memory, start + index * RANGE_BYTES, &mut range)?;
            let (sector, sectors, flags) = (le_u64(&range, 0), le_u32(&range, 8), le_u32(&range, 12));
            let len = u64::from(sectors) * SECTOR;
            let (longest, allowed) = match kind {
                VIRTIO_BLK_T_WRITE_ZEROES => (MAX_ZEROES_SECTORS, RANGE_UNMAP),
                _ => (MAX_DISCARD_SECTORS, 0),
            };
            if sectors > longest {
                return Err(RequestError::Malformed("range longer than announced"));
            }
            if flags & !allowed != 0 {
                return Err(RequestError::Unsupported(kind, flags));
            }
            let offset = disk
                .range(sector, len)
                .ok_or(RequestError::Range { sector, len })?;
            self.bytes += len;
            self.ranges.push(Range {
                offset,
                len,
                unmap: flags & RANGE_UNMAP != 0,
            });
        }
        Ok(())
    }
}

/// Whole sectors, at least one, inside the disk.
fn data_range(disk: &Disk, sector: u64, len: u64) -> Result<u64, RequestError> {
    if len == 0 || !len.is_multiple_of(SECTOR) {
        return Err(RequestError::Malformed("data is not a number of sectors"));
    }
    disk.range(sector, len).ok_or(RequestError::Range { sector, len })
}

fn writable(disk: &Disk) -> Result<(), RequestError> {
    // Whatever the driver negotiated: VIRTIO_BLK_F_RO is information for it, not our protection.
    if disk.read_only() {
        Err(RequestError::ReadOnly)
    } else {
        Ok(())
    }
}

fn expect_empty((_, len): (u64, u64), what: &'static str) -> Result<(), RequestError> {
    if len == 0 {
        Ok(())
    } else {
        Err(RequestError::Malformed(what))
    }
}

fn le_u32(bytes: &[u8; 16], at: usize) -> u32 {
    (le_u64(bytes, at) & u64::from(u32::MAX)) as u32
}

fn le_u64(bytes: &[u8; 16], at: usize) -> u64 {
    (u128::from_le_bytes(*bytes) >> (8 * at)) as u64
}
