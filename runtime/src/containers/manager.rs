//! The containers of a sandbox in its VM. The map of containers is only locked to look into it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use oci_spec::runtime::{LinuxResources, Spec};
use protobuf::MessageField;
use protocols::agent as wire;
use protocols::oci_convert::resources_to_wire;
use tokio::sync::mpsc;

use super::container::Container;
use super::host_pid::HostPid;
use super::io::StreamHub;
use super::poststop::{Poststop, Records};
use super::process::{Phase, Process};
use super::spec::amend_resources;
use super::{ContainerManager, pod_stats, stats};
use crate::error::{Error, ErrorKind, Result};
use crate::paths::check_id;
use crate::sandbox::{Sandbox, SandboxEnd, VirtSandbox};
use crate::types::{
    ContainerProcess, ContainerStats, CreateContainerRequest, Event, ExecProcessRequest, ProcessExit,
    ProcessState, UpdateContainerRequest,
};

/// An entry of the map: the id is taken from the beginning of a create.
enum Slot {
    Creating {
        /// It was deleted in the meantime: nobody will ask for it when it is there.
        unwanted: bool,
    },
    Ready(Arc<Container>),
}

/// How long the VM of a pod lives that is made with the container which stands for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum PodState {
    /// At least as long as that container.
    #[default]
    Whole,
    /// That container was deleted while others ran, as any container may be: as long as one of them runs.
    Orphaned,
    /// Nothing keeps it any more.
    Over,
}

#[derive(Default)]
struct Containers {
    slots: HashMap<String, Slot>,
    pod: PodState,
}

impl Containers {
    fn ready(&self) -> Vec<Arc<Container>> {
        self.slots.values().filter_map(Slot::ready).collect()
    }

    /// Whether a container other than `id` has not ended, or is on its way.
    fn others_live(&self, id: &str) -> bool {
        let mut others = self.slots.iter().filter(|(other, _)| *other != id);
        others.any(|(_, slot)| match slot {
            Slot::Creating { unwanted } => !unwanted,
            Slot::Ready(container) => !matches!(container.init.phase(), Phase::Stopped(_)),
        })
    }
}

/// The containers of one sandbox.
pub struct VirtContainerManager {
    pub(super) sandbox_id: String,
    pub(super) namespace: String,
    pub(super) sandbox: Arc<VirtSandbox>,
    pub(super) streams: Arc<StreamHub>,
    events: mpsc::UnboundedSender<Event>,
    containers: Mutex<Containers>,
    /// Of the first container, when the pod's network namespace is one that it keeps.
    first_pid: Mutex<Option<HostPid>>,
}

impl VirtContainerManager {
    /// A manager without containers.
    pub fn new(
        sandbox_id: impl Into<String>,
        namespace: impl Into<String>,
        sandbox: Arc<VirtSandbox>,
        events: mpsc::UnboundedSender<Event>,
        streams: Arc<StreamHub>,
    ) -> Self {
        let (sandbox_id, namespace) = (sandbox_id.into(), namespace.into());
        Self {
            sandbox_id,
            namespace,
            sandbox,
            streams,
            events,
            containers: Mutex::default(),
            first_pid: Mutex::default(),
        }
    }

    /// Makes `pid` that of the container which is created next.
    pub(crate) fn adopt(&self, pid: HostPid) {
        *self.first_pid.lock().unwrap_or_else(PoisonError::into_inner) = Some(pid);
    }

