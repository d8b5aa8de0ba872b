//! The rate limiter of all queues of a disk, and who waits for it.
//!
//! A queue that has to wait leaves its doorbell here. One timer, watched on the I/O loop, rings the doorbells of all that
//! wait, and each asks again; so it does not matter on which thread a queue is served.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;

use crate::rate_limiter::RateLimiterConfig;
use crate::rate_limiter::{RateLimiter, RateLimiterState};

/// A rate limiter shared by queues.
#[derive(Debug, Clone)]
pub(super) struct Throttle(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    limiter: RateLimiter,
    waiting: Vec<Arc<EventFd>>,
}

impl Throttle {
    pub(super) fn new(config: &RateLimiterConfig) -> io::Result<Self> {
        Ok(Self(Arc::new(Mutex::new(Inner {
            limiter: RateLimiter::new(config)?,
            waiting: Vec::new(),
        }))))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a request over `bytes` may start; if not, `doorbell` rings when it is worth asking again.
    pub(super) fn admit(&self, bytes: u64, doorbell: &Arc<EventFd>) -> bool {
        let mut inner = self.lock();
        let open = inner.limiter.consume(bytes, 1);
        if !open && !inner.waiting.iter().any(|w| Arc::ptr_eq(w, doorbell)) {
            inner.waiting.push(doorbell.clone());
        }
        open
    }

    /// How often a request was told to wait.
    pub(super) fn throttled(&self) -> u64 {
        self.lock().limiter.throttled()
    }

    pub(super) fn state(&self) -> RateLimiterState {
        self.lock().limiter.state()
    }

    pub(super) fn restore(&self, state: &RateLimiterState) {
        self.lock().limiter.restore(state);
    }
}

/// Watches the limiter's timer on the I/O loop.
#[derive(Debug)]
pub(super) struct ThrottleTimer {
    throttle: Throttle,
    timer: RawFd,
}

impl ThrottleTimer {
    pub(super) fn new(throttle: Throttle) -> Self {
        let timer = throttle.lock().limiter.as_raw_fd();
        Self { throttle, timer }
    }

    fn ring(&self) {
        let mut inner = self.throttle.lock();
        inner.limiter.on_timer();
        for doorbell in inner.waiting.drain(..) {
            if let Err(error) = doorbell.write(1) {
                guest_log!(ERROR, %error, "block: cannot wake a queue that waits for the rate limiter");
            }
        }
    }
}

impl MutEventSubscriber for ThrottleTimer {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new_raw(self.timer, EventSet::IN)) {
            guest_log!(ERROR, ?error, "block: cannot watch the rate limiter's timer");
        }
        // Who was told to wait while nobody watched asks again.
        self.ring();
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        self.ring();
    }
}
