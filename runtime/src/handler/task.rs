//! What containerd may ask of a shim's containers, one typed method for each call of its Task service.

use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use super::RuntimeHandlerManager;
use crate::containers::ContainerManager;
use crate::error::Result;
use crate::types::{
    ContainerProcess, ContainerStats, CreateContainerRequest, DeletedProcess, ExecProcessRequest,
    ProcessExit, ProcessState, UpdateContainerRequest,
};

/// Bound of [`TaskHandler::shutdown`]; what is not done by then is left to `delete` and the journal.
const SHUTDOWN: Duration = Duration::from_secs(15);

/// Serves the requests of one shim process; the shim's services know no other way into the runtime.
///
/// Errors have the kinds of containerd's shim contract. A pid is the one that stands for a process on the host: its
/// container's. Whoever calls a method that changes something drives it to its end: a future that is dropped leaves its
/// change half done. Only waiting may be given up.
#[async_trait]
pub trait TaskHandler: Send + Sync + 'static {
    /// Creates a container; the first one of a shim also creates the sandbox. Returns the pid of its init.
    async fn create_container(&self, request: CreateContainerRequest) -> Result<u32>;
    /// Starts init or an exec; returns its pid.
    async fn start_process(&self, process: &ContainerProcess) -> Result<u32>;
    /// Removes a stopped process. The sandbox ends with its own container, or with the last one that still ran then.
    async fn delete_process(&self, process: &ContainerProcess) -> Result<DeletedProcess>;
    /// Registers another process.
    async fn exec_process(&self, request: ExecProcessRequest) -> Result<()>;
    /// Signals a process, or all processes of its container.
    async fn kill_process(&self, process: &ContainerProcess, signal: u32, all: bool) -> Result<()>;
    /// Waits for the end of a process; before its start and after its end, too.
    async fn wait_process(&self, process: &ContainerProcess) -> Result<ProcessExit>;
    /// State of a process.
    async fn state_process(&self, process: &ContainerProcess) -> Result<ProcessState>;
    /// Changes the size of a terminal: columns, rows.
    async fn resize_process_pty(&self, process: &ContainerProcess, width: u32, height: u32) -> Result<()>;
    /// Closes stdin.
    async fn close_process_io(&self, process: &ContainerProcess) -> Result<()>;
    /// Freezes a container.
    async fn pause_container(&self, container: &str) -> Result<()>;
    /// Thaws a container.
    async fn resume_container(&self, container: &str) -> Result<()>;
    /// Host pids of a container's processes.
    async fn pids(&self, container: &str) -> Result<Vec<u32>>;
    /// Pid of a container.
    async fn connect_container(&self, container: &str) -> Result<u32>;
    /// Figures of a container.
    async fn stats_container(&self, container: &str) -> Result<ContainerStats>;
    /// Changes a container's limits and its pod's bandwidth.
    async fn update_container(&self, request: UpdateContainerRequest) -> Result<()>;
    /// Whether the shim may end, with everything of the sandbox ended already: when no container is left, or `now`.
    async fn shutdown_container(&self, container: &str, now: bool) -> Result<bool>;

    /// Stops everything within a bounded time; exits are reported as events.
    async fn shutdown(&self);
    /// True once the sandbox has ended and nothing is left.
    fn watch_end(&self) -> watch::Receiver<bool>;
}

#[async_trait]
impl TaskHandler for RuntimeHandlerManager {
    async fn create_container(&self, request: CreateContainerRequest) -> Result<u32> {
        self.create(request).await
    }

    async fn start_process(&self, process: &ContainerProcess) -> Result<u32> {
        self.ready()?.containers.start_process(process).await
    }

    async fn delete_process(&self, process: &ContainerProcess) -> Result<DeletedProcess> {
        let instance = self.ready()?;
        // Of a container that is still being made nobody knows a pid; its deletion says what is to be said.
        let pid = instance.containers.connect_container(&process.container_id).await;
        let exit = instance.containers.delete_process(process).await?;
        if instance.containers.is_over() {
            // The VM goes with the container. Off the path of this answer; Shutdown waits for it, if it comes: nobody asks for
            // it behind a container that is not the sandbox' own.
            let end = self.end.clone();
            tokio::spawn(async move {
                instance.wind_down().await;
                if !instance.containers.has_wanted() {
                    end.send_replace(true);
                }
            });
        }
        Ok(DeletedProcess { pid: pid?, exit })
    }

    async fn exec_process(&self, request: ExecProcessRequest) -> Result<()> {
        self.ready()?.containers.exec_process(request).await
    }

    async fn kill_process(&self, process: &ContainerProcess, signal: u32, all: bool) -> Result<()> {
        self.ready()?.containers.kill_process(process, signal, all).await
    }

    async fn wait_process(&self, process: &ContainerProcess) -> Result<ProcessExit> {
        self.ready()?.containers.wait_process(process).await
    }

    async fn state_process(&self, process: &ContainerProcess) -> Result<ProcessState> {
        self.ready()?.containers.state_process(process).await
    }

    async fn resize_process_pty(&self, process: &ContainerProcess, width: u32, height: u32) -> Result<()> {
        let containers = self.ready()?.containers.clone();
        containers.resize_process_pty(process, width, height).await
    }

    async fn close_process_io(&self, process: &ContainerProcess) -> Result<()> {
        self.ready()?.containers.close_process_io(process).await
    }

    async fn pause_container(&self, container: &str) -> Result<()> {
        self.ready()?.containers.pause_container(container).await
    }

    async fn resume_container(&self, container: &str) -> Result<()> {
        self.ready()?.containers.resume_container(container).await
    }

    async fn pids(&self, container: &str) -> Result<Vec<u32>> {
        self.connect_container(container).await.map(|pid| vec![pid])
    }

    async fn connect_container(&self, container: &str) -> Result<u32> {
        self.ready()?.containers.connect_container(container).await
    }

    async fn stats_container(&self, container: &str) -> Result<ContainerStats> {
        self.ready()?.containers.stats_container(container).await
    }

    async fn update_container(&self, request: UpdateContainerRequest) -> Result<()> {
        self.ready()?.containers.update_container(request).await
    }

    async fn shutdown_container(&self, container: &str, now: bool) -> Result<bool> {
        self.shut_down(container, now).await
    }

    async fn shutdown(&self) {
        if tokio::time::timeout(SHUTDOWN, self.wind_down()).await.is_err() {
            tracing::error!(
                sandbox = self.context.sandbox_id,
                "not everything has ended in {SHUTDOWN:?}"
            );
        }
        self.end.send_replace(true);
    }

    fn watch_end(&self) -> watch::Receiver<bool> {
        self.end.subscribe()
    }
}
