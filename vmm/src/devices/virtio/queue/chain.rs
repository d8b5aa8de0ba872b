//! Descriptor chains as devices want them: checked once, then read and written through bounded copies.
//!
//! The guest can put anything into its descriptor table, and can change it while it is being read. [`Chain::parse`]
//! walks the table exactly once and keeps its own copy of every address and length; everything after works on the copy.

#![allow(unsafe_code)]

mod walk;

use std::ops::Range;

use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory as _, VolatileSlice};

use walk::Walk;

use crate::memory::GuestMemory;

/// A descriptor chain that breaks the rules of virtio 1.2, section 2.7.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// No descriptor could be read: the head or the indirect table is invalid.
    #[error("chain {head}: no valid descriptor")]
    Empty {
        /// Index of the head descriptor.
        head: u16,
    },
    /// The last descriptor promises a next one that cannot be read, or the descriptors form a loop.
    #[error("chain {head}: cut after {count} descriptors by a loop, a bad index or a bad indirect table")]
    Cut {
        /// Index of the head descriptor.
        head: u16,
        /// Descriptors read until then.
        count: usize,
    },
    /// More descriptors than the queue has entries (2.7.5.2 forbids it, indirect or not).
    #[error("chain {head}: more than {limit} descriptors")]
    TooLong {
        /// Index of the head descriptor.
        head: u16,
        /// Most descriptors allowed.
        limit: usize,
    },
    /// A device-readable buffer after a device-writable one (2.7.4.2).
    #[error("chain {head}: descriptor {position} is device-readable but follows a device-writable one")]
    Order {
        /// Index of the head descriptor.
        head: u16,
        /// Position in the chain.
        position: usize,
    },
    /// A buffer that is not entirely RAM.
    #[error("chain {head}: {len} bytes at {address:#x} are not guest memory")]
    OutOfRange {
        /// Index of the head descriptor.
        head: u16,
        /// Guest physical address of the buffer.
        address: u64,
        /// Length of the buffer in bytes.
        len: u32,
    },
}

/// Access to a part of [`Buffers`] that does not exist, or guest memory that vanished.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{wanted} bytes at offset {offset} of a {len} byte buffer")]
pub struct OutOfBuffer {
    /// Offset of the access.
    pub offset: u64,
    /// Bytes wanted.
    pub wanted: usize,
    /// Bytes there are.
    pub len: u64,
}

/// The buffers of one direction of a chain, as one run of bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Buffers {
    parts: Vec<(GuestAddress, u32)>,
    len: u64,
}

impl Buffers {
    fn push(&mut self, address: GuestAddress, len: u32) {
        if len > 0 {
            self.parts.push((address, len));
            self.len += u64::from(len);
        }
    }

    /// Bytes in all buffers together; below 2³² because a chain may not be longer.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no byte at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The buffers one by one: guest physical address and length, never 0.
    pub fn parts(&self) -> impl Iterator<Item = (u64, u32)> {
        self.parts
            .iter()
            .map(|(address, len)| (address.raw_value(), *len))
    }

    fn clear(&mut self) {
        self.parts.clear();
        self.len = 0;
    }

    /// The bytes from `offset` on, at most `len` of them.
    pub fn sub(&self, offset: u64, len: u64) -> Self {
        let mut out = Self::default();
        for (address, len) in self.range(offset, len) {
            out.push(address, len);
        }
        out
    }

    /// Where the bytes from `offset` on are, at most `len` of them.
    fn range(&self, offset: u64, len: u64) -> impl Iterator<Item = (GuestAddress, u32)> {
        let mut skip = offset;
        let mut left = len;
        let parts = self.parts.iter().map_while(move |&(address, part)| {
            if left == 0 {
                return None;
            }
            let part = u64::from(part);
            let skipped = skip.min(part);
            skip -= skipped;
            let take = (part - skipped).min(left);
            left -= take;
            // `parse` checked that the whole buffer is memory, so the address cannot overflow; `take` fits in a u32
            // because it is at most the descriptor's length.
            Some((address.checked_add(skipped)?, u32::try_from(take).ok()?))
        });
        parts.filter(|(_, len)| *len > 0)
    }

