//! Counts the lines of the test process: by `tracing`, and by the `log` facade that the libraries write to.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::Instant;

use tracing::field::{Field, Visit};
use tracing::span;
use tracing::{Event, Metadata, Subscriber};

/// A message of ours, and a few values.
const LONGEST_LINE: usize = 3 * super::MAX_VALUE_BYTES + 256;

/// What was seen of one message.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// Lines written.
    pub lines: u64,
    /// Bytes of the longest of them, all fields together.
    pub longest: usize,
}

static SEEN: Mutex<Option<HashMap<String, Seen>>> = Mutex::new(None);
static LIBRARIES: Mutex<Vec<String>> = Mutex::new(Vec::new());
static INSTALLED: Once = Once::new();

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets the process count from now on, if it does not yet.
pub fn install() {
    INSTALLED.call_once(|| {
        tracing::subscriber::set_global_default(Recorder).unwrap();
        log::set_logger(&Libraries).unwrap();
        log::set_max_level(log::LevelFilter::Debug);
    });
}

/// What was seen of all messages that begin with `message`.
pub fn seen(message: &str) -> Seen {
    let seen = lock(&SEEN);
    let all = seen.iter().flatten();
    all.filter(|(text, _)| text.starts_with(message))
        .fold(Seen::default(), |sum, (_, one)| Seen {
            lines: sum.lines + one.lines,
            longest: sum.longest.max(one.longest),
        })
}

/// Lets `flood` cause lines with `messages`, each `rounds` times at least, and checks that only a few short ones of each
/// were written, and none by a library.
pub fn assert_limited(messages: &[&str], rounds: u16, flood: impl FnOnce()) {
    install();
    let before: Vec<_> = messages.iter().map(|message| seen(message).lines).collect();
    let suppressed = super::suppressed();
    let begin = Instant::now();
    flood();
    // The period may change meanwhile, more than once on a busy machine.
    let periods = begin.elapsed().as_secs() / super::PERIOD_S + 2;
    let mut written = 0;
    for (message, before) in messages.iter().zip(before) {
        let Seen { lines, longest } = seen(message);
        // Other tests may have used the burst up.
        assert!(lines > 0, "{message}: never written");
        // Some messages are written at two places.
        assert!(
            lines - before <= 2 * periods * u64::from(super::BURST),
            "{message}: {lines} lines"
        );
        assert!(longest <= LONGEST_LINE, "{message}: {longest} bytes");
        written += lines - before;
    }
    let asked = written + super::suppressed() - suppressed;
    assert!(
        asked >= u64::from(rounds) * messages.len() as u64,
        "only {asked} lines of {messages:?}"
    );
    assert_eq!(*lock(&LIBRARIES), [""; 0]);
}

struct Recorder;

#[derive(Default)]
struct Line {
    message: String,
    bytes: usize,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = format!("{value:?}");
        self.bytes += field.name().len() + text.len();
        if field.name() == "message" {
            self.message = text;
        }
    }
}

impl Subscriber for Recorder {
    fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _span: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _span: &span::Id, _values: &span::Record<'_>) {}

    fn record_follows_from(&self, _span: &span::Id, _follows: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        let mut seen = lock(&SEEN);
        let one = seen.get_or_insert_default().entry(line.message).or_default();
        one.lines += 1;
        one.longest = one.longest.max(line.bytes);
    }

    fn enter(&self, _span: &span::Id) {}

    fn exit(&self, _span: &span::Id) {}
}

struct Libraries;

impl log::Log for Libraries {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        ["virtio_queue", "fuse_backend_rs"]
            .iter()
            .any(|library| metadata.target().starts_with(library))
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            lock(&LIBRARIES).push(format!("{}: {}", record.target(), record.args()));
        }
    }

    fn flush(&self) {}
}
