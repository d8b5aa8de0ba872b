//! From a queue to requests, one at a time, and back.

use std::sync::Arc;
use std::time::Instant;

use super::Surroundings;
use crate::devices::virtio::ActiveQueue;
use crate::devices::virtio::block::request::Request;
use crate::devices::virtio::block::target::Target;
use crate::devices::virtio::chain::Chain;
use crate::devices::virtio::moderation::{Moderation, Turn};
use crate::devices::virtio::served_queue::ServedQueue;

/// What the queue has now.
#[derive(Debug)]
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

/// A queue and what its requests need.
#[derive(Debug)]
pub(in super::super) struct Intake {
    pub(in super::super) queue: ServedQueue,
    pub(in super::super) target: Arc<Target>,
    /// Taken from the queue, held back by the rate limiter.
    held: Option<Request>,
    moderation: Moderation,
    /// Position in the queue at the end of the last turn.
    seen: u16,
    /// This turn does not ask for kicks: another comes by itself.
    quiet: bool,
}

impl Intake {
    pub(super) fn new(around: &Surroundings, queue: ActiveQueue) -> Self {
        let (memory, interrupt) = (around.memory.clone(), around.interrupt.clone());
        let queue = ServedQueue::new(&around.target.id, queue, memory, interrupt);
        Self {
            seen: queue.position().next_avail,
            queue,
            target: around.target.clone(),
            held: None,
            moderation: Moderation::new(Instant::now()),
            quiet: false,
        }
    }

    /// Begins a turn.
    pub(super) fn begin_turn(&mut self) {
        self.queue.take_kick();
        self.queue.suppress_kicks();
        self.quiet = self.moderation.holds(Instant::now());
    }

    /// Ends a turn: tells the driver what was answered, or says until when that is held back. A turn must follow then.
    pub(super) fn end_turn(&mut self, in_flight: bool) -> Option<Instant> {
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
    pub(super) fn take(&mut self) -> Taken {
        if let Some(request) = self.held.take() {
            return self.admit(request);
        }
        let memory = self.queue.memory().clone();
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
        let request = match Chain::parse(&memory, chain, self.queue.size()) {
            Ok(chain) => Request::new(&self.target, &memory, head, &chain),
            Err(error) => {
                guest_log!(DEBUG, device = %self.target.id, %error, "block: chain dropped");
                None
            }
        };
        match request {
            Some(request) => self.admit(request),
            None => {
                self.queue.complete(head, 0);
                Taken::Returned
            }
        }
    }

    fn admit(&mut self, request: Request) -> Taken {
        match &self.target.throttle {
            Some(throttle) if !throttle.admit(request.bytes_moved(), self.queue.kick()) => {
                self.held = Some(request);
                Taken::Throttled
            }
            _ => Taken::Request(request),
        }
    }

    /// The request the limiter holds back, if any: a queue that is stopped finishes what it took.
    pub(super) fn take_held(&mut self) -> Option<Request> {
        self.held.take()
    }

    /// Gives a finished request back to the driver; it hears of it at the end of the turn, or later.
    pub(super) fn answer(&mut self, request: Request) {
        let head = request.head();
        let written = request.answer(&self.target);
        self.queue.complete(head, written);
    }
}
