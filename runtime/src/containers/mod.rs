//! Containers of a sandbox and their processes.

mod container;
mod create;
mod exec;
mod exit;
mod hooks;
mod host_pid;
mod io;
mod manager;
mod pid_namespace;
pub(crate) mod pod_stats;
pub(crate) mod poststop;
mod process;
mod signal;
pub(crate) mod spec;
pub(crate) mod stats;

use async_trait::async_trait;

use crate::error::Result;
use crate::types::{
    ContainerProcess, ContainerStats, CreateContainerRequest, ExecProcessRequest, ProcessExit, ProcessState,
    UpdateContainerRequest,
};

pub(crate) use hooks::netns_for_hooks;
pub use host_pid::HostPid;
pub use io::{Client, Direction, Lease, ProcessStream, StreamHub};
pub use manager::VirtContainerManager;
pub use spec::bundle::{container_kind, load_sandbox_spec, load_spec};
pub use spec::check;

/// Kata's container manager.
///
/// Errors have the kinds of containerd's shim contract: `NotFound` for an unknown id, `AlreadyExists` for a taken one,
/// `FailedPrecondition` for a call in the wrong state.
#[async_trait]
pub trait ContainerManager: Send + Sync {
    /// Creates a container; its init waits. Returns the host pid that stands for it.
    async fn create_container(
        &self,
        request: CreateContainerRequest,
        spec: oci_spec::runtime::Spec,
    ) -> Result<u32>;
    /// Freezes a container.
    async fn pause_container(&self, container: &str) -> Result<()>;
    /// Thaws a container.
    async fn resume_container(&self, container: &str) -> Result<()>;
    /// Figures of a container.
    async fn stats_container(&self, container: &str) -> Result<ContainerStats>;
    /// Changes a container's limits and its pod's bandwidth.
    async fn update_container(&self, request: UpdateContainerRequest) -> Result<()>;
    /// The host pid that stands for a container.
    async fn connect_container(&self, container: &str) -> Result<u32>;
    /// Ends a process' stdin.
    async fn close_process_io(&self, process: &ContainerProcess) -> Result<()>;
    /// Removes a stopped process; with init goes the container.
    async fn delete_process(&self, process: &ContainerProcess) -> Result<ProcessExit>;
    /// Registers another process.
    async fn exec_process(&self, request: ExecProcessRequest) -> Result<()>;
    /// Signals a process.
    async fn kill_process(&self, process: &ContainerProcess, signal: u32, all: bool) -> Result<()>;
    /// Changes the size of a terminal, now or when the process starts.
    async fn resize_process_pty(&self, process: &ContainerProcess, width: u32, height: u32) -> Result<()>;
    /// Runs a created process. Returns the host pid that stands for it.
    async fn start_process(&self, process: &ContainerProcess) -> Result<u32>;
    /// State of a process.
    async fn state_process(&self, process: &ContainerProcess) -> Result<ProcessState>;
    /// Waits for a process' end; before its start and after its end, too.
    async fn wait_process(&self, process: &ContainerProcess) -> Result<ProcessExit>;
    /// The host pid that stands for the sandbox: the shim's. Each container has one of its own.
    async fn pid(&self) -> Result<u32>;
}
