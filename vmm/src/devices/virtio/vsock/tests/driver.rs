//! The guest's driver: packets in and out of the rings.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use crate::config::VsockConfig;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::state::QueuePosition;
use crate::devices::virtio::test_ring::{
    BUFFERS, Buf, MALFORMED, PATIENCE, RINGS, TestGuest, TestRing, Used, survive_malformed_chains,
};
use crate::devices::virtio::vsock::packet::{HEADER_LEN, Header, Op};
use crate::devices::virtio::vsock::{Vsock, VsockHandle};

/// The guest's context id.
pub(super) const GUEST_CID: u32 = 3;
/// Size of the rings.
pub(super) const RING: u16 = 128;
/// Size of an rx buffer, as Linux posts them.
pub(super) const RX_BUFFER: u32 = 4096;
const RX_AREA: u64 = BUFFERS;
const TX_AREA: u64 = 0x80_0000;
const EVENT_AREA: u64 = 0x70_0000;
const TX_SLOT: u64 = 0x1_1000;
const TX_SLOTS: u64 = 64;

/// A packet the guest received.
#[derive(Debug, Clone)]
pub(super) struct Packet {
    pub(super) header: Header,
    pub(super) payload: Vec<u8>,
}

/// A device with a guest.
pub(super) struct Driver {
    pub(super) guest: TestGuest,
    pub(super) device: Vsock,
    pub(super) handle: VsockHandle,
    pub(super) rx: TestRing,
    pub(super) tx: TestRing,
    pub(super) event: TestRing,
    /// Address of each posted rx buffer; `None` for those made to be refused.
    rx_posted: HashMap<u16, Option<u64>>,
    rx_awkward: bool,
    tx_free: VecDeque<u64>,
    tx_busy: HashMap<u16, u64>,
    /// The next rx and tx heads, to check that buffers come back in order.
    rx_order: VecDeque<u16>,
    tx_order: VecDeque<u16>,
    rx_side: Side,
    tx_side: Side,
    event_side: Side,
    event_idx: bool,
    /// Interrupts so far.
    pub(super) interrupts: u64,
}

/// How a driver saves notifications, as Linux's does: a doorbell only when the device asks for it, a look at the used
/// ring only after an interrupt.
#[derive(Default)]
struct Side {
    /// Used entries taken.
    used: u16,
    /// Chains offered, and how many of them the device may have been told of.
    offered: u16,
    told: u16,
    /// No interrupt is needed to look at the used ring.
    asleep: bool,
}

impl Driver {
    pub(super) fn new() -> Self {
        Self::with(None, true)
    }

    pub(super) fn with(uds_path: Option<std::path::PathBuf>, event_idx: bool) -> Self {
        let config = VsockConfig {
            guest_cid: GUEST_CID,
            uds_path,
        };
        let (device, handle) = Vsock::new(&config).unwrap();
        Self::around(device, handle, event_idx)
    }

    /// A driver that posts no rx buffers until [`Self::post_all`].
    pub(super) fn without_buffers() -> Self {
        let (device, handle) = Vsock::new(&VsockConfig {
            guest_cid: GUEST_CID,
            uds_path: None,
        })
        .unwrap();
        Self::bare(device, handle, true)
    }

    /// Brings the driver of a guest up.
    pub(super) fn around(device: Vsock, handle: VsockHandle, event_idx: bool) -> Self {
        let mut driver = Self::bare(device, handle, event_idx);
        driver.post_all();
        driver
    }

    fn bare(mut device: Vsock, handle: VsockHandle, event_idx: bool) -> Self {
        let guest = TestGuest::new();
        let (rx, tx, event) = activate(&guest, &mut device, event_idx);
        Self {
            guest,
            device,
            handle,
            rx,
            tx,
            event,
            rx_posted: HashMap::new(),
            rx_awkward: false,
            tx_free: (0..TX_SLOTS).map(|slot| TX_AREA + slot * TX_SLOT).collect(),
            tx_busy: HashMap::new(),
            rx_order: VecDeque::new(),
            rx_side: Side::default(),
            tx_side: Side::default(),
            event_side: Side::default(),
            event_idx,
            interrupts: 0,
            tx_order: VecDeque::new(),
        }
    }

    /// Resets the device and brings the driver up again.
    pub(super) fn restart(&mut self) {
        self.device.reset();
        (self.rx, self.tx, self.event) = activate(&self.guest, &mut self.device, true);
        self.event_idx = true;
        (self.rx_side, self.tx_side, self.event_side) = Default::default();
        self.rx_posted.clear();
        self.rx_order.clear();
        self.tx_order.clear();
        self.tx_free.extend(self.tx_busy.drain().map(|(_, slot)| slot));
        self.post_all();
    }

    /// Stops the device and starts it again: a pause of the machine.
    pub(super) fn pause(&mut self, between: impl FnOnce(&mut Self)) {
        let positions = self.device.suspend();
        between(self);
        self.resume(&positions);
    }

