mod properties;

use std::sync::Mutex;

use super::registers::{RegisterPages, Registers};
use super::slots::Slots;
use super::*;
use crate::acpi::shared_page::SharedPage;
use crate::bus::BusDevice;
use crate::confinement::Role;
use crate::devices::virtio::ActivateError;
use crate::devices::virtio::state::{self, QueuePosition, StateError};
use crate::guest_log::recorder::assert_limited;
use crate::memory::allocate;
use crate::memory::layout::MemoryLayout;

const STATUS: u64 = 0x70;
/// Where the fake device stands in its first queue when it is suspended.
const POSITION: QueuePosition = QueuePosition {
    index: 0,
    next_avail: 7,
    next_used: 5,
};
const OFFERED: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1;

#[derive(Debug, Default)]
struct Calls {
    suspends: u32,
    /// Position of the first queue at each activation.
    positions: Vec<(u16, u16)>,
    activations: Vec<(u64, Vec<(usize, u16)>)>,
    resets: usize,
    config: Vec<(u64, Vec<u8>)>,
    /// Names of the threads that started or stopped it.
    threads: Vec<String>,
}

impl Calls {
    fn note_thread(&mut self) {
        let thread = std::thread::current();
        self.threads.push(thread.name().unwrap_or_default().to_owned());
    }
}

struct Fake(Arc<Mutex<Calls>>);

impl VirtioDevice for Fake {
    fn id(&self) -> &str {
        "fake"
    }

    fn device_type(&self) -> u32 {
        42
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16, 8]
    }

    fn features(&self) -> u64 {
        OFFERED
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (byte, value) in data.iter_mut().zip(offset..) {
            *byte = value as u8;
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.0.lock().unwrap().config.push((offset, data.to_vec()));
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let queues = activation
            .queues
            .iter()
            .map(|q| (q.index, q.queue.size()))
            .collect();
        if let Some(first) = activation.queues.first() {
            let position = (first.queue.next_avail(), first.queue.next_used());
            self.0.lock().unwrap().positions.push(position);
        }
        let mut calls = self.0.lock().unwrap();
        calls.activations.push((activation.features, queues));
        calls.note_thread();
        Ok(())
    }

    fn reset(&mut self) {
        let mut calls = self.0.lock().unwrap();
        calls.resets += 1;
        calls.note_thread();
    }

    fn suspend(&mut self) -> Vec<QueuePosition> {
        self.0.lock().unwrap().suspends += 1;
        vec![POSITION]
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        Ok(Vec::new())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        state::expect_none(self.id(), state)
    }
}

struct Driver {
    transport: MmioTransport,
    calls: Arc<Mutex<Calls>>,
    irqfd: Arc<EventFd>,
}

impl Driver {
    fn new() -> Self {
        let calls = Arc::new(Mutex::new(Calls::default()));
        let irqfd = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let (io, _) = IoLoop::spawn("test-io", Confinement::default()).unwrap();
        let kicks = (0..2)
            .map(|_| Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()))
            .collect();
        let host = Host {
            memory: Arc::new(allocate(&MemoryLayout::ram(64 << 20)).unwrap()),
            io,
            confinement: Confinement::default(),
        };
        let interrupt = SlotInterrupt::new(Registers::unseen().unwrap(), irqfd.clone());
        let transport = MmioTransport::new(Box::new(Fake(calls.clone())), host, interrupt, kicks);
        Self {
            transport,
            calls,
            irqfd,
        }
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u64, value: u32) -> u32 {
        self.transport.write(offset, &value.to_le_bytes());
        self.read(STATUS)
    }

    fn features(&mut self, features: u64) {
        for select in [0, 1] {
            self.write(0x24, select);
            self.write(0x20, (features >> (32 * select)) as u32);
        }
    }

    fn negotiate(&mut self, features: u64) -> u32 {
        self.write(STATUS, 1);
        self.write(STATUS, 3);
        self.features(features);
        self.write(STATUS, 11)
    }

    fn queue(&mut self, index: u32, size: u32, desc: u64) {
        self.write(0x30, index);
        for (offset, value) in [
            (0x38, size),
            (0x80, desc as u32),
            (0x84, (desc >> 32) as u32),
            (0x90, 0x20_1000),
            (0xa0, 0x20_2000),
            (0x44, 1),
        ] {
            self.write(offset, value);
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.transport.host.io.stop();
    }
}

