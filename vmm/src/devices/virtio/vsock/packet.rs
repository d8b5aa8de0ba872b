//! The 44-byte packet header and the descriptor chains that carry packets (virtio 1.2, 5.10.6).
//!
//! The `virtio-vsock` crate's parser accepts one payload descriptor per packet; Linux sends one per page fragment for
//! MSG_ZEROCOPY (6.7) and for large packets (6.17), and the specification allows any framing, so chains are gathered
//! here. The header is copied out of guest memory once: what was checked is what is used.

#![allow(unsafe_code)]

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestMemory as _, Le16, Le32, Le64, VolatileSlice};

use crate::memory::GuestMemory;

/// Bytes of a packet header.
pub(super) const HEADER_LEN: usize = size_of::<RawHeader>();
/// Context id of the host (virtio 1.2, 5.10.4).
pub(super) const HOST_CID: u64 = 2;
/// VIRTIO_VSOCK_TYPE_STREAM, the only type offered.
pub(super) const TYPE_STREAM: u16 = 1;
/// SHUTDOWN flag: the sender of the packet will receive no more data.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// SHUTDOWN flag: the sender of the packet will send no more data.
pub(super) const SHUTDOWN_SEND: u32 = 2;
/// Both SHUTDOWN flags.
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// Most pieces of guest memory in one chain: IOV_MAX, so that one system call moves them. Bounds the work of a chain
/// made of an indirect table of 65,535 entries.
const MAX_PIECES: usize = 1024;

/// Operations (virtio 1.2, 5.10.6, `enum virtio_vsock_op`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    /// Open a connection.
    Request = 1,
    /// Accept it.
    Response = 2,
    /// Refuse or forget a connection.
    Rst = 3,
    /// The flags say what the sender will not do any more; flags are never taken back.
    Shutdown = 4,
    /// Payload.
    Rw = 5,
    /// Tells `buf_alloc` and `fwd_cnt`.
    CreditUpdate = 6,
    /// Asks for a credit update.
    CreditRequest = 7,
}

impl Op {
    /// The operation a header names, if it is a known one.
    pub(super) fn from_wire(op: u16) -> Option<Self> {
        Some(match op {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Rst,
            4 => Self::Shutdown,
            5 => Self::Rw,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// `struct virtio_vsock_hdr`, little endian, as it is in guest memory.
#[repr(C, packed)]
#[derive(Debug, Clone, Copy, Default)]
struct RawHeader {
    src_cid: Le64,
    dst_cid: Le64,
    src_port: Le32,
    dst_port: Le32,
    len: Le32,
    type_: Le16,
    op: Le16,
    flags: Le32,
    buf_alloc: Le32,
    fwd_cnt: Le32,
}

// SAFETY: packed, so without padding, and made only of integers: every bit pattern is a valid value.
unsafe impl vm_memory::ByteValued for RawHeader {}

/// A packet header in host byte order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Header {
    /// Context id of the sender.
    pub(super) src_cid: u64,
    /// Context id of the receiver.
    pub(super) dst_cid: u64,
    /// Port of the sender.
    pub(super) src_port: u32,
    /// Port of the receiver.
    pub(super) dst_port: u32,
    /// Payload bytes after the header.
    pub(super) len: u32,
    /// Socket type.
    pub(super) type_: u16,
    /// Operation.
    pub(super) op: u16,
    /// Flags of the operation.
    pub(super) flags: u32,
    /// The sender's receive buffer, in bytes.
    pub(super) buf_alloc: u32,
    /// Bytes the sender has taken out of that buffer, modulo 2^32.
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// The header as it goes on the wire.
    pub(super) fn to_wire(self) -> [u8; HEADER_LEN] {
        let raw = RawHeader {
            src_cid: self.src_cid.into(),
            dst_cid: self.dst_cid.into(),
            src_port: self.src_port.into(),
            dst_port: self.dst_port.into(),
            len: self.len.into(),
            type_: self.type_.into(),
            op: self.op.into(),
            flags: self.flags.into(),
            buf_alloc: self.buf_alloc.into(),
            fwd_cnt: self.fwd_cnt.into(),
        };
        let mut wire = [0; HEADER_LEN];
        wire.copy_from_slice(vm_memory::ByteValued::as_slice(&raw));
        wire
    }

    /// Reads a header from the wire.
    pub(super) fn from_wire(wire: &[u8; HEADER_LEN]) -> Self {
        let mut raw = RawHeader::default();
        vm_memory::ByteValued::as_mut_slice(&mut raw).copy_from_slice(wire);
        Self {
            src_cid: raw.src_cid.into(),
            dst_cid: raw.dst_cid.into(),
            src_port: raw.src_port.into(),
            dst_port: raw.dst_port.into(),
            len: raw.len.into(),
            type_: raw.type_.into(),
            op: raw.op.into(),
            flags: raw.flags.into(),
            buf_alloc: raw.buf_alloc.into(),
            fwd_cnt: raw.fwd_cnt.into(),
        }
    }

    /// The RST that refuses the packet with this header.
    pub(super) fn refusal(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            type_: self.type_,
            op: Op::Rst as u16,
            ..Self::default()
        }
    }
}

/// A descriptor chain that is not a packet, or not a buffer for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum ChainError {
    /// A device-writable buffer on the tx queue, or a readable one on the rx queue.
    #[error("descriptor with the wrong access direction")]
    Direction,
    /// A buffer outside guest memory.
    #[error("descriptor outside guest memory")]
    Address,
    /// More pieces than any packet needs.
    #[error("more than {MAX_PIECES} buffers in one chain")]
    TooLong,
    /// No room for a header.
    #[error("{0} bytes are too few for a header of {HEADER_LEN}")]
    NoHeader(usize),
    /// The header announces more payload than the chain holds.
    #[error("header says {announced} bytes of payload, the chain holds {present}")]
    Length {
        /// `len` of the header.
        announced: u32,
        /// Bytes in the chain after the header.
        present: usize,
    },
}

/// Who writes the buffers of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// The tx queue: the driver wrote, the device reads.
    DeviceReads,
    /// The rx queue: the device writes.
    DeviceWrites,
}

