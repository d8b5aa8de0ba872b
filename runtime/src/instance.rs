//! Putting a sandbox together: configuration, resources, VM, agent, containers.

use std::path::PathBuf;
use std::sync::Arc;

use oci_spec::runtime::Spec;
use tokio::sync::{OnceCell, mpsc};

use crate::agent::KataAgent;
use crate::config::{self, ConfigFile, HypervisorConfig, TomlConfig, annotations};
use crate::containers::{ContainerManager, StreamHub, VirtContainerManager, poststop};
use crate::error::{Error, ErrorKind, Result};
use crate::hypervisor::NetworkLimits;
use crate::hypervisor::{Hypervisor, make_dragonball};
use crate::paths::SandboxPaths;
use crate::resource::network::{self, NetworkSettings};
use crate::resource::{ResourceManager, SandboxResources};
use crate::sandbox::{Sandbox, SandboxConfig, VirtSandbox};
use crate::types::{CreateContainerRequest, Event, RuntimeOptions};

/// What the shim knows about itself.
#[derive(Debug, Clone)]
pub struct ShimContext {
    /// Id of the sandbox this process serves.
    pub sandbox_id: String,
    /// containerd namespace.
    pub namespace: String,
    /// Bundle of the sandbox container.
    pub bundle: PathBuf,
    /// Verbose logs, guest console included.
    pub debug: bool,
    /// Makes the log verbose: the configuration, which may ask for it, is known later than the log.
    pub log_verbosely: fn(),
    /// Streams that clients fetch from the shim.
    pub streams: Arc<StreamHub>,
}

/// A sandbox and its containers.
pub(crate) struct RuntimeInstance {
    pub(crate) sandbox: Arc<VirtSandbox>,
    pub(crate) containers: Arc<VirtContainerManager>,
    /// Whose end is the sandbox's.
    pub(crate) life: Life,
    ended: OnceCell<()>,
}

/// Whose end is the end of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Life {
    /// That of the container it was made with.
    OfContainer,
    /// Nobody's: the Sandbox API ends it.
    OfItsOwn,
}

impl RuntimeInstance {
    /// Takes a sandbox that has not been started; its end becomes the end of its containers.
    pub(crate) fn new(
        context: &ShimContext,
        sandbox: Arc<VirtSandbox>,
        life: Life,
        events: mpsc::UnboundedSender<Event>,
    ) -> Arc<Self> {
        let (id, namespace) = (context.sandbox_id.clone(), context.namespace.clone());
        let streams = context.streams.clone();
        let containers = VirtContainerManager::new(id, namespace, sandbox.clone(), events, streams);
        let containers = Arc::new(containers);
        let (watched, killed) = (sandbox.clone(), containers.clone());
        tokio::spawn(async move {
            if let Ok(end) = watched.wait().await {
                killed.vm_ended(&end);
            }
        });
        Arc::new(Self {
            sandbox,
            containers,
            life,
            ended: OnceCell::new(),
        })
    }

    /// Creates another container. Returns its pid.
    pub(crate) async fn create_container(
        &self,
        request: CreateContainerRequest,
        mut spec: Spec,
    ) -> Result<u32> {
        if self.life == Life::OfItsOwn && request.container_id == self.sandbox.id() {
            let message = format!("container {}: its id is the sandbox's", request.container_id);
            return Err(Error::new(ErrorKind::AlreadyExists, message));
        }
        self.sandbox
            .require_running()
            .map_err(|error| error.context(format!("container {}", request.container_id)))?;
        self.sandbox.provide_files(&mut spec);
        self.containers.create_container(request, spec).await
    }

    /// Boots the sandbox and creates its first container: what the container needs on the host is made while the guest
    /// boots. Returns the container's pid.
    pub(crate) async fn boot_with(&self, request: CreateContainerRequest, spec: Spec) -> Result<u32> {
        let (sandbox, containers) = (&self.sandbox, &self.containers);
        sandbox.prepare().await?;
        let prepare = async {
            let prepared = containers.prepare(request, spec).await;
            if prepared.is_err()
                && let Err(error) = sandbox.stop().await
            {
                tracing::warn!(%error, "interrupting a boot");
            }
            prepared
        };
        // Both to their end: half a boot cannot be undone.
        let (started, prepared) = tokio::join!(sandbox.start(), prepare);
        let prepared = prepared?;
        if let Err(error) = started {
            containers.abandon(prepared).await;
            return Err(error);
        }
        containers.create_prepared(prepared).await
    }

    /// Stops the VM and removes everything on the host, once; later callers wait for the first one.
    pub(crate) async fn wind_down(&self) {
        let end = async {
            // Containers that nobody has deleted end with the VM; their hooks are noted in a folder that goes with it.
            let due = self.containers.take_left_poststop().await;
            if !due.is_empty() {
                if let Err(error) = self.sandbox.stop().await {
                    tracing::error!(%error, "end of the VM");
                }
                poststop::run_all(due).await;
            }
            if let Err(error) = self.sandbox.shutdown().await {
                tracing::error!(%error, "end of the sandbox");
            }
        };
        self.ended.get_or_init(|| end).await;
    }
}

