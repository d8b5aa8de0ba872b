#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::device::UNPLUGGED_INACCESSIBLE;
use super::region::{BlockState, Region, Request, Response};
use super::state;
use super::*;
use crate::devices::virtio::test_resume::{activate_at, config};
use crate::devices::virtio::test_ring::{
    BUFFERS, Buf, PATIENCE, TestGuest, TestRing, flood, survive_malformed_chains,
};
use crate::devices::virtio::transport::mmio::interrupt::INTERRUPT_CONFIG;
use crate::devices::virtio::{CHAIN_FEATURES, VirtioDevice};
use crate::guest_log::recorder::assert_limited;
use crate::memory::layout::WINDOW_ALIGN;
use crate::memory::window::Windows;
use crate::memory::window::fake::{FakeMemslots, windows};
use vm_memory::{Bytes, GuestAddress};

const FEATURES: u64 = CHAIN_FEATURES | UNPLUGGED_INACCESSIBLE;
const MIB: u64 = 1 << 20;
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

/// A driver at a device with two chunks and a limit of 200 MiB.
struct Driver {
    guest: TestGuest,
    rings: Vec<TestRing>,
    device: Mem,
    windows: Windows,
    memory: Arc<crate::memory::GuestMemory>,
    slots: Arc<FakeMemslots>,
    start: u64,
}

impl Driver {
    fn new() -> Self {
        let (windows, memory, slots) = windows(2 * WINDOW_ALIGN, 0);
        let window = windows.hotplug().unwrap().clone();
        Self::over(windows, memory, slots, Mem::new("mem", window, 200 * MIB))
    }

    fn over(
        windows: Windows,
        memory: Arc<crate::memory::GuestMemory>,
        slots: Arc<FakeMemslots>,
        mut device: Mem,
    ) -> Self {
        let guest = TestGuest::new();
        let start = windows.hotplug().unwrap().region().start;
        let rings = vec![guest.ring(0, 16, true)];
        activate_at(&guest, &mut device, &rings, FEATURES, &[]).unwrap();
        Self {
            guest,
            rings,
            device,
            windows,
            memory,
            slots,
            start,
        }
    }

    fn submit(&mut self, kind: u16, address: u64, blocks: u16) {
        let mut request = [0; 24];
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&address.to_le_bytes());
        request[16..18].copy_from_slice(&blocks.to_le_bytes());
        self.guest.write(BUFFERS, &request);
        self.guest.write(BUFFERS + 64, &[0xff; 16]);
        self.rings[0].submit(&[Buf::Read(BUFFERS, 24), Buf::Write(BUFFERS + 64, 10)]);
    }

    fn response(&self) -> (u16, u16) {
        let bytes = self.guest.read(BUFFERS + 64, 10);
        (
            u16::from_le_bytes([bytes[0], bytes[1]]),
            u16::from_le_bytes([bytes[8], bytes[9]]),
        )
    }

    fn request(&mut self, kind: u16, address: u64, blocks: u16) -> (u16, u16) {
        self.submit(kind, address, blocks);
        self.rings[0].kick();
        assert_eq!(self.rings[0].wait_used().len, 10);
        self.response()
    }

    /// Sets the target without waiting for it.
    fn target(&mut self, bytes: u64) {
        let handle = self.device.handle();
        let _ = handle.resize(0, bytes, Duration::ZERO);
        // A resize that times out gives up; the driver of these tests wants the target to stay.
        self.device.shared.update(|state| {
            state.region.as_mut().unwrap().request(bytes);
        });
    }

    fn sizes(&self) -> (u64, u64) {
        (
            u64::from_le_bytes(config(&self.device, 40)),
            u64::from_le_bytes(config(&self.device, 48)),
        )
    }

    fn chunks(&self) -> usize {
        self.slots.set.lock().unwrap().len()
    }
}

#[test]
fn config_when_read_describes_the_region() {
    let driver = Driver::new();
    let config: [u8; 56] = config(&driver.device, 0);
    let field = |index: usize| {
        let at = index * 8;
        u64::from_le_bytes(config[at..at + 8].try_into().unwrap())
    };
    let fields: Vec<_> = (0..7).map(field).collect();
    let size = 2 * WINDOW_ALIGN;
    assert_eq!(fields, [BLOCK_SIZE, 0, driver.start, size, size, 0, 0]);
}

