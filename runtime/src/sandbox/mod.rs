//! A pod: one VM, one agent, any number of containers.

mod config;
mod files;
mod monitor;
mod virt;

use std::collections::HashMap;
use std::time::SystemTime;

use async_trait::async_trait;

use crate::error::{Error, Result};
use crate::hypervisor::VmExit;
use crate::types::{ContainerProcess, ProcessExit};

pub use config::SandboxConfig;
pub(crate) use config::{namespace, place_of};
pub use virt::VirtSandbox;

/// Life of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SandboxState {
    /// Nothing runs.
    Init,
    /// The VM boots.
    Starting,
    /// Containers can be created.
    Running,
    /// The VM is being stopped on purpose.
    Stopping,
    /// The VM has ended.
    Stopped(SandboxEnd),
}

/// How and when a sandbox ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxEnd {
    /// Of its VM.
    pub exit: VmExit,
    /// When that became known.
    pub at: SystemTime,
    /// Whether it was stopped on purpose.
    pub wanted: bool,
}

impl SandboxEnd {
    /// Exit status of a VM that ended by itself: as if killed by signal 9.
    const KILLED: u32 = 137;

    /// An end that is known just now.
    pub(crate) fn now(exit: VmExit, wanted: bool) -> Self {
        Self {
            exit,
            at: SystemTime::now(),
            wanted,
        }
    }

    /// As the exit status of a process: 0 for a sandbox that was stopped, 137 for one that died.
    pub fn status(&self) -> u32 {
        if self.wanted { 0 } else { Self::KILLED }
    }
}

/// State of a sandbox as the Sandbox API knows it: `SANDBOX_READY`, `SANDBOX_NOTREADY`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    /// The VM runs.
    Ready,
    /// It does not run yet, or any more.
    NotReady,
}

/// A sandbox as the Sandbox API reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxStatus {
    /// Sandbox id.
    pub sandbox_id: String,
    /// Live host pid.
    pub pid: u32,
    /// Whether containers can be created.
    pub state: Readiness,
    /// For people.
    pub info: HashMap<String, String>,
    /// When it became ready.
    pub created_at: Option<SystemTime>,
    /// How and when it ended.
    pub end: Option<SandboxEnd>,
}

/// A pod, with Kata's methods. The handler calls `start`, `stop`, `status`, `wait` and `shutdown`. The others wait for their
/// callers: `wait_process` for a sandbox that waits for its processes itself, the iptables for pod networks,
/// `direct_volume_*` for volumes, `start_template` for templates, metrics, policy and `agent_sock` for the management
/// socket. Those whose work belongs to a later release have a default that says so.
#[async_trait]
pub trait Sandbox: Send + Sync {
    /// Boots the VM up to a working agent.
    ///
    /// # Errors
    /// One line with phase, time and the guest's last words.
    async fn start(&self) -> Result<()>;
    /// Boots a VM that becomes a template.
    async fn start_template(&self) -> Result<()> {
        Err(Error::unsupported("Sandbox::start_template"))
    }
    /// Stops the VM within a bounded time; idempotent.
    async fn stop(&self) -> Result<()>;
    /// Removes everything on the host; idempotent.
    async fn cleanup(&self) -> Result<()>;
    /// Stops and cleans up.
    async fn shutdown(&self) -> Result<()>;
    /// For the Sandbox API.
    async fn status(&self) -> Result<SandboxStatus>;
    /// Waits for the end of the VM.
    async fn wait(&self) -> Result<SandboxEnd>;
    /// Waits for a process; here a matter of [`ContainerManager::wait_process`](crate::containers::ContainerManager).
    async fn wait_process(&self, _process: &ContainerProcess) -> Result<ProcessExit> {
        Err(Error::unsupported("Sandbox::wait_process"))
    }
    /// Looks for interfaces that appeared later.
    async fn rescan_network(&self) -> Result<()>;
    /// Changes the pod's bandwidth to what Kubernetes' annotations ask for.
    async fn limit_network(&self, annotations: &HashMap<String, String>) -> Result<()>;
    /// iptables-restore in the guest.
    async fn set_iptables(&self, is_ipv6: bool, data: Vec<u8>) -> Result<Vec<u8>>;
    /// iptables-save in the guest.
    async fn get_iptables(&self, is_ipv6: bool) -> Result<Vec<u8>>;
    /// Figures of a direct volume.
    async fn direct_volume_stats(&self, _path: &str) -> Result<String> {
        Err(Error::unsupported("Sandbox::direct_volume_stats"))
    }
    /// Grows a direct volume.
    async fn direct_volume_resize(&self, _path: &str, _size: u64) -> Result<()> {
        Err(Error::unsupported("Sandbox::direct_volume_resize"))
    }
    /// Replaces the agent's policy.
    async fn set_policy(&self, policy: &str) -> Result<()>;
    /// Address of the agent for tools.
    async fn agent_sock(&self) -> Result<String>;
    /// Prometheus text of the guest.
    async fn agent_metrics(&self) -> Result<String>;
    /// Figures of the VMM.
    async fn hypervisor_metrics(&self) -> Result<String>;
}
