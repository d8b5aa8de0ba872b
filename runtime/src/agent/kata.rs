//! The agent over ttrpc on an in-process vsock stream.

use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use protocols::agent_ttrpc::AgentServiceClient;
use protocols::health_ttrpc::HealthClient;
use protocols::{agent as wire, csi, health, types};
use ttrpc::context::{Context, with_duration};

use super::{Agent, AgentManager, HealthService, rpc_error};
use crate::config::AgentConfig;
use crate::error::{Error, ErrorKind, Result};

/// Bound of a call that the agent answers at once. Generous: an emulated guest is 20 times slower than a real one.
const CALL: Duration = Duration::from_secs(60);

#[derive(Clone)]
struct Clients {
    agent: AgentServiceClient,
    health: HealthClient,
}

/// Client of a kata-agent.
pub struct KataAgent {
    config: AgentConfig,
    address: String,
    clients: Mutex<Option<Clients>>,
}

impl KataAgent {
    /// An agent without a connection; `address` is how tools outside of this process reach it.
    pub fn new(config: AgentConfig, address: impl Into<String>) -> Self {
        Self {
            config,
            address: address.into(),
            clients: Mutex::new(None),
        }
    }

    fn clients(&self, method: &'static str) -> Result<Clients> {
        let clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        clients
            .clone()
            .ok_or_else(|| Error::new(ErrorKind::Unavailable, format!("agent {method}: not connected")))
    }
}

#[async_trait]
impl AgentManager for KataAgent {
    async fn start(&self, stream: UnixStream) -> Result<()> {
        let failed = |error| Error::new(ErrorKind::Internal, format!("agent connection: {error}"));
        stream.set_nonblocking(true).map_err(failed)?;
        let stream = tokio::net::UnixStream::from_std(stream).map_err(failed)?;
        let client = ttrpc::r#async::Client::new(ttrpc::r#async::transport::Socket::new(stream));
        let clients = Clients {
            agent: AgentServiceClient::new(client.clone()),
            health: HealthClient::new(client),
        };
        *self.clients.lock().unwrap_or_else(PoisonError::into_inner) = Some(clients);
        Ok(())
    }

    async fn stop(&self) {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    async fn disconnect(&self) -> Result<()> {
        self.stop().await;
        Ok(())
    }

    async fn agent_sock(&self) -> Result<String> {
        Ok(format!("{}:{}", self.address, self.config.server_port))
    }

    async fn agent_config(&self) -> AgentConfig {
        self.config.clone()
    }
}

#[async_trait]
impl HealthService for KataAgent {
    async fn check(&self) -> Result<health::HealthCheckResponse> {
        let timeout = Duration::from_millis(self.config.health_check_request_timeout_ms);
        let request = health::CheckRequest::new();
        let client = self.clients("Check")?.health;
        client
            .check(with_duration(timeout), &request)
            .await
            .map_err(|error| rpc_error("Check", error))
    }

