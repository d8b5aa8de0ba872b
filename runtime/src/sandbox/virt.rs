//! The pod's lifecycle over a VM. State is published on a watch channel; no lock is held across a boot or an RPC.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use protocols::agent as wire;
use tokio::sync::{OnceCell, mpsc, watch};
use tokio::task::JoinSet;

use super::monitor::{self, Members};
use super::{Readiness, Sandbox, SandboxConfig, SandboxState, SandboxStatus};
use crate::agent::{Agent, wait_ready};
use crate::config::TomlConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::hypervisor::{Hypervisor, READY_PORT, VmExit};
use crate::resource::ResourceManager;
use crate::timeline;
use crate::types::Event;

/// Bound of building the VM on the host.
const START_VM: Duration = Duration::from_secs(120);
/// How long a guest may take to say goodbye, which includes writing back what is dirty on its shares and disks; the VM is
/// stopped afterwards anyway.
const GOODBYE: Duration = Duration::from_secs(10);
/// Bound of the VM's own end.
const STOP_VM: Duration = Duration::from_secs(10);

/// A pod in a VM.
pub struct VirtSandbox {
    id: String,
    pod: SandboxConfig,
    config: TomlConfig,
    hypervisor: Arc<dyn Hypervisor>,
    agent: Arc<dyn Agent>,
    resources: Arc<ResourceManager>,
    members: Arc<Members>,
    state: watch::Sender<SandboxState>,
    /// What the VM is built with is there.
    prepared: OnceCell<()>,
    /// The guest knows of its end.
    goodbye: OnceCell<()>,
    events: mpsc::UnboundedSender<Event>,
    /// Log forwarding, health checks: end with the sandbox.
    background: Mutex<JoinSet<()>>,
}

impl VirtSandbox {
    /// A sandbox that has not been started: the pod that `pod` describes, on a node configured by `config`.
    pub fn new(
        pod: SandboxConfig,
        config: TomlConfig,
        hypervisor: Arc<dyn Hypervisor>,
        agent: Arc<dyn Agent>,
        resources: Arc<ResourceManager>,
        events: mpsc::UnboundedSender<Event>,
    ) -> Self {
        Self {
            id: pod.id.clone(),
            pod,
            config,
            hypervisor,
            agent,
            resources,
            members: Arc::default(),
            state: watch::Sender::new(SandboxState::Init),
            prepared: OnceCell::new(),
            goodbye: OnceCell::new(),
            events,
            background: Mutex::default(),
        }
    }

    /// Makes on the host what the VM is built with; [`Sandbox::start`] does it otherwise. Containers can be prepared from
    /// now on.
    ///
    /// # Errors
    /// What could not be set up.
    pub async fn prepare(&self) -> Result<()> {
        let prepare = async {
            let netns = self.pod.netns.as_ref().map(|path| path.display().to_string());
            self.hypervisor
                .prepare_vm(&self.id, netns, &self.pod.annotations)
                .await?;
            self.resources.prepare_before_start_vm().await
        };
        self.prepared
            .get_or_try_init(|| prepare)
            .await
            .copied()
            .map_err(|error| error.context(format!("sandbox {}", self.id)))
    }

    /// Tells a running guest, once, that it ends: it stops its containers and writes back what it has not yet. Nothing
    /// can be created afterwards, [`Sandbox::stop`] is what is left to do. Bounded.
    pub async fn say_goodbye(&self) {
        let goodbye = async {
            if !self.enter(&SandboxState::Running, SandboxState::Stopping) {
                return;
            }
            let destroy = self.agent.destroy_sandbox(wire::DestroySandboxRequest::default());
            if !matches!(tokio::time::timeout(GOODBYE, destroy).await, Ok(Ok(()))) {
                tracing::debug!(
                    sandbox = self.id,
                    "the agent did not confirm the end of the sandbox"
                );
            }
        };
        self.goodbye.get_or_init(|| goodbye).await;
    }

    /// Its VM.
    pub fn hypervisor(&self) -> &Arc<dyn Hypervisor> {
        &self.hypervisor
    }

    /// Its agent.
    pub fn agent(&self) -> &Arc<dyn Agent> {
        &self.agent
    }

    /// Its resources on the host.
    pub fn resources(&self) -> &Arc<ResourceManager> {
        &self.resources
    }

    /// Its containers, which their manager enters here.
    pub fn members(&self) -> &Members {
        &self.members
    }

