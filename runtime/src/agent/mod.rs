//! The guest agent as the rest of the runtime sees it: Kata's three traits over the wire messages of [`protocols`].

mod connect;
#[cfg(test)]
pub(crate) mod fake;
mod kata;
pub(crate) mod logs;

use async_trait::async_trait;
use protocols::agent as wire;
use protocols::{csi, health, types};

use crate::config::AgentConfig;
use crate::error::{Error, ErrorKind, Result};

pub use connect::wait_ready;
pub use kata::KataAgent;
pub use logs::forward_logs;

/// Connection to the agent.
#[async_trait]
pub trait AgentManager: Send + Sync {
    /// Takes `stream`, connected to the agent's port, into use.
    ///
    /// # Errors
    /// `Internal` when the stream cannot be made asynchronous.
    async fn start(&self, stream: std::os::unix::net::UnixStream) -> Result<()>;
    /// Drops the connection; calls fail with `Unavailable` from now on.
    async fn stop(&self);
    /// As [`AgentManager::stop`], to connect again later.
    async fn disconnect(&self) -> Result<()>;
    /// Address for tools outside of this process.
    async fn agent_sock(&self) -> Result<String>;
    /// The configuration in use.
    async fn agent_config(&self) -> AgentConfig;
}

/// Health service.
#[async_trait]
pub trait HealthService: Send + Sync {
    /// Whether the agent serves.
    async fn check(&self) -> Result<health::HealthCheckResponse>;
    /// Versions of the agent and its protocol.
    async fn version(&self) -> Result<health::VersionCheckResponse>;
}

