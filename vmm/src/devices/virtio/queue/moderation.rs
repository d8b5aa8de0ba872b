//! Interrupt moderation: how long the driver may wait to hear of finished requests.
//!
//! An interrupt costs the guest three exits (injection, acknowledgement, end of interrupt), and the kick of the request
//! it submits meanwhile one more. A device faster than the guest would interrupt, and be kicked, for every request. So
//! when the driver keeps several requests under way, finished ones are held back until there are some, or for about the
//! time the driver needs to submit as many; while they are, the device looks at the queue by itself and asks for no
//! kicks. A driver that waits for one request at a time never notices: its request is announced at once.
//!
//! How long is learned. The time between requests is measured while nothing is held, corrected by what each hold gathers,
//! and after a hold that gathers nothing (the driver waits for what is held) a number of requests passes without.
//!
//! Measured in the lab (`tests/lab/bench block`, 4 KiB at depth 16, from the page cache): 0.09 instead of 0.46 interrupts
//! for a request, and half the exits.

use std::time::{Duration, Instant};

/// Fewer requests under way are announced at once.
const MIN_DEPTH: u16 = 4;
/// Requests a driver may have under way that has more than one.
const EXPLORED_DEPTH: u16 = 8;
/// Shortest time worth a timer.
const MIN_HOLD: Duration = Duration::from_micros(10);
/// Longest time a request is held. On a machine of today a hold takes some tens of microseconds.
const MAX_HOLD: Duration = Duration::from_millis(1);
/// A longer pause says nothing about the driver's pace.
const PAUSE: Duration = Duration::from_millis(1);
/// Requests announced at once after a hold that gathered nothing.
const SKIP: u32 = 64;

/// A look at the queue: what was taken from it, and what is to be announced.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Turn {
    /// Requests taken since the last turn.
    pub taken: u16,
    /// Requests taken whose end the driver has not seen; 0 if it does not tell.
    pub awaited: u16,
    /// Those of them that are finished.
    pub unannounced: u16,
    /// Requests that are being worked on: their end brings the next turn.
    pub in_flight: bool,
}

/// Finished requests are being held back.
#[derive(Debug, Clone, Copy)]
struct Hold {
    until: Instant,
    /// Requests taken since it began.
    gathered: u16,
}

/// The moderation of one queue.
#[derive(Debug)]
pub struct Moderation {
    /// Most requests awaited lately.
    depth: u16,
    /// Time between two requests.
    pace: Duration,
    /// When requests were taken last.
    taken_at: Instant,
    /// Requests to announce at once.
    skip: u32,
    hold: Option<Hold>,
}

impl Moderation {
    /// Nothing learned yet; `now` is the time.
    pub fn new(now: Instant) -> Self {
        Self {
            depth: 0,
            pace: Duration::ZERO,
            taken_at: now,
            skip: 0,
            hold: None,
        }
    }

    /// Whether finished requests are held at `now`, so that another turn will come without a kick.
    pub fn holds(&self, now: Instant) -> bool {
        self.hold.is_some_and(|hold| now < hold.until)
    }

    /// Says at the end of a turn until when what is finished is held back; `None` announces it.
    pub fn decide(&mut self, now: Instant, turn: Turn) -> Option<Instant> {
        self.depth = turn.awaited.max(self.depth - self.depth.div_ceil(8));
        self.measure(now, turn.taken);
        if self.hold.is_some_and(|hold| now >= hold.until) {
            self.learn();
            return None;
        }
        if turn.unannounced == 0 {
            return self.hold.map(|hold| hold.until);
        }
        if self.hold.is_none() {
            self.skip = self.skip.saturating_sub(u32::from(turn.unannounced));
        }
        let mut depth = self.depth;
        if (2..MIN_DEPTH).contains(&depth) && self.skip == 0 {
            // There may be more requests to come than are under way: the driver heard of each end too early to tell.
            depth = EXPLORED_DEPTH;
        }
        if turn.unannounced >= enough(depth, turn.in_flight) {
            self.hold = None;
        } else if self.hold.is_none() && self.skip == 0 {
            let hold = self.pace * u32::from(enough(depth, false));
            self.hold = Some(Hold {
                until: now + hold.clamp(MIN_HOLD, MAX_HOLD),
                gathered: 0,
            });
        }
        self.hold.map(|hold| hold.until)
    }

    fn measure(&mut self, now: Instant, taken: u16) {
        if let Some(hold) = &mut self.hold {
            hold.gathered = hold.gathered.saturating_add(taken);
        } else if taken > 0 {
            let gap = now.saturating_duration_since(self.taken_at);
            if gap < PAUSE {
                self.pace = (self.pace * 7 + gap / u32::from(taken)) / 8;
            }
        }
        if taken > 0 {
            self.taken_at = now;
        }
    }

    /// Ends a hold that took its time.
    fn learn(&mut self) {
        let Some(Hold { gathered, .. }) = self.hold.take() else {
            return;
        };
        if gathered == 0 || self.depth < MIN_DEPTH {
            self.skip = SKIP;
        } else if gathered > enough(self.depth, false) {
            self.pace = self.pace * 3 / 4;
        } else if gathered < enough(self.depth, false) / 2 {
            self.pace = (self.pace * 5 / 4).min(MAX_HOLD);
        }
    }
}

