//! A fake guest driver for device tests: split rings in guest memory, well-formed and malformed chains.
//!
//! Memory of a [`TestGuest`]: rings from [`RINGS`] on (64 KiB per queue), buffers wherever the test wants between
//! [`BUFFERS`] and [`MEMORY_SIZE`].

// Of tests and fuzzing.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::state::QueuePosition;
use super::transport::mmio::SlotInterrupt;
use super::transport::mmio::registers::Registers;
use super::{Activation, ActiveQueue, Interrupt, VirtioDevice};
use crate::confinement::{Confinement, Seccomp, Thread};
use crate::io_loop::IoLoop;
use crate::memory::GuestMemory;

/// RAM of the fake guest, from address 0.
pub const MEMORY_SIZE: usize = 16 << 20;
/// Where the rings start.
pub const RINGS: u64 = 0x10_0000;
/// Where buffers may start.
pub const BUFFERS: u64 = 0x20_0000;
/// Descriptor flags.
pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
/// Descriptor flags.
pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
/// Descriptor flags.
pub const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
/// Longest wait of any test for a device.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// One buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub enum Buf {
    /// Device-readable: address, length.
    Read(u64, u32),
    /// Device-writable: address, length.
    Write(u64, u32),
}

/// A completed chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// Head descriptor.
    pub head: u16,
    /// Bytes the device says it wrote.
    pub len: u32,
}

/// The driver's side of one queue.
pub struct TestRing {
    memory: Arc<GuestMemory>,
    index: usize,
    size: u16,
    base: u64,
    avail_index: u16,
    used_seen: u16,
    next_descriptor: u16,
    event_idx: bool,
    /// The queue's doorbell.
    pub kick: Arc<EventFd>,
}

impl TestRing {
    fn new(memory: Arc<GuestMemory>, index: usize, size: u16, event_idx: bool) -> Self {
        Self {
            memory,
            index,
            size,
            base: RINGS + index as u64 * 0x1_0000,
            avail_index: 0,
            used_seen: 0,
            next_descriptor: 0,
            event_idx,
            kick: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
        }
    }

    fn avail(&self) -> u64 {
        self.base + 0x8000
    }

    fn used(&self) -> u64 {
        self.base + 0xc000
    }

    /// Where the device counts the chains it returned.
    pub fn used_index(&self) -> GuestAddress {
        GuestAddress(self.used() + 2)
    }

