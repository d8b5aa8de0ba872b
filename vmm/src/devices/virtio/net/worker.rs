//! All queues of an interface, served on the I/O loop.
//!
//! Who wakes whom, so that no wake-up is lost (CVE-2020-16843) and nothing spins:
//! - A receive queue waits for a frame (EPOLLIN), or for buffers (kicks on, EPOLLIN off), or for the rate limiter (timer,
//!   EPOLLIN off). Kicks are switched on before the last look at the ring, epoll is level-triggered: whatever came in
//!   between is seen.
//! - A transmit queue waits for a kick, or for space in the TAP (EPOLLOUT; the chain is back in the ring), or for the rate
//!   limiter (timer).
//! - The control queue waits for a kick, or for the end of a change of the TAP (eventfd), or for the limit of such changes
//!   (timer; the command is back in the ring).
//! - A queue whose turn is over kicks itself.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::control::{self, Command};
use super::handle::{Shared, lock};
use super::rx::{RxQueue, RxWait};
use super::state::Limits;
use super::switch::{self, Switch, Switcher};
use super::tap::Backend;
use super::tx::{TxQueue, TxWait};
use super::{FRAME_MAX, HEADER};
use crate::devices::virtio::queue::served_queue::ServedQueue;
use crate::devices::virtio::state::QueuePosition;
use crate::rate_limiter::RateLimiter;

/// What an event is about: `kind`, and the pair above it.
mod token {
    pub const RX_KICK: u32 = 0;
    pub const TX_KICK: u32 = 1;
    pub const TAP: u32 = 2;
    pub const CONTROL: u32 = 3;
    pub const RX_TIMER: u32 = 4;
    pub const TX_TIMER: u32 = 5;
    pub const CHANGED: u32 = 6;
    pub const SWITCHED: u32 = 7;
    pub const SWITCH_TIMER: u32 = 8;
    pub const KINDS: u32 = 9;

    pub fn of(kind: u32, pair: usize) -> u32 {
        // At most 8 pairs.
        kind + KINDS * pair as u32
    }
}

/// A queue pair and its end of the TAP.
#[derive(Debug)]
pub(super) struct Pair {
    backend: Arc<dyn Backend>,
    rx: RxQueue,
    tx: TxQueue,
    rx_wait: RxWait,
    tx_wait: TxWait,
    /// What epoll watches the TAP for; `None`: not at all, it is gone.
    watched: Option<EventSet>,
}

impl Pair {
    pub(super) fn new(backend: Arc<dyn Backend>, rx: RxQueue, tx: TxQueue) -> Self {
        Self {
            backend,
            rx,
            tx,
            rx_wait: RxWait::Turn,
            tx_wait: TxWait::Turn,
            watched: None,
        }
    }

    fn interest(&self) -> EventSet {
        let mut interest = EventSet::empty();
        interest.set(EventSet::IN, self.rx_wait == RxWait::Frame);
        interest.set(EventSet::OUT, self.tx_wait == TxWait::Space);
        interest
    }
}

/// The rate limiters of an interface.
#[derive(Debug)]
pub(super) struct Limiters {
    pub(super) rx: RateLimiter,
    pub(super) tx: RateLimiter,
}

/// What a stopped worker leaves behind.
#[derive(Debug)]
pub(super) struct Remains {
    pub(super) positions: Vec<QueuePosition>,
    pub(super) pairs: u16,
    pub(super) limits: Limits,
}

/// The queues of an interface.
#[derive(Debug)]
pub(super) struct NetWorker {
    pairs: Vec<Pair>,
    /// Pairs in use, from the first.
    active: usize,
    control: Option<(ServedQueue, Switcher)>,
    /// A change of the number of pairs that is under way; no other command is served meanwhile.
    switch: Option<Switch>,
    /// Queues the driver set up and does not use.
    idle: Vec<QueuePosition>,
    limiters: Limiters,
    shared: Arc<Shared>,
    scratch: Vec<u8>,
    /// The pair that is first when tokens come: each in turn.
    first: usize,
}

