//! `grpc.AgentService`: each call checks its request, does its work in the sandbox, and maps the error.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use protocols::agent::{
    AddARPNeighborsRequest, AddSwapPathRequest, AddSwapRequest, AgentDetails, CloseStdinRequest,
    CopyFileRequest, CreateContainerRequest, CreateSandboxRequest, DestroySandboxRequest, ExecProcessRequest,
    GetDiagnosticDataRequest, GetDiagnosticDataResponse, GetIPTablesRequest, GetIPTablesResponse,
    GetMetricsRequest, GetOOMEventRequest, GuestDetailsRequest, GuestDetailsResponse, Interfaces,
    ListInterfacesRequest, ListRoutesRequest, MemAgentCompactConfig, MemAgentMemcgConfig,
    MemHotplugByProbeRequest, Metrics, OOMEvent, OnlineCPUMemRequest, PauseContainerRequest,
    ReadStreamRequest, ReadStreamResponse, RemoveContainerRequest, RemoveInterfaceRequest,
    RemoveStaleVirtiofsShareMountsRequest, ReseedRandomDevRequest, ResizeVolumeRequest,
    ResumeContainerRequest, Routes, SetGuestDateTimeRequest, SetIPTablesRequest, SetIPTablesResponse,
    SetPolicyRequest, SignalProcessRequest, StartContainerRequest, StatsContainerRequest,
    StatsContainerResponse, TtyWinResizeRequest, UpdateContainerRequest, UpdateEphemeralMountsRequest,
    UpdateInterfaceRequest, UpdateRoutesRequest, VolumeStatsRequest, WaitProcessRequest, WaitProcessResponse,
    WriteStreamRequest, WriteStreamResponse,
};
use protocols::agent_ttrpc::AgentService;
use protocols::csi::VolumeStatsResponse;
use protocols::empty::Empty;
use protocols::oci_convert::{process_from_wire, resources_from_wire};
use protocols::types::Interface;
use ttrpc::asynchronous::TtrpcContext;
use ttrpc::{Code, Result};

use super::status::{of_machine, of_network, of_sandbox, status};
use crate::container::{Container, ContainerError, Process, network_stats};
use crate::machine;
use crate::network::Network;
use crate::sandbox::{Sandbox, SandboxError, refuse_string_user, valid_id};
use crate::signal::Signal;
use crate::storage;

/// Device types `CreateContainer` understands.
const DEVICES: [&str; 2] = ["blk", "mmioblk"];

/// The service. Knows nothing itself; everything is in the sandbox.
pub struct Service {
    sandbox: Arc<Sandbox>,
    network: Network,
    /// Whether the agent is PID 1 of a guest.
    is_init: bool,
}

impl Service {
    /// Serves `sandbox` with its `network`.
    pub fn new(sandbox: Arc<Sandbox>, network: Network, is_init: bool) -> Self {
        Self {
            sandbox,
            network,
            is_init,
        }
    }

    fn container(&self, id: &str) -> Result<Arc<Container>> {
        self.sandbox.container(id).map_err(of_sandbox)
    }

    async fn freeze(&self, id: &str, frozen: bool) -> Result<Empty> {
        let container = self.container(id)?;
        container
            .freeze(frozen)
            .await
            .map_err(|error| in_container(id, error))?;
        Ok(Empty::new())
    }

    fn process(&self, id: &str, exec_id: &str) -> Result<Arc<Process>> {
        self.container(id)?
            .process(exec_id)
            .map_err(|error| in_container(id, error))
    }
}

fn in_container(id: &str, source: ContainerError) -> ttrpc::Error {
    of_sandbox(SandboxError::Container {
        id: id.to_owned(),
        source,
    })
}

/// What a call of an `#[async_trait]` returns.
type Answer<'call, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'call>>;

/// Calls of the protocol that this agent does not implement answer so, with their name. `#[async_trait]` does not
/// see into macros, so these are written as it would have.
macro_rules! unimplemented_calls {
    ($($name:ident($request:ty) -> $response:ty, $wire_name:literal;)*) => {
        $(
            fn $name<'this, 'context, 'call>(
                &'this self,
                _: &'context TtrpcContext,
                _: $request,
            ) -> Answer<'call, $response>
            where
                'this: 'call,
                'context: 'call,
                Self: 'call,
            {
                Box::pin(std::future::ready(Err(status(
                    Code::UNIMPLEMENTED,
                    concat!($wire_name, " is not implemented by this agent"),
                ))))
            }
        )*
    };
}