    /// Moves the guest to a device of another process.
    pub(super) fn restore(&mut self, between: impl FnOnce(&mut Self)) {
        let positions = self.device.suspend();
        let state = self.device.save().unwrap();
        let config = VsockConfig {
            guest_cid: GUEST_CID,
            uds_path: None,
        };
        (self.device, self.handle) = Vsock::new(&config).unwrap();
        self.device.restore(&state).unwrap();
        between(self);
        self.resume(&positions);
    }

    fn resume(&mut self, positions: &[QueuePosition]) {
        let rings = [&self.rx, &self.tx, &self.event];
        self.guest
            .resume(&mut self.device, &rings, positions, self.event_idx);
    }

    /// Offers an event buffer, and rings only if the device asked for it.
    pub(super) fn post_event(&mut self) {
        self.event.submit(&[Buf::Write(EVENT_AREA, 8)]);
        self.event_side.offered = self.event_side.offered.wrapping_add(1);
        if self
            .event_side
            .must_ring(&self.guest, RINGS + 0x2_0000, self.event_idx)
        {
            self.event.kick();
        }
    }

    /// Offers malformed event buffers, each of which must come back.
    pub(super) fn survive_malformed_events(&mut self) {
        survive_malformed_chains(&mut self.event);
        let count = MALFORMED.len() as u16;
        self.event_side.offered = self.event_side.offered.wrapping_add(count);
        self.event_side.told = self.event_side.offered;
    }

    /// The id of the next event.
    pub(super) fn wait_event(&mut self) -> u32 {
        let used = self.event.wait_used();
        assert_eq!(used.len, 4);
        let id = self.guest.read(EVENT_AREA, 4);
        self.guest.write(EVENT_AREA, &[0xff; 8]);
        u32::from_le_bytes(id.try_into().unwrap())
    }

    pub(super) fn post_all(&mut self) {
        for index in 0..u64::from(RING) {
            self.post(RX_AREA + index * u64::from(RX_BUFFER));
        }
        self.ring_rx();
    }

    fn post(&mut self, address: u64) {
        let head = if self.rx_awkward {
            self.rx.submit(&[
                Buf::Write(address, 10),
                Buf::Write(address + 10, 1000),
                Buf::Write(address + 1010, RX_BUFFER - 1010),
            ])
        } else {
            self.rx.submit(&[Buf::Write(address, RX_BUFFER)])
        };
        self.posted(head, Some(address));
    }

    fn posted(&mut self, head: u16, address: Option<u64>) {
        self.rx_posted.insert(head, address);
        self.rx_order.push_back(head);
        self.rx_side.offered = self.rx_side.offered.wrapping_add(1);
    }

    /// Posts buffers in three pieces, and after each one that is readable by the device only.
    pub(super) fn post_awkward(&mut self) {
        self.rx_awkward = true;
        for index in 0..u64::from(RING) / 4 {
            self.post(RX_AREA + index * u64::from(RX_BUFFER));
            self.post_bad();
        }
        self.ring_rx();
    }

    fn post_bad(&mut self) {
        let head = self.rx.submit(&[Buf::Read(RX_AREA, RX_BUFFER)]);
        self.posted(head, None);
    }

    /// Sends a packet, as a header and a payload descriptor.
    pub(super) fn send(&mut self, header: Header, payload: &[u8]) {
        let slot = self.tx_slot();
        self.guest.write(slot, &header.to_wire());
        let mut buffers = vec![Buf::Read(slot, HEADER_LEN as u32)];
        if !payload.is_empty() {
            self.guest.write(slot + HEADER_LEN as u64, payload);
            buffers.push(Buf::Read(slot + HEADER_LEN as u64, payload.len() as u32));
        }
        self.submit(slot, &buffers);
    }

    /// Puts a packet on the ring and does not tell the device.
    pub(super) fn send_without_kick(&mut self, header: Header, payload: &[u8]) {
        let slot = self.tx_slot();
        self.guest.write(slot, &header.to_wire());
        self.guest.write(slot + HEADER_LEN as u64, payload);
        let head = self
            .tx
            .submit(&[Buf::Read(slot, (HEADER_LEN + payload.len()) as u32)]);
        self.tx_busy.insert(head, slot);
        self.tx_order.push_back(head);
        // As if the device had been told and had not looked.
        self.tx_side.offered = self.tx_side.offered.wrapping_add(1);
        self.tx_side.told = self.tx_side.offered;
    }

    /// Sends raw buffers, described by their offset in a slot filled with `bytes`.
    pub(super) fn send_raw(&mut self, bytes: &[u8], buffers: &[(u64, u32)]) {
        let slot = self.tx_slot();
        self.guest.write(slot, bytes);
        let buffers: Vec<_> = buffers
            .iter()
            .map(|&(offset, len)| Buf::Read(slot + offset, len))
            .collect();
        self.submit(slot, &buffers);
    }

    fn submit(&mut self, slot: u64, buffers: &[Buf]) {
        let head = self.tx.submit(buffers);
        self.tx_busy.insert(head, slot);
        self.tx_order.push_back(head);
        self.tx_side.offered = self.tx_side.offered.wrapping_add(1);
        self.ring_tx();
    }