    pub(super) fn take_first_pid(&self) -> Option<HostPid> {
        self.first_pid
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    /// The poststop hooks of containers that nobody has deleted: the caller's to run. To be called before the sandbox' folders
    /// go.
    pub(crate) async fn take_left_poststop(&self) -> Vec<Poststop> {
        let records = Records::of(&self.sandbox.resources().state_folder());
        let due = tokio::task::spawn_blocking(move || records.take_all()).await;
        due.unwrap_or_default()
    }

    /// Whether any container is left, one that is being created for nobody not counted.
    pub fn has_wanted(&self) -> bool {
        self.containers()
            .slots
            .values()
            .any(|slot| !matches!(slot, Slot::Creating { unwanted: true }))
    }

    /// Whether a deletion has left nothing that the VM would be for.
    pub fn is_over(&self) -> bool {
        self.containers().pod == PodState::Over
    }

    /// Notes that container `id`, which has ended, is being deleted. What becomes of the pod: it is over when `id` was its own
    /// container, or that was deleted before, and no other one lives.
    pub(super) fn enter_deletion(&self, id: &str) -> PodState {
        let mut containers = self.containers();
        let next = match containers.pod {
            PodState::Whole if id != self.sandbox_id => PodState::Whole,
            PodState::Whole | PodState::Orphaned if containers.others_live(id) => PodState::Orphaned,
            PodState::Whole | PodState::Orphaned | PodState::Over => PodState::Over,
        };
        containers.pod = next;
        next
    }

    /// The VM is gone, and every process with it. Exits are published, waiters released.
    pub fn vm_ended(&self, end: &SandboxEnd) {
        let containers = self.containers().ready();
        for container in containers {
            tracing::warn!(container = container.id, exit = %end.exit, "killed with the VM");
            container.killed();
        }
    }

    /// Figures of all containers together. One that goes in the meantime is left out.
    ///
    /// # Errors
    /// Of the agent.
    pub async fn stats_of_all(&self) -> Result<ContainerStats> {
        let containers = self.containers().ready();
        let mut all = Vec::with_capacity(containers.len());
        for container in containers {
            match self.stats(&container, true).await {
                Ok(stats) => all.push(stats),
                Err(error) if error.kind == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(pod_stats::together(&all))
    }

    /// `pod`: with the interfaces, which are the pod's.
    async fn stats(&self, container: &Container, pod: bool) -> Result<ContainerStats> {
        let request = wire::StatsContainerRequest {
            container_id: container.id.clone(),
            ..Default::default()
        };
        let response = self.sandbox.agent().stats_container(request).await?;
        Ok(stats::convert(response, pod))
    }

    fn containers(&self) -> MutexGuard<'_, Containers> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn container(&self, id: &str) -> Result<Arc<Container>> {
        self.containers()
            .slots
            .get(id)
            .and_then(Slot::ready)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("container {id} does not exist")))
    }

    /// The container that `pid` stands for on the host.
    pub(super) fn container_at(&self, pid: u32) -> Option<Arc<Container>> {
        let mut ready = self.containers().ready().into_iter();
        ready.find(|container| container.host.pid.tid() == pid)
    }

    fn process(&self, id: &ContainerProcess) -> Result<(Arc<Container>, Arc<Process>)> {
        let container = self.container(&id.container_id)?;
        let process = container.process(&id.exec_id)?;
        Ok((container, process))
    }

    /// Takes the id for a create; [`Self::enter`] or [`Self::remove`] follows.
    pub(super) fn reserve(&self, id: &str) -> Result<()> {
        check_id("container", id)?;
        match self.containers().slots.entry(id.to_owned()) {
            Entry::Occupied(_) => Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("container {id} exists already"),
            )),
            Entry::Vacant(entry) => {
                entry.insert(Slot::Creating { unwanted: false });
                Ok(())
            }
        }
    }

    /// Fills the place of a reserved id and publishes that, before anything can happen to the container and no other event
    /// comes first. False, and nothing done, when it is not wanted any more.
    pub(super) fn enter(&self, container: Arc<Container>, created: Event) -> bool {
        let mut containers = self.containers();
        if matches!(
            containers.slots.get(&container.id),
            Some(Slot::Creating { unwanted: true })
        ) {
            return false;
        }
        self.sandbox.members().enter(&container.id);
        self.publish(created);
        let id = container.id.clone();
        containers.slots.insert(id, Slot::Ready(container));
        true
    }

    /// Notes that a container which is being created will not be asked for.
    fn disown(&self, id: &str) {
        if let Some(Slot::Creating { unwanted }) = self.containers().slots.get_mut(id) {
            tracing::info!(container = id, "deleted while it is created");
            *unwanted = true;
        }
    }

    /// Gives the id back.
    pub(super) fn remove(&self, id: &str) {
        self.sandbox.members().leave(id);
        self.containers().slots.remove(id);
    }

    /// A channel for a process to publish its own events.
    pub(super) fn events(&self) -> mpsc::UnboundedSender<Event> {
        self.events.clone()
    }

    pub(super) fn publish(&self, event: Event) {
        // Nobody listens once the shim ends.
        let _ = self.events.send(event);
    }
}

