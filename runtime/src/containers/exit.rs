//! How processes end: waiting for them in the guest, and removing them.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use protocols::agent as wire;
use tokio::sync::mpsc;

use super::VirtContainerManager;
use super::container::{Container, KILLED};
use super::manager::PodState;
use super::process::{Phase, Process};
use super::signal::SIGKILL;
use crate::error::{Error, ErrorKind, Result};
use crate::host::blocking;
use crate::sandbox::{SandboxState, VirtSandbox};
use crate::types::{Event, ProcessExit};

/// How long a removal waits for output that nobody has read to its end.
const DRAIN: Duration = Duration::from_secs(10);
/// How long a created container that is deleted may take to die.
const KILL: Duration = Duration::from_secs(10);
/// How long the end of the VM may take to become known after the agent stopped answering.
const VM_END: Duration = Duration::from_secs(10);
/// Exit status when nothing better is known.
pub(super) const UNKNOWN_STATUS: u32 = 255;

impl VirtContainerManager {
    /// Waits for a process in the guest, without a time limit, and publishes its exit.
    pub(super) fn spawn_waiter(&self, container: Arc<Container>, process: Arc<Process>) {
        let (sandbox, events) = (self.sandbox.clone(), self.events());
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
                if exit.status == KILLED {
                    publish_kill_for_memory(&sandbox, &container.id, &events).await;
                }
                sandbox.members().end(&container.id);
                container.init_exited(exit).await;
            } else {
                process.exited(exit);
            }
        });
    }

    /// Removes a stopped process and publishes that; with init goes the container.
    pub(super) async fn delete(
        &self,
        container: Arc<Container>,
        process: Arc<Process>,
    ) -> Result<ProcessExit> {
        let removal = async {
            let exit = if process.is_init() {
                self.delete_container(container).await?
            } else {
                self.delete_exec(&container, &process).await?
            };
            self.publish(Event::TaskDelete {
                process: process.id().clone(),
                pid: process.host_pid(),
                exit,
            });
            Ok(exit)
        };
        process.remove_once(removal).await
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
        match self.enter_deletion(&container.id) {
            // The VM goes with it: one farewell to the whole guest, which writes everything back, says it all.
            PodState::Over => self.sandbox.close_without_containers().await,
            state => {
                if state == PodState::Orphaned && container.id == self.sandbox_id {
                    self.leave_others().await;
                }
                self.remove_in_guest(&container.id).await;
            }
        }
        container.host.cleanup().await;
        self.remove(&container.id);
        Ok(exit)
    }

    /// The pod's own container goes, others run: as with runc, where nothing hangs on it.
    async fn leave_others(&self) {
        tracing::info!("the sandbox' container is deleted, others run: the VM goes on");
        let resources = self.sandbox.resources().clone();
        let noted = blocking("state of the sandbox", move || {
            let noted = resources.note_orphaned();
            noted.map_err(|error| Error::new(ErrorKind::Internal, error.to_string()))
        });
        if let Err(error) = noted.await {
            tracing::error!(%error, "containerd may end the others with this one");
        }
    }

    pub(super) async fn remove_in_guest(&self, container: &str) {
        let remove = wire::RemoveContainerRequest {
            container_id: container.to_owned(),
            ..Default::default()
        };
        match self.sandbox.agent().remove_container(remove).await {
            Ok(()) => {}
            Err(error) if matches!(error.kind, ErrorKind::NotFound | ErrorKind::Unavailable) => {}
            // The guest keeps something; the host side must not.
            Err(error) => tracing::warn!(container, %error, "remove in the guest"),
        }
    }

    async fn delete_exec(&self, container: &Container, process: &Process) -> Result<ProcessExit> {
        let exit = match process.phase() {
            Phase::Stopped(exit) => exit,
            // It never ran: 0, as runc's shim says.
            Phase::Created => ProcessExit {
                status: 0,
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

/// An exit by SIGKILL may be the kernel's doing for want of memory. The guest tells of that on a way of its own, and the news
/// may be slower than those of the exit, which clients take for the last word: so the cgroup is asked.
async fn publish_kill_for_memory(
    sandbox: &VirtSandbox,
    container: &str,
    events: &mpsc::UnboundedSender<Event>,
) {
    if sandbox.members().was_killed(container) {
        return;
    }
    let request = wire::StatsContainerRequest {
        container_id: container.to_owned(),
        ..Default::default()
    };
    match sandbox.agent().stats_container(request).await {
        Ok(stats) => {
            if stats.cgroup_stats.memory_events.oom_kill > 0 {
                sandbox.members().publish_kill(container, events);
            }
        }
        // It was removed meanwhile, or its VM has ended: nothing more is known.
        Err(error) => tracing::debug!(container, %error, "kills for memory"),
    }
}

async fn vm_ended_soon(sandbox: &VirtSandbox) -> bool {
    let mut state = sandbox.watch_state();
    let ended = state.wait_for(|state| matches!(state, SandboxState::Stopped(_)));
    tokio::time::timeout(VM_END, ended).await.is_ok()
}
