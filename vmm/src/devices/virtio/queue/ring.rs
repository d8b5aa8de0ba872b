//! A split ring's chains, taken and returned without a word of virtio-queue.
//!
//! The crate writes a log line for every entry of the avail ring that it cannot use, as fast as the driver makes them.
//! What it would complain about is therefore looked at first, and comes back as an error to count and log with a limit.

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestMemory as _};

use crate::memory::GuestMemory;

/// A ring that breaks the rules of virtio 1.2, 2.7.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The avail index is more than a queue ahead, or the ring is not memory.
    #[error("{0}")]
    Avail(virtio_queue::Error),
    /// The driver offered a head that the descriptor table does not have (2.7.13.1).
    #[error("head {head} in a queue of {size}")]
    Head {
        /// The head, as in the avail ring.
        head: u16,
        /// Entries of the descriptor table.
        size: u16,
    },
    /// The used ring is not memory.
    #[error("{0}")]
    Used(virtio_queue::Error),
}

/// The next chain; `None` when the driver offers none.
///
/// # Errors
/// [`RingError::Avail`]: the driver has broken the ring.
pub fn take<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemory,
) -> Result<Option<DescriptorChain<&'m GuestMemory>>, RingError> {
    Ok(queue.iter(memory).map_err(RingError::Avail)?.next())
}

/// Returns the chain with this head and the bytes written into it.
///
/// # Errors
/// [`RingError`]; nothing is returned then.
pub fn give_back(queue: &mut Queue, memory: &GuestMemory, head: u16, written: u32) -> Result<(), RingError> {
    let size = queue.size();
    if head >= size {
        return Err(RingError::Head { head, size });
    }
    queue.add_used(memory, head, written).map_err(RingError::Used)
}

/// Whether descriptor table, avail ring and used ring are memory, to the last byte.
pub fn is_in_memory(queue: &Queue, memory: &GuestMemory) -> bool {
    let size = usize::from(queue.size());
    // virtio 1.2, 2.7: 16 bytes a descriptor; `flags`, `idx` and an event index around entries of 2 and of 8 bytes.
    let rings = [
        (queue.desc_table(), 16 * size),
        (queue.avail_ring(), 6 + 2 * size),
        (queue.used_ring(), 6 + 8 * size),
    ];
    rings
        .into_iter()
        .all(|(start, len)| memory.check_range(GuestAddress(start), len))
}
