//! The shim binary: parses the command line and runs the action.

#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::process::ExitCode;

use shim::args::{Action, Args, USAGE};
use shim::{bootstrap, delete, info, run, start, version};

fn main() -> ExitCode {
    let result = Args::parse(std::env::args().skip(1))
        .map_err(|error| error.to_string())
        .and_then(|args| act(&args));
    match result {
        Ok(output) => match io::stdout()
            .write_all(&output)
            .and_then(|()| io::stdout().flush())
        {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&format!("stdout: {error}")),
        },
        Err(message) => fail(&message),
    }
}

/// Runs the action and returns its output. Errors are one line.
fn act(args: &Args) -> Result<Vec<u8>, String> {
    // start's stderr is part of its answer, and serving has none: they log their warnings instead.
    if !matches!(args.action, Action::Start | Action::Run) {
        for warning in &args.warnings {
            eprintln!("{}: {warning}", version::NAME);
        }
    }
    match args.action {
        Action::Version => Ok(version::text().into_bytes()),
        Action::Help => Ok(USAGE.as_bytes().to_vec()),
        Action::Info => info::info(&bootstrap::read_stdin()).map_err(|error| format!("-info: {error}")),
        Action::Start => start::start(args).map_err(|error| format!("start {}: {error}", args.id)),
        Action::Delete => delete::delete(args).map_err(|error| format!("delete {}: {error}", args.id)),
        Action::Run => run::run(args)
            .map(|()| Vec::new())
            .map_err(|error| format!("run {}: {error}", args.id)),
    }
}

fn fail(message: &str) -> ExitCode {
    // Nothing is left to tell if stderr is gone.
    let _ = writeln!(io::stderr(), "{}: {message}", version::NAME);
    ExitCode::FAILURE
}
