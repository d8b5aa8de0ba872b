//! Containers and their processes.

mod cgroup;
pub mod devices;
pub mod helper;
mod hooks;
mod launch;
mod make;
mod oom;
mod ports;
mod process;
mod pty;
mod resources;
mod spec;
mod stdio;

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use oci_spec::runtime::{Hook, Process as ProcessSpec, Spec};
use tokio::net::unix::pipe;
use tokio::time::timeout;

use cgroup::Cgroup;
use devices::DeviceRules;
use helper::{Kind, Request};
pub use hooks::GuestHooks;
pub use launch::LaunchError;
use make::{make, not_executed};
pub use oom::OomNotices;
pub use ports::{PortError, Ports};
pub use process::{Process, SignalError};
pub use resources::{ResourceError, network_stats};
pub use spec::{
    CGROUP_PARENT, Shared, SpecError, adapt, is_sandbox, pid_namespace_of, set_device_numbers, sysctl_path,
};
use stdio::exec_outcome;
pub use stdio::{Plan, StreamError};

use crate::reaper::Reaper;
use crate::signal::Signal;

/// How long `StartContainer` waits for the program to be executed before it answers anyway.
const EXEC_PATIENCE: Duration = Duration::from_secs(10);
/// Processes of a container that have ended and been waited for; older ones are forgotten.
const MAX_ENDED_EXECS: usize = 64;
/// How long the init of a container that could not be finished may take to be gone.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

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
    /// There is no such program.
    #[error("{0}")]
    NoProgram(String),
    /// The rules for its devices could not be set.
    #[error("device rules of container {id}: {source}")]
    Devices {
        /// Container.
        id: String,
        /// Why.
        source: io::Error,
    },
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
    pub out_of_memory: OomNotices,
    /// Hooks of the guest's image, once the sandbox has named their folder.
    pub hooks: std::sync::OnceLock<GuestHooks>,
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
    /// Held while its processes are made to stand still, or to go on.
    freezing: tokio::sync::Mutex<()>,
    /// Whether its processes go without CAP_MKNOD.
    no_mknod: bool,
    /// Present until the container is started.
    exec_report: Mutex<Option<pipe::Receiver>>,
    execs: Mutex<Execs>,
    next_file: AtomicU64,
}