    /// The queue as the transport would hand it to the device.
    pub fn active(&self) -> ActiveQueue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.set_size(self.size);
        queue.set_desc_table_address(Some(self.base as u32), Some(0));
        queue.set_avail_ring_address(Some(self.avail() as u32), Some(0));
        queue.set_used_ring_address(Some(self.used() as u32), Some(0));
        queue.set_event_idx(self.event_idx);
        queue.set_ready(true);
        assert!(queue.is_valid(&*self.memory));
        ActiveQueue {
            index: self.index,
            queue,
            kick: self.kick.clone(),
        }
    }

    /// The queue as the transport would hand it to a device that goes on where another stood.
    pub fn active_at(&self, position: &QueuePosition) -> ActiveQueue {
        assert_eq!(usize::from(position.index), self.index);
        let mut active = self.active();
        active.queue.set_next_avail(position.next_avail);
        active.queue.set_next_used(position.next_used);
        active
    }

    /// Lets the ring stand where it does after `index` chains that all came back, before it is given to a device with
    /// [`active_at`](Self::active_at). Returns that position.
    pub fn begin_at(&mut self, index: u16) -> QueuePosition {
        self.set_avail_index(index);
        self.memory
            .store(index.to_le(), self.used_index(), Ordering::Release)
            .unwrap();
        self.set_used_event(index);
        self.used_seen = index;
        QueuePosition {
            index: self.index as u16,
            next_avail: index,
            next_used: index,
        }
    }

    /// Chains offered that were not seen to come back.
    pub fn outstanding(&self) -> u16 {
        self.avail_index.wrapping_sub(self.used_seen)
    }

    /// Writes one descriptor of the queue's table.
    pub fn descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        self.descriptor_at(self.base, index, address, len, flags, next);
    }

    /// Writes one descriptor of any table, e.g. an indirect one.
    pub fn descriptor_at(&self, table: u64, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = GuestAddress(table + 16 * u64::from(index));
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&bytes, at).unwrap();
    }

    /// Puts `head` on the avail ring.
    pub fn offer(&mut self, head: u16) {
        let slot = self.avail() + 4 + 2 * u64::from(self.avail_index % self.size);
        self.memory.write_obj(head.to_le(), GuestAddress(slot)).unwrap();
        self.set_avail_index(self.avail_index.wrapping_add(1));
    }

    /// Sets the avail index, possibly to something absurd.
    pub fn set_avail_index(&mut self, index: u16) {
        self.avail_index = index;
        let at = GuestAddress(self.avail() + 2);
        self.memory.store(index.to_le(), at, Ordering::Release).unwrap();
    }

    /// Sets the flags of the avail ring (bit 0: no interrupt).
    pub fn set_avail_flags(&self, flags: u16) {
        self.memory
            .write_obj(flags.to_le(), GuestAddress(self.avail()))
            .unwrap();
    }

    /// Asks for an interrupt when the used index passes `index` (EVENT_IDX).
    pub fn set_used_event(&self, index: u16) {
        let at = GuestAddress(self.avail() + 4 + 2 * u64::from(self.size));
        self.memory.store(index.to_le(), at, Ordering::SeqCst).unwrap();
    }

    /// Writes a well-formed chain into free descriptors and offers it. Returns its head.
    pub fn submit(&mut self, buffers: &[Buf]) -> u16 {
        let head = self.next_descriptor;
        for (position, buffer) in buffers.iter().enumerate() {
            let last = position + 1 == buffers.len();
            let index = (head + position as u16) % self.size;
            let (address, len, mut flags) = match *buffer {
                Buf::Read(address, len) => (address, len, 0),
                Buf::Write(address, len) => (address, len, WRITE),
            };
            if !last {
                flags |= NEXT;
            }
            self.descriptor(index, address, len, flags, (index + 1) % self.size);
        }
        self.next_descriptor = (head + buffers.len() as u16) % self.size;
        self.offer(head);
        head
    }

    /// Rings the doorbell.
    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Rings the doorbell if the device asks for it after the last `added` chains; says whether it did. With EVENT_IDX the
    /// device names an index in `avail_event`, which follows the used ring's entries (virtio 1.2, 2.7.10); without, it
    /// sets a flag in the used ring.
    pub fn kick_if_wanted(&self, added: u16) -> bool {
        fence(Ordering::SeqCst);
        let load = |offset: u64| {
            let at = GuestAddress(self.used() + offset);
            u16::from_le(self.memory.load(at, Ordering::SeqCst).unwrap())
        };
        let wanted = if self.event_idx {
            let event = load(4 + 8 * u64::from(self.size));
            self.avail_index.wrapping_sub(event).wrapping_sub(1) < added
        } else {
            u32::from(load(0)) & VRING_USED_F_NO_NOTIFY == 0
        };
        if wanted {
            self.kick();
        }
        wanted
    }

    /// Asks for an interrupt when `more` completions came after the next; false when that many are there already
    /// (EVENT_IDX).
    pub fn ask_for_interrupt(&self, more: u16) -> bool {
        self.set_used_event(self.used_seen.wrapping_add(more));
        fence(Ordering::SeqCst);
        let index: u16 = self.memory.load(self.used_index(), Ordering::SeqCst).unwrap();
        u16::from_le(index).wrapping_sub(self.used_seen) <= more
    }

    /// The next completion, if there is one.
    pub fn try_used(&mut self) -> Option<Used> {
        let index = self
            .memory
            .load::<u16>(self.used_index(), Ordering::Acquire)
            .unwrap();
        if u16::from_le(index) == self.used_seen {
            return None;
        }
        let at = GuestAddress(self.used() + 4 + 8 * u64::from(self.used_seen % self.size));
        let entry: [u32; 2] = self.memory.read_obj(at).unwrap();
        self.used_seen = self.used_seen.wrapping_add(1);
        Some(Used {
            head: u16::try_from(u32::from_le(entry[0])).unwrap(),
            len: u32::from_le(entry[1]),
        })
    }

    /// Waits for the next completion.
    pub fn wait_used(&mut self) -> Used {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(used) = self.try_used() {
                return used;
            }
            assert!(Instant::now() < deadline, "queue {}: no completion", self.index);
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Submits a chain, kicks, and waits for it to come back.
    pub fn round_trip(&mut self, buffers: &[Buf]) -> Used {
        let head = self.submit(buffers);
        self.kick();
        let used = self.wait_used();
        assert_eq!(used.head, head);
        used
    }
}

