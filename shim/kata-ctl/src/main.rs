//! What an operator asks before and after running containers: is this host usable, what is configured, which version,
//! and why does that pod not start.

#![forbid(unsafe_code)]

mod diagnose;
mod findings;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use runtime::types::RuntimeOptions;

/// Checks and describes the Kata runtime with its in-process VMM.
#[derive(Debug, Parser)]
#[command(name = "kata-ctl", version, arg_required_else_help = true)]
struct Cli {
    /// Configuration file to use instead of the one the shim would find.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Checks that this host can run sandboxes; the exit status says so too.
    Check {
        /// Only say, in one line, whether KVM is here and able to run a Linux guest.
        #[arg(long)]
        kvm_can_run_linux: bool,
    },
    /// Prints what is known of the sandboxes on this host: shims and what their threads do, guests' consoles, leftovers.
    Diagnose {
        /// Only the sandbox with this id; default: all.
        sandbox: Option<String>,
    },
    /// Prints versions, the configuration in use and the state of the host.
    Env {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Looks after machines that were saved to a folder.
    Snapshot {
        #[command(subcommand)]
        what: Snapshot,
    },
    /// Prints the version.
    Version,
}

#[derive(Debug, Subcommand)]
enum Snapshot {
    /// Reads all of a save and compares its checksums; the exit status says whether it is undamaged. Do this before clones map
    /// its memory: they look at no checksum.
    Verify {
        /// The folder with the files `state` and `memory`.
        folder: PathBuf,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let config_path = cli
        .config
        .map(|path| path.to_string_lossy().into_owned())
        .unwrap_or_default();
    let options = RuntimeOptions {
        config_path,
        ..RuntimeOptions::default()
    };
    match cli.command {
        Command::Check { kvm_can_run_linux } => {
            let verdict = if kvm_can_run_linux {
                findings::check_kvm()
            } else {
                findings::check(&options)
            };
            print!("{}", verdict.text);
            success(verdict.usable)
        }
        Command::Diagnose { sandbox } => {
            print!("{}", findings::check(&options).text);
            let report = diagnose::report(Path::new("/"), sandbox.as_deref());
            print!("{}", report.text);
            success(report.found)
        }
        Command::Env { json } => env(&options, json),
        Command::Snapshot {
            what: Snapshot::Verify { folder },
        } => verify(&folder),
        Command::Version => {
            print!("{}", shim::version::text());
            ExitCode::SUCCESS
        }
    }
}

fn success(good: bool) -> ExitCode {
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn verify(folder: &Path) -> ExitCode {
    match runtime::check::snapshot(folder) {
        Ok(()) => {
            println!("{}: undamaged", folder.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("kata-ctl: snapshot {}: {error}", folder.display());
            ExitCode::FAILURE
        }
    }
}

fn env(options: &RuntimeOptions, json: bool) -> ExitCode {
    let env = findings::env(options);
    let text = if json {
        serde_json::to_string_pretty(&env)
    } else {
        Ok(findings::as_text(&env))
    };
    match text {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("kata-ctl: env: {error}");
            ExitCode::FAILURE
        }
    }
}
