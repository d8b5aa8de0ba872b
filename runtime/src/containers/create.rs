//! Creating a container: its rootfs and volumes on the host, its spec as the guest gets it, its streams.

use std::sync::Arc;

use oci_spec::runtime::Spec;
use protobuf::MessageField;
use protocols::agent as wire;
use protocols::oci_convert::spec_to_wire;
use protocols::pid_namespace;

use super::VirtContainerManager;
use super::container::{Container, HostSide};
use super::hooks::HostHooks;
use super::host_pid::HostPid;
use super::io::{Owner, ProcessIo, Streams};
use super::pid_namespace::PidNamespace;
use super::process::Process;
use super::spec::bundle::container_kind;
use super::spec::{GuestSpec, amend, join_pid_namespace};
use crate::error::{Error, ErrorKind, Result};
use crate::host::blocking;
use crate::sandbox::SandboxState;
use crate::timeline;
use crate::types::{ContainerProcess, CreateContainerRequest, Event, Stdio};

/// A container that is ready on the host. Its id is taken: [`VirtContainerManager::create_prepared`] or
/// [`VirtContainerManager::abandon`] has to follow.
pub(crate) struct Prepared {
    request: CreateContainerRequest,
    host: HostSide,
    streams: Streams,
    /// All that the agent is told, but for the streams.
    message: wire::CreateContainerRequest,
}

impl VirtContainerManager {
    /// Does everything for a container that needs no guest: the VM may still boot.
    ///
    /// # Errors
    /// `AlreadyExists` for a taken id; otherwise naming the mount that cannot be had. Nothing is left then.
    pub(crate) async fn prepare(&self, request: CreateContainerRequest, spec: Spec) -> Result<Prepared> {
        self.reserve(&request.container_id)?;
        match self.prepare_reserved(&request, spec).await {
            Ok((host, streams, message)) => Ok(Prepared {
                request,
                host,
                streams,
                message,
            }),
            Err(error) => {
                self.remove(&request.container_id);
                Err(error)
            }
        }
    }

    /// Rootfs and volumes beside the streams, whose logger may take a while; then the message to the agent, and the hooks of
    /// the host's, which find the rootfs mounted.
    async fn prepare_reserved(
        &self,
        request: &CreateContainerRequest,
        spec: Spec,
    ) -> Result<(HostSide, Streams, wire::CreateContainerRequest)> {
        let spec = Arc::new(spec);
        let streams = self.open_streams(&request.container_id, &request.stdio);
        let (host, streams) = tokio::join!(self.host_side(request, &spec), streams);
        let host = host?;
        let message = self.message(request, Arc::unwrap_or_clone(spec), &host);
        let context = |error: Error| error.context(format!("container {}", request.container_id));
        let ready = match (streams, message) {
            (Ok(streams), Ok(message)) => match &host.hooks {
                // What they put into the pod's network namespace is seen by the scan at Start.
                Some(hooks) => hooks.create(&host.pid).await.map(|()| (streams, message)),
                None => Ok((streams, message)),
            },
            (Err(error), _) | (_, Err(error)) => Err(error),
        };
        match ready {
            Ok((streams, message)) => Ok((host, streams, message)),
            Err(error) => {
                host.cleanup().await;
                Err(context(error))
            }
        }
    }

    /// Undoes [`Self::prepare`].
    pub(crate) async fn abandon(&self, prepared: Prepared) {
        prepared.host.cleanup().await;
        self.remove(&prepared.request.container_id);
    }

    /// Creates the container in the guest, publishes it and watches its init. Returns the host pid that stands for it.
    ///
    /// # Errors
    /// Those of the agent, and of streams that cannot be opened; nothing is left then.
    pub(crate) async fn create_prepared(&self, prepared: Prepared) -> Result<u32> {
        let Prepared {
            request,
            host,
            streams,
            message,
        } = prepared;
        let (id, pid) = (request.container_id.clone(), host.pid.tid());
        let init = match self.create_in_guest(&request, pid, streams, message).await {
            Ok(init) => init,
            Err(error) => {
                host.cleanup().await;
                self.remove(&id);
                return Err(error.context(format!("create container {id}")));
            }
        };
        timeline::mark("container created");
        let container = Arc::new(Container::new(id, request.bundle.clone(), init, host));
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
        container.host.cleanup().await;
        self.remove(id);
        Error::new(
            ErrorKind::FailedPrecondition,
            format!("container {id} was deleted while it was created"),
        )
    }