impl Slot {
    fn ready(&self) -> Option<Arc<Container>> {
        match self {
            Self::Creating { .. } => None,
            Self::Ready(container) => Some(container.clone()),
        }
    }
}

#[async_trait]
impl ContainerManager for VirtContainerManager {
    async fn create_container(&self, request: CreateContainerRequest, spec: Spec) -> Result<u32> {
        let prepared = self.prepare(request, spec).await?;
        self.create_prepared(prepared).await
    }

    async fn pause_container(&self, container: &str) -> Result<()> {
        self.pause(self.container(container)?.as_ref()).await
    }

    async fn resume_container(&self, container: &str) -> Result<()> {
        self.resume(self.container(container)?.as_ref()).await
    }

    async fn stats_container(&self, container: &str) -> Result<ContainerStats> {
        let container = self.container(container)?;
        self.stats(&container, container.id == self.sandbox_id).await
    }

    async fn update_container(&self, request: UpdateContainerRequest) -> Result<()> {
        let container = self.container(&request.container_id)?;
        let what = format!("resources of container {}", container.id);
        let mut resources: LinuxResources = serde_json::from_slice(&request.resources_json)
            .map_err(|error| Error::new(ErrorKind::InvalidArgument, format!("{what}: {error}")))?;
        amend_resources(&mut resources).map_err(|error| error.context(what))?;
        // First, because it can refuse what it is asked.
        self.sandbox.limit_network(&request.annotations).await?;
        let request = wire::UpdateContainerRequest {
            container_id: container.id.clone(),
            resources: MessageField::some(resources_to_wire(&resources)),
            ..Default::default()
        };
        self.sandbox.agent().update_container(request).await
    }

    async fn connect_container(&self, container: &str) -> Result<u32> {
        Ok(self.container(container)?.host.pid.tid())
    }

    async fn close_process_io(&self, process: &ContainerProcess) -> Result<()> {
        let (_, process) = self.process(process)?;
        process.close_stdin();
        Ok(())
    }

    async fn delete_process(&self, id: &ContainerProcess) -> Result<ProcessExit> {
        // Not found, as runc's shim answers; what is on its way must not stay behind its client's back.
        let (container, process) = self.process(id).inspect_err(|_| {
            if id.exec_id.is_empty() {
                self.disown(&id.container_id);
            }
        })?;
        self.delete(container, process).await
    }

    async fn exec_process(&self, request: ExecProcessRequest) -> Result<()> {
        self.add_exec(request)
    }

    async fn kill_process(&self, id: &ContainerProcess, signal: u32, all: bool) -> Result<()> {
        let (container, process) = self.process(id)?;
        self.kill(&container, &process, signal, all).await
    }

    async fn resize_process_pty(&self, id: &ContainerProcess, width: u32, height: u32) -> Result<()> {
        let (_, process) = self.process(id)?;
        self.resize(&process, width, height).await
    }

    async fn start_process(&self, id: &ContainerProcess) -> Result<u32> {
        let (container, process) = self.process(id)?;
        self.start(container, process).await
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
}
