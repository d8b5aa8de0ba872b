//! One token bucket, in integers: no rounding ever gives more than the rate, none is lost over time.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::config::TokenBucketConfig;

/// Most tokens of one operation, hence the largest debt: no virtio request has more bytes (virtio 1.2, 2.7.5.2: a chain
/// is shorter than 2³²). Larger ones count as this.
pub(super) const MAX_OPERATION: u64 = u32::MAX as u64;

/// What is in a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BucketState {
    /// Tokens; below zero: debt, to be paid before anything passes.
    pub level: i128,
    /// What is left of the one-time burst.
    pub burst: u64,
}

/// A token bucket that is told the time.
#[derive(Debug)]
pub(super) struct TokenBucket {
    size: u64,
    /// Time from empty to full, in ns; 1 or more.
    refill: u128,
    /// From -[`MAX_OPERATION`] to `size`.
    level: i128,
    /// A part of the next token: `part / refill` of it.
    part: u128,
    burst: u64,
    last: Duration,
}

impl TokenBucket {
    /// A full bucket. The sizes of `config` are at least 1.
    pub(super) fn new(config: &TokenBucketConfig, now: Duration) -> Self {
        Self {
            size: config.size,
            refill: u128::from(config.refill_time_ms).saturating_mul(1_000_000).max(1),
            level: i128::from(config.size),
            part: 0,
            burst: config.one_time_burst,
            last: now,
        }
    }

    /// Zero when `tokens` may be taken at `now`, else the time until then.
    pub(super) fn wait(&mut self, tokens: u64, now: Duration) -> Duration {
        self.gain(now);
        let wanted = i128::from(tokens.min(MAX_OPERATION)) - i128::from(self.burst);
        // What does not fit passes when the bucket is full.
        let missing = wanted.min(i128::from(self.size)) - self.level;
        let Ok(missing @ 1..) = u128::try_from(missing) else {
            return Duration::ZERO;
        };
        let parts = missing.saturating_mul(self.refill).saturating_sub(self.part);
        let nanos = parts.div_ceil(u128::from(self.size).max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX).max(1))
    }

    /// Takes `tokens`, those of the burst first, into debt if there are not enough.
    pub(super) fn take(&mut self, tokens: u64) {
        let tokens = tokens.min(MAX_OPERATION);
        let from_burst = tokens.min(self.burst);
        self.burst -= from_burst;
        self.set_level(self.level - i128::from(tokens - from_burst));
    }

    /// What is in it at `now`.
    pub(super) fn state(&mut self, now: Duration) -> BucketState {
        self.gain(now);
        BucketState {
            level: self.level,
            burst: self.burst,
        }
    }

    /// Sets the tokens, within what the bucket can hold and owe.
    pub(super) fn set_level(&mut self, level: i128) {
        self.level = level.clamp(-i128::from(MAX_OPERATION), i128::from(self.size));
    }

    /// Leaves at most `burst` of the one-time burst.
    pub(super) fn limit_burst(&mut self, burst: u64) {
        self.burst = self.burst.min(burst);
    }

    /// Adds what the time since the last call brought.
    fn gain(&mut self, now: Duration) {
        // Beyond 584 years the clock stands still for us.
        let passed = now.saturating_sub(self.last).as_nanos().min(u64::MAX.into());
        self.last = self.last.max(now);
        let size = u128::from(self.size);
        // Whole refills apart, so that no product exceeds 2⁶⁴ × 2⁶⁴; saturation can only lose tokens.
        let parts = (passed % self.refill)
            .saturating_mul(size)
            .saturating_add(self.part);
        let tokens = (passed / self.refill)
            .saturating_mul(size)
            .saturating_add(parts / self.refill);
        self.part = parts % self.refill;
        let tokens = i128::try_from(tokens).unwrap_or(i128::MAX);
        let level = self.level.saturating_add(tokens);
        if level >= i128::from(self.size) {
            self.part = 0;
        }
        self.set_level(level);
    }
}
