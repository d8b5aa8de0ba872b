//! The containers of a sandbox in its VM. The map of containers is only locked to look into it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use oci_spec::runtime::{LinuxResources, Process as OciProcess, Spec};
use protobuf::MessageField;
use protocols::agent as wire;
use protocols::oci_convert::{process_to_wire, resources_to_wire, spec_to_wire};
use tokio::sync::mpsc;

use super::bundle::container_kind;
use super::container::{Container, HostSide, KILLED};
use super::process::{Phase, Process};
use super::spec::{GuestSpec, amend, amend_process, amend_resources};
use super::stdio::{Owner, ProcessIo};
use super::{ContainerManager, stats};
use crate::error::{Error, ErrorKind, Result};
use crate::hypervisor::VmExit;
use crate::paths::check_id;
use crate::sandbox::{SandboxState, VirtSandbox};
use crate::timeline;
use crate::types::{
    ContainerProcess, ContainerStats, CreateContainerRequest, Event, ExecProcessRequest, ProcessExit,
    ProcessState,
};

/// How long a removal waits for output that nobody has read to its end.
const DRAIN: Duration = Duration::from_secs(10);
/// How long a created container that is deleted may take to die.
const KILL: Duration = Duration::from_secs(10);
/// How long the end of the VM may take to become known after the agent stopped answering.
const VM_END: Duration = Duration::from_secs(10);
/// Exit status when nothing better is known.
const UNKNOWN_STATUS: u32 = 255;
/// As the wire has it.
const SIGKILL: u32 = libc::SIGKILL as u32;

/// An entry of the map: the id is taken from the beginning of a create.
enum Slot {
    Creating,
    Ready(Arc<Container>),
}

/// The containers of one sandbox.
pub struct VirtContainerManager {
    sandbox_id: String,
    namespace: String,
    sandbox: Arc<VirtSandbox>,
    events: mpsc::UnboundedSender<Event>,
    containers: Mutex<HashMap<String, Slot>>,
}

impl VirtContainerManager {
    /// A manager without containers.
    pub fn new(
        sandbox_id: impl Into<String>,
        namespace: impl Into<String>,
        sandbox: Arc<VirtSandbox>,
        events: mpsc::UnboundedSender<Event>,
    ) -> Self {
        let (sandbox_id, namespace) = (sandbox_id.into(), namespace.into());
        Self {
            sandbox_id,
            namespace,
            sandbox,
            events,
            containers: Mutex::default(),
        }
    }

    /// Whether any container is left.
    pub fn is_empty(&self) -> bool {
        self.containers().is_empty()
    }

    /// The VM is gone, and every process with it. Exits are published, waiters released.
    pub fn vm_ended(&self, exit: &VmExit) {
        let containers: Vec<_> = self.containers().values().filter_map(Slot::ready).collect();
        for container in containers {
            tracing::warn!(container = container.id, %exit, "killed with the VM");
            container.killed();
        }
    }

