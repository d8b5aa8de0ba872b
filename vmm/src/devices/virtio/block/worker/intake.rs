//! From a queue to requests, one at a time, and back.

use std::sync::Arc;

use super::Surroundings;
use crate::devices::virtio::ActiveQueue;
use crate::devices::virtio::block::request::Request;
use crate::devices::virtio::block::target::Target;
use crate::devices::virtio::chain::Chain;
use crate::devices::virtio::served_queue::ServedQueue;

/// What the queue has now.
#[derive(Debug)]
pub(in super::super) enum Taken {
    /// A request, checked.
    Request(Request),
    /// A chain that is no request; it went back already.
    Returned,
    /// Nothing; a kick comes with the next request.
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
}

impl Intake {
    pub(super) fn new(around: &Surroundings, queue: ActiveQueue) -> Self {
        let (memory, interrupt) = (around.memory.clone(), around.interrupt.clone());
        Self {
            queue: ServedQueue::new(&around.target.id, queue, memory, interrupt),
            target: around.target.clone(),
            held: None,
        }
    }

    /// Takes the next request.
    pub(super) fn take(&mut self) -> Taken {
        if let Some(request) = self.held.take() {
            return self.admit(request);
        }
        let memory = self.queue.memory().clone();
        let chain = match self.queue.pop(&memory) {
            Some(chain) => chain,
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
                tracing::debug!(device = %self.target.id, %error, "block: chain dropped");
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

    /// Gives a finished request back to the driver; it hears of it at the next `notify`.
    pub(super) fn answer(&mut self, request: Request) {
        let head = request.head();
        let written = request.answer(&self.target);
        self.queue.complete(head, written);
    }
}