    fn tx_slot(&mut self) -> u64 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.reap();
            // Three descriptors per packet must always be free.
            if self.tx_busy.len() < usize::from(RING) / 3 {
                return self.tx_free.pop_front().unwrap();
            }
            assert!(Instant::now() < deadline, "the device does not take packets");
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    fn ring_rx(&mut self) {
        if self.rx_side.must_ring(&self.guest, RINGS, self.event_idx) {
            self.rx.kick();
        }
    }

    fn ring_tx(&mut self) {
        if self
            .tx_side
            .must_ring(&self.guest, RINGS + 0x1_0000, self.event_idx)
        {
            self.tx.kick();
        }
    }

    fn next_rx(&mut self) -> Option<Used> {
        self.take_interrupt();
        self.rx_side.next(&mut self.rx)
    }

    fn next_tx(&mut self) -> Option<Used> {
        self.take_interrupt();
        self.tx_side.next(&mut self.tx)
    }

    fn take_interrupt(&mut self) {
        // One line for both queues, and tests look at the count themselves.
        let count = self.guest.interrupts();
        if count > 0 {
            self.interrupts += count;
            (self.rx_side.asleep, self.tx_side.asleep) = (false, false);
        }
    }

    /// Takes back sent buffers; returns how many are still with the device.
    pub(super) fn reap(&mut self) -> usize {
        while let Some(used) = self.next_tx() {
            assert_eq!(
                self.tx_order.pop_front(),
                Some(used.head),
                "tx buffers out of order"
            );
            self.tx_free.push_back(self.tx_busy.remove(&used.head).unwrap());
        }
        self.tx_busy.len()
    }

    /// The next packet, if there is one.
    pub(super) fn try_receive(&mut self) -> Option<Packet> {
        let (used, address) = loop {
            let used = self.next_rx()?;
            assert_eq!(
                self.rx_order.pop_front(),
                Some(used.head),
                "rx buffers out of order"
            );
            if let Some(address) = self.rx_posted.remove(&used.head).unwrap() {
                break (used, address);
            }
            assert_eq!(used.len, 0, "a refused buffer was written");
            self.post_bad();
            self.ring_rx();
        };
        assert!(
            used.len >= HEADER_LEN as u32 && used.len <= RX_BUFFER,
            "used length {}",
            used.len
        );
        let bytes = self.guest.read(address, used.len as usize);
        let header = Header::from_wire(bytes[..HEADER_LEN].try_into().unwrap());
        let payload = bytes[HEADER_LEN..].to_vec();
        assert_eq!(header.len as usize, payload.len());
        assert_eq!((header.src_cid, header.dst_cid), (2, u64::from(GUEST_CID)));
        self.post(address);
        self.ring_rx();
        Some(Packet { header, payload })
    }

    /// Waits for a packet.
    pub(super) fn receive(&mut self) -> Packet {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(packet) = self.try_receive() {
                return packet;
            }
            assert!(Instant::now() < deadline, "no packet for the guest");
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Waits for a packet that is no `other`.
    pub(super) fn receive_but(&mut self, other: Op) -> Packet {
        loop {
            let packet = self.receive();
            if packet.header.op != other as u16 {
                return packet;
            }
        }
    }

    /// Waits until the device has done everything it was told to, and what that led to.
    pub(super) fn settle(&self) {
        for _ in 0..5 {
            self.guest.io.drain().unwrap();
        }
    }

    /// Checks that no packet comes within `time`.
    pub(super) fn expect_silence(&mut self, time: Duration) {
        let deadline = Instant::now() + time;
        while Instant::now() < deadline {
            if let Some(packet) = self.try_receive() {
                panic!("unexpected packet {:?}", packet.header);
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

impl Side {
    /// Whether the device wants to hear of the chains offered since the last call (virtio 1.2, 2.7.10).
    fn must_ring(&mut self, guest: &TestGuest, ring: u64, event_idx: bool) -> bool {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let used_ring = ring + 0xc000;
        let read = |address| u16::from_le_bytes(guest.read(address, 2).try_into().unwrap());
        let (old, new) = (std::mem::replace(&mut self.told, self.offered), self.offered);
        if event_idx {
            let event = read(used_ring + 4 + 8 * u64::from(RING));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            read(used_ring) & 1 == 0
        }
    }

    /// The next used chain; when there is none, asks for an interrupt and does not look again before it.
    fn next(&mut self, ring: &mut TestRing) -> Option<Used> {
        if self.asleep {
            return None;
        }
        let used = ring.try_used().or_else(|| {
            ring.set_used_event(self.used);
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            ring.try_used()
        });
        match used {
            Some(_) => self.used = self.used.wrapping_add(1),
            None => self.asleep = true,
        }
        used
    }
}

fn activate(guest: &TestGuest, device: &mut Vsock, event_idx: bool) -> (TestRing, TestRing, TestRing) {
    let mut rings = guest.activate(device, RING, event_idx).into_iter();
    let mut next = || rings.next().unwrap();
    (next(), next(), next())
}