impl NetWorker {
    pub(super) fn new(
        pairs: Vec<Pair>,
        active: usize,
        control: Option<(ServedQueue, Switcher)>,
        idle: Vec<QueuePosition>,
        limiters: Limiters,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            pairs,
            active,
            control,
            switch: None,
            idle,
            limiters,
            shared,
            scratch: vec![0; FRAME_MAX + 1],
            first: 0,
        }
    }

    /// Ends the work, off the loop: chains taken and not used go back to their rings.
    pub(super) fn stop(&mut self) -> Remains {
        self.finish_switch();
        let mut positions = self.idle.clone();
        for pair in &mut self.pairs {
            positions.push(pair.rx.stop(&self.shared.counters));
            positions.push(pair.tx.queue.position());
        }
        positions.extend(self.control.as_ref().map(|(queue, _)| queue.position()));
        positions.sort_by_key(|position| position.index);
        Remains {
            positions,
            // At most 8.
            pairs: self.active as u16,
            limits: Limits {
                rx: self.limiters.rx.state(),
                tx: self.limiters.tx.state(),
            },
        }
    }

    fn serve_rx(&mut self, index: usize) {
        if index >= self.active {
            return;
        }
        let Some(pair) = self.pairs.get_mut(index) else {
            return;
        };
        if pair.rx_wait == RxWait::Gone {
            return;
        }
        pair.rx_wait = pair.rx.serve(
            &*pair.backend,
            &mut self.limiters.rx,
            &mut self.scratch,
            &self.shared.counters,
        );
        if pair.rx_wait == RxWait::Turn {
            pair.rx.queue().kick_self();
        }
    }

    fn serve_tx(&mut self, index: usize) {
        if index >= self.active {
            return;
        }
        let Some(pair) = self.pairs.get_mut(index) else {
            return;
        };
        pair.tx_wait = pair
            .tx
            .serve(&*pair.backend, &mut self.limiters.tx, &self.shared.counters);
        if pair.tx_wait == TxWait::Turn {
            pair.tx.queue.kick_self();
        }
    }

    fn serve_control(&mut self) {
        let Self {
            pairs,
            active,
            control: Some((queue, switcher)),
            switch,
            shared,
            ..
        } = self
        else {
            return;
        };
        queue.take_kick();
        queue.suppress_kicks();
        let memory = queue.memory().clone();
        for _ in 0..control::BUDGET {
            if switch.is_some() {
                break;
            }
            let Some(chain) = queue.pop(&memory) else {
                if queue.enable_kicks() {
                    queue.suppress_kicks();
                    continue;
                }
                queue.notify();
                return;
            };
            let command = Command::read(&memory, chain, queue.size());
            match command.pairs.filter(|wanted| (1..=pairs.len()).contains(wanted)) {
                Some(wanted) if wanted != *active => {
                    if !lock(&shared.changes).consume(0, 1) {
                        queue.put_back(1);
                        shared.counters.control_throttled.add(1);
                        queue.notify();
                        return;
                    }
                    let backends = pairs.iter().map(|pair| pair.backend.clone()).collect();
                    match switcher.start(backends, (*active, wanted), command) {
                        Ok(started) => *switch = Some(started),
                        Err(command) => command.answer(queue, false, &shared.counters),
                    }
                }
                known => command.answer(queue, known.is_some(), &shared.counters),
            }
        }
        queue.notify();
        if switch.is_none() {
            queue.kick_self();
        }
    }

    /// Waits for the change of the number of pairs that is under way, if any, and answers the driver.
    fn finish_switch(&mut self) {
        let (Some(switch), Some((queue, switcher))) = (self.switch.take(), &mut self.control) else {
            return;
        };
        let (command, switched) = switcher.finish(switch);
        // Nothing to read means that the event is what told us.
        let _ = self.shared.switched.read();
        let before = self.active;
        self.active = switched.unwrap_or(before);
        // Their queues may hold work from before.
        for pair in self.pairs.iter().take(self.active).skip(before) {
            pair.rx.queue().kick_self();
            pair.tx.queue.kick_self();
        }
        command.answer(queue, switched.is_some(), &self.shared.counters);
        queue.notify();
        queue.kick_self();
    }

    /// All pairs that wait for tokens, each first in turn.
    fn retry(&mut self, waits: impl Fn(&Pair) -> bool, serve: impl Fn(&mut Self, usize)) {
        self.first = self.first.wrapping_add(1);
        let count = self.active;
        for step in 0..count {
            let index = self.first.wrapping_add(step).checked_rem(count).unwrap_or(0);
            if self.pairs.get(index).is_some_and(&waits) {
                serve(self, index);
            }
        }
    }

    fn tap_event(&mut self, index: usize, set: EventSet, ops: &mut EventOps) {
        if set.intersects(EventSet::IN) {
            self.serve_rx(index);
        }
        if set.intersects(EventSet::OUT) {
            self.serve_tx(index);
        }
        // Always reported, asked for or not: leave it to epoll and the loop spins. The interface was deleted.
        if set.intersects(EventSet::ERROR | EventSet::HANG_UP)
            && let Some(pair) = self.pairs.get_mut(index)
            && pair.watched.is_some()
        {
            guest_log!(WARN, device = %self.shared.id, pair = index, "net: the TAP is gone");
            pair.rx_wait = RxWait::Gone;
            unwatch(&self.shared.id, pair, ops);
        }
    }

    fn apply_limits(&mut self) {
        // Nothing to read means it was read already.
        let _ = self.shared.changed.read();
        let limits = *lock(&self.shared.limits);
        self.limiters.rx.update(&limits.rx);
        self.limiters.tx.update(&limits.tx);
    }

    /// Watches each TAP for what its queues wait for.
    fn update_interest(&mut self, ops: &mut EventOps) {
        for (index, pair) in self.pairs.iter_mut().enumerate() {
            let Some(watched) = pair.watched else { continue };
            if pair.rx_wait == RxWait::Gone {
                unwatch(&self.shared.id, pair, ops);
                continue;
            }
            let interest = if index < self.active {
                pair.interest()
            } else {
                EventSet::empty()
            };
            if interest == watched {
                continue;
            }
            let fd = pair.backend.as_raw_fd();
            match ops.modify(Events::with_data_raw(fd, token::of(token::TAP, index), interest)) {
                Ok(()) => pair.watched = Some(interest),
                Err(error) => {
                    guest_log!(ERROR, device = %self.shared.id, ?error, "net: cannot watch the TAP");
                }
            }
        }
    }
}