/// RAM, an I/O loop and an interrupt line, for one device.
pub struct TestGuest {
    /// Guest RAM.
    pub memory: Arc<GuestMemory>,
    /// Registers of the device's slot.
    pub registers: Registers,
    /// Counts interrupts.
    pub irqfd: Arc<EventFd>,
    /// The I/O loop.
    pub io: IoLoop,
    thread: Option<Thread<()>>,
}

impl Default for TestGuest {
    fn default() -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_SIZE)]).unwrap();
        let (io, thread) = IoLoop::spawn("test-io", confinement()).unwrap();
        Self {
            memory: Arc::new(memory),
            registers: Registers::unseen().unwrap(),
            irqfd: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
            io,
            thread: Some(thread),
        }
    }
}

/// Threads under test are confined as they are in use; not under a fuzzer, whose sanitizers make calls of their own there.
pub fn confinement() -> Confinement {
    match cfg!(test) {
        true => Confinement::default(),
        false => Confinement {
            seccomp: Seccomp::Off,
            keep_capabilities: true,
        },
    }
}

impl TestGuest {
    /// A guest with [`MEMORY_SIZE`] bytes of RAM.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty ring, as a freshly reset driver leaves it.
    pub fn ring(&self, index: usize, size: u16, event_idx: bool) -> TestRing {
        let ring = TestRing::new(self.memory.clone(), index, size, event_idx);
        self.memory
            .write_slice(&[0; 0x1_0000], GuestAddress(ring.base))
            .unwrap();
        ring
    }

    /// Starts `device` with one ring of `size` entries per queue.
    pub fn activate(&self, device: &mut dyn VirtioDevice, size: u16, event_idx: bool) -> Vec<TestRing> {
        let count = device.queue_sizes().len();
        let rings: Vec<_> = (0..count)
            .map(|index| self.ring(index, size, event_idx))
            .collect();
        let mut features = 1 << VIRTIO_F_VERSION_1;
        if event_idx {
            features |= 1 << VIRTIO_RING_F_EVENT_IDX;
        }
        let activation = Activation {
            memory: self.memory.clone(),
            features,
            queues: rings.iter().map(TestRing::active).collect(),
            interrupt: self.interrupt(),
            io: self.io.clone(),
            confinement: confinement(),
        };
        device.activate(activation).unwrap();
        rings
    }

    /// Starts `device` on `rings` where `positions` say, as the transport does after a suspend or a restore.
    pub fn resume(
        &self,
        device: &mut dyn VirtioDevice,
        rings: &[&TestRing],
        positions: &[QueuePosition],
        event_idx: bool,
    ) {
        assert_eq!(rings.len(), positions.len());
        let queues = rings.iter().zip(positions);
        let mut features = 1 << VIRTIO_F_VERSION_1;
        if event_idx {
            features |= 1 << VIRTIO_RING_F_EVENT_IDX;
        }
        let activation = Activation {
            memory: self.memory.clone(),
            features,
            queues: queues.map(|(ring, at)| ring.active_at(at)).collect(),
            interrupt: self.interrupt(),
            io: self.io.clone(),
            confinement: confinement(),
        };
        device.activate(activation).unwrap();
    }

    /// The interrupt of a device of this guest.
    pub fn interrupt(&self) -> Interrupt {
        Interrupt::new(Arc::new(self.slot()))
    }

    /// The slot of a device of this guest.
    pub fn slot(&self) -> SlotInterrupt {
        SlotInterrupt::new(self.registers.clone(), self.irqfd.clone())
    }

    /// InterruptStatus.
    pub fn status(&self) -> u32 {
        self.registers.interrupt_status().load(Ordering::SeqCst)
    }

