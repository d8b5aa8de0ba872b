//! Logs go where containerd reads them: the FIFO `log` in the bundle, which containerd copies into its own log.
//!
//! containerd may be gone, restarting or slow. So the FIFO is opened for reading and writing (a write never meets "no
//! reader") and non-blocking: a line that does not fit is dropped and counted, and the next line that fits says so.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::prelude::*;
use tracing_subscriber::{Registry, reload};

use crate::logfmt::{self, Logfmt};
use crate::version;

/// Name of the FIFO in the bundle.
pub const FIFO: &str = "log";

/// A write of up to this many bytes into a pipe is all or nothing (pipe(7)).
const PIPE_BUF: usize = 4096;

/// Lets the process log into the FIFO of the bundle at `bundle`; without such a FIFO the logs are discarded, because
/// stdout and stderr belong to containerd's protocol.
pub fn to_fifo(bundle: &Path, namespace: &str, sandbox: &str, debug: bool) {
    let Some(fifo) = Fifo::open(&bundle.join(FIFO)) else {
        return;
    };
    let level = if debug {
        LevelFilter::DEBUG
    } else {
        LevelFilter::INFO
    };
    // For as long as the process lives: the handler that writes there takes no lock and opens nothing.
    if let Ok(last_words) = fifo.file.try_clone() {
        let last_words: &'static File = Box::leak(Box::new(last_words));
        runtime::hypervisor::report_violations_to(last_words.as_fd());
    }
    install(fifo, namespace, sandbox, level);
}

/// Lets the process log warnings to stderr.
pub fn to_stderr(namespace: &str, sandbox: &str, debug: bool) {
    let level = if debug {
        LevelFilter::DEBUG
    } else {
        LevelFilter::WARN
    };
    install(io::stderr, namespace, sandbox, level);
}

/// Changes what is logged of the running process.
static FILTER: OnceLock<reload::Handle<LevelFilter, Registry>> = OnceLock::new();

/// Logs as much as with `-debug` from now on.
pub fn verbosely() {
    if let Some(filter) = FILTER.get() {
        make_verbose(filter);
    }
}

fn make_verbose(filter: &reload::Handle<LevelFilter, Registry>) {
    if let Err(error) = filter.reload(LevelFilter::DEBUG) {
        tracing::warn!(%error, "the log stays as it is");
    }
}

fn install<W>(writer: W, namespace: &str, sandbox: &str, level: LevelFilter)
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let (subscriber, filter) = subscriber(writer, namespace, sandbox, level);
    // Fails only if a subscriber is installed already, which then keeps serving.
    if subscriber.try_init().is_ok() {
        let _ = FILTER.set(filter);
    }
}

fn subscriber<W>(
    writer: W,
    namespace: &str,
    sandbox: &str,
    level: LevelFilter,
) -> (
    impl tracing::Subscriber + Send + Sync,
    reload::Handle<LevelFilter, Registry>,
)
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let (filter, handle) = reload::Layer::new(level);
    let layer = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .event_format(Logfmt {
            suffix: suffix(namespace, sandbox),
        })
        .with_writer(writer)
        .with_filter(filter);
    (tracing_subscriber::registry().with(layer), handle)
}

fn suffix(namespace: &str, sandbox: &str) -> String {
    let mut text = format!("name={} pid={}", version::NAME, std::process::id());
    for (key, value) in [("namespace", namespace), ("sandbox", sandbox)] {
        if !value.is_empty() {
            text.push_str(&format!(" {key}="));
            // Writing to a String cannot fail.
            let _ = logfmt::value(&mut text, value);
        }
    }
    text
}

/// How long a second panic waits for the first one's report.
const REPORT_PATIENCE: Duration = Duration::from_secs(2);

/// Reports the first panic of any thread in the log, with the thread and the place, and aborts the process.
///
/// A panic is a fault of ours, in a device, a library or a request, and nobody knows what it left behind: a ring half
/// served, a lock half held, a container nobody will report the end of. A half-dead shim would hold its pod for ever; a
/// dead one is what containerd knows how to handle. It runs `delete`, which undoes what the journal says, and publishes the
/// exit of every process with status 137.
pub fn abort_on_panic() {
    static REPORTING: AtomicBool = AtomicBool::new(false);
    std::panic::set_hook(Box::new(|info| {
        if REPORTING.swap(true, Ordering::SeqCst) {
            // The first one's report is about to be written; unless it waits for something of this thread.
            thread::sleep(REPORT_PATIENCE);
            std::process::abort();
        }
        let current = thread::current();
        let thread = current.name().unwrap_or("without a name");
        let message = info.payload_as_str().unwrap_or("no message");
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(
            thread,
            place,
            panic = message,
            "shim panicked, aborting: its pod ends"
        );
        // Names are looked up in files, which a confined thread may not open.
        if !runtime::hypervisor::is_confined() {
            let backtrace = std::backtrace::Backtrace::force_capture();
            tracing::debug!(%backtrace, "backtrace of the panic");
        }
        std::process::abort();
    }));
}