    fn containers(&self) -> std::sync::MutexGuard<'_, HashMap<String, Slot>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn container(&self, id: &str) -> Result<Arc<Container>> {
        self.containers()
            .get(id)
            .and_then(Slot::ready)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("container {id} does not exist")))
    }

    fn process(&self, id: &ContainerProcess) -> Result<(Arc<Container>, Arc<Process>)> {
        let container = self.container(&id.container_id)?;
        let process = container.process(&id.exec_id)?;
        Ok((container, process))
    }

    fn reserve(&self, id: &str) -> Result<()> {
        check_id("container", id)?;
        match self.containers().entry(id.to_owned()) {
            Entry::Occupied(_) => Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("container {id} exists already"),
            )),
            Entry::Vacant(entry) => {
                entry.insert(Slot::Creating);
                Ok(())
            }
        }
    }

    async fn create(&self, request: &CreateContainerRequest, spec: Spec) -> Result<Arc<Container>> {
        let id = request.container_id.clone();
        let (spec, host) = self.host_side(request, spec).await?;
        let result = self.create_in_guest(request, spec, &host).await;
        let init = match result {
            Ok(init) => init,
            Err(error) => {
                cleanup_host(Arc::new(host)).await;
                return Err(error.context(format!("create container {id}")));
            }
        };
        Ok(Arc::new(Container::new(id, request.bundle.clone(), init, host)))
    }

    /// Rootfs and volumes: mounts, so off the async threads.
    async fn host_side(&self, request: &CreateContainerRequest, spec: Spec) -> Result<(Spec, HostSide)> {
        let resources = self.sandbox.resources().clone();
        let (id, bundle, mounts) = (
            request.container_id.clone(),
            request.bundle.clone(),
            request.rootfs.clone(),
        );
        let prepared = tokio::task::spawn_blocking(move || {
            let rootfs = resources.handle_rootfs(&id, &bundle, &mounts, &spec)?;
            match resources.handle_volumes(&id, &spec) {
                Ok(volumes) => Ok((spec, HostSide { rootfs, volumes })),
                Err(error) => {
                    HostSide {
                        rootfs,
                        volumes: Default::default(),
                    }
                    .cleanup();
                    Err(error)
                }
            }
        });
        prepared
            .await
            .unwrap_or_else(|error| Err(Error::new(ErrorKind::Internal, format!("rootfs: {error}"))))
    }

    async fn create_in_guest(
        &self,
        request: &CreateContainerRequest,
        mut spec: Spec,
        host: &HostSide,
    ) -> Result<Arc<Process>> {
        let id = &request.container_id;
        let kind = container_kind(&spec)?;
        let guest = GuestSpec {
            container: id.clone(),
            rootfs: host.rootfs.get_guest_rootfs_path(),
            mounts: host.volumes.mounts(),
            bundle: request.bundle.clone(),
            terminal: request.stdio.terminal,
            disable_seccomp: self.sandbox.config().runtime.disable_guest_seccomp,
        };
        for warning in amend(&mut spec, guest, &kind)? {
            tracing::warn!(container = id, "{warning}");
        }
        let init = ContainerProcess {
            container_id: id.clone(),
            exec_id: String::new(),
        };
        let init = Arc::new(Process::new(init, request.stdio.clone(), self.events.clone()));
        let io = self.open_io(&init)?;
        let create = wire::CreateContainerRequest {
            container_id: id.clone(),
            storages: host
                .rootfs
                .get_storage()
                .into_iter()
                .chain(host.volumes.storages())
                .collect(),
            OCI: MessageField::some(spec_to_wire(&spec)),
            stdin_port: io.stdin_port,
            stdout_port: io.stdout_port,
            stderr_port: io.stderr_port,
            ..Default::default()
        };
        if let Err(error) = self.sandbox.agent().create_container(create).await {
            io.close();
            // The agent may have got half way.
            let remove = wire::RemoveContainerRequest {
                container_id: id.clone(),
                ..Default::default()
            };
            if let Err(undo) = self.sandbox.agent().remove_container(remove).await {
                tracing::debug!(container = id, error = %undo, "after a failed create");
            }
            return Err(error);
        }
        init.set_io(io);
        Ok(init)
    }

    fn open_io(&self, process: &Process) -> Result<Arc<ProcessIo>> {
        let port = self.sandbox.config().runtime.passfd_listener_port;
        let owner = Owner {
            container: &process.id().container_id,
            namespace: &self.namespace,
        };
        ProcessIo::open(self.sandbox.hypervisor().clone(), process.stdio(), port, owner)
    }

    /// Waits for a process in the guest, without a time limit, and publishes its exit.
    fn spawn_waiter(&self, container: Arc<Container>, process: Arc<Process>) {
        let sandbox = self.sandbox.clone();
        tokio::spawn(async move {
            let request = wire::WaitProcessRequest {
                container_id: container.id.clone(),
                exec_id: process.id().exec_id.clone(),
                ..Default::default()
            };
            let status = match sandbox.agent().wait_process(request).await {
                // The agent reports 0 to 255.
                Ok(response) => u32::from(response.status.unsigned_abs() as u8),
                Err(error) => {
                    if matches!(process.phase(), Phase::Stopped(_)) || vm_ended_soon(&sandbox).await {
                        // The end of the VM is handled for all processes at once.
                        return;
                    }
                    tracing::error!(%process, %error, "waiting failed, the VM still runs");
                    UNKNOWN_STATUS
                }
            };
            let exit = ProcessExit {
                status,
                at: SystemTime::now(),
            };
            if process.is_init() {
                container.init_exited(exit).await;
            } else {
                process.exited(exit);
            }
        });
    }

    async fn start_init(&self, container: &Container) -> Result<()> {
        let request = wire::StartContainerRequest {
            container_id: container.id.clone(),
            ..Default::default()
        };
        self.sandbox.agent().start_container(request).await
    }

    async fn start_exec(&self, container: &Container, process: &Process, spec: &OciProcess) -> Result<()> {
        let io = self.open_io(process)?;
        let request = wire::ExecProcessRequest {
            container_id: container.id.clone(),
            exec_id: process.id().exec_id.clone(),
            process: MessageField::some(process_to_wire(spec)),
            stdin_port: io.stdin_port,
            stdout_port: io.stdout_port,
            stderr_port: io.stderr_port,
            ..Default::default()
        };
        if let Err(error) = self.sandbox.agent().exec_process(request).await {
            io.close();
            return Err(error);
        }
        process.set_io(io);
        Ok(())
    }

    async fn resize(&self, process: &Process, width: u32, height: u32) -> Result<()> {
        let request = wire::TtyWinResizeRequest {
            container_id: process.id().container_id.clone(),
            exec_id: process.id().exec_id.clone(),
            row: height,
            column: width,
            ..Default::default()
        };
        self.sandbox.agent().tty_win_resize(request).await
    }

    async fn signal(&self, process: &Process, signal: u32, all: bool) -> Result<()> {
        // The agent takes an empty exec id for the container as a whole.
        let exec_id = if all {
            String::new()
        } else {
            process.id().exec_id.clone()
        };
        let request = wire::SignalProcessRequest {
            container_id: process.id().container_id.clone(),
            exec_id,
            signal,
            ..Default::default()
        };
        self.sandbox.agent().signal_process(request).await
    }

    /// A created container ends; by decree when the agent cannot signal what does not run yet.
    async fn kill_created(&self, container: &Container, signal: u32) {
        let status = 128 + signal;
        // What waits there for its start is PID 1 of a namespace: it ignores everything but SIGKILL.
        if let Err(error) = self.signal(&container.init, SIGKILL, false).await {
            tracing::debug!(container = container.id, %error, "created container is declared dead");
            container.all_exited(ProcessExit {
                status,
                at: SystemTime::now(),
            });
        }
    }

    async fn delete_container(&self, container: Arc<Container>) -> Result<ProcessExit> {
        let init = container.init.clone();
        match init.phase() {
            Phase::Stopped(_) => {}
            Phase::Created => {
                self.kill_created(&container, SIGKILL).await;
                if tokio::time::timeout(KILL, init.wait()).await.is_err() {
                    container.killed();
                }
            }
            Phase::Starting { .. } | Phase::Running | Phase::Paused => return Err(init.wrong_state("delete")),
        }
        let exit = init.wait().await?;
        if let Some(io) = init.io() {
            io.drain(DRAIN).await;
        }
        let remove = wire::RemoveContainerRequest {
            container_id: container.id.clone(),
            ..Default::default()
        };
        match self.sandbox.agent().remove_container(remove).await {
            Ok(()) => {}
            Err(error) if matches!(error.kind, ErrorKind::NotFound | ErrorKind::Unavailable) => {}
            // The guest keeps something; the host side must not.
            Err(error) => tracing::warn!(container = container.id, %error, "remove in the guest"),
        }
        cleanup_host(container.host.clone()).await;
        self.containers().remove(&container.id);
        Ok(exit)
    }

    async fn delete_exec(&self, container: &Container, process: &Process) -> Result<ProcessExit> {
        let exit = match process.phase() {
            Phase::Stopped(exit) => exit,
            Phase::Created => ProcessExit {
                status: KILLED,
                at: SystemTime::now(),
            },
            Phase::Starting { .. } | Phase::Running | Phase::Paused => {
                return Err(process.wrong_state("delete"));
            }
        };
        process.exited(exit);
        if let Some(io) = process.io() {
            io.drain(DRAIN).await;
        }
        container.remove_exec(&process.id().exec_id);
        Ok(exit)
    }
}

