//! The knobs of a rate limiter.

use serde::{Deserialize, Serialize};

/// Limits on what a device may move; without a bucket there is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RateLimiterConfig {
    /// Tokens are bytes.
    pub bandwidth: Option<TokenBucketConfig>,
    /// Tokens are operations: block requests, network frames.
    pub ops: Option<TokenBucketConfig>,
}

/// A token bucket: full at first, refilled at a constant rate of `size` tokens in `refill_time_ms`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenBucketConfig {
    /// Most tokens it holds, 1 or more.
    pub size: u64,
    /// Tokens given once on top of that, spent first and never refilled.
    #[serde(default)]
    pub one_time_burst: u64,
    /// Time in ms from empty to full, 1 or more.
    pub refill_time_ms: u64,
}

/// A bucket that could never hold or never gain a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{bucket}: size {size}, refill_time_ms {refill_time_ms}: both must be 1 or more (leave the bucket out for no limit)"
)]
pub struct BucketConfigError {
    /// `bandwidth` or `ops`.
    pub bucket: &'static str,
    /// Configured size.
    pub size: u64,
    /// Configured refill time.
    pub refill_time_ms: u64,
}

impl RateLimiterConfig {
    /// Checks the buckets.
    ///
    /// # Errors
    /// [`BucketConfigError`] for the first bucket that could never hold or never gain a token.
    pub fn validate(&self) -> Result<(), BucketConfigError> {
        for (bucket, config) in [("bandwidth", self.bandwidth), ("ops", self.ops)] {
            if let Some(TokenBucketConfig {
                size, refill_time_ms, ..
            }) = config
                && (size == 0 || refill_time_ms == 0)
            {
                return Err(BucketConfigError {
                    bucket,
                    size,
                    refill_time_ms,
                });
            }
        }
        Ok(())
    }
}
