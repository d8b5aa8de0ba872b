#![allow(unsafe_code)]

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use super::bucket::{BucketState, MAX_OPERATION, TokenBucket};
use super::{Buckets, RateLimiter, RateLimiterState};
use crate::rate_limiter::{BucketConfigError, RateLimiterConfig, TokenBucketConfig};

const PATIENCE: Duration = Duration::from_secs(60);

fn bucket(size: u64, one_time_burst: u64, refill_time_ms: u64) -> TokenBucketConfig {
    TokenBucketConfig {
        size,
        one_time_burst,
        refill_time_ms,
    }
}

fn bandwidth(bucket: TokenBucketConfig) -> RateLimiterConfig {
    RateLimiterConfig {
        bandwidth: Some(bucket),
        ops: None,
    }
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Whether an operation passes at `now`; takes its tokens if so.
fn passes(buckets: &mut Buckets, bytes: u64, ops: u64, now: Duration) -> bool {
    let open = buckets.wait(bytes, ops, now).is_zero();
    if open {
        buckets.take(bytes, ops);
    }
    open
}

fn wait_readable(limiter: &RateLimiter, timeout: Duration) -> bool {
    let mut fd = libc::pollfd {
        fd: limiter.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&raw mut fd, 1, timeout.as_millis() as i32) == 1 }
}

#[test]
fn consume_when_the_bucket_is_empty_waits_for_exactly_what_is_missing() {
    let mut buckets = Buckets::new(&bandwidth(bucket(1000, 0, 1000)), Duration::ZERO);
    assert!(passes(&mut buckets, 1000, 1, Duration::ZERO));
    assert_eq!(buckets.wait(10, 1, Duration::ZERO), ms(10));
    assert_eq!(buckets.wait(10, 1, ms(4)), ms(6));
    assert!(!passes(&mut buckets, 10, 1, ms(10) - Duration::from_nanos(1)));
    assert!(passes(&mut buckets, 10, 1, ms(10)));
    assert!(!passes(&mut buckets, 1, 1, ms(10)));
}

#[test]
fn consume_when_there_is_a_burst_spends_it_first_and_once() {
    let mut buckets = Buckets::new(&bandwidth(bucket(100, 50, 100)), Duration::ZERO);
    assert!(passes(&mut buckets, 50, 1, Duration::ZERO));
    assert!(passes(&mut buckets, 100, 1, Duration::ZERO));
    assert!(!passes(&mut buckets, 1, 1, Duration::ZERO));
    assert!(!passes(&mut buckets, 101, 1, ms(99)));
    assert!(passes(&mut buckets, 100, 1, ms(100_000)), "full, not more");
    assert!(!passes(&mut buckets, 1, 1, ms(100_000)));
}

#[test]
fn consume_when_larger_than_the_bucket_passes_when_full_and_leaves_debt() {
    let mut buckets = Buckets::new(&bandwidth(bucket(100, 0, 100)), Duration::ZERO);
    assert!(passes(&mut buckets, 350, 1, Duration::ZERO));
    assert_eq!(buckets.wait(1, 1, Duration::ZERO), ms(251));
    assert_eq!(buckets.wait(350, 1, Duration::ZERO), ms(350));
    assert!(!passes(&mut buckets, 350, 1, ms(349)));
    assert!(passes(&mut buckets, 350, 1, ms(350)));
}

#[test]
fn consume_when_one_bucket_refuses_takes_from_neither() {
    let config = RateLimiterConfig {
        bandwidth: Some(bucket(100, 0, 1000)),
        ops: Some(bucket(1, 0, 10)),
    };
    let mut buckets = Buckets::new(&config, Duration::ZERO);
    assert!(passes(&mut buckets, 60, 1, Duration::ZERO));
    assert!(!passes(&mut buckets, 40, 1, ms(9)), "ops");
    assert!(passes(&mut buckets, 40, 1, ms(10)), "the bytes are still there");
    assert!(!passes(&mut buckets, 40, 1, ms(100)), "bandwidth");
    assert_eq!(
        buckets.wait(0, 1, ms(100)),
        Duration::ZERO,
        "the operation is still there"
    );
}

#[test]
fn validate_when_a_bucket_would_be_stuck_is_refused() {
    for (size, refill) in [(0, 1), (1, 0), (0, 0)] {
        let config = bandwidth(bucket(size, 1, refill));
        assert!(matches!(
            config.validate(),
            Err(BucketConfigError {
                bucket: "bandwidth",
                ..
            })
        ));
        let config = RateLimiterConfig {
            ops: config.bandwidth,
            bandwidth: None,
        };
        assert!(matches!(
            config.validate(),
            Err(BucketConfigError { bucket: "ops", .. })
        ));
    }
    assert!(bandwidth(bucket(1, 0, 1)).validate().is_ok());
    assert!(RateLimiterConfig::default().validate().is_ok());
}