#[test]
fn status_when_steps_are_skipped_stays() {
    let mut driver = Driver::new();
    assert_eq!(driver.write(STATUS, 2), 0);
    assert_eq!(driver.write(STATUS, 4), 0);
    assert_eq!(driver.write(STATUS, 1), 1);
    assert_eq!(driver.write(STATUS, 1 | 8), 1);
    assert_eq!(driver.write(STATUS, 3), 3);
    assert_eq!(driver.write(STATUS, 3 | 4), 3);
    // Bits cannot be cleared one by one.
    assert_eq!(driver.write(STATUS, 1), 3);
    assert!(driver.calls.lock().unwrap().activations.is_empty());
}

#[test]
fn features_when_unknown_or_without_version_1_are_refused() {
    for (features, status) in [
        (OFFERED, 11),
        (OFFERED & !1, 11),
        (1, 3),
        (OFFERED | 2, 3),
        (1 << 63 | OFFERED, 3),
    ] {
        let mut driver = Driver::new();
        assert_eq!(driver.negotiate(features), status, "{features:#x}");
        driver.features(0);
        assert_eq!(driver.transport.driver_features == features, status == 11);
    }
}

#[test]
fn activation_when_queues_are_ready_gets_them_frozen() {
    let mut driver = Driver::new();
    driver.queue(0, 16, 0x20_0000);
    assert_eq!(driver.negotiate(OFFERED), 11);
    assert_eq!(driver.read(0x44), 0, "set up before FEATURES_OK");
    driver.queue(1, 4, 0x20_0000);
    driver.queue(7, 4, 0x20_0000);
    assert_eq!(driver.write(STATUS, 15), 15);
    assert!(driver.transport.is_active());
    driver.queue(0, 16, 0x20_0000);
    assert_eq!(driver.write(STATUS, 15), 15);
    assert_eq!(
        driver.calls.lock().unwrap().activations,
        [(OFFERED, vec![(1, 4)])]
    );
    assert!(!driver.transport.queues[0].ready);
}

#[test]
fn activation_when_a_queue_is_impossible_needs_reset_until_reset() {
    for (size, desc) in [
        (16, 0x9000_0000),
        (3, 0x20_0000),
        (0, 0x20_0000),
        (32, 0x20_0000),
        (16, 0x20_0001),
        (1 << 16, 0),
    ] {
        let mut driver = Driver::new();
        driver.negotiate(OFFERED);
        driver.queue(0, size, desc);
        assert_eq!(driver.write(STATUS, 15), 15 | 64, "{size} {desc:#x}");
        assert!(!driver.transport.is_active());
        assert_eq!(driver.read(0x60), 2);
        assert_eq!(driver.irqfd.read().unwrap(), 1);
        assert_eq!(driver.write(STATUS, 15), 15 | 64);
        assert_eq!(driver.write(STATUS, 0), 0);
        assert_eq!(driver.read(0x60), 0);
        assert!(driver.calls.lock().unwrap().activations.is_empty());
    }
}

#[test]
fn reset_when_written_stops_the_device_and_forgets() {
    let mut driver = Driver::new();
    driver.negotiate(OFFERED);
    driver.queue(0, 8, 0x20_0000);
    driver.write(STATUS, 15);
    assert_eq!(driver.write(STATUS, 0), 0);
    assert_eq!(driver.calls.lock().unwrap().resets, 1);
    assert_eq!((driver.read(0x44), driver.transport.driver_features), (0, 0));
    assert_eq!(driver.negotiate(OFFERED), 11);
}