/// The guest memory of one chain, in order.
#[derive(Debug, Default)]
pub(super) struct Pieces<'m> {
    parts: Vec<VolatileSlice<'m>>,
    len: usize,
}

impl<'m> Pieces<'m> {
    /// Collects the buffers of `chain`, all inside guest memory.
    ///
    /// # Errors
    /// [`ChainError::Direction`], [`ChainError::Address`] or [`ChainError::TooLong`].
    pub(super) fn gather(
        memory: &'m GuestMemory,
        chain: DescriptorChain<&'m GuestMemory>,
        access: Access,
    ) -> Result<Self, ChainError> {
        let mut pieces = Self {
            parts: Vec::with_capacity(2),
            len: 0,
        };
        for descriptor in chain {
            if descriptor.is_write_only() != (access == Access::DeviceWrites) {
                return Err(ChainError::Direction);
            }
            for part in memory.get_slices(descriptor.addr(), descriptor.len() as usize) {
                let part = part.map_err(|_| ChainError::Address)?;
                if pieces.parts.len() == MAX_PIECES {
                    return Err(ChainError::TooLong);
                }
                // Cannot overflow: at most 1,024 pieces of less than 4 GiB.
                pieces.len += part.len();
                pieces.parts.push(part);
            }
        }
        Ok(pieces)
    }

    /// Total bytes.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The pieces, in order.
    pub(super) fn parts(&self) -> &[VolatileSlice<'m>] {
        &self.parts
    }

    /// Appends `other`.
    pub(super) fn append(&mut self, other: &Pieces<'m>) {
        self.parts.extend_from_slice(&other.parts);
        self.len += other.len;
    }

    /// Copies from the start of the pieces into `buffer`; returns the bytes copied.
    pub(super) fn copy_to(&self, buffer: &mut [u8]) -> usize {
        let mut copied = 0;
        for part in &self.parts {
            let Some(rest) = buffer.get_mut(copied..).filter(|rest| !rest.is_empty()) else {
                break;
            };
            copied += part.copy_to(rest);
        }
        copied
    }