    /// Its configuration.
    pub fn config(&self) -> &TomlConfig {
        &self.config
    }

    /// Its state, now and later.
    pub fn watch_state(&self) -> watch::Receiver<SandboxState> {
        self.state.subscribe()
    }

    fn enter(&self, from: &SandboxState, to: SandboxState) -> bool {
        self.state.send_if_modified(|state| {
            let matches = state == from;
            if matches {
                *state = to;
            }
            matches
        })
    }

    async fn boot(&self) -> Result<()> {
        let begin = Instant::now();
        self.start_vm().await?;
        // Listening starts right after the vCPUs: a kernel needs far longer to its first process. Should an announcement
        // be missed all the same, the repeated connection attempt finds the agent.
        let listener = self.hypervisor.vsock_listen(READY_PORT)?;
        let kata = &self.config.agent.kata;
        let ready = wait_ready(
            self.hypervisor.clone(),
            listener,
            kata.server_port,
            kata.boot_timeout(),
        )
        .await;
        let stream = ready.map_err(|error| self.boot_error("waiting for the agent", begin, error))?;
        timeline::mark("kernel");
        self.agent.start(stream).await?;
        let create = tokio::select! {
            biased;
            result = self.agent.create_sandbox(self.create_request()) => result,
            exit = self.hypervisor.wait_vm() => Err(Error::new(ErrorKind::Unavailable, exit.to_string())),
        };
        create.map_err(|error| self.boot_error("setting the sandbox up in the guest", begin, error))?;
        self.resources.sync_network(self.agent.as_ref()).await?;
        timeline::mark("agent ready");
        Ok(())
    }

    async fn start_vm(&self) -> Result<()> {
        self.hypervisor.start_vm(START_VM).await?;
        timeline::mark("vm set-up");
        let (hypervisor, state, id) = (self.hypervisor.clone(), self.state.clone(), self.id.clone());
        tokio::spawn(monitor::vm_end(hypervisor, state, id));
        Ok(())
    }

    fn create_request(&self) -> wire::CreateSandboxRequest {
        wire::CreateSandboxRequest {
            hostname: self.pod.hostname.clone(),
            dns: self.pod.dns.clone(),
            storages: self.resources.storages(self.pod.shm_size),
            sandbox_id: self.id.clone(),
            kernel_modules: self
                .config
                .agent
                .kata
                .kernel_modules
                .iter()
                .map(|line| kernel_module(line))
                .collect(),
            ..Default::default()
        }
    }

    /// A failed boot says in which phase, after how long, and shows the guest's last words.
    fn boot_error(&self, phase: &str, begin: Instant, error: Error) -> Error {
        let seconds = begin.elapsed().as_secs_f32();
        let tail = monitor::console_line(self.hypervisor.as_ref());
        let message = format!(
            "{phase} failed after {seconds:.1} s: {}; guest console: {tail}",
            error.message
        );
        Error::new(error.kind, message)
    }

    fn watch_guest(&self) {
        let mut background = self.background.lock().unwrap_or_else(PoisonError::into_inner);
        let (hypervisor, agent) = (&self.hypervisor, &self.agent);
        let kata = &self.config.agent.kata;
        background.spawn(crate::agent::forward_logs(
            hypervisor.clone(),
            kata.log_port,
            kata.boot_timeout(),
            self.id.clone(),
        ));
        let keep = self.config.runtime.keep_abnormal;
        let health = monitor::health(agent.clone(), hypervisor.clone(), self.id.clone(), keep);
        background.spawn(health);
        background.spawn(self.resources.clone().follow_network(agent.clone()));
        background.spawn(monitor::oom(
            agent.clone(),
            self.members.clone(),
            self.events.clone(),
        ));
    }

    async fn ended(&self) -> VmExit {
        let mut state = self.state.subscribe();
        let ended = state
            .wait_for(|state| matches!(state, SandboxState::Stopped(_)))
            .await;
        match ended.as_deref() {
            Ok(SandboxState::Stopped(exit)) => exit.clone(),
            _ => VmExit::Stopped,
        }
    }
}

fn kernel_module(line: &str) -> wire::KernelModule {
    let mut words = line.split_whitespace().map(str::to_owned);
    wire::KernelModule {
        name: words.next().unwrap_or_default(),
        parameters: words.collect(),
        ..Default::default()
    }
}

