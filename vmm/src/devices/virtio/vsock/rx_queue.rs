//! The rx queue while packets are put into it.

use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::host::ReadOutcome;
use super::metrics::Counters;
use super::packet::{HEADER_LEN, Header, Pieces, RxBuffer};
use super::worker::take;
use crate::devices::virtio::queue::ring;
use crate::memory::GuestMemory;

/// Most bytes one connection sends before the next one's turn.
const TURN_BYTES: usize = 64 * 1024;
/// Most buffers filled by one read of the host. Linux posts buffers of 4 KiB.
const TURN_BUFFERS: usize = 32;

/// Where the payload of packets comes from.
pub(super) trait Source {
    /// Reads into `room`, once.
    fn read(&self, room: &Pieces<'_>) -> ReadOutcome;

    /// The header of the next packet, with `len` of the bytes read.
    fn header(&mut self, len: u32) -> Header;
}

/// A borrowed rx queue. Buffers are used in the order in which they were made available, so VIRTIO_F_IN_ORDER holds.
#[derive(Debug)]
pub(super) struct RxQueue<'m> {
    queue: &'m mut Queue,
    memory: &'m GuestMemory,
    counters: &'m Counters,
    used: usize,
}

impl<'m> RxQueue<'m> {
    pub(super) fn new(queue: &'m mut Queue, memory: &'m GuestMemory, counters: &'m Counters) -> Self {
        Self {
            queue,
            memory,
            counters,
            used: 0,
        }
    }

    /// Buffers returned to the driver so far.
    pub(super) fn used(&self) -> usize {
        self.used
    }

    /// Takes the next buffer. Malformed ones go back to the driver empty.
    pub(super) fn take(&mut self) -> Option<RxBuffer<'m>> {
        // A driver that posts malformed buffers as fast as they come back must not keep the loop here.
        for _ in 0..self.queue.size() {
            let chain = take(self.queue, self.memory, "rx")?;
            let head = chain.head_index();
            match RxBuffer::parse(self.memory, chain) {
                Ok(buffer) => return Some(buffer),
                Err(error) => {
                    guest_log!(DEBUG, %error, "vsock: malformed rx buffer");
                    self.counters.malformed.inc();
                    self.give_used(head, 0);
                }
            }
        }
        None
    }

    /// Takes enough buffers for `limit` bytes, or for a turn. A malformed one ends the row and is met again as the first
    /// of a later one: it cannot be returned before those in front of it.
    fn take_row(&mut self, limit: usize) -> Vec<RxBuffer<'m>> {
        let mut row = Vec::new();
        let Some(first) = self.take() else {
            return row;
        };
        let mut room = first.body.len();
        row.push(first);
        while room < limit && row.len() < TURN_BUFFERS {
            let Some(chain) = take(self.queue, self.memory, "rx") else {
                break;
            };
            match RxBuffer::parse(self.memory, chain) {
                Ok(buffer) => {
                    room += buffer.body.len();
                    row.push(buffer);
                }
                Err(_) => {
                    self.queue.go_to_previous_position();
                    break;
                }
            }
        }
        row
    }

    /// Puts a packet without payload into `buffer`.
    pub(super) fn put(&mut self, buffer: &RxBuffer<'m>, header: Header) {
        buffer.write_header(header);
        self.counters.rx_packets.inc();
        self.give_used(buffer.head, HEADER_LEN);
    }

    /// Reads up to `credit` bytes of `source` at once, straight into the buffers of as many packets as they need. `None`
    /// if there is no buffer.
    pub(super) fn put_data(&mut self, credit: u32, source: &mut impl Source) -> Option<ReadOutcome> {
        let limit = (credit as usize).min(TURN_BYTES);
        let row = self.take_row(limit);
        if row.is_empty() {
            return None;
        }
        let mut room = Pieces::default();
        for buffer in &row {
            room.append(&buffer.body);
        }
        room.truncate(limit);
        let outcome = source.read(&room);
        let mut left = match outcome {
            ReadOutcome::Data(count) => count.min(limit),
            ReadOutcome::Blocked | ReadOutcome::End { .. } => 0,
        };
        for buffer in row {
            let len = left.min(buffer.body.len());
            left -= len;
            if len == 0 {
                // Untouched: the next to be taken again.
                self.queue.go_to_previous_position();
                continue;
            }
            buffer.write_header(source.header(u32::try_from(len).unwrap_or(u32::MAX)));
            self.counters.rx_packets.inc();
            self.counters.rx_bytes.add(len as u64);
            self.give_used(buffer.head, HEADER_LEN + len);
        }
        Some(outcome)
    }

    fn give_used(&mut self, head: u16, len: usize) {
        self.used += 1;
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        if let Err(error) = ring::give_back(self.queue, self.memory, head, len) {
            guest_log!(DEBUG, %error, head, "vsock: cannot return an rx buffer");
        }
    }
}
