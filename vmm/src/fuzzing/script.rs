//! The bytes of the fuzzer, read as numbers. After the end everything is 0.

use crate::devices::virtio::test_ring::{BUFFERS, MEMORY_SIZE, RINGS};

#[derive(Debug)]
pub(super) struct Script<'a> {
    rest: &'a [u8],
}

impl<'a> Script<'a> {
    pub fn new(data: &'a [u8]) -> Self {
        Self { rest: data }
    }

    pub fn is_over(&self) -> bool {
        self.rest.is_empty()
    }

    /// At most `count` bytes.
    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (bytes, rest) = self.rest.split_at(count.min(self.rest.len()));
        self.rest = rest;
        bytes
    }

    /// As many bytes as the next one says, less than `limit`.
    pub fn some(&mut self, limit: u8) -> &'a [u8] {
        let count = self.byte() % limit;
        self.bytes(count.into())
    }

    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    fn number<const N: usize>(&mut self) -> [u8; N] {
        let mut number = [0; N];
        let bytes = self.bytes(N);
        number[..bytes.len()].copy_from_slice(bytes);
        number
    }

    pub fn byte(&mut self) -> u8 {
        self.number::<1>()[0]
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.number())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.number())
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.number())
    }

    /// A number that is small most of the time.
    pub fn size(&mut self) -> u32 {
        match self.byte() {
            255 => self.u32(),
            small @ 192.. => u32::from(small - 191) << 12,
            small => u32::from(small),
        }
    }

    /// A guest physical address: most of the time of a buffer, sometimes of a ring, of the end of memory, or any.
    pub fn address(&mut self) -> u64 {
        match self.byte() % 8 {
            0..=4 => BUFFERS + 16 * u64::from(self.u16()),
            5 => RINGS + u64::from(self.u32() % 0x10_0000),
            6 => MEMORY_SIZE as u64 - u64::from(self.byte()),
            _ => self.u64(),
        }
    }
}
