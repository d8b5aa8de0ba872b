//! Containers and their processes.

mod cgroup;
pub mod helper;
mod launch;
mod oom;
mod ports;
mod process;
mod pty;
mod resources;
mod spec;
mod stdio;

use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::signal::Signal;
use oci_spec::runtime::{Process as ProcessSpec, Spec};
use tokio::net::unix::pipe;
use tokio::time::timeout;

use cgroup::Cgroup;
use helper::{Kind, Request};
pub use launch::LaunchError;
pub use ports::{PortError, Ports};
pub use process::{Process, SignalError};
pub use resources::{ResourceError, network_stats};
pub use spec::{CGROUP_PARENT, Shared, SpecError, adapt, set_device_numbers};
use stdio::{Pipes, exec_outcome};
pub use stdio::{Plan, Stdio, StreamError};

use crate::reaper::Reaper;

/// How long `StartContainer` waits for the program to be executed before it answers anyway.
const EXEC_PATIENCE: Duration = Duration::from_secs(10);
/// Processes of a container that have ended and been waited for; older ones are forgotten.
const MAX_ENDED_EXECS: usize = 64;

/// A container operation that failed.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// No process was made.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The specification cannot be run here.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A limit could not be set.
    #[error(transparent)]
    Resources(#[from] ResourceError),
    /// The program could not be executed.
    #[error("{0}")]
    Exec(String),
    /// The container is in another state than the call needs.
    #[error("container {id} is {actual}, not {needed}")]
    State {
        /// Container.
        id: String,
        /// What it is.
        actual: State,
        /// What the call needs.
        needed: &'static str,
    },
    /// No such exec.
    #[error("process {exec_id} of container {id} not found")]
    NoProcess {
        /// Container.
        id: String,
        /// Exec.
        exec_id: String,
    },
    /// There is an exec of this name.
    #[error("process {exec_id} of container {id} exists")]
    ProcessExists {
        /// Container.
        id: String,
        /// Exec.
        exec_id: String,
    },
    /// A file of the container's, on the guest's own filesystem.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Pipes or the terminal could not be made.
    #[error("stdio: {0}")]
    Stdio(io::Error),
    /// The waiting container process could not be told to go.
    #[error("start container {id}: {source}")]
    Notify {
        /// Container.
        id: String,
        /// Why.
        source: io::Error,
    },
}

/// Where a container is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Its init waits for `StartContainer`.
    Created,
    /// Its program runs.
    Running,
    /// Its init has ended.
    Stopped,
}

impl std::fmt::Display for State {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Stopped => "stopped",
        })
    }
}

/// What every container of the sandbox is made with.
pub struct Context {
    /// Collects exit statuses.
    pub reaper: Reaper,
    /// Folder of libcontainer's state.
    pub state_folder: PathBuf,
    /// Capacity of stdio pipes.
    pub pipe_size: Option<u32>,
    /// Gets the name of a container whose process was killed for memory.
    pub out_of_memory: tokio::sync::mpsc::Sender<String>,
}

/// A container.
pub struct Container {
    id: String,
    bundle: PathBuf,
    context: Arc<Context>,
    /// The init's specification; what an exec leaves out comes from here.
    spec: ProcessSpec,
    init: Arc<Process>,
    cgroup: Cgroup,
    /// Present until the container is started.
    exec_report: Mutex<Option<pipe::Receiver>>,
    execs: Mutex<Execs>,
    next_file: AtomicU64,
}

#[derive(Default)]
struct Execs {
    by_id: HashMap<String, Option<Arc<Process>>>,
    /// Ended and waited for, oldest first.
    ended: std::collections::VecDeque<String>,
}

impl Container {
    /// Makes container `id` from `spec` (adapted already): its bundle on disk, its cgroup, and its init, which waits.
    ///
    /// # Errors
    /// Nothing is left behind, but the bundle.
    pub async fn create(
        context: Arc<Context>,
        id: String,
        bundle: PathBuf,
        spec: &Spec,
        plan: Plan,
    ) -> Result<Self, ContainerError> {
        let config = bundle.join("config.json");
        write_json(&config, spec)?;
        let process = spec.process().clone().ok_or(SpecError::Missing("process"))?;
        Cgroup::of(&id)
            .make_parent()
            .map_err(|(path, source)| ContainerError::File { path, source })?;
        let made = make(
            &context,
            &id,
            &bundle,
            &process,
            Kind::Create {
                bundle: bundle.clone(),
            },
            plan,
        )
        .await?;
        let cgroup = Cgroup::of(&id);
        tokio::spawn(oom::watch(
            cgroup.clone(),
            id.clone(),
            context.out_of_memory.clone(),
        ));
        Ok(Self {
            cgroup,
            init: Arc::new(made.process),
            exec_report: Mutex::new(Some(made.exec_report)),
            execs: Mutex::default(),
            next_file: AtomicU64::new(0),
            spec: process,
            context,
            id,
            bundle,
        })
    }