/// Declares [`Agent`], one method per RPC, with the error of each documented once.
macro_rules! agent_trait {
    ($($(#[$doc:meta])* fn $name:ident($request:ty) -> $response:ty;)*) => {
        /// The agent's RPCs, all that its protocol has; which of them the runtime calls is up to the resources of a pod
        /// (networks, volumes and hotplug call more of them than a plain container does). Every method fails with the
        /// kind of the agent's status code, or `Unavailable` when the connection is gone.
        #[async_trait]
        pub trait Agent: AgentManager + HealthService {
            $($(#[$doc])* async fn $name(&self, request: $request) -> Result<$response>;)*
        }
    };
}

agent_trait! {
    /// Sets the sandbox up: hostname, DNS, shared storages, modules.
    fn create_sandbox(wire::CreateSandboxRequest) -> ();
    /// Ends every container; the guest may power off afterwards.
    fn destroy_sandbox(wire::DestroySandboxRequest) -> ();
    /// Brings hot-added CPUs and memory online.
    fn online_cpu_mem(wire::OnlineCPUMemRequest) -> ();
    /// Adds neighbours.
    fn add_arp_neighbors(wire::AddARPNeighborsRequest) -> ();
    /// Takes an interface out of the guest, so that its device can be unplugged.
    fn remove_interface(wire::RemoveInterfaceRequest) -> ();
    /// Lists network interfaces.
    fn list_interfaces(wire::ListInterfacesRequest) -> wire::Interfaces;
    /// Lists routes.
    fn list_routes(wire::ListRoutesRequest) -> wire::Routes;
    /// Configures a network interface.
    fn update_interface(wire::UpdateInterfaceRequest) -> types::Interface;
    /// Replaces the routes.
    fn update_routes(wire::UpdateRoutesRequest) -> wire::Routes;
    /// Creates a container; its init waits.
    fn create_container(wire::CreateContainerRequest) -> ();
    /// Lets a container's init run.
    fn start_container(wire::StartContainerRequest) -> ();
    /// Freezes a container.
    fn pause_container(wire::PauseContainerRequest) -> ();
    /// Thaws a container.
    fn resume_container(wire::ResumeContainerRequest) -> ();
    /// Removes a stopped container.
    fn remove_container(wire::RemoveContainerRequest) -> ();
    /// Figures of a container.
    fn stats_container(wire::StatsContainerRequest) -> wire::StatsContainerResponse;
    /// Changes a container's limits.
    fn update_container(wire::UpdateContainerRequest) -> ();
    /// Runs another process in a container.
    fn exec_process(wire::ExecProcessRequest) -> ();
    /// Signals a process.
    fn signal_process(wire::SignalProcessRequest) -> ();
    /// Waits for a process, without a time limit.
    fn wait_process(wire::WaitProcessRequest) -> wire::WaitProcessResponse;
    /// Closes a process' stdin.
    fn close_stdin(wire::CloseStdinRequest) -> ();
    /// Reads stdout, without a time limit.
    fn read_stdout(wire::ReadStreamRequest) -> wire::ReadStreamResponse;
    /// Reads stderr, without a time limit.
    fn read_stderr(wire::ReadStreamRequest) -> wire::ReadStreamResponse;
    /// Writes stdin, without a time limit.
    fn write_stdin(wire::WriteStreamRequest) -> wire::WriteStreamResponse;
    /// Changes the size of a process' terminal.
    fn tty_win_resize(wire::TtyWinResizeRequest) -> ();
    /// Writes a piece of a file below /run in the guest.
    fn copy_file(wire::CopyFileRequest) -> ();
    /// Prometheus text of the guest.
    fn get_metrics(wire::GetMetricsRequest) -> wire::Metrics;
    /// Waits for the next out-of-memory kill, without a time limit.
    fn get_oom_event(wire::GetOOMEventRequest) -> wire::OOMEvent;
    /// iptables-save of the guest.
    fn get_ip_tables(wire::GetIPTablesRequest) -> wire::GetIPTablesResponse;
    /// iptables-restore in the guest.
    fn set_ip_tables(wire::SetIPTablesRequest) -> wire::SetIPTablesResponse;
    /// Figures of a volume.
    fn get_volume_stats(wire::VolumeStatsRequest) -> csi::VolumeStatsResponse;
    /// Grows a volume's filesystem.
    fn resize_volume(wire::ResizeVolumeRequest) -> ();
    /// What the guest is and can do.
    fn get_guest_details(wire::GuestDetailsRequest) -> wire::GuestDetailsResponse;
    /// Adds a swap device by PCI path.
    fn add_swap(wire::AddSwapRequest) -> ();
    /// Adds a swap device by path.
    fn add_swap_path(wire::AddSwapPathRequest) -> ();
    /// Replaces the agent's policy.
    fn set_policy(wire::SetPolicyRequest) -> ();
    /// Data for support, e.g. a termination log.
    fn get_diagnostic_data(wire::GetDiagnosticDataRequest) -> wire::GetDiagnosticDataResponse;
    /// Mixes entropy into the guest's random number generator.
    fn reseed_random_dev(wire::ReseedRandomDevRequest) -> ();
    /// Sets the guest's clock.
    fn set_guest_date_time(wire::SetGuestDateTimeRequest) -> ();
    /// Probes hot-added memory.
    fn mem_hotplug_by_probe(wire::MemHotplugByProbeRequest) -> ();
    /// Resizes tmpfs mounts.
    fn update_ephemeral_mounts(wire::UpdateEphemeralMountsRequest) -> ();
    /// Unmounts shares whose host side is gone.
    fn remove_stale_virtiofs_share_mounts(wire::RemoveStaleVirtiofsShareMountsRequest) -> ();
    /// Configures the memory agent's memcg part.
    fn mem_agent_memcg_set(wire::MemAgentMemcgConfig) -> ();
    /// Configures the memory agent's compaction.
    fn mem_agent_compact_set(wire::MemAgentCompactConfig) -> ();
}

/// The runtime's error for an agent call `method` that failed.
fn rpc_error(method: &'static str, error: ttrpc::Error) -> Error {
    use ttrpc::Code;
    match error {
        ttrpc::Error::RpcStatus(status) => {
            let kind = match status.code() {
                Code::NOT_FOUND => ErrorKind::NotFound,
                Code::ALREADY_EXISTS => ErrorKind::AlreadyExists,
                Code::INVALID_ARGUMENT | Code::OUT_OF_RANGE => ErrorKind::InvalidArgument,
                Code::FAILED_PRECONDITION | Code::ABORTED => ErrorKind::FailedPrecondition,
                Code::PERMISSION_DENIED | Code::UNAUTHENTICATED => ErrorKind::PermissionDenied,
                Code::UNIMPLEMENTED => ErrorKind::Unimplemented,
                Code::UNAVAILABLE | Code::CANCELLED => ErrorKind::Unavailable,
                Code::DEADLINE_EXCEEDED => ErrorKind::DeadlineExceeded,
                Code::RESOURCE_EXHAUSTED => ErrorKind::ResourceExhausted,
                _ => ErrorKind::Internal,
            };
            Error::new(kind, format!("agent {method}: {}", status.message))
        }
        // Every other variant means the connection, not the call.
        ttrpc::Error::Others(text) if text.contains("timeout") => {
            Error::new(ErrorKind::DeadlineExceeded, format!("agent {method}: {text}"))
        }
        error => Error::new(ErrorKind::Unavailable, format!("agent {method}: {error}")),
    }
}