    async fn host_side(&self, request: &CreateContainerRequest, spec: &Arc<Spec>) -> Result<HostSide> {
        let resources = self.sandbox.resources().clone();
        let (id, bundle) = (&request.container_id, &request.bundle);
        let pid = self.host_pid().await?;
        let hooks = HostHooks::of(id, bundle, spec, resources.state_folder());
        let rootfs = resources.handle_rootfs(id, bundle, &request.rootfs, spec).await?;
        match resources.handle_volumes(id, spec).await {
            Ok(volumes) => Ok(HostSide {
                rootfs,
                volumes,
                resources,
                pid,
                hooks,
            }),
            Err(error) => {
                if let Err(left) = rootfs.cleanup(resources.devices()).await {
                    tracing::warn!(container = id, error = %left, "rootfs");
                }
                Err(error)
            }
        }
    }

    /// The pid that stands for a container: in the pod's network namespace, if it has one.
    async fn host_pid(&self) -> Result<HostPid> {
        if let Some(pid) = self.take_first_pid() {
            return Ok(pid);
        }
        let netns = self.sandbox.netns().map(ToOwned::to_owned);
        blocking("host pid", move || HostPid::park(netns.as_deref())).await
    }

    fn message(
        &self,
        request: &CreateContainerRequest,
        mut spec: Spec,
        host: &HostSide,
    ) -> Result<wire::CreateContainerRequest> {
        let id = &request.container_id;
        let kind = container_kind(&spec)?;
        // A path of the host's in `amend`'s eyes.
        let pids = self.pid_namespace(&spec)?;
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
        if let PidNamespace::Of(other) = &pids {
            join_pid_namespace(&mut spec, pid_namespace::path_of(other));
        }
        let rootfs = host.rootfs.get_storage().into_iter();
        let device = host.rootfs.get_device().into_iter();
        Ok(wire::CreateContainerRequest {
            container_id: id.clone(),
            storages: rootfs.chain(host.volumes.storages()).collect(),
            devices: device.chain(host.volumes.devices()).collect(),
            OCI: MessageField::some(spec_to_wire(&spec)),
            sandbox_pidns: pids == PidNamespace::Pods,
            ..Default::default()
        })
    }

    async fn create_in_guest(
        &self,
        request: &CreateContainerRequest,
        pid: u32,
        streams: Streams,
        mut message: wire::CreateContainerRequest,
    ) -> Result<Arc<Process>> {
        let init = ContainerProcess {
            container_id: request.container_id.clone(),
            exec_id: String::new(),
        };
        let init = Arc::new(Process::new(init, pid, request.stdio.clone(), self.events()));
        let io = self.attach(streams)?;
        message.stdin_port = io.stdin_port;
        message.stdout_port = io.stdout_port;
        message.stderr_port = io.stderr_port;
        if let Err(error) = self.sandbox.agent().create_container(message).await {
            io.close();
            // The agent may have got half way.
            let remove = wire::RemoveContainerRequest {
                container_id: request.container_id.clone(),
                ..Default::default()
            };
            if let Err(undo) = self.sandbox.agent().remove_container(remove).await {
                tracing::debug!(%init, error = %undo, "after a failed create");
            }
            return Err(error);
        }
        init.set_io(io);
        Ok(init)
    }

    pub(super) async fn open_streams(&self, container: &str, stdio: &Stdio) -> Result<Streams> {
        let owner = Owner {
            container: container.to_owned(),
            namespace: self.namespace.clone(),
        };
        Streams::open(stdio, owner, self.streams.clone()).await
    }

    pub(super) fn attach(&self, streams: Streams) -> Result<Arc<ProcessIo>> {
        let port = self.sandbox.config().runtime.passfd_listener_port;
        ProcessIo::attach(self.sandbox.hypervisor().clone(), streams, port)
    }
}