#[derive(Default)]
struct Execs {
    by_id: HashMap<String, Option<Arc<Process>>>,
    /// Ended and waited for, oldest first.
    ended: VecDeque<String>,
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
        let cgroup = Cgroup::of(&id);
        cgroup
            .make_parent()
            .map_err(|(path, source)| ContainerError::File { path, source })?;
        let kind = Kind::Create {
            bundle: bundle.clone(),
        };
        let made = match make(&context, &id, &bundle, &process, kind, plan).await {
            Ok(made) => made,
            Err(error) => {
                discard(&id, cgroup, vec![context.state_folder.join(&id)]).await;
                return Err(match error {
                    // "Not found" is for what exists and has lost its program; here nothing exists.
                    ContainerError::NoProgram(reason) => ContainerError::Exec(reason),
                    error => error,
                });
            }
        };
        let container = Self {
            init: Arc::new(made.process),
            exec_report: Mutex::new(Some(made.exec_report)),
            execs: Mutex::default(),
            next_file: AtomicU64::new(0),
            freezing: tokio::sync::Mutex::default(),
            no_mknod: !devices::supported() && !device_rules(spec).allows_everything(),
            spec: process,
            context,
            cgroup,
            id,
            bundle,
        };
        // Before its program can run.
        if let Err(source) = container.enforce_device_rules(spec) {
            container.kill(KILL_PATIENCE).await;
            container.delete().await;
            return Err(ContainerError::Devices {
                id: container.id,
                source,
            });
        }
        container.watch(spec);
        Ok(container)
    }

    fn enforce_device_rules(&self, spec: &Spec) -> io::Result<()> {
        let rules = device_rules(spec);
        if rules.allows_everything() || !devices::supported() {
            return Ok(());
        }
        rules.enforce(&self.cgroup.file(""))
    }

    /// Tells of kills for memory; and ends what outlives the init of a container whose PID namespace is not its own, and
    /// does not end with it.
    fn watch(&self, spec: &Spec) {
        tokio::spawn(oom::watch(
            self.cgroup.clone(),
            self.id.clone(),
            self.context.out_of_memory.clone(),
        ));
        if !spec::owns_pid_namespace(spec) {
            let (init, cgroup) = (Arc::clone(&self.init), self.cgroup.clone());
            tokio::spawn(async move {
                init.wait().await;
                cgroup.kill_all();
            });
        }
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
        let outcome = exec_outcome(&mut report, EXEC_PATIENCE).await;
        if let Some(reason) = outcome.map_err(ContainerError::Stdio)? {
            return Err(not_executed(reason));
        }
        let hooks = self.context.hooks.get().map(|hooks| &hooks.poststart[..]);
        if let Err(error) = self.run_hooks(hooks.unwrap_or_default()).await {
            self.kill(KILL_PATIENCE).await;
            return Err(error);
        }
        Ok(())
    }

    /// Runs hooks of the guest's image, one after the other, up to the first that fails.
    async fn run_hooks(&self, hooks: &[Hook]) -> Result<(), ContainerError> {
        if hooks.is_empty() {
            return Ok(());
        }
        let number = self.next_file.fetch_add(1, Ordering::Relaxed);
        let file = self.bundle.join(format!("hooks-{number}.json"));
        write_json(&file, &hooks)?;
        let request = Request {
            id: self.id.clone(),
            state: self.context.state_folder.clone(),
            console: None,
            size: None,
            kind: Kind::Hooks { hooks: file.clone() },
        };
        let done = launch::run(&self.context.reaper, &request).await;
        // Left over, it goes with the bundle.
        let _ = std::fs::remove_file(&file);
        Ok(done?)
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
        if self.no_mknod {
            spec::drop_mknod(&mut process);
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

    /// Notes that the host has learned how `process`, exec `exec_id`, ended; the oldest such are forgotten.
    pub fn waited(&self, exec_id: &str, process: &Arc<Process>) {
        let mut execs = lock(&self.execs);
        let current = execs.by_id.get(exec_id).and_then(Option::as_ref);
        if !current.is_some_and(|current| Arc::ptr_eq(current, process)) {
            // The init, or an earlier process of this name.
            return;
        }
        process.stdio().release_terminal();
        if execs.ended.iter().any(|id| id == exec_id) {
            return;
        }
        execs.ended.push_back(exec_id.to_owned());
        if execs.ended.len() > MAX_ENDED_EXECS
            && let Some(oldest) = execs.ended.pop_front()
        {
            execs.by_id.remove(&oldest);
        }
    }

    /// Sends `signal` to a process; with `everyone`, to all processes of the container if that process is its init. To
    /// the init of a container that runs nothing any more, it goes to whatever is left in the cgroup.
    ///
    /// # Errors
    /// No such exec, or the process is gone.
    pub async fn signal(&self, exec_id: &str, signal: Signal, everyone: bool) -> Result<(), ContainerError> {
        let process = self.process(exec_id)?;
        if !Arc::ptr_eq(&process, &self.init) {
            return process
                .signal(signal)
                .map_err(|SignalError::Gone| ContainerError::NoProcess {
                    id: self.id.clone(),
                    exec_id: exec_id.to_owned(),
                });
        }
        // An init that is gone is nothing to complain about: what it left may be meant.
        let to_init = || match process.signal(signal) {
            Ok(()) | Err(SignalError::Gone) => {}
        };
        if lock(&self.exec_report).is_some() {
            let (Ok(()) | Err(SignalError::Gone)) = process.cancel(signal);
        } else if everyone {
            let _freezing = self.freezing.lock().await;
            let to_each = |pid| {
                if pid == process.pid() {
                    to_init();
                } else {
                    // Gone since the cgroup was read.
                    let _ = signal.send(pid);
                }
            };
            self.cgroup.signal_all(to_each).await;
        } else {
            to_init();
            // With a PID namespace of its own the container dies with its init; in a shared one it does not.
            if signal == Signal::KILL {
                self.cgroup.kill_all();
            }
        }
        Ok(())
    }

    /// Makes all its processes stand still, or go on.
    ///
    /// # Errors
    /// They do not.
    pub async fn freeze(&self, frozen: bool) -> Result<(), ContainerError> {
        let _freezing = self.freezing.lock().await;
        Ok(self.cgroup.freeze(frozen).await?)
    }

    /// Kills everything in the container and waits up to `patience` for its init to be gone.
    pub async fn kill(&self, patience: Duration) {
        self.cgroup.kill_all();
        // The process may not be in the cgroup yet, or the cgroup gone already.
        let _ = self.init.signal(Signal::KILL);
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
        let hooks = self.context.hooks.get().map(|hooks| &hooks.poststop[..]);
        if let Err(error) = self.run_hooks(hooks.unwrap_or_default()).await {
            tracing::warn!(container = self.id, %error, "poststop hooks of the guest");
        }
        let state = self.context.state_folder.join(&self.id);
        discard(&self.id, self.cgroup.clone(), vec![state, self.bundle.clone()]).await;
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

    /// The init's PID namespace, for others to join for as long as the file is open.
    ///
    /// # Errors
    /// The init has ended.
    pub fn pid_namespace(&self) -> io::Result<File> {
        let file = File::open(format!("/proc/{}/ns/pid", self.init.pid()))?;
        match self.state() {
            // Its number may have been another process's by then.
            State::Stopped => Err(io::ErrorKind::NotFound.into()),
            State::Created | State::Running => Ok(file),
        }
    }

    fn reserve(&self, exec_id: &str) -> Result<(), ContainerError> {
        let mut execs = lock(&self.execs);
        let taken = match execs.by_id.get(exec_id) {
            None => exec_id == self.id,
            Some(None) => true,
            // The host deletes an exec without a word: once it has ended, its name is free.
            Some(Some(process)) => process.exit_code().is_none(),
        };
        if taken {
            return Err(ContainerError::ProcessExists {
                id: self.id.clone(),
                exec_id: exec_id.to_owned(),
            });
        }
        execs.ended.retain(|id| id != exec_id);
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

fn device_rules(spec: &Spec) -> DeviceRules {
    let linux = spec.linux().as_ref();
    let rules = linux
        .and_then(|linux| linux.resources().as_ref())
        .and_then(|resources| resources.devices().as_deref());
    let nodes = linux
        .and_then(|linux| linux.devices().as_deref())
        .unwrap_or_default();
    let nodes: Vec<_> = nodes
        .iter()
        .filter_map(|node| {
            let block = node.typ() == oci_spec::runtime::LinuxDeviceType::B;
            let major = u32::try_from(node.major()).ok()?;
            Some((block, major, u32::try_from(node.minor()).ok()?))
        })
        .collect();
    DeviceRules::new(rules.unwrap_or_default(), &nodes)
}

/// Ends what is left of container `id` and removes it: its cgroup, and `folders`.
async fn discard(id: &str, cgroup: Cgroup, folders: Vec<PathBuf>) {
    let container = id.to_owned();
    let removal = move || {
        cgroup.kill_all();
        if let Err(error) = cgroup.remove() {
            tracing::warn!(container, "{error}");
        }
        for folder in folders {
            match std::fs::remove_dir_all(&folder) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(container, "remove {}: {error}", folder.display());
                }
                _ => {}
            }
        }
    };
    if let Err(error) = tokio::task::spawn_blocking(removal).await {
        tracing::warn!(container = id, "remove container files: {error}");
    }
}

/// Tells a created container's init to go on. Its socket is reached through a descriptor of its folder, because the
/// path may be longer than a socket address.
fn notify(folder: &Path) -> io::Result<()> {
    use std::io::Write;
    use std::os::fd::AsRawFd;

    let folder = File::open(folder)?;
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