#[test]
fn timer_when_throttled_fires_when_the_tokens_are_there() {
    let start = Instant::now();
    let mut limiter = RateLimiter::new(&bandwidth(bucket(1000, 0, 200))).unwrap();
    assert!(limiter.consume(1000, 1));
    assert!(!wait_readable(&limiter, Duration::ZERO), "armed without need");
    let mut taken = 0;
    // Once at the most, unless this test is stopped for longer than it takes to fill half of the bucket.
    while limiter.consume(500, 1) {
        taken += 500;
    }
    assert!(wait_readable(&limiter, PATIENCE));
    // 1000 were there, those taken since and the 500 that were missing came at 5 in a ms.
    assert!(start.elapsed() >= ms((taken + 500) / 5));
    limiter.on_timer();
    assert!(limiter.consume(500, 1));
    assert!(!wait_readable(&limiter, Duration::ZERO));
    assert_eq!(limiter.throttled(), 1);
}

#[test]
fn timer_when_two_wait_fires_for_the_shorter_one_first() {
    let mut limiter = RateLimiter::new(&bandwidth(bucket(1000, 0, 1_000_000))).unwrap();
    assert!(limiter.consume(1000, 1));
    assert!(!limiter.consume(1000, 1));
    // A token comes each second.
    while limiter.consume(1, 1) {}
    assert!(wait_readable(&limiter, PATIENCE));
}

#[test]
fn on_timer_when_nothing_expired_does_not_block() {
    let mut limiter = RateLimiter::new(&bandwidth(bucket(1, 0, 1_000_000))).unwrap();
    limiter.on_timer();
    assert!(limiter.consume(1, 1));
    assert!(!limiter.consume(1, 1));
    limiter.on_timer();
}

#[test]
fn limiter_when_not_configured_lets_everything_pass() {
    let mut limiter = RateLimiter::new(&RateLimiterConfig::default()).unwrap();
    for _ in 0..1000 {
        assert!(limiter.consume(u64::MAX, u64::MAX) && limiter.may_start());
        limiter.charge(u64::MAX, u64::MAX);
    }
    assert_eq!(limiter.throttled(), 0);
    assert_eq!(limiter.state(), RateLimiterState::default());
}

#[test]
fn may_start_when_charged_into_debt_says_no_until_it_is_paid() {
    let mut limiter = RateLimiter::new(&bandwidth(bucket(1000, 0, 100))).unwrap();
    while limiter.may_start() {
        limiter.charge(2000, 1);
    }
    assert!(wait_readable(&limiter, PATIENCE));
    limiter.on_timer();
    assert!(limiter.may_start());
}

#[test]
fn update_when_an_operation_waits_wakes_it() {
    let mut limiter = RateLimiter::new(&bandwidth(bucket(10, 0, u64::MAX))).unwrap();
    assert!(limiter.consume(10, 1));
    assert!(!limiter.consume(10, 1));
    limiter.update(&RateLimiterConfig::default());
    assert!(wait_readable(&limiter, PATIENCE));
    limiter.on_timer();
    assert!(limiter.consume(10, 1));
}

#[test]
fn update_when_buckets_exist_keeps_their_tokens_within_the_new_size() {
    let mut limiter = RateLimiter::new(&bandwidth(bucket(100, 0, u64::MAX))).unwrap();
    assert!(limiter.consume(30, 1));
    limiter.update(&RateLimiterConfig {
        bandwidth: Some(bucket(1000, 5, u64::MAX)),
        ops: Some(bucket(7, 0, u64::MAX)),
    });
    let full = |level, burst| Some(BucketState { level, burst });
    let state = limiter.state();
    assert_eq!((state.bandwidth, state.ops), (full(70, 5), full(7, 0)));
    limiter.update(&bandwidth(bucket(50, 0, u64::MAX)));
    assert_eq!(limiter.state().bandwidth, full(50, 0));
}

#[test]
fn restore_when_saved_goes_on_from_there_and_when_absurd_is_cut() {
    let config = bandwidth(bucket(100, 50, u64::MAX));
    let mut limiter = RateLimiter::new(&config).unwrap();
    assert!(limiter.consume(120, 1));
    let saved = limiter.state();
    let mut limiter = RateLimiter::new(&config).unwrap();
    limiter.restore(&saved);
    assert_eq!(limiter.state(), saved);
    for level in [i128::MIN, i128::MAX] {
        let absurd = Some(BucketState {
            level,
            burst: u64::MAX,
        });
        limiter.restore(&RateLimiterState {
            bandwidth: absurd,
            ops: absurd,
        });
        let state = limiter.state();
        let bucket = state.bandwidth.unwrap();
        assert!(bucket.level >= -i128::from(MAX_OPERATION) && bucket.level <= 100 && bucket.burst == 0);
        assert!(state.ops.is_none());
    }
}

