//! What is left of a process in which something panicked.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Barrier};
use std::thread;

/// Set for the process that panics, to the folder with its log.
const BUNDLE: &str = "SHIM_TEST_PANIC";
const TEST: &str = "panic::threads_when_they_panic_end_the_process_with_one_line";

/// Eight threads, named as a share's, panic at once; each would be caught by somebody who joins it.
fn panic_in_threads(bundle: &Path) {
    shim::logging::to_fifo(bundle, "test", "pod", false);
    shim::logging::abort_on_panic();
    let barrier = Arc::new(Barrier::new(8));
    let threads: Vec<_> = (0..8)
        .map(|number| {
            let barrier = barrier.clone();
            let name = format!("fs-kataShared-{number}");
            let run = move || {
                barrier.wait();
                let nothing: Option<u32> = None;
                nothing.expect("a fault\nof two lines")
            };
            thread::Builder::new().name(name).spawn(run).unwrap()
        })
        .collect();
    for thread in threads {
        let _ = thread.join();
    }
    unreachable!("the process goes on after a panic");
}

#[test]
fn threads_when_they_panic_end_the_process_with_one_line() {
    if let Some(bundle) = std::env::var_os(BUNDLE) {
        return panic_in_threads(Path::new(&bundle));
    }
    let bundle = tempfile::tempdir().unwrap();
    let fifo = bundle.path().join(shim::logging::FIFO);
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).unwrap();
    // Stays open, so that what was written stays too.
    let mut log = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&fifo)
        .unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", TEST, "--nocapture"])
        .env(BUNDLE, bundle.path())
        .output()
        .unwrap();
    assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{output:?}");
    let mut text = vec![0; 1 << 16];
    let len = log.read(&mut text).unwrap();
    let text = String::from_utf8_lossy(&text[..len]);
    let lines: Vec<_> = text.lines().filter(|line| line.contains("level=error")).collect();
    let [line] = lines[..] else {
        panic!("not one line: {text}");
    };
    for part in [
        "shim panicked, aborting",
        "thread=fs-kataShared-",
        "shim/tests/shim/panic.rs:",
        "a fault\\nof two lines",
    ] {
        assert!(line.contains(part), "{part}: {line}");
    }
}
