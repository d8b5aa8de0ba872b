//! One container: its processes and what was set up for it on the host.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use super::hooks::HostHooks;
use super::host_pid::HostPid;
use super::process::{Phase, Process};
use crate::error::{Error, ErrorKind, Result};
use crate::resource::ResourceManager;
use crate::resource::rootfs::Rootfs;
use crate::resource::volume::Volumes;
use crate::types::{ContainerProcess, ProcessExit, ProcessState};

/// How long the execs of a container may take to follow its init: the kernel kills them with the pid namespace, only
/// the news travels.
const FOLLOW: Duration = Duration::from_secs(3);
/// Status of a process that was killed with its VM or its container: 128 + SIGKILL.
pub(super) const KILLED: u32 = 137;

/// What a container has on the host.
pub(super) struct HostSide {
    pub rootfs: Box<dyn Rootfs>,
    pub volumes: Volumes,
    pub resources: Arc<ResourceManager>,
    /// Stands for it on the host.
    pub pid: HostPid,
    /// `None` when it has no hooks on the host.
    pub hooks: Option<HostHooks>,
}

impl HostSide {
    /// Takes it all away, then runs poststop hooks that are due; what stays is logged and left to the journal.
    pub(super) async fn cleanup(&self) {
        let devices = self.resources.devices();
        self.volumes.cleanup(devices).await;
        if let Err(error) = self.rootfs.cleanup(devices).await {
            tracing::warn!(%error, "rootfs");
        }
        if let Some(hooks) = &self.hooks {
            hooks.stopped().await;
        }
    }
}

/// A container.
pub(super) struct Container {
    pub id: String,
    pub bundle: PathBuf,
    pub init: Arc<Process>,
    pub host: HostSide,
    execs: Mutex<HashMap<String, Arc<Process>>>,
}

impl Container {
    pub(super) fn new(id: String, bundle: PathBuf, init: Arc<Process>, host: HostSide) -> Self {
        Self {
            id,
            bundle,
            init,
            host,
            execs: Mutex::default(),
        }
    }

    /// The process with `exec_id`; empty means init.
    pub(super) fn process(&self, exec_id: &str) -> Result<Arc<Process>> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        self.execs().get(exec_id).cloned().ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                format!("process {exec_id} of container {} does not exist", self.id),
            )
        })
    }

    /// Registers an exec.
    pub(super) fn add_exec(&self, process: Arc<Process>) -> Result<()> {
        let exec_id = process.id().exec_id.clone();
        let mut execs = self.execs();
        if execs.contains_key(&exec_id) {
            let message = format!("process {exec_id} of container {} exists already", self.id);
            return Err(Error::new(ErrorKind::AlreadyExists, message));
        }
        execs.insert(exec_id, process);
        Ok(())
    }

    pub(super) fn remove_exec(&self, exec_id: &str) {
        self.execs().remove(exec_id);
    }

    /// Execs that have not ended, or were never started.
    pub(super) fn live_execs(&self) -> Vec<Arc<Process>> {
        let execs = self.execs();
        execs
            .values()
            .filter(|process| !matches!(process.phase(), Phase::Stopped(_)))
            .cloned()
            .collect()
    }

    /// Init has ended: its exit is the container's last. Execs get a moment to report their own.
    pub(super) async fn init_exited(&self, exit: ProcessExit) {
        let mut live = self.live_execs();
        live.retain(|process| process.phase() != Phase::Created);
        let follow = async {
            for process in &live {
                // Only ends early when the process is removed, which is fine.
                let _ = process.wait().await;
            }
        };
        if tokio::time::timeout(FOLLOW, follow).await.is_err() {
            tracing::warn!(
                container = self.id,
                "processes have not ended with their container"
            );
        }
        self.all_exited(exit);
    }

    /// Everything has ended, execs first.
    pub(super) fn all_exited(&self, exit: ProcessExit) {
        for process in self.live_execs() {
            process.exited(ProcessExit {
                status: KILLED,
                at: exit.at,
            });
        }
        self.init.exited(exit);
    }

    /// The VM is gone.
    pub(super) fn killed(&self) {
        self.all_exited(ProcessExit {
            status: KILLED,
            at: SystemTime::now(),
        });
    }

    pub(super) fn state(&self, process: &Process) -> ProcessState {
        let (status, exit) = process.status();
        ProcessState {
            process: ContainerProcess {
                container_id: self.id.clone(),
                exec_id: process.id().exec_id.clone(),
            },
            bundle: self.bundle.clone(),
            pid: process.host_pid(),
            status,
            stdio: process.stdio().clone(),
            exit,
        }
    }

    fn execs(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<Process>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