    /// Lets the container's init execute its program.
    ///
    /// # Errors
    /// It is started already, has ended, or the program cannot be executed.
    pub async fn start(&self) -> Result<(), ContainerError> {
        let report = lock(&self.exec_report).take();
        let mut report = match (report, self.state()) {
            (Some(report), State::Created | State::Running) => report,
            (_, actual) => return Err(self.wrong_state(actual, "created")),
        };
        let notified = notify(&self.context.state_folder.join(&self.id));
        notified.map_err(|source| ContainerError::Notify {
            id: self.id.clone(),
            source,
        })?;
        match exec_outcome(&mut report, EXEC_PATIENCE)
            .await
            .map_err(ContainerError::Stdio)?
        {
            Some(reason) => Err(ContainerError::Exec(reason)),
            None => Ok(()),
        }
    }

    /// Runs another process in the container.
    ///
    /// # Errors
    /// The container does not run, the name is taken, or the program cannot be executed.
    pub async fn exec(
        &self,
        exec_id: &str,
        mut process: ProcessSpec,
        plan: Plan,
    ) -> Result<(), ContainerError> {
        if self.state() != State::Running {
            return Err(self.wrong_state(self.state(), "running"));
        }
        self.reserve(exec_id)?;
        // Absent capabilities mean the container's, never the agent's.
        if process.capabilities().is_none() {
            process.set_capabilities(self.spec.capabilities().clone());
        }
        process.set_apparmor_profile(None).set_selinux_label(None);
        process.set_oom_score_adj(self.spec.oom_score_adj());

        let number = self.next_file.fetch_add(1, Ordering::Relaxed);
        let file = self.bundle.join(format!("exec-{number}.json"));
        let result = match write_json(&file, &process) {
            Ok(()) => {
                let kind = Kind::Exec {
                    process: file.clone(),
                };
                make(&self.context, &self.id, &self.bundle, &process, kind, plan).await
            }
            Err(error) => Err(error),
        };
        // Left over, it goes with the bundle.
        let _ = std::fs::remove_file(&file);
        let mut execs = lock(&self.execs);
        match result {
            Ok(made) => {
                execs
                    .by_id
                    .insert(exec_id.to_owned(), Some(Arc::new(made.process)));
                Ok(())
            }
            Err(error) => {
                execs.by_id.remove(exec_id);
                Err(error)
            }
        }
    }

    /// The init (`exec_id` empty, or the container's own id as some shims send), or an exec.
    ///
    /// # Errors
    /// No such exec.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>, ContainerError> {
        if exec_id.is_empty() || exec_id == self.id {
            return Ok(Arc::clone(&self.init));
        }
        let execs = lock(&self.execs);
        execs
            .by_id
            .get(exec_id)
            .cloned()
            .flatten()
            .ok_or_else(|| ContainerError::NoProcess {
                id: self.id.clone(),
                exec_id: exec_id.to_owned(),
            })
    }

    /// Notes that the host has learned how `exec_id` ended; the oldest such are forgotten.
    pub fn waited(&self, exec_id: &str) {
        let mut execs = lock(&self.execs);
        if !execs.by_id.contains_key(exec_id) || execs.ended.iter().any(|id| id == exec_id) {
            return;
        }
        execs.ended.push_back(exec_id.to_owned());
        if execs.ended.len() > MAX_ENDED_EXECS
            && let Some(oldest) = execs.ended.pop_front()
        {
            execs.by_id.remove(&oldest);
        }
    }

    /// Sends `signal` to a process. To the init of a container that runs nothing any more, it goes to whatever is
    /// left in the cgroup.
    ///
    /// # Errors
    /// No such exec, or the process is gone.
    pub fn signal(&self, exec_id: &str, signal: Signal) -> Result<(), ContainerError> {
        let process = self.process(exec_id)?;
        let is_init = Arc::ptr_eq(&process, &self.init);
        let created = lock(&self.exec_report).is_some();
        let outcome = if is_init && created {
            process.cancel(signal)
        } else {
            process.signal(signal, is_init)
        };
        match outcome {
            Ok(()) => {}
            Err(SignalError::Gone) if is_init => {}
            Err(SignalError::Gone) => {
                return Err(ContainerError::NoProcess {
                    id: self.id.clone(),
                    exec_id: exec_id.to_owned(),
                });
            }
        }
        // With a PID namespace of its own the container dies with its init; in a shared one it does not.
        if is_init && (signal == Signal::SIGKILL || process.exit_code().is_some()) {
            self.cgroup.signal_all(signal);
        }
        Ok(())
    }

    /// Kills everything in the container and waits up to `patience` for its init to be gone.
    pub async fn kill(&self, patience: Duration) {
        self.cgroup.signal_all(Signal::SIGKILL);
        // The process may not be in the cgroup yet, or the cgroup gone already.
        let _ = self.init.signal(Signal::SIGKILL, false);
        if timeout(patience, self.init.wait()).await.is_err() {
            tracing::warn!(
                container = self.id,
                "init survived SIGKILL for {} s",
                patience.as_secs()
            );
        }
    }

    /// Removes what the container had on disk, and its cgroup. Call [`kill`](Self::kill) before.
    pub async fn delete(&self) {
        let state = self.context.state_folder.join(&self.id);
        let (cgroup, bundle) = (self.cgroup.clone(), self.bundle.clone());
        let id = self.id.clone();
        let removal = move || {
            if let Err(error) = cgroup.remove() {
                tracing::warn!(container = id, "{error}");
            }
            for folder in [state, bundle] {
                match std::fs::remove_dir_all(&folder) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        tracing::warn!(container = id, "remove {}: {error}", folder.display());
                    }
                    _ => {}
                }
            }
        };
        if let Err(error) = tokio::task::spawn_blocking(removal).await {
            tracing::warn!(container = self.id, "remove container files: {error}");
        }
    }

    /// Where the container is in its life.
    pub fn state(&self) -> State {
        if self.init.exit_code().is_some() {
            State::Stopped
        } else if lock(&self.exec_report).is_some() {
            State::Created
        } else {
            State::Running
        }
    }

    /// The container's resources.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// The init's namespaces, as paths for others to join.
    pub fn namespace_path(&self, kind: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/{kind}", self.init.pid()))
    }

    fn reserve(&self, exec_id: &str) -> Result<(), ContainerError> {
        let mut execs = lock(&self.execs);
        if exec_id == self.id || execs.by_id.contains_key(exec_id) {
            return Err(ContainerError::ProcessExists {
                id: self.id.clone(),
                exec_id: exec_id.to_owned(),
            });
        }
        execs.by_id.insert(exec_id.to_owned(), None);
        Ok(())
    }

    fn wrong_state(&self, actual: State, needed: &'static str) -> ContainerError {
        ContainerError::State {
            id: self.id.clone(),
            actual,
            needed,
        }
    }
}