    /// Copies `data.len()` bytes at `offset` out of guest memory.
    ///
    /// # Errors
    /// [`OutOfBuffer`] when the buffers end before that.
    pub fn read(&self, memory: &GuestMemory, offset: u64, data: &mut [u8]) -> Result<(), OutOfBuffer> {
        self.copy(offset, data.len(), |address, piece| {
            memory.read_slice(data.get_mut(piece)?, address).ok()
        })
    }

    /// Copies `data` into guest memory at `offset`.
    ///
    /// # Errors
    /// [`OutOfBuffer`] when the buffers end before that.
    pub fn write(&self, memory: &GuestMemory, offset: u64, data: &[u8]) -> Result<(), OutOfBuffer> {
        self.copy(offset, data.len(), |address, piece| {
            memory.write_slice(data.get(piece)?, address).ok()
        })
    }

    /// Gives `piece` each part of the `wanted` bytes at `offset`: where it is in guest memory, and which of the bytes it holds.
    fn copy(
        &self,
        offset: u64,
        wanted: usize,
        mut piece: impl FnMut(GuestAddress, Range<usize>) -> Option<()>,
    ) -> Result<(), OutOfBuffer> {
        let error = OutOfBuffer {
            offset,
            wanted,
            len: self.len,
        };
        let mut done = 0;
        for (address, len) in self.range(offset, wanted as u64) {
            // At most `wanted`.
            let end = done + len as usize;
            piece(address, done..end).ok_or(error)?;
            done = end;
        }
        if done == wanted { Ok(()) } else { Err(error) }
    }

    /// The buffers as host memory, for system calls that move bytes in place. The number of slices is at most the
    /// number of descriptors plus the memory regions they straddle.
    ///
    /// # Errors
    /// [`OutOfBuffer`] when a buffer is not guest memory, which [`Chain::parse`] excludes.
    pub fn slices<'m>(&self, memory: &'m GuestMemory) -> Result<Vec<VolatileSlice<'m>>, OutOfBuffer> {
        let mut out = Vec::with_capacity(self.parts.len());
        for &(address, len) in &self.parts {
            for slice in memory.get_slices(address, len as usize) {
                out.push(slice.map_err(|_| OutOfBuffer {
                    offset: 0,
                    wanted: len as usize,
                    len: self.len,
                })?);
            }
        }
        Ok(out)
    }

    /// Appends the buffers as host memory to `out` until that has `limit` entries, without an allocation of its own.
    /// Returns the number of bytes appended. The entries are valid as long as `memory` is.
    pub fn iovecs(&self, memory: &GuestMemory, limit: usize, out: &mut Vec<libc::iovec>) -> u64 {
        self.iovecs_of(memory, (0, u64::MAX), limit, out)
    }

    /// As [`iovecs`](Self::iovecs), for the bytes of `range` (offset and length) only.
    pub fn iovecs_of(
        &self,
        memory: &GuestMemory,
        range: (u64, u64),
        limit: usize,
        out: &mut Vec<libc::iovec>,
    ) -> u64 {
        let mut covered = 0;
        for (address, len) in self.range(range.0, range.1) {
            for slice in memory.get_slices(address, len as usize) {
                let Ok(slice) = slice else { return covered };
                if out.len() >= limit {
                    return covered;
                }
                out.push(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
                covered += slice.len() as u64;
            }
        }
        covered
    }

    /// Guest physical address of the last byte.
    pub fn last(&self) -> Option<u64> {
        let (address, len) = self.parts.last()?;
        // Not empty, and checked to be memory.
        address.raw_value().checked_add(u64::from(len.checked_sub(1)?))
    }
}