impl Slot {
    fn ready(&self) -> Option<Arc<Container>> {
        match self {
            Self::Creating => None,
            Self::Ready(container) => Some(container.clone()),
        }
    }
}

async fn cleanup_host(host: Arc<HostSide>) {
    if let Err(error) = tokio::task::spawn_blocking(move || host.cleanup()).await {
        tracing::warn!(%error, "cleanup of a container");
    }
}

async fn vm_ended_soon(sandbox: &VirtSandbox) -> bool {
    let mut state = sandbox.watch_state();
    let ended = state.wait_for(|state| matches!(state, SandboxState::Stopped(_)));
    tokio::time::timeout(VM_END, ended).await.is_ok()
}

#[async_trait]
impl ContainerManager for VirtContainerManager {
    async fn create_container(&self, request: CreateContainerRequest, spec: Spec) -> Result<u32> {
        self.reserve(&request.container_id)?;
        let container = match self.create(&request, spec).await {
            Ok(container) => container,
            Err(error) => {
                self.containers().remove(&request.container_id);
                return Err(error);
            }
        };
        timeline::mark("container created");
        let pid = std::process::id();
        // Before anything can happen to it, so that no other event comes first.
        let _ = self.events.send(Event::TaskCreate {
            container_id: request.container_id.clone(),
            bundle: request.bundle,
            rootfs: request.rootfs,
            stdio: request.stdio,
            pid,
        });
        self.containers()
            .insert(request.container_id, Slot::Ready(container.clone()));
        if matches!(*self.sandbox.watch_state().borrow(), SandboxState::Stopped(_)) {
            // The VM ended between the agent's answer and the entry in the map.
            container.killed();
        }
        self.spawn_waiter(container.clone(), container.init.clone());
        Ok(pid)
    }