#[async_trait]
impl AgentService for Service {
    async fn create_sandbox(&self, _: &TtrpcContext, request: CreateSandboxRequest) -> Result<Empty> {
        self.sandbox.create(&request).await.map_err(of_sandbox)?;
        tracing::info!(
            sandbox = request.sandbox_id,
            hostname = request.hostname,
            "sandbox created"
        );
        Ok(Empty::new())
    }

    async fn destroy_sandbox(&self, _: &TtrpcContext, _: DestroySandboxRequest) -> Result<Empty> {
        self.sandbox.destroy().await;
        tracing::info!("sandbox destroyed");
        Ok(Empty::new())
    }

    async fn create_container(&self, _: &TtrpcContext, request: CreateContainerRequest) -> Result<Empty> {
        let id = request.container_id.clone();
        let outcome = self.sandbox.create_container(request).await;
        match &outcome {
            Ok(()) => tracing::info!(container = id, "container created"),
            Err(error) => tracing::info!(container = id, "container not created: {error}"),
        }
        outcome.map(|()| Empty::new()).map_err(of_sandbox)
    }

    async fn start_container(&self, _: &TtrpcContext, request: StartContainerRequest) -> Result<Empty> {
        let container = self.container(&request.container_id)?;
        container
            .start()
            .await
            .map_err(|error| in_container(&request.container_id, error))?;
        tracing::info!(container = request.container_id, "container started");
        Ok(Empty::new())
    }

    async fn remove_container(&self, _: &TtrpcContext, request: RemoveContainerRequest) -> Result<Empty> {
        let patience = Duration::from_secs(request.timeout.into());
        self.sandbox
            .remove_container(&request.container_id, patience)
            .await
            .map_err(of_sandbox)?;
        tracing::info!(container = request.container_id, "container removed");
        Ok(Empty::new())
    }