/// Host memory in pieces, as system calls take it. Kept by a device for its next request, whatever its thread is.
#[derive(Debug, Default)]
pub struct Iovecs(pub Vec<libc::iovec>);

// SAFETY: nothing is done with the addresses but to hand them to the kernel, and no thread owns what they point to. Who does
// hand them over vouches for the memory.
unsafe impl Send for Iovecs {}

/// A descriptor chain, read from guest memory once and checked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chain {
    /// What the driver gives to the device.
    pub readable: Buffers,
    /// What the device fills.
    pub writable: Buffers,
}

impl Chain {
    /// Walks `chain`. `limit` is the queue's size.
    ///
    /// # Errors
    /// [`ChainError`] at the first broken rule. The chain must still be returned to the driver, with length 0.
    pub fn parse(
        memory: &GuestMemory,
        chain: DescriptorChain<&GuestMemory>,
        limit: u16,
    ) -> Result<Self, ChainError> {
        let mut out = Self::default();
        out.parse_again(memory, chain, limit)?;
        Ok(out)
    }

    /// As [`parse`](Self::parse), in the memory of a chain that is not needed any more; after an error nothing is in it.
    ///
    /// # Errors
    /// As [`parse`](Self::parse).
    pub fn parse_again(
        &mut self,
        memory: &GuestMemory,
        chain: DescriptorChain<&GuestMemory>,
        limit: u16,
    ) -> Result<(), ChainError> {
        let head = chain.head_index();
        self.fill(memory, chain, head, limit)
    }

    /// As [`parse_again`](Self::parse_again), for the chain that starts at descriptor `head` of the table at `table`: one that
    /// was taken from the avail ring before.
    ///
    /// # Errors
    /// As [`parse`](Self::parse).
    pub fn parse_head(
        &mut self,
        memory: &GuestMemory,
        table: GuestAddress,
        head: u16,
        limit: u16,
    ) -> Result<(), ChainError> {
        self.fill(memory, Walk::new(memory, table, limit, head), head, limit)
    }

    fn fill(
        &mut self,
        memory: &GuestMemory,
        descriptors: impl Iterator<Item = Descriptor>,
        head: u16,
        limit: u16,
    ) -> Result<(), ChainError> {
        self.readable.clear();
        self.writable.clear();
        let result = self.take(memory, descriptors, head, usize::from(limit));
        if result.is_err() {
            self.readable.clear();
            self.writable.clear();
        }
        result
    }