mod properties {
    use proptest::prelude::*;

    use super::*;

    prop_compose! {
        /// Small numbers, so that a test crosses all limits many times.
        fn small_bucket()(size in 1u64..2000, burst in 0u64..2000, refill in 1u64..2000) -> TokenBucketConfig {
            bucket(size, burst, refill)
        }
    }

    /// Steps of time in ns and sizes of operations.
    fn operations() -> impl Strategy<Value = Vec<(u64, u64)>> {
        let step = prop_oneof![Just(0), 1u64..1000, 1u64..1_000_000, 1u64..3_000_000_000];
        prop::collection::vec((step, 0u64..3000), 1..80)
    }

    proptest! {
        #[test]
        fn tokens_in_any_window_stay_within_size_and_burst_and_rate(config in small_bucket(), operations in operations()) {
            let mut bucket = TokenBucket::new(&config, Duration::ZERO);
            let mut now = Duration::ZERO;
            let mut granted = Vec::new();
            for (step, tokens) in operations {
                now += Duration::from_nanos(step);
                if bucket.wait(tokens, now).is_zero() {
                    bucket.take(tokens);
                    granted.push((now, u128::from(tokens)));
                }
            }
            let refill = u128::from(config.refill_time_ms) * 1_000_000;
            for first in 0..granted.len() {
                let mut sum = 0;
                let mut largest = 0;
                for &(at, tokens) in &granted[first..] {
                    sum += tokens;
                    largest = largest.max(tokens);
                    // An operation larger than the bucket goes into debt by what it is larger.
                    let at_once = u128::from(config.size).max(largest) + u128::from(config.one_time_burst);
                    let rate = u128::from(config.size) * (at - granted[first].0).as_nanos();
                    prop_assert!(sum * refill <= at_once * refill + rate, "{sum} tokens from {first} to {at:?}");
                }
            }
        }

        #[test]
        fn operation_when_it_waits_as_told_always_passes(config in small_bucket(), operations in operations()) {
            let mut bucket = TokenBucket::new(&config, Duration::ZERO);
            let mut now = Duration::ZERO;
            for (step, tokens) in operations {
                now += Duration::from_nanos(step);
                let wait = bucket.wait(tokens, now);
                if wait > Duration::from_nanos(1) {
                    let early = now + wait - Duration::from_nanos(1);
                    prop_assert!(!bucket.wait(tokens, early).is_zero(), "waits longer than needed");
                }
                now += wait;
                prop_assert!(bucket.wait(tokens, now).is_zero(), "starved");
                bucket.take(tokens);
            }
        }

        #[test]
        fn bucket_when_always_asked_uses_the_whole_rate(config in small_bucket(), step in 1u64..1_000_000) {
            let refill = u128::from(config.refill_time_ms) * 1_000_000;
            // Who empties it keeps less than a token back; what one step brings must fit above that, or the bucket runs over.
            let room = u128::from(config.size - 1);
            prop_assume!(u128::from(config.size) * u128::from(step) <= room * refill);
            let mut bucket = TokenBucket::new(&config, Duration::ZERO);
            let mut now = Duration::ZERO;
            let mut taken = 0u128;
            for _ in 0..2000 {
                now += Duration::from_nanos(step);
                while bucket.wait(1, now).is_zero() {
                    bucket.take(1);
                    taken += 1;
                }
            }
            let rate = u128::from(config.size) * now.as_nanos() / refill;
            // Full at the start: what time brought until the first request is lost.
            let lost = u128::from(config.size) * u128::from(step) / refill + 1;
            let expected = u128::from(config.size + config.one_time_burst) + rate;
            prop_assert!(taken <= expected && taken + lost >= expected, "{taken} of {expected}");
        }

        #[test]
        fn bucket_when_numbers_are_extreme_does_not_overflow(
            size in 1u64.., burst in any::<u64>(), refill in 1u64..,
            operations in prop::collection::vec((any::<u64>(), any::<u64>(), any::<u32>()), 1..50),
        ) {
            let mut bucket = TokenBucket::new(&bucket(size, burst, refill), Duration::ZERO);
            let mut now = Duration::ZERO;
            for (tokens, seconds, nanos) in operations {
                now = now.saturating_add(Duration::new(seconds, nanos % 1_000_000_000));
                let _ = bucket.wait(tokens, now);
                bucket.take(tokens);
                let state = bucket.state(now);
                prop_assert!(state.level <= i128::from(size) && state.level >= -i128::from(MAX_OPERATION));
            }
        }
    }
}
