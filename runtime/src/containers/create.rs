//! Creating a container: its rootfs and volumes on the host, its spec as the guest gets it, its streams.

use std::sync::Arc;

use oci_spec::runtime::Spec;
use protobuf::MessageField;
use protocols::agent as wire;
use protocols::oci_convert::spec_to_wire;

use super::VirtContainerManager;
use super::container::{Container, HostSide};
use super::io::{Owner, ProcessIo};
use super::process::Process;
use super::spec::bundle::container_kind;
use super::spec::{GuestSpec, amend};
use crate::error::{Error, ErrorKind, Result};
use crate::sandbox::SandboxState;
use crate::timeline;
use crate::types::{ContainerProcess, CreateContainerRequest, Event};

impl VirtContainerManager {
    /// Creates a container, publishes it and watches its init. Returns the host pid that stands for it.
    pub(super) async fn create(&self, request: CreateContainerRequest, spec: Spec) -> Result<u32> {
        self.reserve(&request.container_id)?;
        let container = match self.make(&request, spec).await {
            Ok(container) => container,
            Err(error) => {
                self.remove(&request.container_id);
                return Err(error);
            }
        };
        timeline::mark("container created");
        let pid = std::process::id();
        let created = Event::TaskCreate {
            container_id: request.container_id,
            bundle: request.bundle,
            rootfs: request.rootfs,
            stdio: request.stdio,
            pid,
        };
        if !self.enter(container.clone(), created) {
            return Err(self.take_back(container).await);
        }
        if matches!(*self.sandbox.watch_state().borrow(), SandboxState::Stopped(_)) {
            // The VM ended between the agent's answer and the entry in the map.
            container.killed();
        }
        self.spawn_waiter(container.clone(), container.init.clone());
        Ok(pid)
    }

    /// Removes a container that was deleted before it was there: its client has gone.
    async fn take_back(&self, container: Arc<Container>) -> Error {
        let id = &container.id;
        if let Some(io) = container.init.io() {
            io.close();
        }
        self.remove_in_guest(id).await;
        container.host.clone().remove().await;
        self.remove(id);
        Error::new(
            ErrorKind::FailedPrecondition,
            format!("container {id} was deleted while it was created"),
        )
    }

    async fn make(&self, request: &CreateContainerRequest, spec: Spec) -> Result<Arc<Container>> {
        let id = request.container_id.clone();
        let (spec, host) = self.host_side(request, spec).await?;
        let result = self.create_in_guest(request, spec, &host).await;
        let init = match result {
            Ok(init) => init,
            Err(error) => {
                Arc::new(host).remove().await;
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
        let init = Arc::new(Process::new(init, request.stdio.clone(), self.events()));
        let io = self.open_io(&init).await?;
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

    pub(super) async fn open_io(&self, process: &Process) -> Result<Arc<ProcessIo>> {
        let port = self.sandbox.config().runtime.passfd_listener_port;
        let owner = Owner {
            container: process.id().container_id.clone(),
            namespace: self.namespace.clone(),
        };
        ProcessIo::open(self.sandbox.hypervisor().clone(), process.stdio(), port, owner).await
    }
}