    fn take(
        &mut self,
        memory: &GuestMemory,
        descriptors: impl Iterator<Item = Descriptor>,
        head: u16,
        limit: usize,
    ) -> Result<(), ChainError> {
        let mut count = 0;
        let mut more = false;
        let mut writable_seen = false;
        for descriptor in descriptors {
            if count == limit {
                return Err(ChainError::TooLong { head, limit });
            }
            let (address, len) = (descriptor.addr(), descriptor.len());
            if !memory.check_range(address, len as usize) {
                return Err(ChainError::OutOfRange {
                    head,
                    address: address.raw_value(),
                    len,
                });
            }
            if descriptor.is_write_only() {
                writable_seen = true;
                self.writable.push(address, len);
            } else if writable_seen {
                return Err(ChainError::Order {
                    head,
                    position: count,
                });
            } else {
                self.readable.push(address, len);
            }
            more = descriptor.has_next();
            count += 1;
        }
        match (count, more) {
            (0, _) => Err(ChainError::Empty { head }),
            // The iterator gives up on loops (after as many steps as the table has entries), on indices outside the
            // table and on bad indirect tables; in each case the last descriptor it gave still has NEXT set.
            (_, true) => Err(ChainError::Cut { head, count }),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::test_ring::{
        BUFFERS, Buf, INDIRECT, NEXT, Offer, TestGuest, TestRing, WRITE,
    };
    use virtio_queue::QueueOwnedT;

    fn parse(guest: &TestGuest, ring: &TestRing) -> Result<Chain, ChainError> {
        let mut queue = ring.active().queue;
        let chain = queue.iter(&*guest.memory).unwrap().next().unwrap();
        Chain::parse(&guest.memory, chain, 8)
    }

    #[test]
    fn chain_when_well_formed_is_split_by_direction() {
        let guest = TestGuest::new();
        let mut ring = guest.ring(0, 8, false);
        ring.submit(&[
            Buf::Read(BUFFERS, 3),
            Buf::Read(BUFFERS + 100, 5),
            Buf::Write(BUFFERS + 200, 7),
        ]);
        let chain = parse(&guest, &ring).unwrap();
        assert_eq!((chain.readable.len(), chain.writable.len()), (8, 7));
        guest.write(BUFFERS, b"abc");
        guest.write(BUFFERS + 100, b"defgh");
        let mut data = [0; 4];
        chain.readable.read(&guest.memory, 2, &mut data).unwrap();
        assert_eq!(&data, b"cdef");
        let mut one_too_many = [0; 7];
        assert!(chain.readable.read(&guest.memory, 2, &mut one_too_many).is_err());
        assert!(chain.readable.read(&guest.memory, u64::MAX, &mut data).is_err());
        chain.writable.write(&guest.memory, 5, b"xy").unwrap();
        assert_eq!(guest.read(BUFFERS + 200, 8), b"\0\0\0\0\0xy\0");
        assert!(chain.writable.write(&guest.memory, 6, b"xy").is_err());
    }

    #[test]
    fn sub_when_beyond_the_end_is_shorter() {
        let guest = TestGuest::new();
        let mut ring = guest.ring(0, 8, false);
        ring.submit(&[Buf::Read(BUFFERS, 3), Buf::Read(BUFFERS + 100, 5)]);
        let buffers = parse(&guest, &ring).unwrap().readable;
        assert_eq!(buffers.sub(0, u64::MAX), buffers);
        assert_eq!(buffers.sub(2, 3).len(), 3);
        assert_eq!(buffers.sub(7, 10).len(), 1);
        assert!(buffers.sub(8, 1).is_empty());
        assert!(buffers.sub(0, 0).is_empty());
    }

    #[test]
    fn chain_when_malformed_says_how() {
        let cases: [(Offer, ChainError); 6] = [
            (
                |ring| ring.descriptor(0, BUFFERS, 16, NEXT, 0),
                ChainError::Cut { head: 0, count: 8 },
            ),
            (
                |ring| ring.descriptor(0, BUFFERS, 16, NEXT, 8),
                ChainError::Cut { head: 0, count: 1 },
            ),
            (
                |ring| ring.descriptor(0, BUFFERS, 15, INDIRECT, 0),
                ChainError::Empty { head: 0 },
            ),
            (
                |ring| ring.descriptor(0, u64::MAX, 2, 0, 0),
                ChainError::OutOfRange {
                    head: 0,
                    address: u64::MAX,
                    len: 2,
                },
            ),
            (
                |ring| {
                    ring.descriptor(0, BUFFERS, 1, NEXT | WRITE, 1);
                    ring.descriptor(1, BUFFERS, 1, 0, 0);
                },
                ChainError::Order { head: 0, position: 1 },
            ),
            (
                |ring| {
                    (0..9).for_each(|i| ring.descriptor_at(BUFFERS, i, BUFFERS, 1, NEXT, i + 1));
                    ring.descriptor_at(BUFFERS, 9, BUFFERS, 1, 0, 0);
                    ring.descriptor(0, BUFFERS, 160, INDIRECT, 0);
                },
                ChainError::TooLong { head: 0, limit: 8 },
            ),
        ];
        for (write, expected) in cases {
            let guest = TestGuest::new();
            let mut ring = guest.ring(0, 8, false);
            write(&mut ring);
            ring.offer(0);
            assert_eq!(parse(&guest, &ring), Err(expected));
        }
    }
}
