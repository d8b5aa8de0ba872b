//! The phases of a container's life, as the shim notes them in the file named by `KATA_TIMELINE`.
//!
//! One JSON object a line: `{"phase": "shim start", "unix_us": 1700000000000000}`.

use serde_json::Value;

/// The phases in their order.
///
/// `vm set-up` ends when the first vCPU enters the guest, `kernel` when the guest's first process starts.
pub const PHASES: [&str; 7] = [
    "shim start",
    "vm set-up",
    "kernel",
    "agent ready",
    "container created",
    "first output",
    "exit",
];

/// When each phase was reached, in microseconds of Unix time; `None` when it was not noted.
#[derive(Debug, PartialEq)]
pub struct Timeline([Option<u64>; PHASES.len()]);

impl Timeline {
    /// Reads the notes; lines that are not notes are skipped, the first note of a phase counts.
    pub fn parse(text: &str) -> Self {
        let mut times = [None; PHASES.len()];
        for line in text.lines() {
            let Ok(note) = serde_json::from_str::<Value>(line) else {
                continue;
            };
            let phase = note.get("phase").and_then(Value::as_str);
            let at = note.get("unix_us").and_then(Value::as_u64);
            let slot = PHASES
                .iter()
                .zip(&mut times)
                .find(|(name, _)| phase == Some(name));
            if let Some((_, slot)) = slot {
                *slot = slot.or(at);
            }
        }
        Self(times)
    }

    /// A table: the time of each phase since the first one, and since the one before it.
    pub fn table(&self) -> String {
        let mut text = format!("{:<20}{:>12}{:>12}\n", "phase", "at (ms)", "took (ms)");
        let first = self.0.iter().flatten().min().copied();
        let mut before = first;
        for (phase, at) in PHASES.iter().zip(self.0) {
            text.push_str(&format!(
                "{phase:<20}{:>12}{:>12}\n",
                ms(first, at),
                ms(before, at)
            ));
            before = at.or(before);
        }
        text
    }
}

/// The milliseconds from `from` to `to`, or `-` when one is unknown.
fn ms(from: Option<u64>, to: Option<u64>) -> String {
    match (from, to) {
        (Some(from), Some(to)) => {
            let us = to.saturating_sub(from);
            format!("{}.{}", us / 1000, us % 1000 / 100)
        }
        _ => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_when_a_phase_is_missing_shows_a_dash() {
        let notes = "{\"phase\":\"shim start\",\"unix_us\":1000000}\nnoise\n\
                     {\"phase\":\"kernel\",\"unix_us\":1012345}\n{\"phase\":\"kernel\",\"unix_us\":2000000}\n";
        let table = Timeline::parse(notes).table();
        let lines = table
            .lines()
            .map(|l| l.split("  ").filter(|w| !w.is_empty()).collect::<Vec<_>>());
        let lines = lines.map(|l| l.join("|").replace("| ", "|")).collect::<Vec<_>>();
        assert_eq!(lines.get(1).unwrap(), "shim start|0.0|0.0");
        assert_eq!(lines.get(2).unwrap(), "vm set-up|-|-");
        assert_eq!(lines.get(3).unwrap(), "kernel|12.3|12.3");
    }
}