#[test]
fn plug_when_requested_is_acknowledged_and_visible() {
    let mut driver = Driver::new();
    driver.target(8 * MIB);
    assert_eq!(driver.request(PLUG, driver.start, 3).0, ACK);
    assert_eq!(driver.sizes(), (6 * MIB, 8 * MIB));
    assert_eq!(driver.chunks(), 1);
    assert_eq!(driver.request(STATE, driver.start, 3), (ACK, 0));
    assert_eq!(driver.request(STATE, driver.start + 6 * MIB, 5), (ACK, 1));
    assert_eq!(driver.request(STATE, driver.start, 5), (ACK, 2));
    driver.guest.wait_interrupt();
}

/// Whether the host's kernel can write at guest physical `address`, as KVM would for a vCPU.
fn usable(memory: &crate::memory::GuestMemory, address: u64) -> bool {
    use std::os::fd::AsRawFd;
    let zero = std::fs::File::open("/dev/zero").unwrap();
    let at = vm_memory::GuestMemory::get_host_address(memory, GuestAddress(address)).unwrap();
    // SAFETY: the kernel checks the address itself.
    unsafe { libc::read(zero.as_raw_fd(), at.cast(), 1) == 1 }
}

#[test]
fn memory_when_not_plugged_cannot_be_used_beside_a_block_that_is() {
    let mut driver = Driver::new();
    let start = driver.start;
    driver.target(8 * MIB);
    let blocks = |driver: &Driver| -> Vec<bool> {
        (0..5)
            .map(|block| usable(&driver.memory, start + block * BLOCK_SIZE))
            .collect()
    };
    assert_eq!(driver.request(PLUG, start + 2 * MIB, 2).0, ACK);
    assert_eq!(
        (driver.chunks(), blocks(&driver)),
        (1, vec![false, true, true, false, false])
    );
    assert!(!usable(&driver.memory, start + WINDOW_ALIGN));
    assert_eq!(driver.request(UNPLUG, start + 2 * MIB, 1).0, ACK);
    assert_eq!(blocks(&driver), [false, false, true, false, false]);
    assert_eq!(driver.request(UNPLUG_ALL, 0, 0).0, ACK);
    assert_eq!((driver.chunks(), blocks(&driver)), (0, vec![false; 5]));
    // A device that is told to use such a block does, for a moment: the guest gets nothing of it.
    driver.memory.write_obj(7u8, GuestAddress(start)).unwrap();
    let strays = |driver: &Driver| {
        driver
            .device
            .counters()
            .iter()
            .find(|c| c.0 == "stray_pages")
            .unwrap()
            .1
    };
    assert_eq!(strays(&driver), 1);
    assert_eq!(driver.request(PLUG, start, 1).0, ACK);
    assert_eq!(driver.memory.read_obj::<u8>(GuestAddress(start)).unwrap(), 0);
}

#[test]
fn unplug_all_when_much_is_plugged_takes_turns_and_frees_everything() {
    let (windows, memory, slots) = windows(4096 * MIB, 0);
    let window = windows.hotplug().unwrap().clone();
    let mut driver = Driver::over(windows, memory, slots, Mem::new("mem", window, 4096 * MIB));
    driver.target(4096 * MIB);
    for part in 0..3 {
        assert_eq!(driver.request(PLUG, driver.start + part * 1200 * MIB, 600).0, ACK);
    }
    assert_eq!(driver.sizes().0, 3600 * MIB);
    // Suspended somewhere amid the turns, it goes on.
    driver.submit(UNPLUG_ALL, 0, 0);
    driver.rings[0].kick();
    let positions = driver.device.suspend();
    activate_at(
        &driver.guest,
        &mut driver.device,
        &driver.rings,
        FEATURES,
        &positions,
    )
    .unwrap();
    driver.rings[0].wait_used();
    assert_eq!(
        (driver.response().0, driver.sizes().0, driver.chunks()),
        (ACK, 0, 0)
    );
    assert!(!usable(&driver.memory, driver.start));
}