/// A process that was made.
struct Made {
    process: Process,
    exec_report: pipe::Receiver,
}

/// Makes a process of container `id`, with its stdio.
async fn make(
    context: &Context,
    id: &str,
    bundle: &Path,
    spec: &ProcessSpec,
    kind: Kind,
    plan: Plan,
) -> Result<Made, ContainerError> {
    let mut request = Request {
        id: id.to_owned(),
        state: context.state_folder.clone(),
        console: None,
        kind,
    };
    if spec.terminal() != Some(true) {
        let owner = (spec.user().uid(), spec.user().gid());
        let (pipes, child_ends) =
            Pipes::make(&plan, owner, context.pipe_size).map_err(ContainerError::Stdio)?;
        let launched = launch::launch(&context.reaper, &request, child_ends).await?;
        let process = Process::new(launched.pid, launched.exit, |exit| pipes.connect(plan, exit));
        return Ok(Made {
            process,
            exec_report: launched.exec_report,
        });
    }

    static CONSOLES: AtomicU64 = AtomicU64::new(0);
    let number = CONSOLES.fetch_add(1, Ordering::Relaxed);
    let console =
        pty::ConsoleSocket::bind(bundle.join(format!("tty-{number}"))).map_err(ContainerError::Stdio)?;
    request.console = Some(console.path().to_owned());
    let launched = launch::launch(&context.reaper, &request, Vec::new()).await?;
    let terminal = console.receive().map_err(ContainerError::Stdio)?;
    if let Some(size) = spec.console_size() {
        let side = |length: u64| u16::try_from(length).unwrap_or(u16::MAX);
        terminal
            .resize(side(size.height()), side(size.width()))
            .map_err(ContainerError::Stdio)?;
    }
    let process = Process::new(launched.pid, launched.exit, |exit| {
        Stdio::terminal(terminal, plan, exit)
    });
    Ok(Made {
        process,
        exec_report: launched.exec_report,
    })
}

/// Tells a created container's init to go on. Its socket is reached through a descriptor of its folder, because the
/// path may be longer than a socket address.
fn notify(folder: &Path) -> io::Result<()> {
    use std::io::Write;
    use std::os::fd::AsRawFd;

    let folder = std::fs::File::open(folder)?;
    let path = format!("/proc/self/fd/{}/notify.sock", folder.as_raw_fd());
    UnixStream::connect(path)?.write_all(b"start container")
}

fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<(), ContainerError> {
    let written = serde_json::to_vec(value)
        .map_err(io::Error::from)
        .and_then(|bytes| std::fs::write(path, bytes));
    written.map_err(|source| ContainerError::File {
        path: path.to_owned(),
        source,
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
