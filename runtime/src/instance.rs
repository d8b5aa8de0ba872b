//! Putting a sandbox together: configuration, resources, VM, agent, containers.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use oci_spec::runtime::Spec;
use tokio::sync::{OnceCell, mpsc};

use crate::agent::KataAgent;
use crate::config::{self, ConfigFile, HypervisorConfig, TomlConfig, annotations};
use crate::containers::{VirtContainerManager, dns, netns};
use crate::error::Result;
use crate::hypervisor::{Hypervisor, make_dragonball};
use crate::paths::SandboxPaths;
use crate::resource::cpu_mem::InitialSizeManager;
use crate::resource::volume::shm_size;
use crate::resource::{ResourceManager, SandboxResources};
use crate::sandbox::{Sandbox, SandboxStart, VirtSandbox};
use crate::types::{Event, RuntimeOptions};

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
}

/// A sandbox and its containers.
pub(crate) struct RuntimeInstance {
    pub(crate) sandbox: Arc<VirtSandbox>,
    pub(crate) containers: Arc<VirtContainerManager>,
    ended: OnceCell<()>,
}

impl RuntimeInstance {
    /// Takes a started sandbox; its end becomes the end of its containers.
    pub(crate) fn new(
        context: &ShimContext,
        sandbox: Arc<VirtSandbox>,
        events: mpsc::UnboundedSender<Event>,
    ) -> Arc<Self> {
        let (id, namespace) = (context.sandbox_id.clone(), context.namespace.clone());
        let containers = Arc::new(VirtContainerManager::new(id, namespace, sandbox.clone(), events));
        let (watched, killed) = (sandbox.clone(), containers.clone());
        tokio::spawn(async move {
            if let Ok(exit) = watched.wait().await {
                killed.vm_ended(&exit);
            }
        });
        Arc::new(Self {
            sandbox,
            containers,
            ended: OnceCell::new(),
        })
    }

    /// Stops the VM and removes everything on the host, once; later callers wait for the first one.
    pub(crate) async fn wind_down(&self) {
        let end = async {
            if let Err(error) = self.sandbox.shutdown().await {
                tracing::error!(%error, "end of the sandbox");
            }
        };
        self.ended.get_or_init(|| end).await;
    }
}

/// The configuration of a pod: the file's, changed by annotations and limits, then checked.
fn pod_config(
    options: &RuntimeOptions,
    spec: &Spec,
    pod_annotations: &HashMap<String, String>,
) -> Result<ConfigFile> {
    let mut file = config::read(options)?;
    let mut warnings = annotations::apply(&mut file, pod_annotations)?;
    if file.config.runtime.static_sandbox_resource_mgmt {
        warnings.extend(InitialSizeManager::new(spec).setup_config(&mut file));
    }
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    file.config.validate(&file.origins)?;
    Ok(file)
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
    /// A sandbox as the first container's `spec` and `options` ask for, not started.
    pub(crate) fn sandbox(
        &self,
        context: &ShimContext,
        options: &RuntimeOptions,
        spec: &Spec,
        events: mpsc::UnboundedSender<Event>,
    ) -> Result<VirtSandbox> {
        let pod_annotations = spec.annotations().clone().unwrap_or_default();
        let file = pod_config(options, spec, &pod_annotations)?;
        let debug = context.debug || file.config.runtime.enable_debug;
        if debug && !context.debug {
            (context.log_verbosely)();
        }
        let hypervisor_config = &file.config.hypervisor.dragonball;
        hypervisor_config.check_assets(&file.origins)?;
        let paths = SandboxPaths::below(&self.root, &context.namespace, &context.sandbox_id)?;
        let netns = netns(spec);
        let cgroups_path = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.cgroups_path().clone());
        let use_cgroups = self.cgroups && file.config.runtime.sandbox_cgroup_only;
        let resources = SandboxResources {
            cgroups_path: cgroups_path.filter(|_| use_cgroups),
            netns: netns.clone(),
        };
        let resources = Arc::new(ResourceManager::new(
            paths.clone(),
            hypervisor_config,
            &resources,
        )?);
        let hypervisor = (self.make_hypervisor)(hypervisor_config, &file.config, &paths, debug);
        let address = format!("hvsock://{}", paths.hvsock().display());
        let agent = Arc::new(KataAgent::new(file.config.agent.kata.clone(), address));
        let start = SandboxStart {
            hostname: spec.hostname().clone().unwrap_or_default(),
            dns: dns(spec),
            shm_size: shm_size(spec, &context.sandbox_id),
            netns: netns.map(|path| path.display().to_string()),
            annotations: pod_annotations,
        };
        Ok(VirtSandbox::new(
            &context.sandbox_id,
            file.config,
            start,
            hypervisor,
            agent,
            resources,
            events,
        ))
    }
}