#[test]
fn unplug_when_it_is_large_takes_turns_and_outlives_a_save_between_two() {
    let fresh = || {
        let (windows, memory, slots) = windows(4096 * MIB, 0);
        let window = windows.hotplug().unwrap().clone();
        (Region::new(window, 4096 * MIB), windows, memory, slots)
    };
    let (mut region, ..) = fresh();
    let start = region.start();
    let all = Request::Unplug(start, 2048);
    region.request(4096 * MIB);
    assert_eq!(region.handle(Request::Plug(start, 2048)), Some(Response::Ack));
    assert_eq!(region.handle(all), None);
    assert_eq!(region.plugged(), 2048 * MIB);
    // In another process it goes on where it was.
    let saved = state::save("mem", &region).unwrap();
    let (mut region, _windows, memory, slots) = fresh();
    state::restore("mem", &mut region, &saved).unwrap();
    assert_eq!(region.handle(all), Some(Response::Ack));
    assert_eq!((region.plugged(), slots.set.lock().unwrap().len()), (0, 0));
    assert_eq!(
        region.handle(all),
        Some(Response::Error),
        "nothing is plugged any more"
    );
    assert!(!usable(&memory, start));
}

#[test]
fn unplug_when_another_request_comes_between_its_turns_is_a_new_one() {
    let (windows, _memory, _slots) = windows(4096 * MIB, 0);
    let mut region = Region::new(windows.hotplug().unwrap().clone(), 4096 * MIB);
    let start = region.start();
    let all = Request::Unplug(start, 2048);
    region.request(4096 * MIB);
    assert_eq!(region.handle(Request::Plug(start, 2048)), Some(Response::Ack));
    assert_eq!(region.handle(all), None);
    // Looking changes nothing.
    assert_eq!(
        region.handle(Request::State(start, 2048)),
        Some(Response::State(BlockState::Mixed))
    );
    assert_eq!(region.handle(Request::Plug(start, 1)), Some(Response::Ack));
    assert_eq!(region.handle(all), Some(Response::Error), "a part is not plugged");
    assert_eq!(region.plugged(), 2050 * MIB);
    assert_eq!(region.handle(Request::UnplugAll), None);
}

#[test]
fn plug_when_it_breaks_the_rules_is_refused_and_changes_nothing() {
    let mut driver = Driver::new();
    let start = driver.start;
    driver.target(8 * MIB);
    assert_eq!(driver.request(PLUG, start + 2 * MIB, 1).0, ACK);
    for (address, blocks, expected) in [
        (start, 2, ERROR),
        (start + MIB, 1, ERROR),
        (start, 0, ERROR),
        (0, 1, ERROR),
        (start - 2 * MIB, 2, ERROR),
        (start + 2 * WINDOW_ALIGN - 2 * MIB, 2, ERROR),
        (start + 2 * WINDOW_ALIGN, 1, ERROR),
        (u64::MAX - 2 * MIB + 1, 1, ERROR),
        (start + 4 * MIB, 4, NACK),
        (start + 4 * MIB, u16::MAX, ERROR),
    ] {
        assert_eq!(
            driver.request(PLUG, address, blocks).0,
            expected,
            "{address:#x} {blocks}"
        );
        assert_eq!(driver.sizes().0, 2 * MIB);
    }
    assert_eq!(driver.request(77, start, 1).0, ERROR);
}

#[test]
fn plug_when_the_host_refuses_is_busy_and_undone() {
    let mut driver = Driver::new();
    driver.target(8 * MIB);
    driver.slots.broken.store(true, Ordering::SeqCst);
    assert_eq!(driver.request(PLUG, driver.start, 1).0, BUSY);
    assert_eq!(driver.sizes().0, 0);
    driver.slots.broken.store(false, Ordering::SeqCst);
    assert_eq!(driver.request(PLUG, driver.start, 1).0, ACK);
}

#[test]
fn unplug_when_the_last_block_of_a_chunk_goes_hides_it_and_frees_memory() {
    let mut driver = Driver::new();
    let start = driver.start;
    driver.target(8 * MIB);
    // One block in each chunk.
    let at = start + WINDOW_ALIGN - 2 * MIB;
    assert_eq!(driver.request(PLUG, at, 2).0, ACK);
    assert_eq!(driver.chunks(), 2);
    driver
        .memory
        .write_obj(7u8, GuestAddress(start + WINDOW_ALIGN))
        .unwrap();
    assert_eq!(driver.request(UNPLUG, start + WINDOW_ALIGN, 2).0, ERROR);
    assert_eq!(driver.request(UNPLUG, start + WINDOW_ALIGN, 1).0, ACK);
    assert_eq!(driver.chunks(), 1);
    let byte: u8 = driver
        .memory
        .read_obj(GuestAddress(start + WINDOW_ALIGN))
        .unwrap();
    assert_eq!(byte, 0);
    assert!(driver.windows.is_ram(at, 4096) && !driver.windows.is_ram(at + 2 * MIB, 4096));
    assert_eq!(driver.request(UNPLUG_ALL, 0, 0).0, ACK);
    assert_eq!((driver.sizes().0, driver.chunks()), (0, 0));
}

