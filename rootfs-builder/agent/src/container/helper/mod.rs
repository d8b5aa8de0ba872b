//! The short-lived process that builds a container or joins one.
//!
//! libcontainer forks the process it runs in and changes it on the way: oom_score_adj, dumpable, the working
//! directory. PID 1 is threaded and must not change, so it re-executes itself as `kata-agent __ctr …`: one thread,
//! one container process, one line of result, gone. The container process is made a sibling of the helper, that is,
//! a child of the agent, which therefore learns its exit status.

#![allow(unsafe_code)]

mod inside;
mod mounts;

use std::ffi::CString;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::container::{Container, ContainerStatus};
use libcontainer::error::LibcontainerError;
use libcontainer::hooks::{self, HookError};
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::unistd::{AccessFlags, access, execv};
use oci_spec::runtime::{Hook, Spec};
use serde::{Deserialize, Serialize};

use super::pty;

/// First argument that makes the agent's binary run as this helper.
pub const ARGUMENT: &str = "__ctr";

/// runc's words for a program without a path that is nowhere.
const NOT_IN_PATH: &str = "executable file not found in $PATH";

/// Descriptors the agent hands over, in this order from 3 on.
pub const RESULT_FD: RawFd = 3;
/// Open in the container process until it executes its program; carries the reason if it cannot.
pub const EXEC_FD: RawFd = 4;
/// The first of three for the process's stdin, stdout and stderr, unless it has a terminal.
pub const STDIO_FD: RawFd = 5;

/// What the helper is to do: its second argument, as JSON.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// Container.
    pub id: String,
    /// Folder of libcontainer's state.
    pub state: PathBuf,
    /// Listening socket that the terminal is sent to; absent means descriptors from [`STDIO_FD`] on.
    pub console: Option<PathBuf>,
    /// Rows and columns of the terminal.
    pub size: Option<(u16, u16)>,
    /// Which process.
    pub kind: Kind,
}

/// Which process the helper makes.
#[derive(Debug, Serialize, Deserialize)]
pub enum Kind {
    /// The container and its init, waiting to be started.
    Create {
        /// Folder with config.json.
        bundle: PathBuf,
    },
    /// Another process in a running container, started at once.
    Exec {
        /// The process, in config.json's notation.
        process: PathBuf,
    },
    /// No process: hooks, in the guest and outside of the container.
    Hooks {
        /// The list, in config.json's notation.
        hooks: PathBuf,
    },
}

/// Whether `reason`, of a process that could not be made or executed, is that its program does not exist.
pub fn is_missing_program(reason: &str) -> bool {
    // The words of `find` below; libcontainer passes them on and adds its own in front.
    reason.contains("exec: ")
        && (reason.ends_with(NOT_IN_PATH) || reason.ends_with(&describe(nix::Error::ENOENT)))
}

/// What the helper answers: one line of JSON.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// The container process, a child of the agent.
    Pid(i32),
    /// There is none, and none was asked for.
    Done,
    /// Why there is none.
    Error(String),
}

