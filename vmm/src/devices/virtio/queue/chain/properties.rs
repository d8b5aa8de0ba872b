//! Random descriptor tables: a well-formed chain comes back as it was written, anything else as the specification reads.

use proptest::collection::vec;
use proptest::prelude::*;
use virtio_queue::QueueOwnedT;

use super::*;
use crate::devices::virtio::test_ring::{
    BUFFERS, INDIRECT, MEMORY_SIZE, NEXT, RINGS, TestGuest, TestRing, WRITE,
};

/// Entries of the queue.
const SIZE: u16 = 8;
/// Where the indirect table is.
const TABLE: u64 = BUFFERS;
/// Entries written there; two more than a chain may have.
const TABLE_ENTRIES: u16 = SIZE + 2;

/// Address and length of each buffer of a direction.
type Parts = Vec<(u64, u32)>;

/// One entry of a table.
#[derive(Debug, Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn write(self, ring: &TestRing, table: u64, index: u16) {
        ring.descriptor_at(table, index, self.address, self.len, self.flags, self.next);
    }

    fn read(guest: &TestGuest, at: u64) -> Option<Self> {
        let end = at.checked_add(16)?;
        if end > MEMORY_SIZE as u64 {
            return None;
        }
        let bytes = guest.read(at, 16);
        Some(Self {
            address: u64::from_le_bytes(bytes[..8].try_into().unwrap()),
            len: u32::from_le_bytes(bytes[8..12].try_into().unwrap()),
            flags: u16::from_le_bytes(bytes[12..14].try_into().unwrap()),
            next: u16::from_le_bytes(bytes[14..].try_into().unwrap()),
        })
    }
}

fn parse(guest: &TestGuest, ring: &TestRing) -> Result<(Parts, Parts), ChainError> {
    let mut queue = ring.active().queue;
    let chain = queue.iter(&*guest.memory).unwrap().next().unwrap();
    let head = chain.head_index();
    let parsed = Chain::parse(&guest.memory, chain, SIZE);
    // The same chain by its head, in the memory of another.
    let mut again = Chain::default();
    let _ = again.parse_head(&guest.memory, GuestAddress(RINGS), 0, SIZE);
    let result = again.parse_head(&guest.memory, GuestAddress(RINGS), head, SIZE);
    assert_eq!(result.map(|()| again), parsed);
    let chain = parsed?;
    let sum = |parts: &Parts| parts.iter().map(|part| u64::from(part.1)).sum::<u64>();
    let (readable, writable): (Parts, Parts) =
        (chain.readable.parts().collect(), chain.writable.parts().collect());
    assert_eq!(
        (sum(&readable), sum(&writable)),
        (chain.readable.len(), chain.writable.len())
    );
    Ok((readable, writable))
}

/// What virtio 1.2, 2.7.5 and 2.7.7 make of the chain at `head`; `None` when the driver breaks a rule.
fn expected(guest: &TestGuest, head: u16) -> Option<(Parts, Parts)> {
    let (mut table, mut entries, mut indirect) = (RINGS, u32::from(SIZE), false);
    let (mut index, mut steps, mut count) = (u32::from(head), 0, 0);
    let (mut readable, mut writable) = (Vec::new(), Vec::new());
    let mut writable_seen = false;
    loop {
        if index >= entries || steps == entries {
            return None;
        }
        let entry = Descriptor::read(guest, table.checked_add(16 * u64::from(index))?)?;
        if entry.flags & INDIRECT != 0 {
            let len = entry.len / 16;
            if indirect || entry.len % 16 != 0 || len > 0xffff {
                return None;
            }
            // WRITE means nothing here (2.7.5.3.2), and nothing follows an indirect table.
            (table, entries, indirect) = (entry.address, len, true);
            (index, steps) = (0, 0);
            continue;
        }
        count += 1;
        let end = entry.address.checked_add(u64::from(entry.len));
        let inside = entry.len == 0 || end.is_some_and(|end| end <= MEMORY_SIZE as u64);
        let write = entry.flags & WRITE != 0;
        if count > SIZE || !inside || writable_seen && !write {
            return None;
        }
        writable_seen |= write;
        if entry.len > 0 {
            let parts = if write { &mut writable } else { &mut readable };
            parts.push((entry.address, entry.len));
        }
        if entry.flags & NEXT == 0 {
            return Some((readable, writable));
        }
        (index, steps) = (u32::from(entry.next), steps + 1);
    }
}

/// A descriptor with anything in it, more often than not something that means something.
fn descriptor() -> impl Strategy<Value = Descriptor> {
    let end = MEMORY_SIZE as u64;
    let address = prop_oneof![
        4 => Just(TABLE),
        4 => 0..end,
        1 => end - 32..end + 32,
        1 => prop_oneof![Just(u64::MAX), Just(u64::MAX - 15), any::<u64>()],
    ];
    let len = prop_oneof![
        4 => (1..=u32::from(TABLE_ENTRIES)).prop_map(|entries| 16 * entries),
        4 => 0..5000u32,
        1 => prop_oneof![Just(0xffff * 16), Just(0x1_0000 * 16), Just(u32::MAX), any::<u32>()],
    ];
    let flag = |weight, flag| prop_oneof![weight => Just(flag), 4 => Just(0u16)];
    let flags = (flag(12, NEXT), flag(2, WRITE), flag(1, INDIRECT), flag(1, 0xfff8));
    let next = prop_oneof![12 => 0..SIZE, 1 => SIZE..=TABLE_ENTRIES, 1 => any::<u16>()];
    (address, len, flags, next).prop_map(|(address, len, (a, b, c, d), next)| {
        let flags = a | b | c | d;
        Descriptor {
            address,
            len,
            flags,
            next,
        }
    })
}

