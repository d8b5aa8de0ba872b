//! The pod as the guest sees it: its containers, the namespaces and volumes they share, and its end.

mod namespaces;
pub mod pause;
mod sysctls;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use oci_spec::runtime::Spec;
use protocols::agent::{CreateContainerRequest, CreateSandboxRequest, Device, Storage, StringUser};
use protocols::oci_convert::{FromWireError, spec_from_wire};
use tokio::sync::watch;

use crate::container::{
    self, Container, ContainerError, Context, OomNotices, PortError, Ports, Shared, SpecError, StreamError,
};
use crate::hotplug::Hotplug;
use crate::options::Options;
use crate::reaper::Reaper;
use crate::storage::{Mounted, StorageError};
use namespaces::Namespaces;
use pause::Pause;
pub use sysctls::SysctlError;

/// Folder of the pod's own files, and parent of the containers' bundles.
const RUN: &str = "/run/kata-containers";
/// libcontainer's state. Not below [`RUN`], where container names live.
const STATE: &str = "/run/kata-agent/state";
/// Names in [`RUN`] that are not containers.
const RESERVED: [&str; 2] = ["sandbox", "shared"];
const MAX_ID: usize = 128;
/// Device types that are a block device at a path.
const BLOCK_DEVICES: [&str; 2] = ["blk", "mmioblk"];
/// How long a killed container's init may take to be gone.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// A sandbox operation that failed.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A name that is not one.
    #[error("{what} {id:?}: not a valid name")]
    InvalidId {
        /// Name of what.
        what: &'static str,
        /// The name.
        id: String,
    },
    /// There is one already.
    #[error("container {0} exists")]
    ContainerExists(String),
    /// There is none.
    #[error("container {0} not found")]
    NoContainer(String),
    /// `CreateSandbox` twice.
    #[error("sandbox {0} exists")]
    SandboxExists(String),
    /// A request without something it needs.
    #[error("request without {0}")]
    Missing(&'static str),
    /// A field of the request that this agent cannot act on.
    #[error("{0}: not supported by this agent")]
    Unsupported(String),
    /// The specification on the wire is not one.
    #[error(transparent)]
    Wire(#[from] FromWireError),
    /// A volume could not be made available.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A container operation failed.
    #[error("container {id}: {source}")]
    Container {
        /// Which.
        id: String,
        /// Why.
        source: ContainerError,
    },
    /// A stream of a process is not to be had.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// Stdio did not come.
    #[error(transparent)]
    Port(#[from] PortError),
    /// The pod's namespaces could not be made.
    #[error("sandbox namespaces: {0}")]
    Namespaces(io::Error),
    /// A PID namespace that the container was to share.
    #[error("container {id}: PID namespace of {owner}: {source}")]
    PidNamespace {
        /// The container.
        id: String,
        /// Whose.
        owner: String,
        /// Why it cannot be had.
        source: io::Error,
    },
    /// A kernel parameter of the pod.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    /// A file in the guest.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The pod.
pub struct Sandbox {
    context: Arc<Context>,
    ports: Ports,
    hotplug: Hotplug,
    /// Whether the agent owns the machine, and with it /etc.
    owns_machine: bool,
    state: Mutex<State>,
    end: watch::Sender<bool>,
}

#[derive(Default)]
struct State {
    id: Option<String>,
    hostname: String,
    namespaces: Option<Arc<Namespaces>>,
    /// What the PID namespace hangs on that the pod's containers share, if they do.
    pid_anchor: Option<PidAnchor>,
    /// `None` while one is being made.
    containers: HashMap<String, Option<Entry>>,
    storages: Mounted,
}

/// What a pod's PID namespace hangs on.
enum PidAnchor {
    /// The container that stands for the pod, and its namespace.
    Container(String, File),
    /// A pod without one has a process for this.
    Pause(Pause),
}

impl PidAnchor {
    fn namespace(&self) -> &File {
        match self {
            Self::Container(_, namespace) => namespace,
            Self::Pause(pause) => pause.namespace(),
        }
    }
}

#[derive(Clone)]
struct Entry {
    container: Arc<Container>,
    mounts: Vec<PathBuf>,
}

impl Sandbox {
    /// An empty pod.
    pub fn new(options: &Options, reaper: Reaper, ports: Ports, owns_machine: bool) -> Self {
        let context = Context {
            reaper,
            state_folder: PathBuf::from(STATE),
            pipe_size: options.pipe_size,
            out_of_memory: OomNotices::default(),
            hooks: std::sync::OnceLock::new(),
        };
        Self {
            context: Arc::new(context),
            ports,
            hotplug: Hotplug::new(options.hotplug_timeout, owns_machine),
            owns_machine,
            state: Mutex::default(),
            end: watch::channel(false).0,
        }
    }

    /// `CreateSandbox`.
    ///
    /// # Errors
    /// There is one, or a part of it cannot be made.
    pub async fn create(&self, request: &CreateSandboxRequest) -> Result<(), SandboxError> {
        if request.sandbox_id.len() > MAX_ID {
            return Err(SandboxError::InvalidId {
                what: "sandbox",
                id: request.sandbox_id.clone(),
            });
        }
        {
            let mut state = self.state();
            if let Some(id) = &state.id {
                return Err(SandboxError::SandboxExists(id.clone()));
            }
            state.id = Some(request.sandbox_id.clone());
            state.hostname.clone_from(&request.hostname);
        }
        let result = self.create_parts(request).await;
        if result.is_err() {
            self.state().id = None;
        }
        result
    }

    async fn create_parts(&self, request: &CreateSandboxRequest) -> Result<(), SandboxError> {
        if let Some(module) = request.kernel_modules.first() {
            return Err(SandboxError::Unsupported(format!(
                "kernel_modules ({})",
                module.name
            )));
        }
        if !request.guest_hook_path.is_empty() {
            let hooks = container::GuestHooks::find(Path::new(&request.guest_hook_path));
            // A sandbox is created once.
            let _ = self.context.hooks.set(hooks);
        }
        let namespaces = self.namespaces()?;
        sysctls::apply(&request.sysctls, &namespaces)?;
        if !request.hostname.is_empty() && self.owns_machine {
            let named = nix::unistd::sethostname(&request.hostname);
            named.map_err(|error| SandboxError::Namespaces(error.into()))?;
        }
        self.write_resolver(&request.dns)?;
        self.add_storages(&request.storages).await?;
        Ok(())
    }

    /// `DestroySandbox`: ends every container, releases every volume, writes back what is dirty; then tells the agent to
    /// end.
    pub async fn destroy(&self) {
        let containers: Vec<Entry> = self
            .state()
            .containers
            .drain()
            .filter_map(|(_, entry)| entry)
            .collect();
        for entry in containers {
            entry.container.kill(KILL_PATIENCE).await;
            entry.container.delete().await;
        }
        self.state().pid_anchor = None;
        let storages = std::mem::take(&mut self.state().storages);
        let owns_machine = self.owns_machine;
        let release = move || {
            storages.release_all();
            if owns_machine {
                // The answer tells the host that nothing of its data is on the way any more.
                nix::unistd::sync();
            }
        };
        if let Err(error) = tokio::task::spawn_blocking(release).await {
            tracing::warn!("release volumes: {error}");
        }
        self.end.send_replace(true);
    }

    /// The next container whose process was killed for memory; none when the sandbox is destroyed. Of several
    /// callers each event reaches one.
    pub async fn next_out_of_memory(&self) -> Option<String> {
        tokio::select! {
            id = self.context.out_of_memory.next() => Some(id),
            () = self.ended() => None,
        }
    }

    /// Resolves when the sandbox has been destroyed.
    pub async fn ended(&self) {
        // The sender lives in self.
        let _ = self.end.subscribe().wait_for(|ended| *ended).await;
    }

    /// `CreateContainer`.
    ///
    /// # Errors
    /// The name is taken or invalid, or the container cannot be made; nothing of it is left.
    pub async fn create_container(&self, request: CreateContainerRequest) -> Result<(), SandboxError> {
        let id = request.container_id.clone();
        if !valid_id(&id) || RESERVED.contains(&id.as_str()) {
            return Err(SandboxError::InvalidId {
                what: "container",
                id,
            });
        }
        if let Some(mount) = request.shared_mounts.first() {
            return Err(SandboxError::Unsupported(format!(
                "shared_mounts ({})",
                mount.name
            )));
        }
        refuse_string_user(request.string_user.as_ref())?;
        let spec = spec_from_wire(request.OCI.as_ref().ok_or(SandboxError::Missing("OCI"))?)?;
        let plan = self
            .stdio_plan(request.stdin_port, request.stdout_port, request.stderr_port)
            .await?;
        {
            let mut state = self.state();
            if state.containers.contains_key(&id) {
                return Err(SandboxError::ContainerExists(id));
            }
            state.containers.insert(id.clone(), None);
        }
        let mounts = match self.add_storages(&request.storages).await {
            Ok(mounts) => mounts,
            Err(error) => {
                self.state().containers.remove(&id);
                return Err(error);
            }
        };
        match self.make_container(&id, spec, &request, plan).await {
            Ok(container) => {
                let entry = Entry {
                    container: Arc::new(container),
                    mounts,
                };
                self.state().containers.insert(id, Some(entry));
                Ok(())
            }
            Err(error) => {
                self.state().containers.remove(&id);
                self.release(&mounts).await;
                // Empty but for what failed.
                let _ = std::fs::remove_dir_all(bundle(&id));
                Err(error)
            }
        }
    }

    async fn make_container(
        &self,
        id: &str,
        mut spec: Spec,
        request: &CreateContainerRequest,
        plan: container::Plan,
    ) -> Result<Container, SandboxError> {
        let failed = |source: ContainerError| SandboxError::Container {
            id: id.to_owned(),
            source,
        };
        let bundle = bundle(id);
        make_folder(&bundle)?;
        make_folder(&self.context.state_folder)?;
        let devices = self.wait_for_devices(&request.devices).await?;
        // Open until the container has joined it.
        let pids = self.shared_pids(id, &spec, request.sandbox_pidns)?;
        let shared = self.shared_namespaces(&spec, pids.as_ref())?;
        let stands_for_pod = container::is_sandbox(&spec);
        let spec_failed = |error: SpecError| failed(error.into());
        container::set_device_numbers(&mut spec, &devices).map_err(spec_failed)?;
        container::adapt(&mut spec, id, &bundle, &shared).map_err(spec_failed)?;
        if let Some(hooks) = self.context.hooks.get() {
            hooks.add_to(&mut spec);
        }
        let container = Container::create(Arc::clone(&self.context), id.to_owned(), bundle, &spec, plan)
            .await
            .map_err(failed)?;
        if stands_for_pod && pids.is_none() && self.state().pid_anchor.is_none() {
            // Of an init that has ended already there is none to share.
            let namespace = container.pid_namespace().ok();
            self.state().pid_anchor = namespace.map(|file| PidAnchor::Container(id.to_owned(), file));
        }
        Ok(container)
    }

    /// `RemoveContainer`: ends it if need be, and removes everything of it.
    ///
    /// # Errors
    /// There is none.
    pub async fn remove_container(&self, id: &str, patience: Duration) -> Result<(), SandboxError> {
        let entry = {
            let mut state = self.state();
            let entry = state.containers.get(id).cloned().flatten();
            let entry = entry.ok_or_else(|| SandboxError::NoContainer(id.to_owned()))?;
            state.containers.remove(id);
            state
                .pid_anchor
                .take_if(|anchor| matches!(anchor, PidAnchor::Container(name, _) if name == id));
            entry
        };
        let patience = if patience.is_zero() {
            KILL_PATIENCE
        } else {
            patience
        };
        entry.container.kill(patience).await;
        // Before its folder: a root filesystem that is mounted in it must not be emptied.
        self.release(&entry.mounts).await;
        entry.container.delete().await;
        let id = id.to_owned();
        let detach = move || crate::storage::submounts::detach_of(&id);
        if let Err(error) = tokio::task::spawn_blocking(detach).await {
            tracing::warn!("mounts of the host: {error}");
        }
        Ok(())
    }

    /// Container `id`.
    ///
    /// # Errors
    /// There is none.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, SandboxError> {
        let entry = self.state().containers.get(id).cloned().flatten();
        entry
            .map(|entry| entry.container)
            .ok_or_else(|| SandboxError::NoContainer(id.to_owned()))
    }

    /// How a process's streams reach the host. With the stdio port open the host connects those it wants and the
    /// rest is /dev/null; without it, they wait for calls.
    ///
    /// # Errors
    /// A connection does not come.
    pub async fn stdio_plan(
        &self,
        stdin: u32,
        stdout: u32,
        stderr: u32,
    ) -> Result<container::Plan, SandboxError> {
        if !self.ports.listening() && [stdin, stdout, stderr] == [0; 3] {
            return Ok(container::Plan::Calls);
        }
        Ok(container::Plan::Connections(
            self.ports.claim(stdin, stdout, stderr).await?,
        ))
    }

    fn namespaces(&self) -> Result<Arc<Namespaces>, SandboxError> {
        let mut state = self.state();
        if let Some(namespaces) = &state.namespaces {
            return Ok(Arc::clone(namespaces));
        }
        let namespaces = Arc::new(Namespaces::create(&state.hostname).map_err(SandboxError::Namespaces)?);
        state.namespaces = Some(Arc::clone(&namespaces));
        Ok(namespaces)
    }

    /// The PID namespace that container `id` is to join: another container's, or the pod's, which comes into being with the
    /// first that wants it.
    fn shared_pids(&self, id: &str, spec: &Spec, of_pod: bool) -> Result<Option<File>, SandboxError> {
        let failed = |owner: &str| {
            let (id, owner) = (id.to_owned(), owner.to_owned());
            move |source| SandboxError::PidNamespace { id, owner, source }
        };
        if let Some(other) = container::pid_namespace_of(spec) {
            let namespace = self.container(other)?.pid_namespace();
            return namespace.map(Some).map_err(failed(&format!("container {other}")));
        }
        if !of_pod {
            return Ok(None);
        }
        let mut state = self.state();
        let anchor = match state.pid_anchor.take() {
            Some(anchor) => anchor,
            None => PidAnchor::Pause(Pause::start(&self.context.reaper).map_err(failed("the pod"))?),
        };
        let namespace = anchor.namespace().try_clone();
        state.pid_anchor = Some(anchor);
        namespace.map(Some).map_err(failed("the pod"))
    }

    fn shared_namespaces(&self, spec: &Spec, pids: Option<&File>) -> Result<Shared, SandboxError> {
        let namespaces = self.namespaces()?;
        let mut state = self.state();
        // A pod that came without a hostname takes the first container's.
        if state.hostname.is_empty()
            && let Some(hostname) = spec.hostname().as_deref().filter(|name| !name.is_empty())
        {
            namespaces
                .set_hostname(hostname)
                .map_err(SandboxError::Namespaces)?;
            state.hostname = hostname.to_owned();
        }
        Ok(Shared {
            ipc: namespaces.ipc(),
            uts: namespaces.uts(),
            pid: pids.map(namespaces::path),
        })
    }

    /// Waits until the block devices are there. Returns (path in the container, path in the guest).
    async fn wait_for_devices(&self, devices: &[Device]) -> Result<Vec<(String, String)>, SandboxError> {
        let mut found = Vec::with_capacity(devices.len());
        for device in devices {
            if !BLOCK_DEVICES.contains(&device.type_.as_str()) {
                return Err(SandboxError::Unsupported(format!(
                    "device {} of type {}",
                    device.id, device.type_
                )));
            }
            crate::storage::wait_for_device(&device.vm_path, &self.hotplug).await?;
            found.push((device.container_path.clone(), device.vm_path.clone()));
        }
        Ok(found)
    }

    async fn add_storages(&self, storages: &[Storage]) -> Result<Vec<PathBuf>, SandboxError> {
        let mut added = Vec::with_capacity(storages.len());
        for storage in storages {
            match self.add_storage(storage).await {
                Ok(path) => added.push(path),
                Err(error) => {
                    self.release(&added).await;
                    return Err(error);
                }
            }
        }
        Ok(added)
    }

    async fn add_storage(&self, storage: &Storage) -> Result<PathBuf, SandboxError> {
        let path = PathBuf::from(&storage.mount_point);
        if self.state().storages.share(&path) {
            return Ok(path);
        }
        crate::storage::add(storage, &self.hotplug).await?;
        self.state().storages.insert(path.clone(), storage);
        Ok(path)
    }

    async fn release(&self, mounts: &[PathBuf]) {
        let releases: Vec<_> = mounts
            .iter()
            .rev()
            .filter_map(|path| self.state().storages.release(path))
            .collect();
        let unmount = move || releases.into_iter().for_each(|release| release.run());
        if let Err(error) = tokio::task::spawn_blocking(unmount).await {
            tracing::warn!("release volumes: {error}");
        }
    }

    /// Containers that want the pod's DNS bind-mount this file; the agent's own resolver reads /etc.
    fn write_resolver(&self, lines: &[String]) -> Result<(), SandboxError> {
        if lines.is_empty() {
            return Ok(());
        }
        let folder = Path::new(RUN).join("sandbox");
        make_folder(&folder)?;
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        let mut files = vec![folder.join("resolv.conf")];
        if self.owns_machine {
            files.push(PathBuf::from("/etc/resolv.conf"));
        }
        for path in files {
            std::fs::write(&path, &text).map_err(|source| SandboxError::File { path, source })?;
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Names become file names and cgroup names.
pub fn valid_id(id: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_.+-".contains(&byte);
    !id.is_empty() && id.len() <= MAX_ID && id != "." && id != ".." && id.bytes().all(allowed)
}

/// Refuses a user given by name: names are looked up where the image is unpacked, which is never in this guest.
pub fn refuse_string_user(user: Option<&StringUser>) -> Result<(), SandboxError> {
    match user {
        Some(user) if *user != StringUser::default() => Err(SandboxError::Unsupported(format!(
            "string_user ({}:{})",
            user.uid, user.gid
        ))),
        _ => Ok(()),
    }
}

fn bundle(id: &str) -> PathBuf {
    Path::new(RUN).join(id)
}

fn make_folder(path: &Path) -> Result<(), SandboxError> {
    std::fs::create_dir_all(path).map_err(|source| SandboxError::File {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_when_it_could_leave_its_folder_is_invalid() {
        for bad in ["", ".", "..", "a/b", "../x", "a b", "ü", &"x".repeat(129)] {
            assert!(!valid_id(bad), "{bad:?}");
        }
        for good in ["a", "0f1e", "my-pod_1.2+x", &"x".repeat(128)] {
            assert!(valid_id(good), "{good:?}");
        }
    }
}
