use std::sync::Arc;
use std::time::Instant;

use super::*;
use crate::config::BalloonConfig;
use crate::devices::virtio::test_resume::{activate_at, config};
use crate::devices::virtio::test_ring::{
    BUFFERS, Buf, MEMORY_SIZE, PATIENCE, TestGuest, TestRing, flood, survive_malformed_chains,
};
use crate::devices::virtio::transport::mmio::interrupt::INTERRUPT_CONFIG;
use crate::devices::virtio::{CHAIN_FEATURES, VirtioDevice};
use crate::guest_log::recorder::assert_limited;
use crate::memory::window::Windows;
use crate::memory::window::fake::{FakeMemslots, windows};

const STATS: u64 = 1 << 1;
const OOM: u64 = 1 << 2;
const REPORTING: u64 = 1 << 5;
/// Where pages are that tests give away.
const GIVEN: u64 = 0x80_0000;

fn balloon(statistics_interval_s: u16) -> (Balloon, Windows, Arc<FakeMemslots>) {
    // 16 MiB of RAM, as the fake guest has.
    let (windows, _memory, slots) = windows(1, 0);
    let config = BalloonConfig {
        id: "balloon".to_owned(),
        deflate_on_oom: true,
        reporting: true,
        statistics_interval_s,
    };
    (Balloon::new(&config, &windows), windows, slots)
}

fn rings(guest: &TestGuest, indices: &[usize]) -> Vec<TestRing> {
    indices.iter().map(|index| guest.ring(*index, 64, true)).collect()
}

fn start(guest: &TestGuest, device: &mut Balloon, features: u64, indices: &[usize]) -> Vec<TestRing> {
    let rings = rings(guest, indices);
    activate_at(guest, device, &rings, CHAIN_FEATURES | features, &[]).unwrap();
    rings
}

fn pfns(pages: &[u64]) -> Vec<u8> {
    let pfn = |address: &u64| ((address / 4096) as u32).to_le_bytes();
    pages.iter().flat_map(pfn).collect()
}

fn counter(device: &Balloon, name: &str) -> u64 {
    let counters = device.counters();
    counters.iter().find(|(n, _)| *n == name).unwrap().1
}

#[test]
fn features_when_configured_are_offered() {
    let (device, ..) = balloon(5);
    assert_eq!(device.features(), CHAIN_FEATURES | STATS | OOM | REPORTING);
    assert_eq!(device.queue_sizes().len(), 5);
    let (windows, _memory, _slots) = windows(0, 0);
    let config = BalloonConfig {
        id: "balloon".to_owned(),
        deflate_on_oom: false,
        reporting: false,
        statistics_interval_s: 0,
    };
    let device = Balloon::new(&config, &windows);
    assert_eq!(device.features(), CHAIN_FEATURES);
    assert_eq!(device.queue_sizes().len(), 2);
}