#[test]
fn chains_when_malformed_or_too_short_are_returned_without_effect() {
    let mut driver = Driver::new();
    survive_malformed_chains(&mut driver.rings[0]);
    assert_limited(&["mem: chain dropped"], 300, || flood(&mut driver.rings[0], 300));
    driver.target(8 * MIB);
    for (readable, writable) in [(24, 9), (23, 10), (0, 10), (24, 0)] {
        let mut request = [0; 24];
        request[8..16].copy_from_slice(&driver.start.to_le_bytes());
        request[16] = 1;
        driver.guest.write(BUFFERS, &request);
        let chain = [Buf::Read(BUFFERS, readable), Buf::Write(BUFFERS + 64, writable)];
        let used = driver.rings[0].round_trip(&chain);
        assert_eq!(used.len, if writable >= 10 { 10 } else { 0 });
        assert_eq!(driver.sizes().0, 0);
    }
    // Wrong direction.
    let used = driver.rings[0].round_trip(&[Buf::Write(BUFFERS, 24)]);
    assert_eq!(used.len, 10);
    assert_eq!(driver.guest.read(BUFFERS, 2), [3, 0]);
    assert_eq!(driver.sizes().0, 0);
}

#[test]
fn queue_when_its_avail_index_jumps_stops_until_reset() {
    let mut driver = Driver::new();
    driver.rings[0].set_avail_index(1000);
    driver.rings[0].kick();
    driver.device.reset();
    driver.rings = vec![driver.guest.ring(0, 16, true)];
    activate_at(&driver.guest, &mut driver.device, &driver.rings, FEATURES, &[]).unwrap();
    assert_eq!(driver.request(STATE, driver.start, 1), (ACK, 1));
}

#[test]
fn activate_when_the_driver_would_read_unplugged_blocks_is_refused() {
    let guest = TestGuest::new();
    let (windows, _memory, _slots) = windows(1, 0);
    let mut device = Mem::new("mem", windows.hotplug().unwrap().clone(), MIB);
    let rings = [guest.ring(0, 16, true)];
    assert!(activate_at(&guest, &mut device, &rings, CHAIN_FEATURES, &[]).is_err());
}

#[test]
fn resize_when_the_guest_follows_returns_and_when_not_keeps_what_was_reached() {
    let mut driver = Driver::new();
    let handle = driver.device.handle();
    let start = driver.start;
    let resize = |bytes, timeout| {
        let handle = handle.clone();
        std::thread::spawn(move || handle.resize(100, bytes, timeout))
    };
    // Rounded up from 5 MiB.
    let pending = resize(5 * MIB, PATIENCE);
    driver.guest.wait_interrupt();
    assert_eq!(driver.guest.status() & INTERRUPT_CONFIG, INTERRUPT_CONFIG);
    assert_eq!(driver.sizes(), (0, 8 * MIB));
    assert_eq!(driver.request(PLUG, start, 4).0, ACK);
    assert_eq!(pending.join().unwrap(), Ok((0, 8 * MIB)));

    let pending = resize(4 * MIB, Duration::from_millis(50));
    assert_eq!(
        pending.join().unwrap(),
        Err(ResizeMemoryError::Timeout {
            target: 100 + 4 * MIB,
            reached: 100 + 8 * MIB,
            timeout_ms: 50
        })
    );
    assert_eq!(driver.sizes(), (8 * MIB, 8 * MIB));

    assert_eq!(
        handle.resize(100, 201 * MIB, PATIENCE),
        Err(ResizeMemoryError::AboveMaximum {
            requested: 100 + 201 * MIB,
            maximum: 100 + 200 * MIB
        })
    );
    assert!(matches!(
        handle.resize(100, u64::MAX, PATIENCE),
        Err(ResizeMemoryError::AboveMaximum { .. })
    ));
    assert_eq!(
        handle.resize(100, 8 * MIB, Duration::ZERO),
        Ok((8 * MIB, 8 * MIB))
    );
    driver.device.suspend();
    assert_eq!(handle.resize(100, 0, PATIENCE), Err(ResizeMemoryError::NoDriver));
    drop(driver);
    assert_eq!(handle.resize(100, 0, PATIENCE), Err(ResizeMemoryError::Ended));
}

