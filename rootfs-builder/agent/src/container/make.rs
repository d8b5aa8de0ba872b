//! Making a process: its streams, and the helper's run.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::unistd::Pid;
use oci_spec::runtime::Process as ProcessSpec;
use tokio::net::unix::pipe;

use super::helper::{self, Kind, Request};
use super::launch::{self, LaunchError, Launched};
use super::process::Process;
use super::stdio::{Pipes, Plan, Stdio};
use super::{ContainerError, Context, pty};
use crate::signal::Signal;

/// A process that was made.
pub struct Made {
    /// The process.
    pub process: Process,
    /// Ends when it has executed its program, or died; yields the reason if it could not.
    pub exec_report: pipe::Receiver,
}

/// Makes a process of container `id`, with its stdio.
///
/// # Errors
/// There is none; what libcontainer has put on disk may be left.
pub async fn make(
    context: &Context,
    id: &str,
    bundle: &Path,
    spec: &ProcessSpec,
    kind: Kind,
    plan: Plan,
) -> Result<Made, ContainerError> {
    let request = Request {
        id: id.to_owned(),
        state: context.state_folder.clone(),
        console: None,
        size: None,
        kind,
    };
    if spec.terminal() == Some(true) {
        return make_on_terminal(context, bundle, spec, request, plan).await;
    }
    let owner = (spec.user().uid(), spec.user().gid());
    let (pipes, child_ends) = Pipes::make(&plan, owner, context.pipe_size).map_err(ContainerError::Stdio)?;
    let launched = launch(context, &request, child_ends).await?;
    let process = Process::new(launched.pid, launched.exit, |exit| pipes.connect(plan, exit));
    Ok(Made {
        process,
        exec_report: launched.exec_report,
    })
}

async fn make_on_terminal(
    context: &Context,
    bundle: &Path,
    spec: &ProcessSpec,
    mut request: Request,
    plan: Plan,
) -> Result<Made, ContainerError> {
    static CONSOLES: AtomicU64 = AtomicU64::new(0);
    let number = CONSOLES.fetch_add(1, Ordering::Relaxed);
    let console =
        pty::ConsoleSocket::bind(bundle.join(format!("tty-{number}"))).map_err(ContainerError::Stdio)?;
    let side = |length: u64| u16::try_from(length).unwrap_or(u16::MAX);
    request.console = Some(console.path().to_owned());
    request.size = spec
        .console_size()
        .map(|size| (side(size.height()), side(size.width())));
    let launched = launch(context, &request, Vec::new()).await?;
    let terminal = terminal_of(launched.pid, console)?;
    if let Err(error) = terminal.give_to(spec.user().uid()) {
        tracing::warn!(uid = spec.user().uid(), %error, "the terminal stays root's");
    }
    let process = Process::new(launched.pid, launched.exit, |exit| {
        Stdio::terminal(terminal, plan, exit)
    });
    Ok(Made {
        process,
        exec_report: launched.exec_report,
    })
}

/// The terminal that process `pid` sent. Without one the process is killed: nobody could ever see or stop it.
fn terminal_of(pid: Pid, console: pty::ConsoleSocket) -> Result<pty::Pty, ContainerError> {
    console.receive().map_err(|error| {
        let _ = Signal::KILL.send(pid);
        ContainerError::Stdio(error)
    })
}

async fn launch(
    context: &Context,
    request: &Request,
    stdio: Vec<OwnedFd>,
) -> Result<Launched, ContainerError> {
    match launch::launch(&context.reaper, request, stdio).await {
        Err(LaunchError::Refused(reason)) if helper::is_missing_program(&reason) => {
            Err(ContainerError::NoProgram(reason))
        }
        launched => Ok(launched?),
    }
}

/// The error for a program that could not be executed.
pub fn not_executed(reason: String) -> ContainerError {
    if helper::is_missing_program(&reason) {
        ContainerError::NoProgram(reason)
    } else {
        ContainerError::Exec(reason)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;

    /// Ends by itself only long after the test has.
    fn sleeper() -> std::process::Child {
        Command::new("sleep").arg("600").spawn().unwrap()
    }

    fn killed_by(
        mut child: std::process::Child,
        console: pty::ConsoleSocket,
    ) -> (ContainerError, Option<i32>) {
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        let error = terminal_of(pid, console).err().expect("there is no terminal");
        (error, child.wait().unwrap().signal())
    }

    #[tokio::test]
    async fn process_when_it_sent_no_terminal_is_killed() {
        let path = std::env::temp_dir().join(format!("agent-console-{}", std::process::id()));
        // Nobody connected.
        let console = pty::ConsoleSocket::bind(path.clone()).unwrap();
        let (error, signal) = killed_by(sleeper(), console);
        assert!(matches!(error, ContainerError::Stdio(_)), "{error}");
        assert_eq!(signal, Some(libc::SIGKILL));

        // Somebody did, and sent something else.
        let console = pty::ConsoleSocket::bind(path.clone()).unwrap();
        let mut stream = UnixStream::connect(&path).unwrap();
        std::io::Write::write_all(&mut stream, b"no terminal").unwrap();
        let (error, signal) = killed_by(sleeper(), console);
        assert!(error.to_string().contains("sent no terminal"), "{error}");
        assert_eq!(signal, Some(libc::SIGKILL));
        assert!(!path.exists());
    }
}