#[derive(Debug, thiserror::Error)]
enum HelperError {
    #[error("request: {0}")]
    Request(#[from] serde_json::Error),
    #[error("no request")]
    NoRequest,
    #[error(transparent)]
    Container(#[from] LibcontainerError),
    #[error(transparent)]
    Mounts(#[from] mounts::MountError),
    #[error("{path}: {source}")]
    Bundle {
        path: PathBuf,
        source: oci_spec::OciSpecError,
    },
    #[error("hooks of the guest: {0}")]
    Hook(#[from] HookError),
    #[error("{path}: {source}")]
    File { path: PathBuf, source: std::io::Error },
    #[error("container {0} has no process")]
    NoProcess(String),
}

/// The helper's `main`.
pub fn main(request: Option<&String>) -> ExitCode {
    // SAFETY: the agent passes this descriptor to its helper for exactly this use.
    let mut result = File::from(unsafe { OwnedFd::from_raw_fd(RESULT_FD) });
    let outcome = request
        .ok_or(HelperError::NoRequest)
        .and_then(|request| Ok(serde_json::from_str(request)?))
        .and_then(|request| run(&request));
    let (answer, code) = match outcome {
        Ok(answer) => (answer, ExitCode::SUCCESS),
        Err(error) => (Answer::Error(chain(&error)), ExitCode::FAILURE),
    };
    let mut line = serde_json::to_vec(&answer).unwrap_or_default();
    line.push(b'\n');
    // Without a reader the agent is gone, and with it everyone who could act on a failure.
    let _ = result.write_all(&line);
    code
}

fn run(request: &Request) -> Result<Answer, HelperError> {
    if let Kind::Hooks { hooks } = &request.kind {
        run_hooks(request, hooks)?;
        return Ok(Answer::Done);
    }
    make_process(request).map(Answer::Pid)
}

/// Runs the hooks in the file `hooks`, up to the first that fails.
fn run_hooks(request: &Request, hooks: &Path) -> Result<(), HelperError> {
    let text = std::fs::read(hooks).map_err(|source| HelperError::File {
        path: hooks.to_owned(),
        source,
    })?;
    let hooks: Vec<Hook> = serde_json::from_slice(&text)?;
    let container = Container::load(request.state.join(&request.id))?;
    Ok(hooks::run_hooks(
        Some(&hooks),
        Some(&container.state),
        None,
        None,
        None,
    )?)
}

fn make_process(request: &Request) -> Result<i32, HelperError> {
    let mut builder = ContainerBuilder::new(request.id.clone(), SyscallType::default())
        .with_root_path(&request.state)?
        .with_console_socket(request.console.as_ref())
        .with_executor(Program { size: request.size });
    if request.console.is_none() {
        // SAFETY: without a console the agent passes these three, and nothing else here owns them.
        let [stdin, stdout, stderr] =
            [0, 1, 2].map(|stream| unsafe { OwnedFd::from_raw_fd(STDIO_FD + stream) });
        builder = builder.with_stdin(stdin).with_stdout(stdout).with_stderr(stderr);
    }
    match &request.kind {
        Kind::Create { bundle } => {
            prepare_mounts(bundle)?;
            let init = builder
                .as_init(bundle)
                .with_systemd(false)
                .as_sibling(true)
                .with_detach(true);
            let container = init.build()?;
            container
                .pid()
                .map(|pid| pid.as_raw())
                .ok_or_else(|| HelperError::NoProcess(request.id.clone()))
        }
        Kind::Exec { process } => {
            mark_running(request)?;
            let tenant = builder
                .as_tenant()
                .with_process(Some(process))
                .as_sibling(true)
                .with_detach(true);
            Ok(tenant.build()?.as_raw())
        }
        Kind::Hooks { .. } => Err(HelperError::NoProcess(request.id.clone())),
    }
}

/// Makes the container's mounts, and takes out of its specification those that libcontainer is not to make again.
fn prepare_mounts(bundle: &Path) -> Result<(), HelperError> {
    let path = bundle.join("config.json");
    let failed = |source| HelperError::Bundle {
        path: path.clone(),
        source,
    };
    let mut spec = Spec::load(&path).map_err(failed)?;
    mounts::prepare(&mut spec)?;
    spec.save(&path).map_err(failed)
}

/// libcontainer executes only in containers whose state file says they run. The agent starts containers without
/// it (`Container::start` changes the caller's working directory), so the file is corrected here, where it matters.
fn mark_running(request: &Request) -> Result<(), LibcontainerError> {
    let mut container = Container::load(request.state.join(&request.id))?;
    if container.status() == ContainerStatus::Created {
        container.set_status(ContainerStatus::Running).save()?;
    }
    Ok(())
}

/// An error and its causes, without repeating a cause that the error already quotes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// Finds and executes the process's program as runc does: the same rules, the same words in the errors.
#[derive(Clone)]
struct Program {
    size: Option<(u16, u16)>,
}

impl Executor for Program {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        self.size_terminal()
            .and_then(|()| find(spec).map(drop))
            .map_err(ExecutorValidationError::ArgValidationError)
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let reason = match find(spec).and_then(|path| execute(spec, &path)) {
            Ok(never) => match never {},
            Err(reason) => reason,
        };
        // SAFETY: the descriptor was passed for this and is still open: it closes on the exec that just failed.
        let mut report = File::from(unsafe { OwnedFd::from_raw_fd(EXEC_FD) });
        let _ = report.write_all(reason.as_bytes());
        Err(ExecutorError::Other(reason))
    }
}

impl Program {
    /// Before the program runs: many ask for the size once, when they start.
    fn size_terminal(&self) -> Result<(), String> {
        let Some((rows, columns)) = self.size else {
            return Ok(());
        };
        pty::resize(std::io::stdin().as_fd(), rows, columns)
            .map_err(|error| format!("terminal size: {error}"))
    }
}

fn execute(spec: &Spec, path: &str) -> Result<std::convert::Infallible, String> {
    let c_string =
        |text: &str| CString::new(text).map_err(|_| format!("exec: {text:?}: contains a NUL byte"));
    let arguments: Vec<CString> = arguments(spec)
        .iter()
        .map(|text| c_string(text))
        .collect::<Result<_, _>>()?;
    // Rust's runtime ignores SIGPIPE, and an ignored signal stays so across exec: pipelines would not end quietly.
    // SAFETY: the default action runs no code of ours.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }.map_err(|errno| describe(errno).to_string())?;
    execv(&c_string(path)?, &arguments).map_err(|errno| format!("exec: {path:?}: {}", describe(errno)))
}

/// The path of the program, seen from inside the container: as it is if it contains a slash, else from `$PATH`.
fn find(spec: &Spec) -> Result<String, String> {
    let name = arguments(spec)
        .first()
        .filter(|name| !name.is_empty())
        .ok_or("exec: no command given")?;
    if name.contains('/') {
        return match executable(name) {
            Ok(()) => Ok(name.clone()),
            Err(errno) => Err(format!("exec: {name:?}: {}", describe(errno))),
        };
    }
    let environment = spec
        .process()
        .as_ref()
        .and_then(|process| process.env().as_deref())
        .unwrap_or_default();
    let path = environment
        .iter()
        .find_map(|entry| entry.strip_prefix("PATH="))
        .unwrap_or_default();
    let mut refused = None;
    for folder in path.split(':') {
        let candidate = format!("{}/{name}", if folder.is_empty() { "." } else { folder });
        match executable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(nix::Error::EACCES) => refused = Some(candidate),
            Err(_) => {}
        }
    }
    match refused {
        Some(candidate) => Err(format!("exec: {candidate:?}: {}", describe(nix::Error::EACCES))),
        None => Err(format!("exec: {name:?}: {NOT_IN_PATH}")),
    }
}

/// Runs as the container's user, so `access(2)` answers for that user.
fn executable(path: &str) -> nix::Result<()> {
    access(path, AccessFlags::X_OK)?;
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => Ok(()),
        Ok(_) => Err(nix::Error::EACCES),
        Err(error) => Err(nix::Error::from_raw(error.raw_os_error().unwrap_or(libc::EIO))),
    }
}

fn arguments(spec: &Spec) -> &[String] {
    spec.process()
        .as_ref()
        .and_then(|process| process.args().as_deref())
        .unwrap_or_default()
}

fn describe(errno: nix::Error) -> String {
    errno.desc().to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn program_when_missing_is_told_from_one_that_cannot_run() {
        for missing in [
            "exec: \"frobnicate\": executable file not found in $PATH",
            "failed to validate: exec: \"/bin/x\": no such file or directory",
        ] {
            assert!(is_missing_program(missing), "{missing}");
        }
        for other in [
            "exec: \"/tmp\": permission denied",
            "/proc/x: no such file or directory",
        ] {
            assert!(!is_missing_program(other), "{other}");
        }
    }
}
