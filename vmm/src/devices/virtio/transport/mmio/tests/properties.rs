//! A driver that writes anything, in any order: the rules of virtio 1.2, 2.1 and 3.1, hold after every write.

use proptest::collection::vec;
use proptest::prelude::*;

use super::super::status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET};
use super::*;

const STEPS: [u32; 4] = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];

#[derive(Debug, Clone)]
enum Step {
    /// The next step of a correct initialization.
    Forward,
    /// Any register with any value.
    Write(u64, Vec<u8>),
    /// Features, both halves.
    Features(u64),
    /// All registers of a queue: index, size, descriptor table.
    Queue(u32, u32, u64),
    /// The host suspends and resumes the device.
    Resume,
}

fn step() -> impl Strategy<Value = Step> {
    let register = prop_oneof![
        4 => prop::sample::select(vec![0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4]),
        2 => Just(STATUS),
        1 => 0..0x110u64,
        1 => any::<u64>(),
    ];
    let value = prop_oneof![4 => 0..16u32, 1 => any::<u32>(), 1 => (0..32u32).prop_map(|bit| 1 << bit)];
    let bytes =
        prop_oneof![8 => value.prop_map(|value| value.to_le_bytes().to_vec()), 1 => vec(any::<u8>(), 0..9)];
    let features = prop_oneof![6 => Just(OFFERED), 1 => Just(OFFERED & !1), 1 => (0..64u32).prop_map(|bit| OFFERED ^ 1 << bit)];
    let size = prop_oneof![6 => prop::sample::select(vec![4, 8, 16]), 1 => any::<u32>()];
    let table = prop_oneof![6 => Just(0x20_0000), 1 => any::<u64>()];
    prop_oneof![
        6 => Just(Step::Forward),
        6 => (register, bytes).prop_map(|(offset, bytes)| Step::Write(offset, bytes)),
        3 => features.prop_map(Step::Features),
        3 => (0..3u32, size, table).prop_map(|(index, size, table)| Step::Queue(index, size, table)),
        1 => Just(Step::Resume),
    ]
}

/// What the specification lets a device look at: everything the driver wrote since the last reset.
#[derive(Default)]
struct Seen {
    status: u32,
    written: u32,
    resets: usize,
    activations: usize,
    features: u64,
    queues: Vec<QueueRegisters>,
    config: usize,
}

/// Checks the rules after one write, which was of `status` if it reached the status register.
fn check(driver: &Driver, before: &mut Seen, status: Option<u32>) {
    let transport = &driver.transport;
    let calls = driver.calls.lock().unwrap();
    let now = driver.read(STATUS);
    assert_eq!(now, transport.status, "the page shows another status");
    let set = |bits: u32| now & bits == bits;
    if status == Some(0) {
        assert_eq!((now, calls.resets), (0, before.resets + 1));
        assert_eq!(transport.queues, initial_queues(&*transport.device));
        *before = Seen {
            resets: calls.resets,
            queues: transport.queues.clone(),
            config: calls.config.len(),
            activations: calls.activations.len(),
            ..Seen::default()
        };
    }
    assert_eq!(calls.resets, before.resets, "reset without a write of 0");
    before.written |= status.unwrap_or(0);
    assert_eq!(
        now & !NEEDS_RESET & !before.written,
        0,
        "bits nobody wrote: {now:#x}"
    );
    assert_eq!(
        now & !(STEPS.iter().sum::<u32>() | NEEDS_RESET | FAILED),
        0,
        "unknown bits: {now:#x}"
    );
    assert_eq!(before.status & !now, 0, "bits lost without a reset: {now:#x}");
    for pair in STEPS.windows(2) {
        assert!(!set(pair[1]) || set(pair[0]), "a step was left out: {now:#x}");
    }
    if set(FEATURES_OK) {
        let features = transport.driver_features;
        assert!(
            features & !OFFERED == 0 && features & 1 << VIRTIO_F_VERSION_1 != 0,
            "{features:#x}"
        );
        assert!(
            before.status & FEATURES_OK == 0 || features == before.features,
            "changed after FEATURES_OK"
        );
    }
    // Queues: only between FEATURES_OK and DRIVER_OK.
    let open = before.status & (FEATURES_OK | DRIVER_OK | NEEDS_RESET) == FEATURES_OK;
    assert!(
        open || transport.queues == before.queues,
        "queues changed with status {:#x}",
        before.status
    );
    if set(DRIVER_OK) && !set(NEEDS_RESET) {
        assert_eq!(
            calls.activations.len() - before.activations,
            usize::from(before.status & DRIVER_OK == 0)
        );
        let (features, queues) = calls.activations.last().unwrap();
        let ready: Vec<_> = transport
            .queues
            .iter()
            .enumerate()
            .filter(|(_, queue)| queue.ready)
            .collect();
        let expected: Vec<_> = ready
            .iter()
            .map(|(index, queue)| (*index, queue.size as u16))
            .collect();
        assert_eq!((*features, queues), (transport.driver_features, &expected));
        for (queue, max) in ready.iter().map(|(index, queue)| (queue, [16, 8][*index])) {
            assert!(queue.size.is_power_of_two() && queue.size <= max);
            let end = |start: u64, bytes: u64| start.checked_add(bytes).unwrap() <= 64 << 20;
            assert!(end(queue.desc, 16 * u64::from(queue.size)) && end(queue.avail, 6) && end(queue.used, 6));
        }
    } else {
        assert_eq!(
            calls.activations.len(),
            before.activations,
            "activated with status {now:#x}"
        );
    }
    assert!(
        set(DRIVER) || calls.config.len() == before.config,
        "configuration written before DRIVER"
    );
    before.status = now;
    before.features = transport.driver_features;
    before.queues = transport.queues.clone();
    before.activations = calls.activations.len();
    before.config = calls.config.len();
}