    async fn version(&self) -> Result<health::VersionCheckResponse> {
        let request = health::CheckRequest::new();
        let client = self.clients("Version")?.health;
        client
            .version(with_duration(CALL), &request)
            .await
            .map_err(|error| rpc_error("Version", error))
    }
}

/// Turns the wire's `Empty` into `()`, and passes everything else on.
trait Reply<T> {
    fn reply(self) -> T;
}
impl Reply<()> for protocols::empty::Empty {
    fn reply(self) {}
}
impl<T> Reply<T> for T {
    fn reply(self) -> T {
        self
    }
}

/// Implements [`Agent`]: each method names its RPC and its bound.
macro_rules! agent_client {
    ($($name:ident($request:ty) -> $response:ty, $rpc:literal, $bound:expr;)*) => {
        #[async_trait]
        impl Agent for KataAgent {
            $(async fn $name(&self, request: $request) -> Result<$response> {
                let client = self.clients($rpc)?.agent;
                let bound: fn(&AgentConfig) -> Context = $bound;
                let reply = client.$name(bound(&self.config), &request).await;
                reply.map(Reply::<$response>::reply).map_err(|error| rpc_error($rpc, error))
            })*
        }
    };
}

/// Answered at once.
fn short(_: &AgentConfig) -> Context {
    with_duration(CALL)
}

/// Runs as long as a process does: a limit here would kill long-running containers.
fn endless(_: &AgentConfig) -> Context {
    Context::default()
}

/// May load images and run hooks.
fn create(config: &AgentConfig) -> Context {
    with_duration(Duration::from_secs(config.create_container_timeout).max(CALL))
}

agent_client! {
    create_sandbox(wire::CreateSandboxRequest) -> (), "CreateSandbox", create;
    destroy_sandbox(wire::DestroySandboxRequest) -> (), "DestroySandbox", short;
    online_cpu_mem(wire::OnlineCPUMemRequest) -> (), "OnlineCPUMem", short;
    add_arp_neighbors(wire::AddARPNeighborsRequest) -> (), "AddARPNeighbors", short;
    remove_interface(wire::RemoveInterfaceRequest) -> (), "RemoveInterface", short;
    list_interfaces(wire::ListInterfacesRequest) -> wire::Interfaces, "ListInterfaces", short;
    list_routes(wire::ListRoutesRequest) -> wire::Routes, "ListRoutes", short;
    update_interface(wire::UpdateInterfaceRequest) -> types::Interface, "UpdateInterface", short;
    update_routes(wire::UpdateRoutesRequest) -> wire::Routes, "UpdateRoutes", short;
    create_container(wire::CreateContainerRequest) -> (), "CreateContainer", create;
    start_container(wire::StartContainerRequest) -> (), "StartContainer", create;
    pause_container(wire::PauseContainerRequest) -> (), "PauseContainer", short;
    resume_container(wire::ResumeContainerRequest) -> (), "ResumeContainer", short;
    remove_container(wire::RemoveContainerRequest) -> (), "RemoveContainer", short;
    stats_container(wire::StatsContainerRequest) -> wire::StatsContainerResponse, "StatsContainer", short;
    update_container(wire::UpdateContainerRequest) -> (), "UpdateContainer", short;
    exec_process(wire::ExecProcessRequest) -> (), "ExecProcess", create;
    signal_process(wire::SignalProcessRequest) -> (), "SignalProcess", short;
    wait_process(wire::WaitProcessRequest) -> wire::WaitProcessResponse, "WaitProcess", endless;
    close_stdin(wire::CloseStdinRequest) -> (), "CloseStdin", short;
    read_stdout(wire::ReadStreamRequest) -> wire::ReadStreamResponse, "ReadStdout", endless;
    read_stderr(wire::ReadStreamRequest) -> wire::ReadStreamResponse, "ReadStderr", endless;
    write_stdin(wire::WriteStreamRequest) -> wire::WriteStreamResponse, "WriteStdin", endless;
    tty_win_resize(wire::TtyWinResizeRequest) -> (), "TtyWinResize", short;
    copy_file(wire::CopyFileRequest) -> (), "CopyFile", short;
    get_metrics(wire::GetMetricsRequest) -> wire::Metrics, "GetMetrics", short;
    get_oom_event(wire::GetOOMEventRequest) -> wire::OOMEvent, "GetOOMEvent", endless;
    get_ip_tables(wire::GetIPTablesRequest) -> wire::GetIPTablesResponse, "GetIPTables", short;
    set_ip_tables(wire::SetIPTablesRequest) -> wire::SetIPTablesResponse, "SetIPTables", short;
    get_volume_stats(wire::VolumeStatsRequest) -> csi::VolumeStatsResponse, "GetVolumeStats", short;
    resize_volume(wire::ResizeVolumeRequest) -> (), "ResizeVolume", short;
    get_guest_details(wire::GuestDetailsRequest) -> wire::GuestDetailsResponse, "GetGuestDetails", short;
    add_swap(wire::AddSwapRequest) -> (), "AddSwap", short;
    add_swap_path(wire::AddSwapPathRequest) -> (), "AddSwapPath", short;
    set_policy(wire::SetPolicyRequest) -> (), "SetPolicy", short;
    get_diagnostic_data(wire::GetDiagnosticDataRequest) -> wire::GetDiagnosticDataResponse, "GetDiagnosticData", short;
    reseed_random_dev(wire::ReseedRandomDevRequest) -> (), "ReseedRandomDev", short;
    set_guest_date_time(wire::SetGuestDateTimeRequest) -> (), "SetGuestDateTime", short;
    mem_hotplug_by_probe(wire::MemHotplugByProbeRequest) -> (), "MemHotplugByProbe", short;
    update_ephemeral_mounts(wire::UpdateEphemeralMountsRequest) -> (), "UpdateEphemeralMounts", short;
    remove_stale_virtiofs_share_mounts(wire::RemoveStaleVirtiofsShareMountsRequest) -> (),
        "RemoveStaleVirtiofsShareMounts", short;
    mem_agent_memcg_set(wire::MemAgentMemcgConfig) -> (), "MemAgentMemcgSet", short;
    mem_agent_compact_set(wire::MemAgentCompactConfig) -> (), "MemAgentCompactSet", short;
}
