//! What an operator asks before and after running containers: is this host usable, what is configured, which version.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use runtime::types::RuntimeOptions;
use shim::ctl;

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
    /// Prints versions, the configuration in use and the state of the host.
    Env {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Prints the version.
    Version,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let config_path = cli
        .config
        .map(|path| path.to_string_lossy().into_owned())
        .unwrap_or_default();
    let options = RuntimeOptions {
        config_path,
        config_body: Vec::new(),
    };
    match cli.command {
        Command::Check { kvm_can_run_linux } => {
            let verdict = if kvm_can_run_linux {
                ctl::check_kvm()
            } else {
                ctl::check(&options)
            };
            print!("{}", verdict.text);
            if verdict.usable {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Command::Env { json } => {
            let env = ctl::env(&options);
            let text = if json {
                serde_json::to_string_pretty(&env)
            } else {
                Ok(ctl::as_text(&env))
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
        Command::Version => {
            print!("{}", shim::version::text());
            ExitCode::SUCCESS
        }
    }
}