/// The configuration of a pod: the file's, changed by annotations and limits, then checked.
fn pod_config(options: &RuntimeOptions, pod: &SandboxConfig) -> Result<ConfigFile> {
    let mut file = config::read(options)?;
    let mut warnings = annotations::apply(&mut file, &pod.annotations)?;
    if file.config.runtime.static_sandbox_resource_mgmt {
        warnings.extend(pod.size.setup_config(&mut file));
    }
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    file.config.validate(&file.origins)?;
    Ok(file)
}

/// One process is shim and VM: where a client wants the shim, the pod is.
fn host_cgroup(options: &RuntimeOptions, pods: Option<PathBuf>) -> Option<PathBuf> {
    if options.shim_cgroup.is_empty() {
        pods
    } else {
        Some(PathBuf::from(&options.shim_cgroup))
    }
}

/// The namespace whose interfaces the guest gets.
fn network_namespace(config: &TomlConfig, pod: &SandboxConfig) -> Option<PathBuf> {
    pod.netns.clone().filter(|_| !config.runtime.disable_new_netns)
}

/// How a pod's network is made: the configuration, and the bandwidth that the pod's annotations ask for.
fn network_settings(config: &TomlConfig, pod: &SandboxConfig) -> Result<NetworkSettings> {
    let hypervisor = &config.hypervisor.dragonball;
    let node = NetworkLimits {
        rx: hypervisor.rx_rate_limiter_max_rate,
        tx: hypervisor.tx_rate_limiter_max_rate,
    };
    Ok(NetworkSettings {
        model: config.runtime.internetworking_model,
        queues: usize::try_from(hypervisor.network_queues).unwrap_or(1),
        limits: network::limits(node, node, &pod.annotations)?,
        ceiling: node,
    })
}

/// How a VM is made; tests replace it.
pub(crate) type MakeHypervisor =
    dyn Fn(&HypervisorConfig, &TomlConfig, &SandboxPaths, bool) -> Arc<dyn Hypervisor> + Send + Sync;

/// How a pod is put together, apart from what its spec and configuration say.
pub(crate) struct Recipe {
    /// In place of `/run`.
    pub(crate) root: PathBuf,
    /// Makes the VM.
    pub(crate) make_hypervisor: Box<MakeHypervisor>,
    /// Use cgroups of the host.
    pub(crate) cgroups: bool,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            root: "/run".into(),
            make_hypervisor: Box::new(make_dragonball),
            cgroups: true,
        }
    }
}

impl Recipe {
    /// A sandbox as `config` and the runtime class's `options` ask for, not started.
    pub(crate) fn sandbox(
        &self,
        context: &ShimContext,
        options: &RuntimeOptions,
        config: SandboxConfig,
        events: mpsc::UnboundedSender<Event>,
    ) -> Result<VirtSandbox> {
        let file = pod_config(options, &config)?;
        let debug = context.debug || file.config.runtime.enable_debug;
        if debug && !context.debug {
            (context.log_verbosely)();
        }
        let hypervisor_config = &file.config.hypervisor.dragonball;
        hypervisor_config.check_assets(&file.origins)?;
        let paths = SandboxPaths::below(&self.root, &context.namespace, &context.sandbox_id)?;
        let hypervisor = (self.make_hypervisor)(hypervisor_config, &file.config, &paths, debug);
        let pods = config
            .cgroups_path
            .clone()
            .filter(|_| file.config.runtime.sandbox_cgroup_only);
        let resources = SandboxResources {
            cgroups_path: host_cgroup(options, pods).filter(|_| self.cgroups),
            netns: network_namespace(&file.config, &config),
            network: network_settings(&file.config, &config)?,
        };
        let address = format!("hvsock://{}", paths.hvsock().display());
        let resources = ResourceManager::new(paths, hypervisor.clone(), hypervisor_config, &resources)?;
        let agent = Arc::new(KataAgent::new(file.config.agent.kata.clone(), address));
        Ok(VirtSandbox::new(
            config,
            file.config,
            hypervisor,
            agent,
            Arc::new(resources),
            events,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup_when_a_client_names_one_for_the_shim_wins() {
        let mut options = RuntimeOptions::default();
        let pods = || Some(PathBuf::from("/kubepods/p"));
        assert_eq!(host_cgroup(&options, pods()), pods());

        options.shim_cgroup = "/containerd/shim".to_owned();
        for pods in [pods(), None] {
            assert_eq!(
                host_cgroup(&options, pods),
                Some(PathBuf::from("/containerd/shim"))
            );
        }
    }

    #[test]
    fn network_namespace_when_it_is_to_be_left_alone_is_none_of_ours() {
        let pod = SandboxConfig {
            netns: Some("/run/netns/x".into()),
            ..Default::default()
        };
        let mut config = TomlConfig::default();
        assert_eq!(network_namespace(&config, &pod), pod.netns);

        config.runtime.disable_new_netns = true;
        assert_eq!(network_namespace(&config, &pod), None);
    }
}
