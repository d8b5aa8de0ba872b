//! An interface over sockets with its driver.

use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;

use crate::config::NetConfig;
use crate::devices::virtio::net::Net;
pub use crate::devices::virtio::net::socket::{Socket, Wire, device, wire};
use crate::devices::virtio::state::QueuePosition;
use crate::devices::virtio::test_ring::{BUFFERS, Buf, PATIENCE, TestGuest, TestRing};
use crate::devices::virtio::{Activation, VirtioDevice};

pub const MERGE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
pub const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
pub const RING: u16 = 64;
/// Buffers of the receive queue; those of the transmit queue start at [`BUFFERS`].
pub const RX_BUFFERS: u64 = BUFFERS + (8 << 20);

impl Wire {
    /// Takes a frame of the guest and forgets it.
    pub fn discard(&self) {
        let mut byte = [0; 1];
        let flags = rustix::net::RecvFlags::DONTWAIT;
        rustix::net::recv(self, &mut byte[..], flags).unwrap();
    }

    /// Waits for a frame of the guest.
    pub fn recv(&self) -> Vec<u8> {
        let mut frame = None;
        eventually("a frame from the guest", || {
            frame = self.try_recv();
            frame.is_some()
        });
        frame.unwrap()
    }
}

pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// A frame of `len` bytes with its header, no two alike.
pub fn frame(number: usize, len: usize) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend((0..len - 12).map(|at| (at * 7 + at / 256 + number * 13) as u8));
    frame
}

/// An interface with a driver.
pub struct Rig {
    pub guest: TestGuest,
    pub net: Net,
    pub rings: Vec<TestRing>,
    pub sockets: Vec<Arc<Socket>>,
    pub wires: Vec<Wire>,
    pub features: u64,
}

pub fn net_config() -> NetConfig {
    NetConfig {
        queue_size: RING,
        ..NetConfig::new("net0", "tap0")
    }
}

impl Rig {
    pub fn new(features: u64) -> Self {
        Self::with(&net_config(), features)
    }

    pub fn with(config: &NetConfig, features: u64) -> Self {
        let (sockets, wires) = (0..config.queue_pairs).map(|_| wire(1 << 20)).unzip();
        Self::over(config, features, sockets, wires)
    }

    pub fn over(config: &NetConfig, features: u64, sockets: Vec<Arc<Socket>>, wires: Vec<Wire>) -> Self {
        let guest = TestGuest::new();
        let net = device(config, &sockets);
        let sizes = net.queue_sizes().iter().enumerate();
        let event_idx = features & EVENT_IDX != 0;
        let rings = sizes
            .map(|(index, size)| guest.ring(index, *size, event_idx))
            .collect();
        let mut rig = Self {
            guest,
            net,
            rings,
            sockets,
            wires,
            features: features | 1 << VIRTIO_F_VERSION_1,
        };
        rig.activate(&[]);
        rig
    }

    /// Activates the device with its queues at `positions`, or at 0.
    pub fn activate(&mut self, positions: &[QueuePosition]) {
        let queues = self.rings.iter().enumerate().map(|(index, ring)| {
            let mut active = ring.active();
            if let Some(position) = positions.iter().find(|p| usize::from(p.index) == index) {
                active.queue.set_next_avail(position.next_avail);
                active.queue.set_next_used(position.next_used);
            }
            active
        });
        let activation = Activation {
            memory: self.guest.memory.clone(),
            features: self.features,
            queues: queues.collect(),
            interrupt: self.guest.interrupt(),
            io: self.guest.io.clone(),
            confinement: crate::confinement::Confinement::default(),
        };
        self.net.activate(activation).unwrap();
    }

    pub fn counter(&self, name: &str) -> u64 {
        let counters = self.net.counters();
        counters.into_iter().find(|(n, _)| *n == name).unwrap().1
    }

    /// Offers receive buffer `number` of `len` bytes, without a kick. Returns its head.
    pub fn offer_rx(&mut self, number: u64, len: u32) -> u16 {
        self.rings[0].submit(&[Buf::Write(rx_buffer(number), len)])
    }

    /// Offers the frame in transmit buffer `number`, without a kick. Returns its head.
    pub fn offer_tx(&mut self, number: u64, frame: &[u8]) -> u16 {
        let at = tx_buffer(number);
        self.guest.write(at, frame);
        self.rings[1].submit(&[Buf::Read(at, frame.len() as u32)])
    }

    /// What receive buffer `number` holds: `num_buffers`, and the bytes with that field cleared.
    pub fn received(&self, number: u64, len: u32) -> (u16, Vec<u8>) {
        let mut bytes = self.guest.read(rx_buffer(number), len as usize);
        let count = u16::from_le_bytes([bytes[10], bytes[11]]);
        bytes[10..12].fill(0);
        (count, bytes)
    }

    /// Waits until a frame that does not fit has been read into receive buffer 0.
    pub fn wait_first_bytes(&self, frame: &[u8]) {
        eventually("the first part of a frame", || {
            self.guest.read(rx_buffer(0) + 12, 16) == frame[12..28]
        });
        self.settle();
    }

    /// Returns when the loop has handled what was pending.
    pub fn settle(&self) {
        for _ in 0..3 {
            self.guest.io.drain().unwrap();
        }
    }

    /// Gives the loop time with nothing to do, and says whether it did something: a spinning worker does.
    pub fn spins(&self, counter: &str) -> bool {
        self.settle();
        let before = self.counter(counter);
        self.settle();
        self.counter(counter) != before
    }
}

pub fn rx_buffer(number: u64) -> u64 {
    RX_BUFFERS + number * 0x1_1000
}

pub fn tx_buffer(number: u64) -> u64 {
    BUFFERS + number * 0x1_1000
}