#[test]
fn suspend_when_requests_wait_serves_them_after_the_next_activation() {
    let mut driver = Driver::new();
    driver.target(8 * MIB);
    assert_eq!(driver.request(PLUG, driver.start, 1).0, ACK);
    let positions = driver.device.suspend();
    assert_eq!((positions[0].next_avail, positions[0].next_used), (1, 1));
    assert!(driver.device.suspend().is_empty());
    driver.submit(PLUG, driver.start + 2 * MIB, 1);
    activate_at(
        &driver.guest,
        &mut driver.device,
        &driver.rings,
        FEATURES,
        &positions,
    )
    .unwrap();
    // Nobody kicks.
    driver.rings[0].wait_used();
    assert_eq!(driver.response().0, ACK);
    assert_eq!(driver.sizes(), (4 * MIB, 8 * MIB));
}

#[test]
fn restore_when_into_a_fresh_device_goes_on_where_the_old_one_stopped() {
    let mut driver = Driver::new();
    driver.target(100 * MIB);
    let far = driver.start + WINDOW_ALIGN + 64 * MIB;
    assert_eq!(driver.request(PLUG, driver.start, 2).0, ACK);
    assert_eq!(driver.request(PLUG, far, 1).0, ACK);
    let positions = driver.device.suspend();
    let saved = driver.device.save().unwrap();
    driver.submit(PLUG, driver.start, 1);

    let (windows, _memory, slots) = windows(2 * WINDOW_ALIGN, 0);
    let mut device = Mem::new("mem", windows.hotplug().unwrap().clone(), 200 * MIB);
    device.restore(&saved).unwrap();
    assert_eq!(slots.set.lock().unwrap().len(), 2);
    activate_at(&driver.guest, &mut device, &driver.rings, FEATURES, &positions).unwrap();
    driver.rings[0].wait_used();
    // Plugged already.
    assert_eq!(driver.response().0, ERROR);
    driver.device = device;
    assert_eq!(driver.sizes(), (6 * MIB, 100 * MIB));
    assert_eq!(driver.request(STATE, far, 1), (ACK, 0));
}

#[test]
fn restore_when_the_state_is_impossible_is_refused() {
    /// As `MemState`.
    type Fields = (u64, u64, u64, Vec<(u64, u64)>, Option<(u64, u64, u64)>);
    let fresh = || {
        let (windows, _memory, slots) = windows(2 * WINDOW_ALIGN, 0);
        let start = windows.hotplug().unwrap().region().start;
        (
            Mem::new("mem", windows.hotplug().unwrap().clone(), 200 * MIB),
            start,
            slots,
        )
    };
    let size = 2 * WINDOW_ALIGN;
    let start = fresh().1;
    let cases: [Fields; 13] = [
        (start + size, size, 0, vec![], None),
        (start, size / 2, 0, vec![], None),
        (start, size, MIB, vec![], None),
        (start, size, 202 * MIB, vec![], None),
        (start, size, 0, vec![(0, 129)], None),
        (start, size, 0, vec![(128, 1)], None),
        (start, size, 0, vec![(0, 0)], None),
        (start, size, 0, vec![(4, 2), (5, 1)], None),
        (start, size, 0, vec![(u64::MAX, 2)], None),
        (start, size, 0, vec![(4, 4)], Some((0, 8, 0))),
        (start, size, 0, vec![(4, 4)], Some((0, 8, 8))),
        (start, size, 0, vec![(4, 4)], Some((0, 9, 4))),
        (start, size, 0, vec![(4, 4)], Some((0, u64::MAX, 4))),
    ];
    for case in cases {
        let (mut device, _, slots) = fresh();
        let bytes = postcard::to_stdvec(&case).unwrap();
        assert!(device.restore(&bytes).is_err(), "{case:?}");
        assert!(slots.set.lock().unwrap().is_empty());
    }
    let (mut device, _, _slots) = fresh();
    assert!(device.restore(&[]).is_err());
    let good: Fields = (start, size, 4 * MIB, vec![(0, 1), (4, 4)], Some((1, 8, 4)));
    device.restore(&postcard::to_stdvec(&good).unwrap()).unwrap();
}
