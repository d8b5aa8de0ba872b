//! The descriptors of a chain whose head is known, by the rules of [`virtio_queue::DescriptorChain`], which can only be had
//! from the avail ring.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress};

use crate::memory::GuestMemory;

/// Bytes of a descriptor (virtio 1.2, 2.7.5).
const DESCRIPTOR_BYTES: u64 = 16;

/// Gives the descriptors of one chain, in order. Ends at the last, and early at what breaks a rule: a loop, an index beyond
/// the table, a bad indirect table, more than 2³² bytes (2.7.5.2).
#[derive(Debug)]
pub(super) struct Walk<'m> {
    memory: &'m GuestMemory,
    table: GuestAddress,
    /// Entries of the table.
    entries: u16,
    /// The next descriptor.
    next: u16,
    /// Descriptors that may still come; a loop has more than the table.
    left: u16,
    /// The table is an indirect one, which has no other in it (2.7.5.3.1).
    indirect: bool,
    bytes: u32,
}

impl<'m> Walk<'m> {
    pub(super) fn new(memory: &'m GuestMemory, table: GuestAddress, entries: u16, head: u16) -> Self {
        Self {
            memory,
            table,
            entries,
            next: head,
            left: entries,
            indirect: false,
            bytes: 0,
        }
    }

    fn read(&self) -> Option<Descriptor> {
        if self.left == 0 || self.next >= self.entries {
            return None;
        }
        let at = self.table.checked_add(u64::from(self.next) * DESCRIPTOR_BYTES)?;
        self.memory.read_obj(at).ok()
    }

    fn enter(&mut self, descriptor: Descriptor) -> Option<()> {
        let len = u64::from(descriptor.len());
        if self.indirect || !len.is_multiple_of(DESCRIPTOR_BYTES) {
            return None;
        }
        self.table = descriptor.addr();
        self.entries = u16::try_from(len / DESCRIPTOR_BYTES).ok()?;
        self.next = 0;
        self.left = self.entries;
        self.indirect = true;
        Some(())
    }
}

impl Iterator for Walk<'_> {
    type Item = Descriptor;

    fn next(&mut self) -> Option<Descriptor> {
        let mut descriptor = self.read()?;
        if descriptor.refers_to_indirect_table() {
            self.enter(descriptor)?;
            descriptor = self.read()?;
            if descriptor.refers_to_indirect_table() {
                self.left = 0;
                return None;
            }
        }
        self.bytes = self.bytes.checked_add(descriptor.len())?;
        if descriptor.has_next() {
            self.next = descriptor.next();
            self.left -= 1;
        } else {
            self.left = 0;
        }
        Some(descriptor)
    }
}