/// Buffers of a chain, now and then one too many, the order in which the entries of the table are used, and how many of them are in the queue's own
/// table (the others are in an indirect one).
fn well_formed() -> impl Strategy<Value = (Vec<(u64, u32, bool)>, Vec<u16>, usize)> {
    let buffer = (
        BUFFERS + 0x1000..MEMORY_SIZE as u64 - 5000,
        0..5000u32,
        any::<bool>(),
    );
    let order = Just((0..SIZE).collect::<Vec<_>>()).prop_shuffle();
    (
        vec(buffer, 1..=usize::from(SIZE) + 1),
        order,
        0..=usize::from(SIZE),
    )
        .prop_map(|(mut buffers, order, direct)| {
            buffers.sort_by_key(|buffer| buffer.2);
            (buffers, order, direct)
        })
}

proptest! {
    #[test]
    fn chain_when_well_formed_comes_back_unless_it_is_too_long((buffers, order, direct) in well_formed()) {
        let guest = TestGuest::new();
        let mut ring = guest.ring(0, SIZE, false);
        // The entry that points to the indirect table needs a place as well.
        let direct = if direct < buffers.len() { direct.min(usize::from(SIZE) - 1) } else { buffers.len() };
        let last = buffers.len() - 1;
        for (position, (address, len, write)) in buffers.iter().copied().enumerate() {
            let flags = if write { WRITE } else { 0 } | if position < last { NEXT } else { 0 };
            let entry = |next| Descriptor { address, len, flags, next };
            if position < direct {
                entry(*order.get(position + 1).unwrap_or(&0)).write(&ring, RINGS, order[position]);
            } else {
                let index = (position - direct) as u16;
                entry(index + 1).write(&ring, TABLE, index);
            }
        }
        if direct < buffers.len() {
            let len = 16 * (buffers.len() - direct) as u32;
            let table = Descriptor { address: TABLE, len, flags: INDIRECT, next: 0 };
            table.write(&ring, RINGS, order[direct]);
        }
        ring.offer(order[0]);
        let of = |direction: bool| -> Parts {
            let of = buffers.iter().filter(|buffer| buffer.2 == direction && buffer.1 > 0);
            of.map(|buffer| (buffer.0, buffer.1)).collect()
        };
        let expected = if buffers.len() > usize::from(SIZE) {
            Err(ChainError::TooLong { head: order[0], limit: SIZE.into() })
        } else {
            Ok((of(false), of(true)))
        };
        prop_assert_eq!(parse(&guest, &ring), expected);
    }

    #[test]
    fn chain_when_anything_is_in_the_tables_is_what_the_specification_reads(
        table in vec(descriptor(), usize::from(SIZE)),
        indirect in vec(descriptor(), usize::from(TABLE_ENTRIES)),
        head in 0..SIZE + 1,
    ) {
        let guest = TestGuest::new();
        let mut ring = guest.ring(0, SIZE, false);
        for (at, entries) in [(RINGS, table), (TABLE, indirect)] {
            for (index, entry) in (0..).zip(entries) {
                entry.write(&ring, at, index);
            }
        }
        ring.offer(head);
        prop_assert_eq!(parse(&guest, &ring).ok(), expected(&guest, head));
    }

    #[test]
    fn bytes_when_copied_through_a_chain_are_those_of_its_buffers(
        lens in vec(0..40u32, 1..=usize::from(SIZE)),
        offset in 0..200u64,
        wanted in 0..200usize,
    ) {
        let guest = TestGuest::new();
        let mut ring = guest.ring(0, SIZE, false);
        let mut flat = Vec::new();
        let last = lens.len() - 1;
        for (position, len) in (0u16..).zip(&lens) {
            // Apart from each other, so that a copy that runs over the end of a buffer is seen.
            let address = BUFFERS + 100 * u64::from(position);
            let bytes: Vec<u8> = (0..*len).map(|byte| (flat.len() as u32 + byte) as u8).collect();
            guest.write(address, &bytes);
            flat.extend(bytes);
            let flags = if usize::from(position) < last { NEXT } else { 0 };
            ring.descriptor(position, address, *len, flags, position + 1);
        }
        ring.offer(0);
        let mut queue = ring.active().queue;
        let chain = queue.iter(&*guest.memory).unwrap().next().unwrap();
        let buffers = Chain::parse(&guest.memory, chain, SIZE).unwrap().readable;
        let end = offset as usize + wanted;
        let mut read = vec![0; wanted];
        let result = buffers.read(&guest.memory, offset, &mut read);
        prop_assert_eq!(result.is_ok(), wanted == 0 || end <= flat.len());
        if wanted > 0 && end <= flat.len() {
            prop_assert_eq!(&read, &flat[offset as usize..end]);
            buffers.write(&guest.memory, offset, &vec![0xff; wanted]).unwrap();
            flat[offset as usize..end].fill(0xff);
            let mut all = vec![0; flat.len()];
            buffers.read(&guest.memory, 0, &mut all).unwrap();
            prop_assert_eq!(&all, &flat);
            for (position, len) in (0u64..).zip(&lens) {
                let behind = guest.read(BUFFERS + 100 * position + u64::from(*len), 100 - *len as usize);
                prop_assert!(behind.iter().all(|byte| *byte == 0), "written behind buffer {}", position);
            }
        }
    }
}