#[test]
fn registers_when_written_with_another_width_do_nothing() {
    let mut driver = Driver::new();
    driver.transport.write(STATUS, &[1]);
    driver.transport.write(STATUS, &[1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(driver.read(STATUS), 0);
}

#[test]
fn config_when_written_needs_a_driver_and_any_width_reads() {
    let mut driver = Driver::new();
    driver.transport.write(0x104, &[1]);
    driver.negotiate(OFFERED);
    driver.transport.write(0x104, &[2, 3]);
    assert_eq!(driver.calls.lock().unwrap().config, [(4, vec![2, 3])]);
    let mut data = [0; 3];
    driver.transport.read(0x109, &mut data);
    assert_eq!(data, [9, 10, 11]);
}

#[test]
fn registers_when_the_driver_selects_something_else_show_it() {
    let mut driver = Driver::new();
    assert_eq!(
        (driver.read(0), driver.read(4), driver.read(8)),
        (0x7472_6976, 2, 42)
    );
    for (select, features) in [(0, OFFERED as u32), (1, (OFFERED >> 32) as u32), (2, 0)] {
        driver.write(0x14, select);
        assert_eq!(driver.read(0x10), features);
    }
    for (queue, max) in [(1, 8), (2, 0), (0, 16)] {
        driver.write(0x30, queue);
        assert_eq!(driver.read(0x34), max);
    }
    assert_eq!((driver.read(0xb0), driver.read(0xbc)), (u32::MAX, u32::MAX));
}

#[test]
fn notify_when_not_taken_by_kvm_reaches_the_queue() {
    let mut driver = Driver::new();
    driver.write(register::QUEUE_NOTIFY, 0);
    assert!(driver.transport.kicks()[0].read().is_err(), "before DRIVER_OK");
    driver.negotiate(OFFERED);
    driver.write(STATUS, 15);
    driver.write(register::QUEUE_NOTIFY, 1);
    driver.write(register::QUEUE_NOTIFY, 9);
    assert_eq!(driver.transport.kicks()[1].read().unwrap(), 1);
}

#[test]
fn interrupt_when_acknowledged_clears_only_those_bits() {
    let mut driver = Driver::new();
    let interrupt = driver.transport.interrupt().clone();
    interrupt.used(0);
    interrupt.config(|_| {});
    assert_eq!((driver.read(0x60), driver.read(0xfc)), (3, 1));
    driver.write(0x64, 1);
    assert_eq!(driver.read(0x60), 2);
}

/// A driver whose device runs with one queue.
fn running() -> Driver {
    let mut driver = Driver::new();
    driver.negotiate(1 << VIRTIO_F_VERSION_1);
    driver.queue(0, 8, 0x20_0000);
    assert_eq!(driver.write(STATUS, 15), 15);
    driver
}

#[test]
fn resume_when_suspended_activates_once_where_the_queues_stood() {
    let mut driver = running();
    driver.transport.resume().unwrap();
    driver.transport.suspend();
    driver.transport.suspend();
    driver.transport.resume().unwrap();
    driver.transport.resume().unwrap();
    let calls = driver.calls.lock().unwrap();
    assert_eq!(calls.suspends, 1);
    assert_eq!(calls.positions, [(0, 0), (7, 5)]);
}

#[test]
fn restore_when_saved_gives_the_same_registers_and_goes_on() {
    let mut driver = running();
    driver.transport.interrupt().config(|_| {});
    driver.transport.suspend();
    let (state, device) = driver.transport.save().unwrap();

    let mut other = Driver::new();
    other.transport.restore(state.clone(), &device).unwrap();
    assert_eq!(other.transport.save().unwrap(), (state, device));
    assert_eq!(
        (other.read(STATUS), other.read(0x60), other.read(0xfc)),
        (15, 2, 1)
    );
    other.transport.resume().unwrap();
    assert_eq!(other.calls.lock().unwrap().positions, [(7, 5)]);
    // The driver has not acknowledged the interrupt, so it gets it again.
    assert_eq!(other.irqfd.read().unwrap(), 1);
    // Queues stay frozen, and a reset forgets the position.
    other.write(0x44, 0);
    assert_eq!(other.read(0x44), 1);
    other.write(STATUS, 0);
    other.negotiate(1 << VIRTIO_F_VERSION_1);
    other.queue(0, 8, 0x20_0000);
    other.write(STATUS, 15);
    assert_eq!(other.calls.lock().unwrap().positions, [(7, 5), (0, 0)]);
}

#[test]
fn restore_when_the_state_is_impossible_is_refused() {
    let mut driver = running();
    driver.transport.suspend();
    let (good, device) = driver.transport.save().unwrap();
    type Change = fn(&mut TransportState);
    let cases: [(&str, Change); 8] = [
        ("one queue less", |s| s.queues.truncate(1)),
        ("a feature nobody offered", |s| s.driver_features |= 1 << 60),
        ("no FEATURES_OK", |s| s.status &= !8),
        ("no ACKNOWLEDGE", |s| s.status &= !1),
        ("an unknown status bit", |s| s.status |= 1 << 9),
        ("two positions of a queue", |s| s.positions.push(POSITION)),
        ("a queue that is not ready", |s| s.positions[0].index = 1),
        ("a queue that does not exist", |s| s.positions[0].index = 2),
    ];
    for (what, change) in cases {
        let mut state = good.clone();
        change(&mut state);
        let result = Driver::new().transport.restore(state, &device);
        assert!(matches!(result, Err(StateError::Invalid { .. })), "{what}");
    }
    assert!(Driver::new().transport.restore(good, &[1]).is_err());
}

#[test]
fn writes_when_they_flood_the_log_are_told_of_a_few_times() {
    let mut driver = Driver::new();
    let messages = [
        "virtio-mmio: register width ignored",
        "virtio-mmio: driver cleared status bits, ignored",
        "virtio-mmio: features refused",
        "virtio-mmio: device needs reset",
    ];
    assert_limited(&messages, 300, || {
        for _ in 0..300 {
            driver.transport.write(STATUS, &[1, 2, 3]);
            driver.write(STATUS, 0);
            driver.write(STATUS, 3);
            driver.write(STATUS, 2);
            driver.features(0);
            driver.write(STATUS, 11);
            driver.features(OFFERED);
            driver.write(STATUS, 11);
            // A ring of which only the last entries are missing.
            driver.write(0x30, 0);
            driver.write(0x38, 16);
            driver.write(0x80, (64 << 20) - 16);
            driver.write(0x44, 1);
            driver.write(STATUS, 15);
        }
    });
}

#[test]
fn ring_when_it_ends_with_memory_is_accepted() {
    let end = 64 << 20;
    // The last address each part of a queue of 16 may have.
    for (register, last, step) in [(0x80, end - 256, 16), (0x90, end - 38, 2), (0xa0, end - 136, 4)] {
        for (address, accepted) in [(last, true), (last + step, false)] {
            let mut driver = Driver::new();
            driver.write(STATUS, 1);
            driver.write(STATUS, 3);
            driver.features(OFFERED);
            driver.write(STATUS, 11);
            driver.write(0x30, 0);
            driver.write(0x38, 16);
            for (register, usual) in [(0x80, 0x1000), (0x90, 0x2000), (0xa0, 0x3000)] {
                driver.write(register, usual);
            }
            driver.write(register, address);
            driver.write(0x44, 1);
            assert_eq!(
                driver.write(STATUS, 15) & 0x40 == 0,
                accepted,
                "{register:#x}: {address:#x}"
            );
        }
    }
}

#[test]
fn device_when_a_confined_vcpu_writes_its_status_starts_and_stops_on_another_thread() {
    let driver = Driver::new();
    let calls = driver.calls.clone();
    let interrupt = SlotInterrupt::new(Registers::unseen().unwrap(), driver.irqfd.clone());
    let host = driver.transport.host.clone();
    let pages = Arc::new(RegisterPages::new(1).unwrap());
    let shared = Arc::new(SharedPage::new(host.memory.clone()));
    let slots = Arc::new(Slots::new(1, pages, shared));
    let kicks = driver.transport.kicks.clone();
    let transport = MmioTransport::new(Box::new(Fake(calls.clone())), host, interrupt, kicks);
    *slots.lock(0).unwrap() = Some(transport);
    slots.start_on_a_thread(Confinement::default()).unwrap();

    let guest = slots.clone();
    let run = move || {
        let write = |offset, value: u32| guest.write(offset, &value.to_le_bytes());
        for value in [1, 3] {
            let _ = write(STATUS, value);
        }
        for select in [0, 1] {
            let _ = write(0x24, select);
            let _ = write(0x20, (OFFERED >> (32 * select)) as u32);
        }
        for value in [11, 15, 0] {
            let _ = write(STATUS, value);
        }
    };
    let vcpu = Confinement::default()
        .spawn(Role::Vcpu, "test-vcpu", run)
        .unwrap();
    vcpu.join().unwrap();
    slots.end_thread();

    let calls = calls.lock().unwrap();
    assert_eq!(calls.activations, [(OFFERED, vec![])]);
    assert_eq!(calls.threads, ["vmm-starter"; 2]);
}