    async fn pause_container(&self, container: &str) -> Result<()> {
        let container = self.container(container)?;
        if container.init.phase() != Phase::Running {
            return Err(container.init.wrong_state("pause"));
        }
        let request = wire::PauseContainerRequest {
            container_id: container.id.clone(),
            ..Default::default()
        };
        self.sandbox.agent().pause_container(request).await?;
        container.init.pause();
        let _ = self.events.send(Event::TaskPaused {
            container_id: container.id.clone(),
        });
        Ok(())
    }

    async fn resume_container(&self, container: &str) -> Result<()> {
        let container = self.container(container)?;
        if container.init.phase() != Phase::Paused {
            return Err(container.init.wrong_state("resume"));
        }
        let request = wire::ResumeContainerRequest {
            container_id: container.id.clone(),
            ..Default::default()
        };
        self.sandbox.agent().resume_container(request).await?;
        container.init.resume();
        let _ = self.events.send(Event::TaskResumed {
            container_id: container.id.clone(),
        });
        Ok(())
    }

    async fn stats_container(&self, container: &str) -> Result<ContainerStats> {
        let container = self.container(container)?;
        let request = wire::StatsContainerRequest {
            container_id: container.id.clone(),
            ..Default::default()
        };
        self.sandbox
            .agent()
            .stats_container(request)
            .await
            .map(stats::convert)
    }

    async fn update_container(&self, container: &str, resources: &[u8]) -> Result<()> {
        let container = self.container(container)?;
        let what = format!("resources of container {}", container.id);
        let mut resources: LinuxResources = serde_json::from_slice(resources)
            .map_err(|error| Error::new(ErrorKind::InvalidArgument, format!("{what}: {error}")))?;
        amend_resources(&mut resources).map_err(|error| error.context(what))?;
        let request = wire::UpdateContainerRequest {
            container_id: container.id.clone(),
            resources: MessageField::some(resources_to_wire(&resources)),
            ..Default::default()
        };
        self.sandbox.agent().update_container(request).await
    }

    async fn connect_container(&self, container: &str) -> Result<u32> {
        self.container(container)?;
        self.pid().await
    }

    async fn close_process_io(&self, process: &ContainerProcess) -> Result<()> {
        let (_, process) = self.process(process)?;
        if let Some(io) = process.io() {
            io.close_stdin();
        }
        Ok(())
    }

    async fn delete_process(&self, id: &ContainerProcess) -> Result<ProcessExit> {
        let (container, process) = self.process(id)?;
        let exit = if process.is_init() {
            self.delete_container(container).await?
        } else {
            self.delete_exec(&container, &process).await?
        };
        let _ = self.events.send(Event::TaskDelete {
            process: id.clone(),
            pid: std::process::id(),
            exit,
        });
        Ok(exit)
    }

