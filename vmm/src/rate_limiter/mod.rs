//! Limits on bytes and operations: two token buckets and the timer that says when to go on.
//!
//! A device asks [`RateLimiter::consume`] before an operation. When it says no, the device leaves its work where it is and
//! watches the limiter's file descriptor, which becomes readable when enough tokens are there; it then calls
//! [`RateLimiter::on_timer`] and tries again. The timer is armed for that moment only: a device that is not throttled
//! causes no wake-ups.

mod bucket;
mod config;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

pub use self::bucket::BucketState;
use self::bucket::TokenBucket;
pub use self::config::{BucketConfigError, RateLimiterConfig, TokenBucketConfig};
use serde::{Deserialize, Serialize};

/// What is left in the buckets, for save and restore. `None`: no such bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RateLimiterState {
    /// Bytes.
    pub bandwidth: Option<BucketState>,
    /// Operations.
    pub ops: Option<BucketState>,
}

/// The two buckets, without a clock: every `now` is the time since one fixed moment.
#[derive(Debug)]
struct Buckets {
    bandwidth: Option<TokenBucket>,
    ops: Option<TokenBucket>,
}

impl Buckets {
    fn new(config: &RateLimiterConfig, now: Duration) -> Self {
        Self {
            bandwidth: config.bandwidth.map(|config| TokenBucket::new(&config, now)),
            ops: config.ops.map(|config| TokenBucket::new(&config, now)),
        }
    }

    /// Zero when an operation of `bytes` and `ops` may start, else how long it must wait.
    fn wait(&mut self, bytes: u64, ops: u64, now: Duration) -> Duration {
        let wait = |bucket: &mut Option<TokenBucket>, tokens| {
            bucket
                .as_mut()
                .map_or(Duration::ZERO, |bucket| bucket.wait(tokens, now))
        };
        wait(&mut self.bandwidth, bytes).max(wait(&mut self.ops, ops))
    }

    /// Takes the tokens, into debt if there are not enough.
    fn take(&mut self, bytes: u64, ops: u64) {
        if let Some(bucket) = &mut self.bandwidth {
            bucket.take(bytes);
        }
        if let Some(bucket) = &mut self.ops {
            bucket.take(ops);
        }
    }
}

/// Limits the bytes and operations of a device.
#[derive(Debug)]
pub struct RateLimiter {
    buckets: Buckets,
    timer: OwnedFd,
    /// When the timer fires.
    armed: Option<Duration>,
    start: Instant,
    throttled: u64,
}

impl RateLimiter {
    /// A limiter with full buckets. The configuration must be [valid](RateLimiterConfig::validate).
    ///
    /// # Errors
    /// timerfd_create failed: out of file descriptors.
    pub fn new(config: &RateLimiterConfig) -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self {
            buckets: Buckets::new(config, Duration::ZERO),
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            armed: None,
            start: Instant::now(),
            throttled: 0,
        })
    }

    /// Takes `bytes` and `ops` tokens, or none at all and says `false`; the file descriptor then becomes readable when
    /// both are there.
    ///
    /// An operation larger than a bucket passes when that bucket is full, and leaves it in debt.
    pub fn consume(&mut self, bytes: u64, ops: u64) -> bool {
        let open = self.ready_for(bytes, ops);
        if open {
            self.buckets.take(bytes, ops);
        }
        open
    }

    /// Whether an operation whose size shows only when it is done may start: no bucket is empty or in debt. If not, the
    /// file descriptor becomes readable when it may. Tell its size to [`charge`](Self::charge).
    pub fn may_start(&mut self) -> bool {
        self.ready_for(1, 1)
    }

    /// Takes the tokens of an operation that is done, into debt if need be.
    pub fn charge(&mut self, bytes: u64, ops: u64) {
        self.buckets.take(bytes, ops);
    }

    fn ready_for(&mut self, bytes: u64, ops: u64) -> bool {
        if self.buckets.bandwidth.is_none() && self.buckets.ops.is_none() {
            return true;
        }
        let now = self.start.elapsed();
        let wait = self.buckets.wait(bytes, ops, now);
        if wait.is_zero() {
            return true;
        }
        self.throttled += 1;
        self.arm(now, wait);
        false
    }

    /// Clears the expiration of the timer. Call it when the file descriptor is readable, then try again.
    pub fn on_timer(&mut self) {
        // Nothing to read: the timer was armed again since the caller saw it.
        if rustix::io::read(&self.timer, &mut [0; 8]).is_ok() {
            self.armed = None;
        }
    }

    /// Puts a new limit in force. Tokens there are stay, up to the new size; a bucket that did not exist is full; the
    /// one-time burst is given anew. A waiting operation is tried again at once.
    pub fn update(&mut self, config: &RateLimiterConfig) {
        let now = self.start.elapsed();
        let old = self.state();
        self.buckets = Buckets::new(config, now);
        let keep_level = |bucket: &mut Option<TokenBucket>, old: Option<BucketState>| {
            if let (Some(bucket), Some(old)) = (bucket, old) {
                bucket.set_level(old.level);
            }
        };
        keep_level(&mut self.buckets.bandwidth, old.bandwidth);
        keep_level(&mut self.buckets.ops, old.ops);
        if self.armed.take().is_some() {
            self.arm(now, Duration::from_nanos(1));
        }
    }

    /// What is left in the buckets.
    pub fn state(&mut self) -> RateLimiterState {
        let now = self.start.elapsed();
        let state = |bucket: &mut Option<TokenBucket>| bucket.as_mut().map(|bucket| bucket.state(now));
        RateLimiterState {
            bandwidth: state(&mut self.buckets.bandwidth),
            ops: state(&mut self.buckets.ops),
        }
    }

    /// Takes over what [`state`](Self::state) gave, possibly of another configuration or from a file nobody vouches
    /// for: what does not fit a bucket is cut off, so that the limits hold and nothing waits for ever.
    pub fn restore(&mut self, state: &RateLimiterState) {
        let restore = |bucket: &mut Option<TokenBucket>, state: Option<BucketState>| {
            if let (Some(bucket), Some(state)) = (bucket, state) {
                bucket.set_level(state.level);
                bucket.limit_burst(state.burst);
            }
        };
        restore(&mut self.buckets.bandwidth, state.bandwidth);
        restore(&mut self.buckets.ops, state.ops);
    }

    /// How often an operation was told to wait.
    pub fn throttled(&self) -> u64 {
        self.throttled
    }

    /// Arms the timer, unless it fires before that anyway: several may wait, each asks again when it fires.
    fn arm(&mut self, now: Duration, wait: Duration) {
        let at = now.saturating_add(wait);
        if self.armed.is_some_and(|armed| armed <= at) {
            return;
        }
        let value = Timespec {
            // i64 seconds are more than the buckets ever ask for (584 years).
            tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(wait.subsec_nanos()),
        };
        let zero = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let value = Itimerspec {
            it_interval: zero,
            it_value: value,
        };
        match timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &value) {
            Ok(_) => self.armed = Some(at),
            Err(error) => guest_log!(ERROR, %error, "rate limiter: cannot arm the timer"),
        }
    }
}

impl AsRawFd for RateLimiter {
    /// Readable when an operation that was told to wait may be tried again.
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}
