//! A guest that does what a script says to one device.

use std::time::{Duration, Instant};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress};

use super::script::Script;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::state::QueuePosition;
use crate::devices::virtio::test_resume::activate_at;
use crate::devices::virtio::test_ring::{BUFFERS, Buf, INDIRECT, NEXT, TestGuest, TestRing, WRITE};

/// Most actions of one input.
const MAX_ACTIONS: usize = 128;
/// Longest wait for a device to become quiet. One that is not by then is working on a long request, or on a timer.
const QUIET: Duration = Duration::from_millis(20);
/// Buffers of requests, each this long.
const SLOT: u64 = 0x1_0000;
const SLOTS: u64 = 64;

/// The device of a target, and the host around it.
pub(super) trait Subject {
    /// A device as configured. The one before, if any, is gone.
    fn build(&mut self) -> Box<dyn VirtioDevice>;

    /// The driver has started (not after a suspend).
    fn started(&mut self, _guest: &mut Guest) {}

    /// Something only this device knows: a request of its protocol, or something the host does.
    fn act(&mut self, _device: &mut dyn VirtioDevice, _guest: &mut Guest, _script: &mut Script) {}
}

/// The guest's memory and rings.
pub(super) struct Guest {
    pub test: TestGuest,
    rings: Vec<TestRing>,
    next_slot: u64,
}

impl Guest {
    /// Writes what lies in memory.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        // Outside of memory there is nothing to write to.
        let _ = self.test.memory.write_slice(bytes, GuestAddress(address));
    }

    /// An address with [`SLOT`] bytes that were not used lately.
    fn slot(&mut self) -> u64 {
        self.next_slot = (self.next_slot + 1) % SLOTS;
        BUFFERS + self.next_slot * SLOT
    }

    /// Offers `readable`, each with the length it is said to have, and room for `writable` on queue `queue`.
    pub fn request(&mut self, queue: usize, readable: &[(&[u8], u32)], writable: &[u32]) {
        let mut chain = Vec::new();
        for (bytes, len) in readable {
            let at = self.slot();
            self.write(at, bytes);
            chain.push(Buf::Read(at, *len));
        }
        for len in writable {
            chain.push(Buf::Write(self.slot(), *len));
        }
        if let Some(ring) = self.rings.get_mut(queue) {
            ring.submit(&chain);
        }
    }

    /// Rings the doorbell of `queue`.
    pub fn kick(&self, queue: usize) {
        if let Some(ring) = self.rings.get(queue) {
            ring.kick();
        }
    }

    fn ring(&mut self, script: &mut Script) -> Option<&mut TestRing> {
        let count = self.rings.len().max(1);
        self.rings.get_mut(usize::from(script.byte()) % count)
    }

    fn any_request(&mut self, script: &mut Script) {
        let (what, parts) = (script.byte(), script.byte());
        let queue = usize::from(what & 0x7f) % self.rings.len().max(1);
        let readable: Vec<_> = (0..parts & 3)
            .map(|_| {
                let said = script.byte();
                let bytes = script.bytes(usize::from(said & 0x7f));
                let len = if said & 0x80 == 0 {
                    bytes.len() as u32
                } else {
                    script.size()
                };
                (bytes, len)
            })
            .collect();
        let writable: Vec<_> = (0..parts >> 2 & 3).map(|_| script.size()).collect();
        self.request(queue, &readable, &writable);
        if what & 0x80 == 0 {
            self.kick(queue);
        }
    }

    /// Descriptors of any kind; `table` is the queue's own or an indirect one.
    fn descriptors(&mut self, script: &mut Script) {
        let (count, indirect) = (script.byte() % 8, script.byte() & 1 != 0);
        let table = self.slot();
        let Some(ring) = self.ring(script) else { return };
        for index in 0..u16::from(count) {
            let (address, len) = (script.address(), script.size());
            let (flags, next) = (u16::from(script.byte() & 7), u16::from(script.byte()));
            match indirect {
                true => ring.descriptor_at(table, index, address, len, flags, next),
                false => ring.descriptor(index, address, len, flags, next),
            }
        }
        if indirect {
            let flags = INDIRECT | u16::from(script.byte()) & (NEXT | WRITE);
            ring.descriptor(
                0,
                table,
                16 * u32::from(count) + u32::from(script.byte() & 1),
                flags,
                1,
            );
        }
        ring.offer(0);
        ring.kick();
    }
}

/// A guest at a device.
struct Driver<S> {
    subject: S,
    device: Option<Box<dyn VirtioDevice>>,
    guest: Guest,
    features: u64,
    ring_size: u16,
    /// Queues the driver does not set up, by bit.
    left_out: u8,
    active: bool,
}

/// Lets the guest of `data` loose on `subject`.
pub(super) fn run(subject: impl Subject, data: &[u8]) {
    let mut script = Script::new(data);
    let mut driver = Driver::new(subject, &mut script);
    for _ in 0..MAX_ACTIONS {
        if script.is_over() {
            break;
        }
        driver.act(&mut script);
    }
    driver.settle();
    driver.suspend();
    driver.device().reset();
    driver.device = None;
    driver.guest.test.io.drain().expect("the loop has ended");
}