    async fn exec_process(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Result<Empty> {
        let id = &request.container_id;
        let container = self.container(id)?;
        if !valid_id(&request.exec_id) {
            return Err(of_sandbox(SandboxError::InvalidId {
                what: "process",
                id: request.exec_id,
            }));
        }
        refuse_string_user(request.string_user.as_ref()).map_err(of_sandbox)?;
        let process = request
            .process
            .as_ref()
            .ok_or(SandboxError::Missing("process"))
            .map_err(of_sandbox)?;
        let process = process_from_wire(process).map_err(|error| of_sandbox(error.into()))?;
        let plan = self
            .sandbox
            .stdio_plan(request.stdin_port, request.stdout_port, request.stderr_port)
            .await;
        let plan = plan.map_err(of_sandbox)?;
        container
            .exec(&request.exec_id, process, plan)
            .await
            .map_err(|error| in_container(id, error))?;
        Ok(Empty::new())
    }

    async fn signal_process(&self, _: &TtrpcContext, request: SignalProcessRequest) -> Result<Empty> {
        let container = self.container(&request.container_id)?;
        let signal = Signal::new(request.signal).ok_or_else(|| {
            status(
                Code::INVALID_ARGUMENT,
                format!("signal {}: no such signal", request.signal),
            )
        })?;
        container
            .signal(&request.exec_id, signal, request.all)
            .await
            .map_err(|error| in_container(&request.container_id, error))?;
        Ok(Empty::new())
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: WaitProcessRequest,
    ) -> Result<WaitProcessResponse> {
        let container = self.container(&request.container_id)?;
        let process = self.process(&request.container_id, &request.exec_id)?;
        let status = process.wait().await;
        container.waited(&request.exec_id, &process);
        Ok(WaitProcessResponse {
            status,
            ..Default::default()
        })
    }

    async fn write_stdin(
        &self,
        _: &TtrpcContext,
        request: WriteStreamRequest,
    ) -> Result<WriteStreamResponse> {
        let process = self.process(&request.container_id, &request.exec_id)?;
        process
            .stdio()
            .write(&request.data)
            .await
            .map_err(|error| of_sandbox(error.into()))?;
        let len = u32::try_from(request.data.len()).unwrap_or(u32::MAX);
        Ok(WriteStreamResponse {
            len,
            ..Default::default()
        })
    }

    async fn read_stdout(&self, _: &TtrpcContext, request: ReadStreamRequest) -> Result<ReadStreamResponse> {
        let process = self.process(&request.container_id, &request.exec_id)?;
        let data = process.stdio().read_stdout(length(request.len)).await;
        let data = data.map_err(|error| of_sandbox(error.into()))?;
        Ok(ReadStreamResponse {
            data,
            ..Default::default()
        })
    }

    async fn read_stderr(&self, _: &TtrpcContext, request: ReadStreamRequest) -> Result<ReadStreamResponse> {
        let process = self.process(&request.container_id, &request.exec_id)?;
        let data = process.stdio().read_stderr(length(request.len)).await;
        let data = data.map_err(|error| of_sandbox(error.into()))?;
        Ok(ReadStreamResponse {
            data,
            ..Default::default()
        })
    }

    async fn close_stdin(&self, _: &TtrpcContext, request: CloseStdinRequest) -> Result<Empty> {
        self.process(&request.container_id, &request.exec_id)?
            .stdio()
            .close_stdin()
            .await;
        Ok(Empty::new())
    }

    async fn tty_win_resize(&self, _: &TtrpcContext, request: TtyWinResizeRequest) -> Result<Empty> {
        let process = self.process(&request.container_id, &request.exec_id)?;
        let terminal = process.stdio().pty().ok_or_else(|| {
            let process = format!("{}/{}", request.container_id, request.exec_id);
            status(
                Code::FAILED_PRECONDITION,
                format!("process {process} has no terminal"),
            )
        })?;
        let side = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
        terminal
            .resize(side(request.row), side(request.column))
            .map_err(|error| status(Code::INTERNAL, format!("resize terminal: {error}")))?;
        Ok(Empty::new())
    }

    async fn get_guest_details(
        &self,
        _: &TtrpcContext,
        request: GuestDetailsRequest,
    ) -> Result<GuestDetailsResponse> {
        let size = if request.mem_block_size {
            machine::memory_block_size().map_err(of_machine)?
        } else {
            0
        };
        let details = AgentDetails {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            init_daemon: self.is_init,
            device_handlers: DEVICES.map(str::to_owned).into(),
            storage_handlers: storage::DRIVERS.map(str::to_owned).into(),
            ..Default::default()
        };
        Ok(GuestDetailsResponse {
            mem_block_size_bytes: size,
            agent_details: Some(details).into(),
            support_mem_hotplug_probe: request.mem_hotplug_probe && machine::can_probe_memory(),
            ..Default::default()
        })
    }

    async fn online_cpu_mem(&self, _: &TtrpcContext, request: OnlineCPUMemRequest) -> Result<Empty> {
        machine::online(request.nb_cpus, request.wait, request.cpu_only)
            .await
            .map_err(of_machine)?;
        Ok(Empty::new())
    }

    async fn set_guest_date_time(&self, _: &TtrpcContext, request: SetGuestDateTimeRequest) -> Result<Empty> {
        machine::set_clock(request.Sec, request.Usec).map_err(of_machine)?;
        Ok(Empty::new())
    }

    async fn reseed_random_dev(&self, _: &TtrpcContext, request: ReseedRandomDevRequest) -> Result<Empty> {
        machine::reseed(&request.data).map_err(of_machine)?;
        Ok(Empty::new())
    }

    async fn update_container(&self, _: &TtrpcContext, request: UpdateContainerRequest) -> Result<Empty> {
        let container = self.container(&request.container_id)?;
        let limits = request
            .resources
            .as_ref()
            .ok_or(SandboxError::Missing("resources"))
            .map_err(of_sandbox)?;
        let limits = resources_from_wire(limits).map_err(|error| of_sandbox(error.into()))?;
        container
            .cgroup()
            .update(&limits)
            .map_err(|error| in_container(&request.container_id, error.into()))?;
        Ok(Empty::new())
    }

    async fn stats_container(
        &self,
        _: &TtrpcContext,
        request: StatsContainerRequest,
    ) -> Result<StatsContainerResponse> {
        let container = self.container(&request.container_id)?;
        // Without the file there are no interfaces.
        let interfaces = std::fs::read_to_string("/proc/net/dev").unwrap_or_default();
        Ok(StatsContainerResponse {
            cgroup_stats: Some(container.cgroup().stats()).into(),
            network_stats: network_stats(&interfaces),
            ..Default::default()
        })
    }

    async fn pause_container(&self, _: &TtrpcContext, request: PauseContainerRequest) -> Result<Empty> {
        self.freeze(&request.container_id, true).await
    }

    async fn resume_container(&self, _: &TtrpcContext, request: ResumeContainerRequest) -> Result<Empty> {
        self.freeze(&request.container_id, false).await
    }

    /// Answers when a container's process was killed for memory, or the sandbox ends.
    async fn get_oom_event(&self, _: &TtrpcContext, _: GetOOMEventRequest) -> Result<OOMEvent> {
        match self.sandbox.next_out_of_memory().await {
            Some(container_id) => Ok(OOMEvent {
                container_id,
                ..Default::default()
            }),
            None => Err(status(Code::CANCELLED, "the sandbox was destroyed")),
        }
    }

    async fn update_interface(&self, _: &TtrpcContext, request: UpdateInterfaceRequest) -> Result<Interface> {
        let wanted = request.interface.as_ref();
        let wanted = wanted
            .ok_or(SandboxError::Missing("interface"))
            .map_err(of_sandbox)?;
        let interface = self.network.update_interface(wanted).await.map_err(of_network)?;
        tracing::info!(
            name = interface.name,
            address = interface.hwAddr,
            "network interface set up"
        );
        Ok(interface)
    }

    async fn update_routes(&self, _: &TtrpcContext, request: UpdateRoutesRequest) -> Result<Routes> {
        self.network
            .update_routes(&request.routes)
            .await
            .map_err(of_network)
    }

    async fn list_interfaces(&self, _: &TtrpcContext, _: ListInterfacesRequest) -> Result<Interfaces> {
        self.network.list_interfaces().await.map_err(of_network)
    }

    async fn list_routes(&self, _: &TtrpcContext, _: ListRoutesRequest) -> Result<Routes> {
        self.network.list_routes().await.map_err(of_network)
    }

    async fn add_arp_neighbors(&self, _: &TtrpcContext, request: AddARPNeighborsRequest) -> Result<Empty> {
        self.network
            .add_neighbours(&request.neighbors)
            .await
            .map_err(of_network)?;
        Ok(Empty::new())
    }

    async fn remove_interface(&self, _: &TtrpcContext, request: RemoveInterfaceRequest) -> Result<Empty> {
        self.network
            .remove_interface(&request.hwAddr)
            .await
            .map_err(of_network)?;
        tracing::info!(address = request.hwAddr, "network interface removed");
        Ok(Empty::new())
    }

    unimplemented_calls! {
        update_ephemeral_mounts(UpdateEphemeralMountsRequest) -> Empty, "UpdateEphemeralMounts";
        remove_stale_virtiofs_share_mounts(RemoveStaleVirtiofsShareMountsRequest) -> Empty,
            "RemoveStaleVirtiofsShareMounts";
        get_diagnostic_data(GetDiagnosticDataRequest) -> GetDiagnosticDataResponse, "GetDiagnosticData";
        get_ip_tables(GetIPTablesRequest) -> GetIPTablesResponse, "GetIPTables";
        set_ip_tables(SetIPTablesRequest) -> SetIPTablesResponse, "SetIPTables";
        get_metrics(GetMetricsRequest) -> Metrics, "GetMetrics";
        mem_agent_memcg_set(MemAgentMemcgConfig) -> Empty, "MemAgentMemcgSet";
        mem_agent_compact_set(MemAgentCompactConfig) -> Empty, "MemAgentCompactSet";
        mem_hotplug_by_probe(MemHotplugByProbeRequest) -> Empty, "MemHotplugByProbe";
        copy_file(CopyFileRequest) -> Empty, "CopyFile";
        add_swap(AddSwapRequest) -> Empty, "AddSwap";
        add_swap_path(AddSwapPathRequest) -> Empty, "AddSwapPath";
        get_volume_stats(VolumeStatsRequest) -> VolumeStatsResponse, "GetVolumeStats";
        resize_volume(ResizeVolumeRequest) -> Empty, "ResizeVolume";
        set_policy(SetPolicyRequest) -> Empty, "SetPolicy";
    }
}

fn length(requested: u32) -> usize {
    usize::try_from(requested).unwrap_or(usize::MAX)
}