/// Takes the TAP of `pair` off epoll: it is gone.
fn unwatch(device: &str, pair: &mut Pair, ops: &mut EventOps) {
    if pair.watched.take().is_some()
        && let Err(error) = ops.remove(Events::with_data_raw(
            pair.backend.as_raw_fd(),
            0,
            EventSet::empty(),
        ))
    {
        guest_log!(ERROR, device, ?error, "net: cannot stop watching the TAP");
    }
    if pair.tx_wait == TxWait::Space {
        // What waits for space would wait for ever: it is refused now.
        pair.tx.queue.kick_self();
    }
}

impl MutEventSubscriber for NetWorker {
    fn init(&mut self, ops: &mut EventOps) {
        let mut watch = |fd, token, set| {
            let result = ops.add(Events::with_data_raw(fd, token, set));
            if let Err(error) = &result {
                guest_log!(ERROR, device = %self.shared.id, token, ?error, "net: cannot watch");
            }
            result.is_ok()
        };
        for (index, pair) in self.pairs.iter_mut().enumerate() {
            let (rx, tx) = (pair.rx.queue(), &pair.tx.queue);
            watch(
                rx.kick().as_raw_fd(),
                token::of(token::RX_KICK, index),
                EventSet::IN,
            );
            watch(
                tx.kick().as_raw_fd(),
                token::of(token::TX_KICK, index),
                EventSet::IN,
            );
            // A device that was suspended gets no kick for what is in the rings already.
            rx.kick_self();
            tx.kick_self();
            let tap = token::of(token::TAP, index);
            if watch(pair.backend.as_raw_fd(), tap, EventSet::empty()) {
                pair.watched = Some(EventSet::empty());
            }
        }
        if let Some((control, _)) = &self.control {
            watch(control.kick().as_raw_fd(), token::CONTROL, EventSet::IN);
            control.kick_self();
        }
        watch(self.limiters.rx.as_raw_fd(), token::RX_TIMER, EventSet::IN);
        watch(self.limiters.tx.as_raw_fd(), token::TX_TIMER, EventSet::IN);
        watch(self.shared.changed.as_raw_fd(), token::CHANGED, EventSet::IN);
        watch(self.shared.switched.as_raw_fd(), token::SWITCHED, EventSet::IN);
        watch(
            switch::timer(&self.shared.changes),
            token::SWITCH_TIMER,
            EventSet::IN,
        );
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let kind = events.data() % token::KINDS;
        let index = (events.data() / token::KINDS) as usize;
        match kind {
            token::RX_KICK => {
                if let Some(pair) = self.pairs.get(index) {
                    pair.rx.queue().take_kick();
                }
                self.serve_rx(index);
            }
            token::TX_KICK => {
                if let Some(pair) = self.pairs.get(index) {
                    pair.tx.queue.take_kick();
                }
                self.serve_tx(index);
            }
            token::TAP => self.tap_event(index, events.event_set(), ops),
            token::CONTROL => self.serve_control(),
            token::RX_TIMER => {
                self.limiters.rx.on_timer();
                self.retry(|pair| pair.rx_wait == RxWait::Tokens, Self::serve_rx);
            }
            token::TX_TIMER => {
                self.limiters.tx.on_timer();
                self.retry(|pair| pair.tx_wait == TxWait::Tokens, Self::serve_tx);
            }
            token::SWITCHED => {
                // The end of a change that was waited for comes with nothing to do.
                let _ = self.shared.switched.read();
                self.finish_switch();
            }
            token::SWITCH_TIMER => {
                lock(&self.shared.changes).on_timer();
                self.serve_control();
            }
            _ => self.apply_limits(),
        }
        self.update_interest(ops);
    }
}

/// Bytes of the usual largest frame with its header: what to have ready in merged buffers (5.1.6.3.1).
pub(super) fn usual_frame(segments: bool, mtu: Option<u16>) -> u64 {
    if segments {
        return FRAME_MAX as u64;
    }
    // Ethernet header with a VLAN tag.
    let frame = HEADER as u64 + 18 + u64::from(mtu.unwrap_or(1500));
    frame.max(1526)
}