impl<S: Subject> Driver<S> {
    fn new(mut subject: S, script: &mut Script) -> Self {
        let device = subject.build();
        let choice = script.byte();
        // Half of the guests accept all features and set up all queues.
        let (features, left_out) = match choice & 1 {
            0 => (device.features(), 0),
            _ => (script.u64() & device.features(), script.byte()),
        };
        let mut driver = Self {
            subject,
            device: Some(device),
            guest: Guest {
                test: TestGuest::new(),
                rings: Vec::new(),
                next_slot: 0,
            },
            features: features | 1 << VIRTIO_F_VERSION_1,
            ring_size: 1 << (choice >> 1 & 7),
            left_out,
            active: false,
        };
        driver.start();
        driver
    }

    fn device(&mut self) -> &mut dyn VirtioDevice {
        &mut **self.device.as_mut().expect("a device is put back at once")
    }

    /// Activates the device with fresh rings.
    fn start(&mut self) {
        let event_idx = self.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let sizes: Vec<_> = self.device().queue_sizes().to_vec();
        self.guest.rings = sizes
            .iter()
            .enumerate()
            .filter(|(index, _)| self.left_out & 1 << (index % 8) == 0)
            .map(|(index, max)| self.guest.test.ring(index, self.ring_size.min(*max), event_idx))
            .collect();
        self.activate(&[]);
        if self.active {
            self.subject.started(&mut self.guest);
        }
    }

    fn activate(&mut self, positions: &[QueuePosition]) {
        let device = self.device.as_mut().expect("a device is put back at once");
        let (rings, features) = (&self.guest.rings, self.features);
        self.active = activate_at(&self.guest.test, &mut **device, rings, features, positions).is_ok();
    }

    fn suspend(&mut self) -> Vec<QueuePosition> {
        let positions = self.device().suspend();
        let mut indices: Vec<_> = positions.iter().map(|p| p.index).collect();
        indices.dedup();
        assert_eq!(indices.len(), positions.len(), "{positions:?}");
        // A worker that has panicked has none.
        assert_eq!(positions.is_empty(), !self.active, "{positions:?}");
        self.active = false;
        positions
    }

    /// What shows that the device is at work: the used indices and what it counts.
    fn look(&mut self) -> (Vec<u16>, Vec<u64>) {
        let memory = &self.guest.test.memory;
        let rings = self.guest.rings.iter();
        let used = rings.map(|ring| memory.read_obj(ring.used_index()).unwrap_or(0));
        let used = used.collect();
        let counters = self.device().counters().into_iter();
        (used, counters.map(|(_, value)| value).collect())
    }

    /// Waits until the device has nothing to do, but not for long.
    fn settle(&mut self) {
        let deadline = Instant::now() + QUIET;
        let mut last = None;
        loop {
            self.guest.test.io.drain().expect("the loop has ended");
            let now = self.look();
            if last.as_ref() == Some(&now) || Instant::now() > deadline {
                return;
            }
            last = Some(now);
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    fn act(&mut self, script: &mut Script) {
        match script.byte() % 16 {
            0 | 1 => self.guest.any_request(script),
            2 => self.guest.descriptors(script),
            3 => {
                let head = script.u16();
                if let Some(ring) = self.guest.ring(script) {
                    ring.offer(head);
                }
            }
            4 => {
                if let Some(ring) = self.guest.ring(script) {
                    ring.kick();
                }
            }
            5 => {
                let (address, len) = (script.address(), script.byte());
                let bytes = script.bytes(len.into());
                self.guest.write(address, bytes);
            }
            6 => {
                let (index, flags, event) = (script.u16(), script.byte(), script.u16());
                if let Some(ring) = self.guest.ring(script) {
                    match flags >> 1 & 3 {
                        0 => ring.set_avail_index(index),
                        1 => ring.set_avail_flags((flags & 1).into()),
                        _ => ring.set_used_event(event),
                    }
                }
            }
            7 => self.settle(),
            8 => {
                let was_active = self.active;
                let positions = self.suspend();
                if was_active {
                    self.activate(&positions);
                }
            }
            9 => self.restore(),
            10 => {
                self.device().reset();
                self.start();
            }
            11 => self.configuration(script),
            _ => {
                let device = self.device.as_mut().expect("a device is put back at once");
                self.subject.act(&mut **device, &mut self.guest, script);
            }
        }
    }

    /// Moves the guest to a device of another process.
    fn restore(&mut self) {
        let was_active = self.active;
        let positions = self.suspend();
        let saved = self.device().save();
        if let Ok(state) = saved {
            self.device = None;
            self.device = Some(self.subject.build());
            let restored = self.device().restore(&state);
            if let Err(error) = restored {
                // The guest can make a host file vanish between save and restore, but not here.
                panic!("a state just saved is refused: {error}");
            }
        }
        if was_active {
            self.activate(&positions);
        }
    }

    fn configuration(&mut self, script: &mut Script) {
        let (offset, len) = (u64::from(script.byte()), usize::from(script.byte() % 16));
        let offset = if offset == 255 { script.u64() } else { offset };
        if script.byte() & 1 == 0 {
            self.device().read_config(offset, &mut [0; 16][..len]);
        } else {
            let data = script.bytes(len);
            self.device().write_config(offset, data);
        }
    }
}
