//! The agent's log: one JSON object per line, kept in a bounded ring and streamed to whoever connects to the log
//! port. Warnings also go to the console, which the host shows when a boot fails.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// Bytes of log kept for a reader that connects late or is slow; older lines are dropped.
const RING_BYTES: usize = 256 * 1024;
/// Longest line kept; containers' names and error chains end up here, so it needs a bound.
const MAX_LINE: usize = 16 * 1024;

/// The log's ring. Cheap to clone; all clones are the same log.
#[derive(Clone, Default)]
pub struct Log {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    ring: Mutex<Ring>,
    written: Notify,
}

#[derive(Default)]
struct Ring {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Number of the first line in `lines`, counted from the start of the agent.
    first: u64,
}

impl Log {
    /// Makes this log the destination of the process's `tracing` events down to `level`.
    pub fn install(&self, level: tracing::Level) {
        let json = tracing_subscriber::fmt::layer()
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(false)
            .with_writer(self.clone())
            .with_filter(LevelFilter::from_level(level));
        let console = tracing_subscriber::fmt::layer()
            .with_ansi(false)
            .without_time()
            .with_target(false)
            .with_writer(io::stderr)
            .with_filter(LevelFilter::from_level(if level == tracing::Level::TRACE {
                level
            } else {
                tracing::Level::WARN
            }));
        // A second agent in one process exists only in tests; the first subscriber stays.
        let _ = tracing_subscriber::registry().with(json).with(console).try_init();
    }

    /// Sends the log from its oldest kept line on to `reader`, then follows it until the reader goes away.
    pub async fn stream_to(&self, mut reader: impl AsyncWrite + Unpin) -> io::Result<()> {
        let mut next = 0;
        loop {
            let written = self.shared.written.notified();
            let batch = self.lines_from(&mut next);
            if batch.is_empty() {
                written.await;
                continue;
            }
            reader.write_all(&batch).await?;
        }
    }

    /// Everything kept from line `next` on; moves `next` behind it. Lines lost to the bound are counted in a line.
    fn lines_from(&self, next: &mut u64) -> Vec<u8> {
        let ring = self.ring();
        let mut out = Vec::new();
        if *next < ring.first {
            let lost = ring.first - *next;
            out.extend_from_slice(
                format!("{{\"level\":\"WARN\",\"message\":\"{lost} log lines lost\"}}\n").as_bytes(),
            );
            *next = ring.first;
        }
        let skip = usize::try_from(*next - ring.first).unwrap_or(usize::MAX);
        for line in ring.lines.iter().skip(skip) {
            out.extend_from_slice(line);
            *next += 1;
        }
        out
    }

    fn push(&self, line: &[u8]) {
        let mut line = line.get(..MAX_LINE).unwrap_or(line).to_vec();
        if line.last() != Some(&b'\n') {
            line.push(b'\n');
        }
        let mut ring = self.ring();
        ring.bytes += line.len();
        ring.lines.push_back(line);
        while ring.bytes > RING_BYTES {
            let Some(oldest) = ring.lines.pop_front() else {
                break;
            };
            ring.bytes -= oldest.len();
            ring.first += 1;
        }
        drop(ring);
        self.shared.written.notify_waiters();
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.shared.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = LineWriter;

    fn make_writer(&'a self) -> LineWriter {
        LineWriter { log: self.clone() }
    }
}

/// Receives one formatted event per write.
pub struct LineWriter {
    log: Log,
}

impl Write for LineWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.log.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reader_when_late_gets_kept_lines_and_the_number_of_lost_ones() {
        let log = Log::default();
        let line = vec![b'x'; 1023];
        for _ in 0..300 {
            log.push(&line);
        }

        let mut next = 0;
        let text = String::from_utf8(log.lines_from(&mut next)).unwrap();

        assert!(
            text.starts_with("{\"level\":\"WARN\",\"message\":\"44 log lines lost\"}\n"),
            "{}",
            &text[..60]
        );
        assert_eq!(text.lines().count(), 1 + 256);
        assert_eq!(next, 300);
        assert!(log.lines_from(&mut next).is_empty());
    }

    #[test]
    fn line_when_too_long_is_cut_and_terminated() {
        let log = Log::default();
        log.push(&vec![b'y'; MAX_LINE * 2]);

        let bytes = log.lines_from(&mut 0);

        assert_eq!((bytes.len(), bytes.last()), (MAX_LINE + 1, Some(&b'\n')));
    }

    #[tokio::test]
    async fn follower_when_a_line_is_written_receives_it() {
        let log = Log::default();
        let (mut near, far) = tokio::io::duplex(1024);
        let follower = tokio::spawn({
            let log = log.clone();
            async move { log.stream_to(far).await }
        });
        log.push(b"one");
        let mut buffer = [0; 4];
        tokio::io::AsyncReadExt::read_exact(&mut near, &mut buffer)
            .await
            .unwrap();

        assert_eq!(&buffer, b"one\n");
        follower.abort();
    }
}
