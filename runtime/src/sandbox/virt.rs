//! The pod's lifecycle over a VM. State is published on a watch channel; no lock is held across a boot or an RPC.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use oci_spec::runtime::Spec;
use protocols::agent as wire;
use tokio::sync::{OnceCell, mpsc, watch};
use tokio::task::JoinSet;

use super::files::PodFiles;
use super::monitor::{self, Members};
use super::{Readiness, Sandbox, SandboxConfig, SandboxEnd, SandboxState, SandboxStatus};
use crate::agent::{Agent, wait_ready};
use crate::config::TomlConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::host::blocking;
use crate::hypervisor::{Hypervisor, READY_PORT, VmExit};
use crate::resource::ResourceManager;
use crate::resource::network::localhost::LocalhostForward;
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
    /// When it became ready.
    ready_since: OnceLock<SystemTime>,
    /// What the VM is built with is there.
    prepared: OnceCell<()>,
    /// What it provides to containers that bring none of their own; a pod with a pause container has a CRI for that.
    files: OnceLock<PodFiles>,
    /// The guest knows of its end.
    goodbye: OnceCell<()>,
    events: mpsc::UnboundedSender<Event>,
    /// Log forwarding, health checks: end with the sandbox.
    background: Mutex<JoinSet<()>>,
    /// Serves the loopback of the pod's namespace while the sandbox runs.
    localhost: Mutex<Option<LocalhostForward>>,
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
            ready_since: OnceLock::new(),
            prepared: OnceCell::new(),
            files: OnceLock::new(),
            goodbye: OnceCell::new(),
            events,
            background: Mutex::default(),
            localhost: Mutex::default(),
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
            self.make_files().await?;
            self.resources.prepare_before_start_vm().await
        };
        self.prepared
            .get_or_try_init(|| prepare)
            .await
            .copied()
            .map_err(|error| error.context(format!("sandbox {}", self.id)))
    }

    /// The files of a pod whose containers come without.
    async fn make_files(&self) -> Result<()> {
        if !self.pod.provides_files {
            return Ok(());
        }
        let (folder, pod) = (self.resources.pod_files(), self.pod.clone());
        let files = blocking("files of the pod", move || PodFiles::write(folder, &pod)).await?;
        // Once, as the rest of the preparation.
        self.files.get_or_init(|| files);
        Ok(())
    }

    /// Adds to a container's spec what the pod provides and the spec lacks: /etc/hosts, /etc/hostname, /etc/resolv.conf and
    /// the pod's shared memory.
    pub fn provide_files(&self, spec: &mut Spec) {
        if let Some(files) = self.files.get() {
            files.mount_into(spec, &self.id);
        }
    }

    /// Whether containers can be created.
    ///
    /// # Errors
    /// `FailedPrecondition` saying what it does instead.
    pub fn require_running(&self) -> Result<()> {
        let what = match &*self.state.borrow() {
            SandboxState::Running => return Ok(()),
            SandboxState::Init => "has not been started".to_owned(),
            SandboxState::Starting => "is starting".to_owned(),
            SandboxState::Stopping => "is being stopped".to_owned(),
            SandboxState::Stopped(end) => format!("has ended: {}", end.exit),
        };
        let message = format!("sandbox {} {what}", self.id);
        Err(Error::new(ErrorKind::FailedPrecondition, message))
    }

    /// When it became ready.
    pub fn ready_since(&self) -> Option<SystemTime> {
        self.ready_since.get().copied()
    }

    /// Tells a running guest, once, that it ends: it stops its containers and writes back what it has not yet. Nothing
    /// can be created afterwards, [`Sandbox::stop`] is what is left to do. Bounded.
    async fn say_goodbye(&self) {
        self.close(true).await;
    }

    /// Closes a sandbox whose containers have all ended: nothing can be created any more, [`Sandbox::stop`] is what is left to
    /// do. The guest is told, and waited for, only if it has something to do for that: it may owe data to the host, or has
    /// hooks of its own. Bounded.
    pub async fn close_without_containers(&self) {
        let has_hooks = !self.config.hypervisor.dragonball.guest_hook_path.is_empty();
        self.close(has_hooks || self.resources.guest_may_owe_data()).await;
    }

    async fn close(&self, tell: bool) {
        let goodbye = async {
            if !self.enter(&SandboxState::Running, SandboxState::Stopping) || !tell {
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

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
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

    /// Its network namespace on the host; `None` when it was given none.
    pub fn netns(&self) -> Option<&Path> {
        self.pod.netns.as_deref()
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
        let hypervisor = &self.config.hypervisor.dragonball;
        wire::CreateSandboxRequest {
            hostname: self.pod.hostname.clone(),
            dns: self.pod.dns.clone(),
            storages: self.resources.storages(self.pod.shm_size),
            sandbox_id: self.id.clone(),
            guest_hook_path: hypervisor.guest_hook_path.clone(),
            kernel_modules: self
                .config
                .agent
                .kata
                .kernel_modules
                .iter()
                .map(|line| kernel_module(line))
                .collect(),
            sysctls: self.pod.sysctls.clone(),
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

    /// Lets CRI's port-forward reach the guest. A pod is as good without, but for that.
    async fn serve_localhost(&self) {
        let Some(netns) = &self.pod.netns else {
            return;
        };
        if self.config.runtime.disable_new_netns {
            return;
        }
        match LocalhostForward::start(netns, self.hypervisor.clone()).await {
            Ok(forward) => *self.localhost() = Some(forward),
            Err(error) => {
                tracing::warn!(sandbox = self.id, %error, "port-forward does not reach this pod");
            }
        }
        if *self.state.borrow() != SandboxState::Running {
            // It was stopped meanwhile, and has looked already.
            self.localhost().take();
        }
    }

    fn localhost(&self) -> MutexGuard<'_, Option<LocalhostForward>> {
        self.localhost.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ended(&self) -> SandboxEnd {
        let mut state = self.state.subscribe();
        let ended = state
            .wait_for(|state| matches!(state, SandboxState::Stopped(_)))
            .await;
        match ended.as_deref() {
            Ok(SandboxState::Stopped(end)) => end.clone(),
            // The sender is in `self`, so this cannot be.
            _ => SandboxEnd::now(VmExit::Stopped, true),
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
                    let wanted = *state == SandboxState::Stopping;
                    *state = SandboxState::Stopped(SandboxEnd::now(exit, wanted));
                }
                !ended
            });
        } else if self.enter(&SandboxState::Starting, SandboxState::Running) {
            self.ready_since.get_or_init(SystemTime::now);
            self.watch_guest();
            self.serve_localhost().await;
        } else {
            let message = format!("sandbox {}: stopped while it started", self.id);
            return Err(Error::new(ErrorKind::Unavailable, message));
        }
        result.map_err(|error| error.context(format!("sandbox {}", self.id)))
    }

    async fn stop(&self) -> Result<()> {
        let never_ran = SandboxState::Stopped(SandboxEnd::now(VmExit::Stopped, true));
        if self.enter(&SandboxState::Init, never_ran) {
            return Ok(());
        }
        self.say_goodbye().await;
        self.enter(&SandboxState::Starting, SandboxState::Stopping);
        self.background
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .abort_all();
        // The namespace is not held any longer.
        let localhost = self.localhost().take();
        if let Some(localhost) = localhost {
            localhost.stop().await;
        }
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
        let state = self.state.borrow().clone();
        let ready = state == SandboxState::Running;
        let mut info = self.resources.info();
        let hypervisor = &self.config.hypervisor.dragonball;
        info.insert("confinement".to_owned(), hypervisor.confinement());
        let end = match state {
            SandboxState::Stopped(end) => Some(end),
            _ => None,
        };
        if let Some(end) = &end {
            info.insert("end".to_owned(), end.exit.to_string());
        }
        Ok(SandboxStatus {
            sandbox_id: self.id.clone(),
            pid: std::process::id(),
            state: if ready {
                Readiness::Ready
            } else {
                Readiness::NotReady
            },
            info,
            created_at: self.ready_since(),
            end,
        })
    }

    async fn wait(&self) -> Result<SandboxEnd> {
        Ok(self.ended().await)
    }

    async fn rescan_network(&self) -> Result<()> {
        self.resources.sync_network(self.agent.as_ref()).await
    }

    async fn limit_network(&self, annotations: &HashMap<String, String>) -> Result<()> {
        self.resources.limit_network(annotations).await
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
