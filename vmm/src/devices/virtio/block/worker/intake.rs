//! From a queue to requests, one at a time, and back.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use super::Surroundings;
use crate::devices::virtio::ActiveQueue;
use crate::devices::virtio::block::request::{Request, Spare};
use crate::devices::virtio::block::target::Target;
use crate::devices::virtio::queue::chain::{Chain, ChainError};
use crate::devices::virtio::queue::moderation::{Moderation, Turn};
use crate::devices::virtio::queue::served_queue::ServedQueue;
use crate::devices::virtio::state::QueuePosition;
use crate::memory::GuestMemory;

/// What the queue has now.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "a box would be an allocation for each request"
)]
pub(in super::super) enum Taken {
    /// A request, checked.
    Request(Request),
    /// A chain that is no request; it went back already.
    Returned,
    /// Nothing; a kick comes with the next request, or a turn follows that looks.
    Idle,
    /// A request the rate limiter holds back; the kick's eventfd becomes readable when it may go on.
    Throttled,
}

/// Where a stopped queue stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct Stopped {
    pub(in super::super) position: QueuePosition,
    /// Heads of the chains that were taken and are not returned, because their requests are not finished.
    pub(in super::super) unfinished: Vec<u16>,
}

/// A queue and what its requests need.
#[derive(Debug)]
pub(in super::super) struct Intake {
    pub(in super::super) queue: ServedQueue,
    pub(in super::super) target: Arc<Target>,
    /// Heads of chains taken by a worker before this one, whose requests begin anew. The rate limiter let them pass then.
    unfinished: VecDeque<u16>,
    /// Taken from the queue last, held back by the rate limiter.
    held: Option<Request>,
    /// The chain in hand; kept for its memory.
    chain: Chain,
    /// What finished requests left, at most as many as were in flight at once.
    spares: Vec<Spare>,
    moderation: Moderation,
    /// Position in the queue at the end of the last turn.
    seen: u16,
    /// This turn does not ask for kicks: another comes by itself.
    quiet: bool,
}

impl Intake {
    /// `unfinished`: what the queue's last worker did not finish.
    pub(in super::super) fn new(
        around: &Surroundings,
        queue: ActiveQueue,
        unfinished: VecDeque<u16>,
    ) -> Self {
        let (memory, interrupt) = (around.memory.clone(), around.interrupt.clone());
        let queue = ServedQueue::new(&around.target.id, queue, memory, interrupt);
        Self {
            seen: queue.position().next_avail,
            queue,
            target: around.target.clone(),
            unfinished,
            held: None,
            chain: Chain::default(),
            spares: Vec::new(),
            moderation: Moderation::new(Instant::now()),
            quiet: false,
        }
    }

    /// Begins a turn.
    pub(in super::super) fn begin_turn(&mut self) {
        self.queue.take_kick();
        self.queue.suppress_kicks();
        self.quiet = self.moderation.holds(Instant::now());
    }

    /// Ends a turn: tells the driver what was answered, or says until when that is held back. A turn must follow then.
    pub(in super::super) fn end_turn(&mut self, in_flight: bool) -> Option<Instant> {
        let next_avail = self.queue.position().next_avail;
        let turn = Turn {
            taken: next_avail.wrapping_sub(std::mem::replace(&mut self.seen, next_avail)),
            awaited: self.queue.awaited(),
            unannounced: self.queue.unannounced(),
            in_flight,
        };
        let until = self.moderation.decide(Instant::now(), turn);
        if until.is_none() {
            self.queue.notify();
            if self.quiet && self.queue.enable_kicks() {
                self.queue.kick_self();
            }
        }
        until
    }

    /// Takes the next request.
    pub(in super::super) fn take(&mut self) -> Taken {
        if let Some(request) = self.held.take() {
            return self.admit(request);
        }
        let memory = self.queue.memory().clone();
        if let Some(head) = self.unfinished.pop_front() {
            let parsed = self.queue.parse_head(head, &mut self.chain);
            return match self.request(&memory, head, parsed) {
                Some(request) => Taken::Request(request),
                None => Taken::Returned,
            };
        }
        let chain = match self.queue.pop(&memory) {
            Some(chain) => chain,
            None if self.quiet => return Taken::Idle,
            // Another look closes the race with a driver that did not kick because it was asked not to.
            None if self.queue.enable_kicks() => match self.queue.pop(&memory) {
                Some(chain) => {
                    self.queue.suppress_kicks();
                    chain
                }
                None => return Taken::Idle,
            },
            None => return Taken::Idle,
        };
        let head = chain.head_index();
        let parsed = self.chain.parse_again(&memory, chain, self.queue.size());
        match self.request(&memory, head, parsed) {
            Some(request) => self.admit(request),
            None => Taken::Returned,
        }
    }

    /// The request in the chain in hand; a chain that has none goes back.
    fn request(
        &mut self,
        memory: &Arc<GuestMemory>,
        head: u16,
        parsed: Result<(), ChainError>,
    ) -> Option<Request> {
        if let Err(error) = parsed {
            guest_log!(DEBUG, device = %self.target.id, %error, "block: chain dropped");
        }
        let spare = self.spares.pop().unwrap_or_default();
        match Request::new(&self.target, memory, head, &self.chain, spare) {
            Ok(request) => Some(request),
            Err(spare) => {
                self.spares.push(spare);
                self.queue.complete(head, 0);
                None
            }
        }
    }

    fn admit(&mut self, request: Request) -> Taken {
        match &self.target.throttle {
            Some(throttle) if !throttle.admit(request.bytes(), self.queue.kick()) => {
                self.held = Some(request);
                Taken::Throttled
            }
            _ => Taken::Request(request),
        }
    }

    /// Gives a finished request back to the driver; it hears of it at the end of the turn, or later.
    pub(in super::super) fn answer(&mut self, request: Request) {
        let head = request.head();
        let (written, spare) = request.answer(&self.target);
        self.spares.push(spare);
        self.queue.complete(head, written);
    }

    /// Where the queue stands while the request at `head` is in hand and nothing else is. The driver hears of what was
    /// answered: this may be the last look at the queue.
    pub(super) fn standing(&mut self, head: u16) -> Stopped {
        self.queue.notify();
        Stopped {
            position: self.queue.position(),
            unfinished: std::iter::once(head)
                .chain(self.unfinished.iter().copied())
                .collect(),
        }
    }

    /// Ends the work: the driver hears of what was answered, and the request the limiter holds back goes back to the ring.
    /// `unfinished` are the heads of requests begun and not answered.
    pub(super) fn stop(&mut self, mut unfinished: Vec<u16>) -> Stopped {
        if self.held.take().is_some() {
            // Nothing was taken after it.
            self.queue.put_back(1);
        }
        unfinished.extend(self.unfinished.drain(..));
        self.queue.notify();
        Stopped {
            position: self.queue.position(),
            unfinished,
        }
    }
}
