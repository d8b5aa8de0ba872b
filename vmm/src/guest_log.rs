//! Log lines that the guest can cause, or a host error that comes with every request of the guest.
//!
//! A guest may repeat what it did as fast as it can trap. [`guest_log!`] writes the first [`BURST`] lines of a call site
//! in each [`PERIOD_S`], and counts the others; the count goes with the site's next line as the field `suppressed`.
//! A value shown with `%` or `?` is cut after [`MAX_VALUE_BYTES`], with control characters escaped: a line can neither be
//! made long nor look like two.
//!
//! A line that is not written costs one look at the clock and one atomic operation; its values are not formatted. Lines
//! about the host alone (an administrator's call, the end of the machine) use `tracing` directly.

use std::fmt::{self, Display, Write};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::time::{ClockId, clock_gettime};

/// Lines one call site writes in a period.
pub const BURST: u32 = 10;
/// Length of a period in seconds.
pub const PERIOD_S: u64 = 60;
/// Longest value of a field in a line, in bytes of the line.
pub const MAX_VALUE_BYTES: usize = 256;

static SUPPRESSED: AtomicU64 = AtomicU64::new(0);

/// Lines of the whole process that were not written.
pub fn suppressed() -> u64 {
    SUPPRESSED.load(Ordering::Relaxed)
}

/// Writes a line with the level, fields and message given, unless its call site has written too many.
///
/// Fields as in `tracing::event!`: `name`, `name = value`, and with `%` (Display) or `?` (Debug) before the value. The
/// message is a literal and comes last.
macro_rules! guest_log {
    (@ $level:ident [$($fields:tt)*] $message:literal $(,)?) => {{
        static LIMIT: $crate::guest_log::Limit = $crate::guest_log::Limit::new();
        if ::tracing::enabled!(::tracing::Level::$level)
            && let Some($crate::guest_log::Admitted { suppressed }) = LIMIT.admit()
        {
            ::tracing::event!(::tracing::Level::$level, $($fields)* suppressed, $message);
        }
    }};
    (@ $level:ident [$($fields:tt)*] $name:ident = % $value:expr, $($rest:tt)+) => {
        guest_log!(@ $level [$($fields)* $name = %$crate::guest_log::Clip(&$value),] $($rest)+)
    };
    (@ $level:ident [$($fields:tt)*] $name:ident = ? $value:expr, $($rest:tt)+) => {
        guest_log!(@ $level [$($fields)* $name = %$crate::guest_log::Clip(format_args!("{:?}", &$value)),] $($rest)+)
    };
    (@ $level:ident [$($fields:tt)*] $name:ident = $value:expr, $($rest:tt)+) => {
        guest_log!(@ $level [$($fields)* $name = $value,] $($rest)+)
    };
    (@ $level:ident [$($fields:tt)*] % $name:ident, $($rest:tt)+) => {
        guest_log!(@ $level [$($fields)*] $name = %$name, $($rest)+)
    };
    (@ $level:ident [$($fields:tt)*] ? $name:ident, $($rest:tt)+) => {
        guest_log!(@ $level [$($fields)*] $name = ?$name, $($rest)+)
    };
    (@ $level:ident [$($fields:tt)*] $name:ident, $($rest:tt)+) => {
        guest_log!(@ $level [$($fields)* $name,] $($rest)+)
    };
    ($level:ident, $($rest:tt)+) => {
        guest_log!(@ $level [] $($rest)+)
    };
}

/// What one call site may still write: its period in the upper half, the lines asked for in it in the lower.
#[derive(Debug)]
pub struct Limit(AtomicU64);

/// A line may be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admitted {
    /// Lines of the call site that were not written since its last one, if any.
    pub suppressed: Option<u64>,
}

impl Limit {
    /// Nothing was written yet.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Asks for a line now.
    pub fn admit(&self) -> Option<Admitted> {
        // CLOCK_MONOTONIC_COARSE needs no system call; it has been running since the boot, so periods begin at 0.
        let now = clock_gettime(ClockId::MonotonicCoarse).tv_sec;
        self.admit_in(u64::try_from(now).unwrap_or(0) / PERIOD_S)
    }

    fn admit_in(&self, period: u64) -> Option<Admitted> {
        let period = period as u32;
        let next = |state: u64| {
            let lines = if upper(state) == period { state as u32 } else { 0 };
            u64::from(period) << 32 | u64::from(lines.saturating_add(1))
        };
        let mut before = self.0.load(Ordering::Relaxed);
        while let Err(now) =
            self.0
                .compare_exchange_weak(before, next(before), Ordering::Relaxed, Ordering::Relaxed)
        {
            before = now;
        }
        let lines = next(before) as u32;
        if lines > BURST {
            SUPPRESSED.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        let passed = upper(before) != period;
        let left_out = u64::from((before as u32).saturating_sub(BURST));
        Some(Admitted {
            suppressed: (passed && left_out > 0).then_some(left_out),
        })
    }
}

fn upper(state: u64) -> u32 {
    (state >> 32) as u32
}

/// A value in a line: its first [`MAX_VALUE_BYTES`], control characters escaped.
#[derive(Debug)]
pub struct Clip<T>(pub T);

impl<T: Display> Display for Clip<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = Clipped {
            out: f,
            left: MAX_VALUE_BYTES,
            full: false,
        };
        let result = write!(out, "{}", self.0);
        if out.full { f.write_char('…') } else { result }
    }
}

struct Clipped<'a, 'f> {
    out: &'a mut fmt::Formatter<'f>,
    left: usize,
    full: bool,
}

impl Clipped<'_, '_> {
    fn put(&mut self, c: char) -> fmt::Result {
        let Some(left) = self.left.checked_sub(c.len_utf8()) else {
            self.full = true;
            // Ends the formatting of the value, however long it is.
            return Err(fmt::Error);
        };
        self.left = left;
        self.out.write_char(c)
    }
}

impl Write for Clipped<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            if c.is_control() {
                c.escape_default().try_for_each(|c| self.put(c))?;
            } else {
                self.put(c)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
pub mod recorder;
#[cfg(test)]
mod tests;