#[test]
fn target_when_set_is_in_the_configuration_and_signalled() {
    let guest = TestGuest::new();
    let (mut device, windows, _slots) = balloon(0);
    device.set_target(4096 * 3 + 1).unwrap();
    let _rings = start(&guest, &mut device, 0, &[0, 1]);
    assert_eq!(config::<8>(&device, 0), [3, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(guest.interrupts(), 0);
    device.set_target(8192).unwrap();
    assert_eq!(guest.wait_interrupt(), 1);
    assert_eq!(guest.status(), INTERRUPT_CONFIG);
    device.write_config(4, &2u32.to_le_bytes());
    device.write_config(0, &9u32.to_le_bytes());
    device.write_config(4, &[1, 1]);
    let expected = BalloonStatus {
        target: 8192,
        actual: 8192,
    };
    assert_eq!(device.status(), expected);
    let too_large = MEMORY_SIZE as u64 + 1;
    assert!(matches!(
        device.set_target(too_large),
        Err(BalloonError::TooLarge { .. })
    ));
    assert!(device.set_target(u64::MAX).is_err());
    windows.hotplug().unwrap().plug(0, 128 << 20).unwrap();
    windows.hotplug().unwrap().open(0, 128 << 20).unwrap();
    device.set_target(too_large).unwrap();
}

#[test]
fn inflate_when_pages_are_given_frees_exactly_them() {
    let guest = TestGuest::new();
    let (mut device, ..) = balloon(0);
    let mut rings = start(&guest, &mut device, 0, &[0, 1]);
    guest.write(GIVEN, &vec![7; 0x1_0000]);
    let list = pfns(&[GIVEN + 0x3000, GIVEN + 0x1000, GIVEN + 0x2000, GIVEN + 0x1000]);
    guest.write(BUFFERS, &list);
    // In two buffers, not split at a page number.
    let chain = [Buf::Read(BUFFERS, 5), Buf::Read(BUFFERS + 5, 11)];
    assert_eq!(rings[0].round_trip(&chain).len, 0);
    guest.wait_interrupt();
    assert_eq!(guest.read(GIVEN, 0x1000), [7; 0x1000]);
    assert_eq!(guest.read(GIVEN + 0x1000, 0x3000), [0; 0x3000]);
    assert_eq!(guest.read(GIVEN + 0x4000, 0x1000), [7; 0x1000]);
    assert_eq!(counter(&device, "inflated_bytes"), 0x3000);

    guest.write(GIVEN + 0x1000, &[8; 0x1000]);
    rings[1].round_trip(&[Buf::Read(BUFFERS, 16)]);
    assert_eq!(guest.read(GIVEN + 0x1000, 0x1000), [8; 0x1000]);
    assert_eq!(counter(&device, "deflated_bytes"), 0x4000);
}

#[test]
fn inflate_when_pages_are_not_ram_frees_the_others() {
    let guest = TestGuest::new();
    let (mut device, ..) = balloon(0);
    let mut rings = start(&guest, &mut device, 0, &[0, 1]);
    guest.write(GIVEN, &[7; 0x1000]);
    let list = pfns(&[MEMORY_SIZE as u64, 0xffff_ffff << 12, 0x1_0000_0000, GIVEN]);
    guest.write(BUFFERS, &list);
    rings[0].round_trip(&[Buf::Read(BUFFERS, 16)]);
    assert_eq!(guest.read(GIVEN, 0x1000), [0; 0x1000]);
    assert_eq!(counter(&device, "refused_ranges"), 3);
    // A list of a megabyte is cut, a device-writable one is no list.
    rings[0].round_trip(&[Buf::Read(BUFFERS + 0x10_0000, 1 << 20)]);
    let before = counter(&device, "inflated_bytes");
    rings[0].round_trip(&[Buf::Write(BUFFERS, 16)]);
    rings[0].round_trip(&[Buf::Read(BUFFERS, 3)]);
    assert_eq!(counter(&device, "inflated_bytes"), before);
}

#[test]
fn reporting_when_ranges_are_free_in_the_guest_frees_whole_pages() {
    let guest = TestGuest::new();
    let (mut device, ..) = balloon(0);
    // Linux numbers queues without gaps.
    let mut rings = start(&guest, &mut device, REPORTING, &[0, 1, 2]);
    guest.write(GIVEN, &[7; 0x8000]);
    rings[2].round_trip(&[
        Buf::Write(GIVEN + 0x4000, 0x2000),
        Buf::Write(GIVEN + 100, 0x2000),
    ]);
    assert_eq!(guest.read(GIVEN, 0x1000), [7; 0x1000]);
    assert_eq!(guest.read(GIVEN + 0x1000, 0x1000), [0; 0x1000]);
    assert_eq!(guest.read(GIVEN + 0x2000, 0x2000), [7; 0x2000]);
    assert_eq!(guest.read(GIVEN + 0x4000, 0x2000), [0; 0x2000]);
    assert_eq!(counter(&device, "reported_bytes"), 0x3000);
}

#[test]
fn reporting_when_queues_are_numbered_by_the_specification_works() {
    let guest = TestGuest::new();
    let (mut device, ..) = balloon(0);
    let mut three = start(&guest, &mut device, REPORTING, &[0, 1, 4]);
    guest.write(GIVEN, &[7; 0x1000]);
    three[2].round_trip(&[Buf::Write(GIVEN, 0x1000)]);
    assert_eq!(guest.read(GIVEN, 0x1000), [0; 0x1000]);
    device.reset();
    let too_few = rings(&guest, &[0, 1]);
    assert!(activate_at(&guest, &mut device, &too_few, CHAIN_FEATURES | REPORTING, &[]).is_err());
}

#[test]
fn statistics_when_sent_are_reported_and_asked_for_again() {
    let guest = TestGuest::new();
    let (mut device, ..) = balloon(1);
    let mut rings = start(&guest, &mut device, STATS, &[0, 1, 2]);
    assert!(device.statistics().is_err());
    let stat = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
    guest.write(
        BUFFERS,
        &[stat(4, 1000), stat(99, 1), stat(5, u64::MAX), vec![6]].concat(),
    );
    rings[2].submit(&[Buf::Read(BUFFERS, 31)]);
    rings[2].kick();
    // The buffer comes back when the device wants the next ones.
    assert_eq!(rings[2].wait_used().len, 0);
    let statistics = device.statistics().unwrap();
    let values: Vec<_> = statistics.values.into_iter().collect();
    assert_eq!(values, [("free_memory", 1000), ("total_memory", u64::MAX)]);
    assert_eq!(balloon(0).0.statistics(), {
        let reason = "statistics_interval_s is 0";
        let id = "balloon".to_owned();
        Err(BalloonError::NoStatistics { id, reason })
    });
}

#[test]
fn statistics_when_several_buffers_are_sent_returns_the_older_ones() {
    let guest = TestGuest::new();
    let (mut device, ..) = balloon(600);
    let mut rings = start(&guest, &mut device, STATS, &[0, 1, 2]);
    let heads: Vec<_> = (0..20)
        .map(|_| rings[2].submit(&[Buf::Read(BUFFERS, 20)]))
        .collect();
    rings[2].kick();
    for head in &heads[..19] {
        assert_eq!(rings[2].wait_used().head, *head);
    }
    let positions = device.suspend();
    assert_eq!(rings[2].wait_used().head, heads[19]);
    assert_eq!((positions[2].next_avail, positions[2].next_used), (20, 20));
}

#[test]
fn malformed_chains_are_returned_by_each_queue() {
    let guest = TestGuest::new();
    let (mut device, ..) = balloon(1);
    let mut rings = start(&guest, &mut device, STATS | REPORTING, &[0, 1, 2, 3]);
    for ring in &mut rings {
        survive_malformed_chains(ring);
    }
    assert_limited(&["balloon: chain dropped"], 300, || flood(&mut rings[0], 300));
    rings[0].set_avail_index(5000);
    rings[0].kick();
    rings[1].round_trip(&[Buf::Read(BUFFERS, 16)]);
}

#[test]
fn suspend_when_chains_wait_serves_them_after_the_next_activation() {
    let guest = TestGuest::new();
    let (mut device, windows, _slots) = balloon(600);
    let features = CHAIN_FEATURES | STATS | REPORTING;
    let mut rings = start(&guest, &mut device, STATS | REPORTING, &[0, 1, 2, 3]);
    device.set_target(3 << 20).unwrap();
    device.write_config(4, &77u32.to_le_bytes());
    let held = rings[2].submit(&[Buf::Read(BUFFERS, 10)]);
    rings[2].kick();
    let deadline = Instant::now() + PATIENCE;
    while counter(&device, "statistics_received") == 0 {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    let positions = device.suspend();
    assert_eq!(rings[2].wait_used().head, held);
    let saved = device.save().unwrap();

    guest.write(GIVEN, &[7; 0x2000]);
    guest.write(BUFFERS, &pfns(&[GIVEN]));
    rings[0].submit(&[Buf::Read(BUFFERS, 4)]);
    activate_at(&guest, &mut device, &rings, features, &positions).unwrap();
    rings[0].wait_used();
    assert_eq!(guest.read(GIVEN, 0x1000), [0; 0x1000]);
    let positions = device.suspend();

    rings[3].submit(&[Buf::Write(GIVEN + 0x1000, 0x1000)]);
    let mut restored = Balloon::new(
        &BalloonConfig {
            id: "balloon".to_owned(),
            deflate_on_oom: true,
            reporting: true,
            statistics_interval_s: 600,
        },
        &windows,
    );
    restored.restore(&saved).unwrap();
    assert_eq!(restored.status(), device.status());
    activate_at(&guest, &mut restored, &rings, features, &positions).unwrap();
    rings[3].wait_used();
    assert_eq!(guest.read(GIVEN + 0x1000, 0x1000), [0; 0x1000]);
}

#[test]
fn restore_when_the_target_is_beyond_memory_is_refused() {
    let (mut device, ..) = balloon(0);
    let bytes = |target: u32, actual: u32| postcard::to_stdvec(&(target, actual)).unwrap();
    assert!(device.restore(&bytes(u32::MAX, 0)).is_err());
    assert!(device.restore(&[]).is_err());
    device.restore(&bytes(4096, u32::MAX)).unwrap();
    assert_eq!(device.status().target, 16 << 20);
}