    /// Interrupts since the last call.
    pub fn interrupts(&self) -> u64 {
        self.irqfd.read().unwrap_or(0)
    }

    /// Waits until at least one interrupt came, and takes all there are.
    pub fn wait_interrupt(&self) -> u64 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.interrupts() {
                0 => assert!(Instant::now() < deadline, "no interrupt"),
                count => return count,
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Fills guest memory.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    /// Reads guest memory.
    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

impl Drop for TestGuest {
    fn drop(&mut self) {
        self.io.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Writes descriptors and offers a chain.
pub type Offer = fn(&mut TestRing);

/// Every way a chain can be malformed that a device must survive. Each entry offers one chain on `ring` whose head is
/// below the ring's size, so that the device can and must return it.
pub const MALFORMED: &[(&str, Offer)] = &[
    ("loop to itself", |ring| {
        ring.descriptor(0, BUFFERS, 16, NEXT, 0);
        ring.offer(0);
    }),
    ("loop of two", |ring| {
        ring.descriptor(0, BUFFERS, 16, NEXT, 1);
        ring.descriptor(1, BUFFERS, 16, NEXT, 0);
        ring.offer(0);
    }),
    ("next index outside the table", |ring| {
        ring.descriptor(0, BUFFERS, 16, NEXT, 0xffff);
        ring.offer(0);
    }),
    ("zero length", |ring| {
        ring.descriptor(0, BUFFERS, 0, 0, 0);
        ring.offer(0);
    }),
    ("address outside memory", |ring| {
        ring.descriptor(0, 0xffff_f000, 16, 0, 0);
        ring.offer(0);
    }),
    ("address at the end of the address space", |ring| {
        ring.descriptor(0, u64::MAX - 7, 16, 0, 0);
        ring.offer(0);
    }),
    ("length beyond memory", |ring| {
        ring.descriptor(0, BUFFERS, u32::MAX, 0, 0);
        ring.offer(0);
    }),
    ("device-writable length beyond memory", |ring| {
        ring.descriptor(0, MEMORY_SIZE as u64 - 8, 16, WRITE, 0);
        ring.offer(0);
    }),
    ("readable after writable", |ring| {
        ring.descriptor(0, BUFFERS, 64, WRITE | NEXT, 1);
        ring.descriptor(1, BUFFERS, 64, 0, 0);
        ring.offer(0);
    }),
    ("indirect table of odd length", |ring| {
        ring.descriptor(0, BUFFERS, 17, INDIRECT, 0);
        ring.offer(0);
    }),
    ("empty indirect table", |ring| {
        ring.descriptor(0, BUFFERS, 0, INDIRECT, 0);
        ring.offer(0);
    }),
    ("indirect table inside an indirect table", |ring| {
        ring.descriptor_at(BUFFERS, 0, BUFFERS, 16, INDIRECT, 0);
        ring.descriptor(0, BUFFERS, 16, INDIRECT, 0);
        ring.offer(0);
    }),
    ("indirect table outside memory", |ring| {
        ring.descriptor(0, 0xffff_f000, 32, INDIRECT, 0);
        ring.offer(0);
    }),
    ("indirect loop in a huge table", |ring| {
        ring.descriptor_at(BUFFERS, 0, BUFFERS, 16, NEXT, 1);
        ring.descriptor_at(BUFFERS, 1, BUFFERS, 16, NEXT, 0);
        ring.descriptor(0, BUFFERS, 0xffff * 16, INDIRECT, 0);
        ring.offer(0);
    }),
];

/// Sends every malformed chain to queue `queue` of a running device and checks that each one comes back.
pub fn survive_malformed_chains(ring: &mut TestRing) {
    for (what, offer) in MALFORMED {
        offer(ring);
        ring.kick();
        let used = ring.wait_used();
        assert_eq!(used.head, 0, "{what}");
    }
}

/// Floods a queue that is served in order: `rounds` times a head the queue does not have, then a chain that is a loop.
#[cfg(test)]
pub fn flood(ring: &mut TestRing, rounds: u16) {
    for round in 0..rounds {
        ring.offer(u16::MAX - round);
        ring.descriptor(0, BUFFERS, 16, NEXT, 0);
        ring.offer(0);
        ring.kick();
        ring.wait_used();
    }
}