/// As many finished requests are announced at once: three quarters of what the driver has under way, so that it has something
/// to do until it sees them; fewer when the device is busy, because that must not run dry.
fn enough(depth: u16, in_flight: bool) -> u16 {
    match depth {
        ..MIN_DEPTH => 0,
        depth if in_flight => depth / 8,
        depth => depth - depth / 4,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    const PACE: Duration = Duration::from_micros(20);
    const LATENCY: Duration = Duration::from_micros(30);

    /// A driver that submits a request each [`PACE`] while it has less than `depth` under way and sees an announcement
    /// [`LATENCY`] later, and a device that finishes each request at once. Returns the announcements needed for
    /// `requests`, and the longest time a finished request was held.
    fn simulate(moderation: &mut Moderation, start: Instant, depth: u16, requests: u32) -> (u32, Duration) {
        let mut now = start;
        let (mut submitted, mut announcements, mut longest) = (0, 0, Duration::ZERO);
        let (mut unannounced, mut held_since, mut until) = (0, start, None);
        // Announced and not yet seen: when it will be, and how many.
        let mut unseen: VecDeque<(Instant, u16)> = VecDeque::new();
        let mut submit_at = start;
        while submitted < requests {
            let under_way = |unseen: &VecDeque<_>| unannounced + unseen.iter().map(|(_, n)| n).sum::<u16>();
            let next = match under_way(&unseen) < depth {
                true => Some(submit_at.max(now)),
                false => unseen.front().map(|(at, _)| *at),
            };
            // What comes first: the end of the hold, or the driver.
            now = [until, next].into_iter().flatten().min().unwrap();
            while unseen.pop_front_if(|(at, _)| *at <= now).is_some() {}
            let taken = u16::from(under_way(&unseen) < depth && submit_at <= now);
            if taken == 1 {
                submit_at = now + PACE;
                submitted += 1;
                held_since = if unannounced == 0 { now } else { held_since };
                unannounced += 1;
            }
            let turn = Turn {
                taken,
                awaited: unannounced + unseen.iter().map(|(_, n)| n).sum::<u16>(),
                unannounced,
                in_flight: false,
            };
            until = moderation.decide(now, turn);
            if until.is_none() && unannounced > 0 {
                announcements += 1;
                longest = longest.max(now - held_since);
                unseen.push_back((now + LATENCY, std::mem::take(&mut unannounced)));
            }
        }
        (announcements, longest)
    }

    #[test]
    fn decide_when_requests_come_one_at_a_time_announces_each_at_once() {
        let start = Instant::now();
        let mut moderation = Moderation::new(start);
        assert_eq!(simulate(&mut moderation, start, 1, 1000), (1000, Duration::ZERO));
    }

    #[test]
    fn decide_when_the_driver_keeps_many_under_way_announces_some_at_a_time() {
        let start = Instant::now();
        let mut moderation = Moderation::new(start);
        let (announcements, longest) = simulate(&mut moderation, start, 16, 1000);
        assert!((100..=333).contains(&announcements), "{announcements}");
        assert!(longest <= 16 * PACE, "{longest:?}");
        // And one at a time again: the first of them may be held, not all.
        let (announcements, longest) = simulate(&mut moderation, start + MAX_HOLD * 1000, 1, 1000);
        assert!(announcements >= 995, "{announcements}");
        assert!(longest <= MAX_HOLD, "{longest:?}");
    }

    #[test]
    fn decide_when_a_hold_gathers_nothing_announces_the_next_at_once() {
        let mut now = Instant::now();
        let mut moderation = Moderation::new(now);
        let turn = |taken| Turn {
            taken,
            awaited: 16,
            unannounced: 1,
            in_flight: false,
        };
        let until = moderation.decide(now, turn(1)).unwrap();
        assert!(moderation.holds(now) && !moderation.holds(until));
        assert_eq!(moderation.decide(until, turn(0)), None);
        for _ in 1..SKIP {
            now += PACE;
            assert_eq!(moderation.decide(now, turn(1)), None);
        }
        assert!(moderation.decide(now, turn(1)).is_some());
    }

    #[test]
    fn decide_when_the_device_is_busy_holds_less() {
        let now = Instant::now();
        let busy = |unannounced| Turn {
            taken: 0,
            awaited: 16,
            unannounced,
            in_flight: true,
        };
        let mut moderation = Moderation::new(now);
        assert!(moderation.decide(now, busy(1)).is_some());
        assert_eq!(moderation.decide(now, busy(2)), None);
    }

    mod properties {
        use proptest::prelude::*;

        use super::*;

        proptest! {
            #[test]
            fn decide_whatever_happens_holds_nothing_longer_than_the_limit(
                turns in prop::collection::vec((0u64..5_000_000, 0u16..300, 0u16..300, 0u16..300, any::<bool>()), 1..200)
            ) {
                let mut now = Instant::now();
                let mut moderation = Moderation::new(now);
                let mut until = None;
                for (step, taken, awaited, unannounced, in_flight) in turns {
                    // The worker comes back at the end of a hold at the latest.
                    let next = now + Duration::from_nanos(step);
                    now = until.map_or(next, |until| next.min(until));
                    let before = until;
                    until = moderation.decide(now, Turn { taken, awaited, unannounced, in_flight });
                    if let Some(until) = until {
                        prop_assert!(until <= now + MAX_HOLD && before.is_none_or(|before| before == until && now < before));
                    }
                    prop_assert_eq!(moderation.holds(now), until.is_some());
                }
            }
        }
    }
}
