//! A driver and a device on one queue, one step at a time in random order: nothing is lost, nothing comes twice, and
//! neither side sleeps while the other waits for it.

use std::collections::VecDeque;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::devices::virtio::test_ring::{BUFFERS, Buf, RINGS, TestGuest, TestRing};

/// Entries of the queue.
const SIZE: u16 = 8;

/// What happens next.
#[derive(Debug, Clone, Copy)]
enum Step {
    /// The driver offers up to so many chains, then looks whether it must kick.
    Offer(u16),
    /// The driver's interrupt handler runs if there was an interrupt; it then asks for the next after so many
    /// completions more (EVENT_IDX).
    Interrupt(u16),
    /// The device's worker runs if it was kicked or did not finish, with this budget.
    Work(usize),
    /// The same, and the driver goes on meanwhile.
    WorkSlowly(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (1..=SIZE).prop_map(Step::Offer),
        (0..SIZE).prop_map(Step::Interrupt),
        (1..=usize::from(SIZE)).prop_map(Step::Work),
        (1..=usize::from(SIZE)).prop_map(Step::WorkSlowly),
    ]
}

/// The driver.
struct Driver {
    ring: TestRing,
    event_idx: bool,
    irqfd: Arc<EventFd>,
    /// Heads offered, oldest first.
    offered: VecDeque<u16>,
    completed: u32,
}

impl Driver {
    fn offer(&mut self, chains: u16) {
        let chains = chains.min(SIZE - self.ring.outstanding());
        for _ in 0..chains {
            let head = self.ring.submit(&[Buf::Write(BUFFERS, 16)]);
            self.offered.push_back(head);
        }
        if chains > 0 {
            self.ring.kick_if_wanted(chains);
        }
    }

    /// Linux's virtqueue_enable_cb_delayed: look again after asking, because completions may have come before.
    fn interrupt(&mut self, more: u16) {
        if self.irqfd.read().is_err() {
            return;
        }
        loop {
            while let Some(used) = self.ring.try_used() {
                assert_eq!(Some(used.head), self.offered.pop_front(), "not the oldest chain");
                assert_eq!(used.len, u32::from(used.head));
                self.completed += 1;
            }
            let more = more.min(self.ring.outstanding().saturating_sub(1));
            if !self.event_idx || self.ring.ask_for_interrupt(more) {
                break;
            }
        }
    }
}

/// The device's worker.
struct Device {
    queue: ServedQueue,
    unfinished: bool,
    taken: u32,
}

impl Device {
    fn work(&mut self, budget: usize) {
        if !self.must_work() {
            return;
        }
        let taken = &mut self.taken;
        let served = self.queue.serve(budget, |_, chain| {
            *taken += 1;
            u32::from(chain.head_index())
        });
        self.unfinished = served == Served::More;
    }

    /// The same one step at a time; `meanwhile` runs wherever the driver can come between.
    fn work_slowly(&mut self, budget: usize, mut meanwhile: impl FnMut()) {
        if !self.must_work() {
            return;
        }
        let memory = self.queue.memory().clone();
        let mut left = budget;
        loop {
            self.queue.suppress_kicks();
            meanwhile();
            while left > 0
                && let Some(chain) = self.queue.pop(&memory)
            {
                left -= 1;
                self.taken += 1;
                meanwhile();
                self.queue.complete(chain.head_index(), chain.head_index().into());
            }
            meanwhile();
            self.unfinished = left == 0;
            if self.unfinished || !self.queue.enable_kicks() {
                break;
            }
        }
        meanwhile();
        self.queue.notify();
    }

    fn must_work(&self) -> bool {
        self.queue.kick().read().is_ok() || self.unfinished
    }
}

fn queue_and_driver(guest: &TestGuest, event_idx: bool, begin: u16) -> (Device, Driver) {
    let mut ring = guest.ring(0, SIZE, event_idx);
    let position = ring.begin_at(begin);
    let mut queue = ServedQueue::new(
        "test",
        ring.active_at(&position),
        guest.memory.clone(),
        guest.interrupt(),
    );
    queue.enable_kicks();
    let device = Device {
        queue,
        unfinished: false,
        taken: 0,
    };
    let driver = Driver {
        ring,
        event_idx,
        irqfd: guest.irqfd.clone(),
        offered: VecDeque::new(),
        completed: 0,
    };
    (device, driver)
}

proptest! {
    #[test]
    fn queue_when_both_sides_sleep_has_returned_every_chain(
        steps in vec((step(), vec(step(), 0..6)), 1..40),
        event_idx in any::<bool>(),
        begin in prop_oneof![Just(0), 0xfff0..=u16::MAX],
    ) {
        let guest = TestGuest::new();
        let (mut device, mut driver) = queue_and_driver(&guest, event_idx, begin);
        let act = |driver: &mut Driver, step| match step {
            Step::Offer(chains) => driver.offer(chains),
            Step::Interrupt(more) => driver.interrupt(more),
            Step::Work(_) | Step::WorkSlowly(_) => {}
        };
        for (step, during) in steps {
            match step {
                Step::Work(budget) => device.work(budget),
                Step::WorkSlowly(budget) => {
                    let mut during = during.into_iter();
                    device.work_slowly(budget, || {
                        if let Some(step) = during.next() {
                            act(&mut driver, step);
                        }
                    });
                }
                step => act(&mut driver, step),
            }
        }
        // Both go on as long as they have been told to.
        for _ in 0..2 * SIZE {
            device.work(usize::from(SIZE));
            driver.interrupt(0);
        }
        prop_assert_eq!(driver.ring.outstanding(), 0, "chains nobody looks for");
        prop_assert_eq!(device.taken, driver.completed);
        prop_assert!(driver.offered.is_empty());
    }

    #[test]
    fn queue_when_the_avail_ring_holds_anything_takes_what_is_offered_until_it_breaks(
        ring in vec(any::<u16>(), usize::from(SIZE)),
        steps in vec((prop_oneof![8 => 0..=SIZE, 1 => any::<u16>()], 1..20usize), 1..20),
        begin in any::<u16>(),
    ) {
        let guest = TestGuest::new();
        let (mut device, mut driver) = queue_and_driver(&guest, false, begin);
        let avail_ring = RINGS + 0x8000 + 4;
        for (slot, head) in (0..).zip(&ring) {
            guest.write(avail_ring + 2 * slot, &head.to_le_bytes());
        }
        let (mut index, mut next, mut used, mut broken) = (begin, begin, begin, false);
        for (jump, budget) in steps {
            index = index.wrapping_add(jump);
            driver.ring.set_avail_index(index);
            let mut heads = Vec::new();
            let served = device.queue.serve(budget, |_, chain| {
                heads.push(chain.head_index());
                0
            });
            let ahead = index.wrapping_sub(next);
            broken |= ahead > SIZE;
            let count = if broken { 0 } else { ahead.min(budget as u16) };
            let expected: Vec<u16> = (0..count)
                .map(|step| ring[usize::from(next.wrapping_add(step) % SIZE)])
                .collect();
            next = next.wrapping_add(count);
            // What is no index of the table cannot be returned.
            used = used.wrapping_add(expected.iter().filter(|head| **head < SIZE).count() as u16);
            prop_assert_eq!(heads, expected);
            prop_assert_eq!(served == Served::More, usize::from(count) == budget);
            let position = device.queue.position();
            prop_assert_eq!((position.next_avail, position.next_used), (next, used));
        }
    }
}
