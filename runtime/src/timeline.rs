//! Marks of a start-up timeline, for people who measure.
//!
//! When the environment variable `KATA_TIMELINE` names a file, every [`mark`] appends one line of JSON to it:
//! `{"phase":"agent ready","unix_us":1732372749123456}`. Without the variable a mark costs one atomic load.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

static FILE: OnceLock<Option<File>> = OnceLock::new();

/// Whether anybody measures.
pub fn is_enabled() -> bool {
    FILE.get_or_init(open).is_some()
}

/// Appends `phase` with the current time to the timeline, if there is one. Never fails: a timeline that cannot be
/// written must not stop a container.
pub fn mark(phase: &str) {
    mark_at(phase, SystemTime::now());
}

/// As [`mark`], for something that happened at `time`.
pub fn mark_at(phase: &str, time: SystemTime) {
    let Some(mut file) = FILE.get_or_init(open).as_ref() else {
        return;
    };
    let line = line(phase, time);
    // One write per line: with O_APPEND lines of several threads (and of `start` and `run`) do not mix.
    if let Err(error) = file.write_all(line.as_bytes()) {
        tracing::debug!(%error, "timeline");
    }
}

fn line(phase: &str, time: SystemTime) -> String {
    let unix_us = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_micros());
    format!(
        "{{\"phase\":{},\"unix_us\":{unix_us}}}\n",
        serde_json::Value::from(phase)
    )
}

fn open() -> Option<File> {
    let path = std::env::var_os("KATA_TIMELINE").filter(|path| !path.is_empty())?;
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .inspect_err(|error| tracing::warn!(path = %path.display(), %error, "KATA_TIMELINE cannot be opened"))
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_when_written_is_one_json_object() {
        let text = line(
            "agent \"ready\"",
            UNIX_EPOCH + std::time::Duration::from_micros(1_500),
        );

        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["phase"], "agent \"ready\"");
        assert_eq!(value["unix_us"], 1_500);
        assert!(text.ends_with('\n') && text.matches('\n').count() == 1);
    }
}