    async fn exec_process(&self, request: ExecProcessRequest) -> Result<()> {
        let container = self.container(&request.process.container_id)?;
        check_id("exec", &request.process.exec_id)?;
        if !matches!(
            container.init.phase(),
            Phase::Running | Phase::Paused | Phase::Created
        ) {
            return Err(container.init.wrong_state("execute a process in"));
        }
        let invalid = |message: String| {
            let exec = &request.process.exec_id;
            Error::new(
                ErrorKind::InvalidArgument,
                format!("process {exec} of container {}: {message}", container.id),
            )
        };
        let mut spec: OciProcess =
            serde_json::from_slice(&request.spec_json).map_err(|error| invalid(error.to_string()))?;
        if spec.args().as_ref().is_none_or(Vec::is_empty) {
            return Err(invalid("args is missing or empty".into()));
        }
        spec.set_terminal(Some(request.stdio.terminal));
        amend_process(&mut spec);
        let process =
            Process::new(request.process.clone(), request.stdio, self.events.clone()).with_spec(spec);
        container.add_exec(Arc::new(process))?;
        let _ = self.events.send(Event::TaskExecAdded {
            process: request.process,
        });
        Ok(())
    }

    async fn kill_process(&self, id: &ContainerProcess, signal: u32, all: bool) -> Result<()> {
        let (container, process) = self.process(id)?;
        match process.phase() {
            Phase::Stopped(_) => Err(Error::new(
                ErrorKind::NotFound,
                format!("cannot kill {process}: it has already exited"),
            )),
            Phase::Created if process.is_init() => {
                self.kill_created(&container, signal).await;
                Ok(())
            }
            Phase::Created => {
                process.exited(ProcessExit {
                    status: 128 + signal,
                    at: SystemTime::now(),
                });
                Ok(())
            }
            Phase::Starting { .. } | Phase::Running | Phase::Paused => self
                .signal(&process, signal, all)
                .await
                .map_err(|error| error.context(format!("signal {signal} to {process}"))),
        }
    }

    async fn resize_process_pty(&self, id: &ContainerProcess, width: u32, height: u32) -> Result<()> {
        let (_, process) = self.process(id)?;
        if process.remember_size(width, height) {
            return Ok(());
        }
        self.resize(&process, width, height).await
    }

    async fn start_process(&self, id: &ContainerProcess) -> Result<u32> {
        let (container, process) = self.process(id)?;
        if !process.is_init() && container.init.phase() != Phase::Running {
            return Err(container.init.wrong_state("start a process in"));
        }
        process.begin_start()?;
        let started = match process.spec() {
            None => self.start_init(&container).await,
            Some(spec) => self.start_exec(&container, &process, spec).await,
        };
        if let Err(error) = started {
            // 127 as shells say for a command that cannot be found.
            process.fail_start(if error.kind == ErrorKind::NotFound {
                127
            } else {
                UNKNOWN_STATUS
            });
            return Err(error.context(format!("start {process}")));
        }
        if let Some((width, height)) = process.take_size()
            && let Err(error) = self.resize(&process, width, height).await
        {
            tracing::warn!(%process, %error, "terminal size");
        }
        process.finish_start();
        if !process.is_init() {
            self.spawn_waiter(container, process);
        }
        Ok(std::process::id())
    }

    async fn state_process(&self, id: &ContainerProcess) -> Result<ProcessState> {
        let (container, process) = self.process(id)?;
        Ok(container.state(&process))
    }

    async fn wait_process(&self, id: &ContainerProcess) -> Result<ProcessExit> {
        let (_, process) = self.process(id)?;
        process.wait().await
    }

    async fn pid(&self) -> Result<u32> {
        Ok(std::process::id())
    }

    async fn need_shutdown_sandbox(&self, container: &str, now: bool) -> bool {
        now || container == self.sandbox_id || self.is_empty()
    }

    async fn is_sandbox_container(&self, process: &ContainerProcess) -> bool {
        process.exec_id.is_empty() && process.container_id == self.sandbox_id
    }
}