struct Fifo {
    file: File,
    dropped: AtomicU64,
}

impl Fifo {
    /// `None` when there is no FIFO at `path`; a regular file is refused, it would grow without a reader.
    fn open(path: &Path) -> Option<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW)
            .open(path)
            .ok()?;
        let is_fifo = file.metadata().is_ok_and(|meta| meta.file_type().is_fifo());
        is_fifo.then(|| Self {
            file,
            dropped: AtomicU64::new(0),
        })
    }

    fn put(&self, line: &[u8]) -> bool {
        (&self.file).write_all(line).is_ok()
    }
}

impl<'a> MakeWriter<'a> for Fifo {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line(self)
    }
}

/// Writes one event; never fails and never blocks.
struct Line<'a>(&'a Fifo);

impl Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let fifo = self.0;
        let dropped = fifo.dropped.swap(0, Ordering::Relaxed);
        let mut lost = dropped > 0
            && !fifo.put(format!("level=warning msg=\"log lines dropped\" count={dropped}\n").as_bytes());
        if lost {
            fifo.dropped.fetch_add(dropped, Ordering::Relaxed);
        }
        if !lost {
            lost = match line.split_at_checked(PIPE_BUF) {
                None => !fifo.put(line),
                Some((head, _)) => {
                    // A longer line could be torn by another writer: cut it, on one write.
                    let mut cut = head.to_vec();
                    cut.splice(PIPE_BUF - 5.., *b" ...\n");
                    !fifo.put(&cut)
                }
            };
        }
        if lost {
            fifo.dropped.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn fifo() -> (tempfile::TempDir, Fifo) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FIFO);
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RWXU).unwrap();
        let fifo = Fifo::open(&path).unwrap();
        (dir, fifo)
    }

    fn drain(fifo: &Fifo) -> String {
        let mut bytes = vec![0; 1 << 20];
        let mut text = String::new();
        while let Ok(count) = (&fifo.file).read(&mut bytes) {
            text.push_str(std::str::from_utf8(&bytes[..count]).unwrap());
        }
        text
    }

    #[test]
    fn log_fifo_when_full_drops_lines_and_counts() {
        let (_dir, fifo) = fifo();
        let line = format!("{}\n", "x".repeat(999));
        for _ in 0..100 {
            fifo.make_writer().write_all(line.as_bytes()).unwrap();
        }
        let kept = drain(&fifo).lines().count();
        assert!(kept < 100, "a pipe holds 64 KiB");

        fifo.make_writer().write_all(b"after\n").unwrap();

        let dropped = 100 - kept;
        assert_eq!(
            drain(&fifo),
            format!("level=warning msg=\"log lines dropped\" count={dropped}\nafter\n")
        );
    }

    #[test]
    fn log_when_made_verbose_in_use_is() {
        let (dir, fifo) = fifo();
        let writer = Fifo::open(&dir.path().join(FIFO)).unwrap();
        let (subscriber, filter) = subscriber(writer, "ns", "s", LevelFilter::INFO);
        tracing::subscriber::with_default(subscriber, || {
            tracing::debug!("before");
            make_verbose(&filter);
            tracing::debug!("after");
        });
        let text = drain(&fifo);
        assert!(text.contains("after") && !text.contains("before"), "{text}");
    }

    #[test]
    fn log_line_when_long_is_cut_to_one_write() {
        let (_dir, fifo) = fifo();

        fifo.make_writer()
            .write_all("y".repeat(10_000).as_bytes())
            .unwrap();

        let text = drain(&fifo);
        assert_eq!(text.len(), PIPE_BUF);
        assert!(text.ends_with("y ...\n"));
    }

    #[test]
    fn log_file_when_no_fifo_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Fifo::open(&dir.path().join(FIFO)).is_none());
        std::fs::write(dir.path().join(FIFO), "").unwrap();

        assert!(Fifo::open(&dir.path().join(FIFO)).is_none());
    }
}
