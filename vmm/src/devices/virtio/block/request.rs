//! One request: parsed from its chain, checked, turned into steps, answered (virtio 1.2, section 5.2.6).

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::disk::{Disk, SECTOR};
use super::step::{Direction, Next, Step, Transfer};
use super::target::{SERIAL_BYTES, Target};
use crate::devices::virtio::chain::{Buffers, Chain, OutOfBuffer};
use crate::memory::GuestMemory;

/// `struct virtio_blk_req`: type, reserved, sector.
const HEADER_BYTES: u64 = 16;
/// `struct virtio_blk_discard_write_zeroes`: sector, number of sectors, flags.
const RANGE_BYTES: u64 = 16;
/// `unmap` in its flags.
const RANGE_UNMAP: u32 = 1;
/// Ranges in one DISCARD or WRITE_ZEROES.
pub(super) const MAX_RANGES: u32 = 16;
/// Sectors of one range of a DISCARD: 2 GiB, like Firecracker's and QEMU's bound of a 32-bit byte count.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// Sectors of one range of a WRITE_ZEROES: 64 MiB, because they may really have to be written, and a reset waits for that.
pub(super) const MAX_ZEROES_SECTORS: u32 = 1 << 17;

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

/// A request on its way; it owns everything the host's kernel needs for it.
#[derive(Debug)]
pub(super) struct Request {
    head: u16,
    memory: Arc<GuestMemory>,
    /// Where the status byte goes.
    status: Buffers,
    /// Request type of the header.
    kind: u32,
    /// Bytes moved or covered.
    bytes: u64,
    /// Bytes before the status that are written if all goes well.
    written: u32,
    /// What is left to do; the first is in hand.
    steps: VecDeque<Step>,
    outcome: Result<(), RequestError>,
}

/// A request's steps as its type asks for them.
#[derive(Debug, Default)]
struct Work {
    kind: u32,
    bytes: u64,
    written: u32,
    steps: VecDeque<Step>,
}

impl Request {
    /// Checks the request in `chain`. `None` when there is no byte for a status: nothing is done, and the chain goes back
    /// with length 0.
    pub(super) fn new(target: &Target, memory: &Arc<GuestMemory>, head: u16, chain: &Chain) -> Option<Self> {
        // The status is the last device-writable byte, the data is what is before it.
        let data_len = chain.writable.len().checked_sub(1)?;
        let incoming = chain.writable.sub(0, data_len);
        let mut work = Work::default();
        let outcome = work.plan(target, memory, &chain.readable, &incoming);
        if outcome.is_err() {
            work.steps.clear();
        }
        Some(Self {
            head,
            memory: memory.clone(),
            status: chain.writable.sub(data_len, 1),
            kind: work.kind,
            bytes: work.bytes,
            written: work.written,
            steps: work.steps,
            outcome,
        })
    }

    /// Head descriptor of its chain.
    pub(super) fn head(&self) -> u16 {
        self.head
    }

    /// Bytes it moves, for the rate limiter. Ranges do not count: a discard of gigabytes is one operation.
    pub(super) fn bytes_moved(&self) -> u64 {
        match self.kind {
            VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT => self.bytes,
            _ => 0,
        }
    }

    /// What is to be done now; `None` when the request can be answered.
    pub(super) fn step(&self) -> Option<&Step> {
        self.steps.front()
    }

    /// Takes in the result of the step in hand.
    pub(super) fn step_done(&mut self, disk: &Disk, result: io::Result<u64>) {
        let Some(step) = self.steps.front_mut() else {
            return;
        };
        match step.judge(disk, result) {
            Next::Again => {}
            Next::Done => {
                self.steps.pop_front();
            }
            Next::Zeroes { step, rest } => {
                self.steps.pop_front();
                self.push_zeroes(step, rest);
            }
            Next::Failed(error) => {
                self.steps.clear();
                self.outcome = Err(error.into());
            }
        }
    }

    /// `step`, and after it the same question about the rest: the file system may have an answer for another part.
    fn push_zeroes(&mut self, step: Step, (offset, len): (u64, u64)) {
        if len > 0 {
            self.steps.push_front(Step::write_zeroes(offset, len, false));
        }
        self.steps.push_front(step);
    }

