//! One request: parsed from its chain, checked, carried out, answered (virtio 1.2, section 5.2.6).

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::disk::{Disk, SECTOR};
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
/// Sectors of one such range: 2 GiB, like Firecracker's and QEMU's bound of a 32-bit byte count.
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 22;

/// Bytes of the serial the guest reads.
pub(super) const SERIAL_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// Why a request failed; becomes its status byte.
#[derive(Debug, thiserror::Error)]
pub(super) enum RequestError {
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

/// What requests work on.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) disk: Disk,
    pub(super) serial: [u8; SERIAL_BYTES],
    pub(super) id: String,
}

/// Carries out the request in `chain` and writes its status. Returns the bytes written into the chain.
///
/// `write_through`: the driver did not accept VIRTIO_BLK_F_FLUSH, so a write must be durable when it completes
/// (5.2.6.2).
pub(super) fn execute(target: &Target, memory: &GuestMemory, chain: &Chain, write_through: bool) -> u32 {
    // The status is the last device-writable byte, the data is what is before it.
    let Some(data_len) = chain.writable.len().checked_sub(1) else {
        tracing::debug!(device = %target.id, "block: request without a status byte");
        return 0;
    };
    let incoming = chain.writable.sub(0, data_len);
    let (status, written) = match run(target, memory, &chain.readable, &incoming, write_through) {
        Ok(written) => (VIRTIO_BLK_S_OK as u8, written),
        Err(error) => {
            match &error {
                RequestError::Io(_) => tracing::warn!(device = %target.id, %error, "block: request failed"),
                _ => tracing::debug!(device = %target.id, %error, "block: request refused"),
            }
            (error.status(), 0)
        }
    };
    match chain.writable.write(memory, data_len, &[status]) {
        Ok(()) => written.saturating_add(1),
        Err(error) => {
            tracing::debug!(device = %target.id, %error, "block: no status written");
            0
        }
    }
}

/// `outgoing` starts with the header; `incoming` is without the status byte. Returns the bytes put into `incoming`.
fn run(
    target: &Target,
    memory: &GuestMemory,
    outgoing: &Buffers,
    incoming: &Buffers,
    write_through: bool,
) -> Result<u32, RequestError> {
    let mut header = [0; HEADER_BYTES as usize];
    outgoing.read(memory, 0, &mut header)?;
    let (kind, sector) = (le_u32(&header, 0), le_u64(&header, 8));
    let data = outgoing.sub(HEADER_BYTES, u64::MAX);
    let disk = &target.disk;
    match kind {
        VIRTIO_BLK_T_IN => {
            expect_empty(&data, "a read with data for the device")?;
            let offset = data_range(disk, sector, incoming)?;
            disk.read(&incoming.slices(memory)?, offset)?;
            // Chains are shorter than 2³² bytes.
            Ok(u32::try_from(incoming.len()).unwrap_or(u32::MAX))
        }
        VIRTIO_BLK_T_OUT => {
            expect_empty(incoming, "a write with room for data")?;
            writable(disk)?;
            let offset = data_range(disk, sector, &data)?;
            disk.write(&data.slices(memory)?, offset)?;
            if write_through {
                disk.flush()?;
            }
            Ok(0)
        }
        VIRTIO_BLK_T_FLUSH => {
            if !disk.read_only() {
                disk.flush()?;
            }
            Ok(0)
        }
        VIRTIO_BLK_T_GET_ID => {
            incoming.write(memory, 0, &target.serial)?;
            Ok(SERIAL_BYTES as u32)
        }
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            writable(disk)?;
            expect_empty(incoming, "ranges with room for data")?;
            ranges(disk, memory, kind, &data)?;
            if write_through {
                disk.flush()?;
            }
            Ok(0)
        }
        _ => Err(RequestError::Unsupported(kind, 0)),
    }
}

fn ranges(disk: &Disk, memory: &GuestMemory, kind: u32, data: &Buffers) -> Result<(), RequestError> {
    let count = data.len() / RANGE_BYTES;
    if count == 0 || count > u64::from(MAX_RANGES) || !data.len().is_multiple_of(RANGE_BYTES) {
        return Err(RequestError::Malformed("bad number of ranges"));
    }
    for index in 0..count {
        let mut range = [0; RANGE_BYTES as usize];
        data.read(memory, index * RANGE_BYTES, &mut range)?;
        let (sector, sectors, flags) = (le_u64(&range, 0), le_u32(&range, 8), le_u32(&range, 12));
        let len = u64::from(sectors) * SECTOR;
        if sectors > MAX_RANGE_SECTORS {
            return Err(RequestError::Malformed("range longer than announced"));
        }
        let allowed = if kind == VIRTIO_BLK_T_WRITE_ZEROES {
            RANGE_UNMAP
        } else {
            0
        };
        if flags & !allowed != 0 {
            return Err(RequestError::Unsupported(kind, flags));
        }
        let offset = disk
            .range(sector, len)
            .ok_or(RequestError::Range { sector, len })?;
        match (sectors, kind) {
            (0, _) => {}
            (_, VIRTIO_BLK_T_DISCARD) => disk.discard(offset, len)?,
            _ => disk.write_zeroes(offset, len, flags & RANGE_UNMAP != 0)?,
        }
    }
    Ok(())
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