/// Performs a step as register writes; calls `after` with what was written to the status register after each of them.
fn perform(driver: &mut Driver, step: Step, after: &mut dyn FnMut(&Driver, Option<u32>)) {
    let mut write = |driver: &mut Driver, offset: u64, bytes: &[u8]| {
        driver.transport.write(offset, bytes);
        let value = <[u8; 4]>::try_from(bytes).map(u32::from_le_bytes);
        after(driver, value.ok().filter(|_| offset == STATUS));
    };
    let mut writes = Vec::new();
    match step {
        Step::Forward => {
            let status = driver.read(STATUS) & !NEEDS_RESET;
            let next = STEPS.into_iter().find(|bit| status & bit == 0).unwrap_or(0);
            writes.push((STATUS, status | next));
        }
        Step::Write(offset, bytes) => write(driver, offset, &bytes),
        Step::Features(features) => {
            for select in [0, 1] {
                writes.extend([(0x24, select), (0x20, (features >> (32 * select)) as u32)]);
            }
        }
        Step::Queue(index, size, desc) => {
            let (low, high) = (desc as u32, (desc >> 32) as u32);
            writes.extend([(0x30, index), (0x38, size), (0x80, low), (0x84, high)]);
            writes.extend([(0x90, 0x20_1000), (0xa0, 0x20_2000), (0x44, 1)]);
        }
        Step::Resume => {
            driver.transport.suspend();
            let activations = driver.calls.lock().unwrap().activations.len();
            let active = driver.transport.is_active();
            driver.transport.resume().unwrap();
            let mut calls = driver.calls.lock().unwrap();
            assert_eq!(calls.activations.len() - activations, usize::from(active));
            // Only the driver's own activations are counted by `check`.
            calls.activations.truncate(activations);
        }
    }
    for (offset, value) in writes {
        write(driver, offset, &value.to_le_bytes());
    }
}

proptest! {
    #[test]
    fn transport_when_the_driver_writes_anything_keeps_the_rules(steps in vec(step(), 1..60)) {
        let mut driver = Driver::new();
        let mut seen = Seen { queues: driver.transport.queues.clone(), ..Seen::default() };
        for step in steps {
            perform(&mut driver, step, &mut |driver, status| check(driver, &mut seen, status));
        }
        // Whatever was before: a driver that starts again finds a device that works.
        let begin = Step::Write(STATUS, vec![0; 4]);
        let start = [begin, Step::Forward, Step::Forward, Step::Features(OFFERED), Step::Forward, Step::Queue(1, 8, 0x20_0000), Step::Forward];
        for step in start {
            perform(&mut driver, step, &mut |driver, status| check(driver, &mut seen, status));
        }
        prop_assert!(driver.transport.is_active());
        let calls = driver.calls.lock().unwrap();
        prop_assert_eq!(calls.activations.last(), Some(&(OFFERED, vec![(1, 8)])));
    }
}