    /// Copies `bytes` to the start of the pieces; returns the bytes copied.
    fn copy_from(&self, bytes: &[u8]) -> usize {
        let mut copied = 0;
        for part in &self.parts {
            let Some(rest) = bytes.get(copied..).filter(|rest| !rest.is_empty()) else {
                break;
            };
            // `write` copies as much as fits, and fails only at an offset outside the slice.
            copied += part.write(rest, 0).unwrap_or(0);
        }
        copied
    }

    /// Drops the first `count` bytes.
    pub(super) fn skip(&mut self, count: usize) {
        let mut left = count.min(self.len);
        self.len -= left;
        let mut gone = 0;
        for part in &mut self.parts {
            if left >= part.len() {
                left -= part.len();
                gone += 1;
                continue;
            }
            if let Ok(rest) = part.offset(left) {
                *part = rest;
            }
            break;
        }
        self.parts.drain(..gone);
    }

    /// Keeps the first `count` bytes.
    pub(super) fn truncate(&mut self, count: usize) {
        let mut left = count.min(self.len);
        self.len = left;
        let mut kept = 0;
        for part in &mut self.parts {
            if left == 0 {
                break;
            }
            if part.len() > left
                && let Ok(front) = part.subslice(0, left)
            {
                *part = front;
            }
            left -= part.len().min(left);
            kept += 1;
        }
        self.parts.truncate(kept);
    }
}

/// A packet the guest sent.
#[derive(Debug)]
pub(super) struct TxPacket<'m> {
    /// Its header, copied.
    pub(super) header: Header,
    /// Its payload, in guest memory, `header.len` bytes. Only bytes to pass on: the guest may still change them.
    pub(super) payload: Pieces<'m>,
}

impl<'m> TxPacket<'m> {
    /// Parses a chain of the tx queue. With a payload that does not fit the header the error comes with the header,
    /// so that the connection can be refused.
    ///
    /// # Errors
    /// [`ChainError`].
    pub(super) fn parse(
        memory: &'m GuestMemory,
        chain: DescriptorChain<&'m GuestMemory>,
    ) -> Result<Self, (ChainError, Option<Header>)> {
        let mut payload = Pieces::gather(memory, chain, Access::DeviceReads).map_err(|e| (e, None))?;
        let mut wire = [0; HEADER_LEN];
        if payload.copy_to(&mut wire) < HEADER_LEN {
            return Err((ChainError::NoHeader(payload.len()), None));
        }
        let header = Header::from_wire(&wire);
        payload.skip(HEADER_LEN);
        if payload.len() < header.len as usize {
            let error = ChainError::Length {
                announced: header.len,
                present: payload.len(),
            };
            return Err((error, Some(header)));
        }
        payload.truncate(header.len as usize);
        Ok(Self { header, payload })
    }
}

/// A buffer of the rx queue.
#[derive(Debug)]
pub(super) struct RxBuffer<'m> {
    /// Head of its chain.
    pub(super) head: u16,
    header: Pieces<'m>,
    /// Room for payload, at least one byte.
    pub(super) body: Pieces<'m>,
}

impl<'m> RxBuffer<'m> {
    /// Checks a chain of the rx queue.
    ///
    /// # Errors
    /// [`ChainError`]; a buffer that holds a header and nothing else is refused too, no driver posts one.
    pub(super) fn parse(
        memory: &'m GuestMemory,
        chain: DescriptorChain<&'m GuestMemory>,
    ) -> Result<Self, ChainError> {
        let head = chain.head_index();
        let mut body = Pieces::gather(memory, chain, Access::DeviceWrites)?;
        if body.len() <= HEADER_LEN {
            return Err(ChainError::NoHeader(body.len()));
        }
        let mut header = Pieces {
            parts: body.parts.clone(),
            len: body.len,
        };
        header.truncate(HEADER_LEN);
        body.skip(HEADER_LEN);
        Ok(Self { head, header, body })
    }

    /// Writes the header in front of the body.
    pub(super) fn write_header(&self, header: Header) {
        let written = self.header.copy_from(&header.to_wire());
        debug_assert_eq!(written, HEADER_LEN);
    }
}