#[async_trait]
impl Sandbox for VirtSandbox {
    async fn start(&self) -> Result<()> {
        self.prepare().await?;
        if !self.enter(&SandboxState::Init, SandboxState::Starting) {
            let (kind, what) = match *self.state.borrow() {
                SandboxState::Stopped(_) => (ErrorKind::Unavailable, "stopped before it started"),
                _ => (ErrorKind::FailedPrecondition, "already started"),
            };
            return Err(Error::new(kind, format!("sandbox {}: {what}", self.id)));
        }
        let result = self.boot().await;
        if let Err(error) = &result {
            // The VM may not exist: nobody else would report its end.
            if let Err(stop) = self.hypervisor.stop_vm().await {
                tracing::warn!(sandbox = self.id, error = %stop, "after a failed boot");
            }
            let exit = VmExit::Failure(error.message.clone());
            self.state.send_if_modified(|state| {
                let ended = matches!(state, SandboxState::Stopped(_));
                if !ended {
                    *state = SandboxState::Stopped(exit);
                }
                !ended
            });
        } else if self.enter(&SandboxState::Starting, SandboxState::Running) {
            self.watch_guest();
        } else {
            let message = format!("sandbox {}: stopped while it started", self.id);
            return Err(Error::new(ErrorKind::Unavailable, message));
        }
        result.map_err(|error| error.context(format!("sandbox {}", self.id)))
    }

    async fn stop(&self) -> Result<()> {
        if self.enter(&SandboxState::Init, SandboxState::Stopped(VmExit::Stopped)) {
            return Ok(());
        }
        self.say_goodbye().await;
        self.enter(&SandboxState::Starting, SandboxState::Stopping);
        self.background
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .abort_all();
        self.hypervisor.stop_vm().await?;
        if tokio::time::timeout(STOP_VM, self.ended()).await.is_err() {
            let message = format!(
                "sandbox {}: the VM has not ended {STOP_VM:?} after it was stopped",
                self.id
            );
            return Err(Error::new(ErrorKind::DeadlineExceeded, message));
        }
        Ok(())
    }

    async fn cleanup(&self) -> Result<()> {
        let files = self.hypervisor.cleanup().await;
        self.resources.close_network().await;
        let resources = self.resources.clone();
        let cleaned = tokio::task::spawn_blocking(move || resources.cleanup()).await;
        cleaned.unwrap_or_else(|error| Err(Error::new(ErrorKind::Internal, format!("cleanup: {error}"))))?;
        files
    }

    async fn shutdown(&self) -> Result<()> {
        let stopped = self.stop().await;
        self.agent.stop().await;
        self.cleanup().await?;
        stopped
    }

    async fn status(&self) -> Result<SandboxStatus> {
        let ready = *self.state.borrow() == SandboxState::Running;
        Ok(SandboxStatus {
            sandbox_id: self.id.clone(),
            pid: std::process::id(),
            state: if ready {
                Readiness::Ready
            } else {
                Readiness::NotReady
            },
            info: self.resources.info(),
        })
    }

    async fn wait(&self) -> Result<VmExit> {
        Ok(self.ended().await)
    }

    async fn rescan_network(&self) -> Result<()> {
        self.resources.sync_network(self.agent.as_ref()).await
    }

    async fn set_iptables(&self, is_ipv6: bool, data: Vec<u8>) -> Result<Vec<u8>> {
        let request = wire::SetIPTablesRequest {
            is_ipv6,
            data,
            ..Default::default()
        };
        self.agent
            .set_ip_tables(request)
            .await
            .map(|response| response.data)
    }

    async fn get_iptables(&self, is_ipv6: bool) -> Result<Vec<u8>> {
        let request = wire::GetIPTablesRequest {
            is_ipv6,
            ..Default::default()
        };
        self.agent
            .get_ip_tables(request)
            .await
            .map(|response| response.data)
    }

    async fn set_policy(&self, policy: &str) -> Result<()> {
        self.agent
            .set_policy(wire::SetPolicyRequest {
                policy: policy.to_owned(),
                ..Default::default()
            })
            .await
    }

    async fn agent_sock(&self) -> Result<String> {
        self.agent.agent_sock().await
    }

    async fn agent_metrics(&self) -> Result<String> {
        self.agent
            .get_metrics(wire::GetMetricsRequest::default())
            .await
            .map(|response| response.metrics)
    }

    async fn hypervisor_metrics(&self) -> Result<String> {
        self.hypervisor.get_hypervisor_metrics().await
    }
}
