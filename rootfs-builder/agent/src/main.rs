//! `kata-agent`: PID 1 of the microVM. Mounts what containers need, then serves the runtime on the host over ttrpc.
//!
//! In a guest it takes its options from the kernel command line. For tests it runs on any Linux host as root:
//! `kata-agent --no-init agent.server_addr=unix:///tmp/agent.sock …` in private mount, PID, IPC and UTS
//! namespaces, with cgroup v2 mounted on /sys/fs/cgroup. `--listen ADDRESS` is short for `agent.server_addr=`.

// What a host says must not be able to panic PID 1.
#![deny(clippy::indexing_slicing)]

mod container;
mod hotplug;
mod init;
mod logging;
mod machine;
mod mount_options;
mod network;
mod options;
mod reaper;
mod sandbox;
mod server;
mod signal;
mod storage;
mod transport;

use std::process::ExitCode;

use logging::Log;
use options::Options;

/// First argument of the agent outside of a guest.
const TEST_MODE: &str = "--no-init";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (first, rest) = match arguments.split_first() {
        Some((first, rest)) => (Some(first.as_str()), rest),
        None => (None, Default::default()),
    };
    match first {
        Some(container::helper::ARGUMENT) => container::helper::main(rest.first()),
        Some(sandbox::pause::ARGUMENT) => sandbox::pause::main(),
        Some("--version") => {
            println!("kata-agent {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Some(TEST_MODE) => run_test_mode(rest),
        _ if std::process::id() == 1 => run_init(),
        _ => {
            eprintln!(
                "kata-agent is PID 1 of a guest; outside of one use: kata-agent {TEST_MODE} --listen unix:///PATH"
            );
            ExitCode::FAILURE
        }
    }
}

/// PID 1: whatever happens, the machine is powered off at the end.
fn run_init() -> ExitCode {
    init::install_panic_hook();
    match init::prepare() {
        Ok((command_line, warnings)) => {
            let (options, option_warnings) = Options::parse(&command_line);
            let warnings = warnings.iter().map(ToString::to_string).chain(option_warnings);
            run(&options, warnings, true);
        }
        Err(error) => eprintln!("kata-agent: {error}; powering off"),
    }
    init::power_off()
}

fn run_test_mode(arguments: &[String]) -> ExitCode {
    let line = arguments.join(" ").replace("--listen ", "agent.server_addr=");
    let (options, warnings) = Options::parse(&line);
    if run(&options, warnings.into_iter(), false) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Serves until the sandbox is destroyed. Says on the console why, if it cannot; returns whether it could.
fn run(options: &Options, warnings: impl Iterator<Item = String>, is_init: bool) -> bool {
    let log = Log::default();
    log.install(options.log_level);
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    // One thread: the agent waits almost always, and a pod's first vCPU is often its only one.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!("start the event loop: {error}");
            return false;
        }
    };
    let outcome = runtime.block_on(server::serve(options, &log, is_init));
    // Helper threads may sit in a system call that never ends; the machine goes down anyway.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => true,
        Err(error) => {
            tracing::error!("{error}");
            false
        }
    }
}