    /// Writes the status and counts. Returns the bytes written into the chain.
    pub(super) fn answer(self, target: &Target) -> u32 {
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
        match self.status.write(&self.memory, 0, &[status]) {
            Ok(()) => written.saturating_add(1),
            Err(error) => {
                guest_log!(DEBUG, device = %target.id, %error, "block: no status written");
                0
            }
        }
    }
}

impl Work {
    /// `outgoing` starts with the header; `incoming` is without the status byte.
    fn plan(
        &mut self,
        target: &Target,
        memory: &Arc<GuestMemory>,
        outgoing: &Buffers,
        incoming: &Buffers,
    ) -> Result<(), RequestError> {
        let mut header = [0; HEADER_BYTES as usize];
        outgoing.read(memory, 0, &mut header)?;
        let (kind, sector) = (le_u32(&header, 0), le_u64(&header, 8));
        self.kind = kind;
        let data = outgoing.sub(HEADER_BYTES, u64::MAX);
        let disk = &target.disk;
        match kind {
            VIRTIO_BLK_T_IN => {
                expect_empty(&data, "a read with data for the device")?;
                let offset = data_range(disk, sector, incoming)?;
                let transfer = Transfer::new(disk, Direction::Read, memory, incoming, offset)?;
                self.bytes = incoming.len();
                // Chains are shorter than 2³² bytes.
                self.written = u32::try_from(incoming.len()).unwrap_or(u32::MAX);
                self.steps.push_back(Step::Move(transfer));
            }
            VIRTIO_BLK_T_OUT => {
                expect_empty(incoming, "a write with room for data")?;
                writable(disk)?;
                let offset = data_range(disk, sector, &data)?;
                let transfer = Transfer::new(disk, Direction::Write, memory, &data, offset)?;
                self.bytes = data.len();
                self.steps.push_back(Step::Move(transfer));
                self.write_through(target);
            }
            VIRTIO_BLK_T_FLUSH => {
                if !disk.read_only() {
                    self.steps.push_back(Step::Flush);
                }
            }
            VIRTIO_BLK_T_GET_ID => {
                incoming.write(memory, 0, &target.serial)?;
                self.written = SERIAL_BYTES as u32;
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                writable(disk)?;
                expect_empty(incoming, "ranges with room for data")?;
                self.ranges(disk, memory, &data)?;
                self.write_through(target);
            }
            _ => return Err(RequestError::Unsupported(kind, 0)),
        }
        Ok(())
    }

    /// Without a write-back cache a write must be durable when it completes (5.2.6.2).
    fn write_through(&mut self, target: &Target) {
        if !target.writeback() {
            self.steps.push_back(Step::Flush);
        }
    }

    fn ranges(&mut self, disk: &Disk, memory: &GuestMemory, data: &Buffers) -> Result<(), RequestError> {
        let kind = self.kind;
        let count = data.len() / RANGE_BYTES;
        if count == 0 || count > u64::from(MAX_RANGES) || !data.len().is_multiple_of(RANGE_BYTES) {
            return Err(RequestError::Malformed("bad number of ranges"));
        }
        for index in 0..count {
            let mut range = [0; RANGE_BYTES as usize];
            data.read(memory, index * RANGE_BYTES, &mut range)?;
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
            match (sectors, kind) {
                (0, _) => {}
                (_, VIRTIO_BLK_T_DISCARD) => self.steps.push_back(Step::discard(offset, len)),
                _ => self
                    .steps
                    .push_back(Step::write_zeroes(offset, len, flags & RANGE_UNMAP != 0)),
            }
        }
        Ok(())
    }
}

/// Whole sectors, at least one, inside the disk.
fn data_range(disk: &Disk, sector: u64, data: &Buffers) -> Result<u64, RequestError> {
    let len = data.len();
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

fn expect_empty(buffers: &Buffers, what: &'static str) -> Result<(), RequestError> {
    if buffers.is_empty() {
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
