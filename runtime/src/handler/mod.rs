//! The shim's entry into the runtime: the one sandbox of a process, and what may be asked of it.

mod sandbox;
mod task;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use oci_spec::runtime::Spec;
use tokio::sync::{mpsc, watch};

use crate::config::{self, ConfigFile};
use crate::containers::poststop::{self, Poststop, Records};
use crate::containers::{self, container_kind, load_spec};
use crate::cri::ContainerKind;
use crate::error::{Error, ErrorKind, Result};
use crate::host::journal::{self, JournalError};
use crate::host::mounts;
use crate::instance::{Life, Recipe, RuntimeInstance};
use crate::paths::SandboxPaths;
use crate::resource::{rootfs, volume};
use crate::sandbox::{Sandbox, SandboxConfig, VirtSandbox};
use crate::types::{CreateContainerRequest, Event, RuntimeOptions};

pub use crate::instance::ShimContext;
pub use sandbox::SandboxHandler;
pub use task::TaskHandler;

/// Owns the one runtime instance of a shim process and routes requests to it.
pub struct RuntimeHandlerManager {
    context: ShimContext,
    events: mpsc::UnboundedSender<Event>,
    recipe: Recipe,
    instance: watch::Sender<Instance>,
    /// The sandbox while it boots, so that a shutdown can interrupt that.
    booting: Mutex<Option<Arc<VirtSandbox>>>,
    end: watch::Sender<bool>,
}

/// The runtime instance of this process.
#[derive(Clone, Default)]
enum Instance {
    /// No create has come yet, or the last one failed.
    #[default]
    None,
    /// The first create of a container boots the VM.
    Creating,
    /// The Sandbox API has created a sandbox. It waits for its start.
    Made(Arc<RuntimeInstance>),
    /// The Sandbox API boots the VM.
    Starting(Arc<RuntimeInstance>),
    /// It was started, and may have ended since.
    Ready(Arc<RuntimeInstance>),
    /// Nothing will be created any more.
    Ended,
}

impl RuntimeHandlerManager {
    /// A manager without a sandbox; the first create makes one.
    pub fn new(context: ShimContext, events: mpsc::UnboundedSender<Event>) -> Self {
        Self::with_recipe(context, events, Recipe::default())
    }

    pub(crate) fn with_recipe(
        context: ShimContext,
        events: mpsc::UnboundedSender<Event>,
        recipe: Recipe,
    ) -> Self {
        Self {
            context,
            events,
            recipe,
            instance: watch::Sender::new(Instance::None),
            booting: Mutex::default(),
            end: watch::Sender::new(false),
        }
    }

    fn ready(&self) -> Result<Arc<RuntimeInstance>> {
        match &*self.instance.borrow() {
            Instance::Ready(instance) => Ok(instance.clone()),
            // containerd takes "not found" for "already gone"; anything else makes it try for ever.
            _ => {
                let message = format!("sandbox {} has no containers", self.context.sandbox_id);
                Err(Error::new(ErrorKind::NotFound, message))
            }
        }
    }

    async fn create(&self, request: CreateContainerRequest) -> Result<u32> {
        let spec = load_spec(&request.bundle)?;
        // What cannot be had is said before a VM is booted for it.
        rootfs::check(&request.bundle, &request.rootfs, &spec)
            .map_err(|error| error.context(format!("rootfs of container {}", request.container_id)))?;
        volume::check(&self.context.sandbox_id, &request.container_id, &spec)?;
        containers::check(&spec)
            .map_err(|error| error.context(format!("container {}", request.container_id)))?;
        if let Some(instance) = self.existing().await? {
            return instance.create_container(request, spec).await;
        }
        let created = self.create_with_sandbox(request, spec).await;
        self.booting().take();
        match created {
            Ok((instance, pid)) => {
                self.instance.send_replace(Instance::Ready(instance));
                Ok(pid)
            }
            Err(error) => {
                self.instance.send_replace(Instance::None);
                Err(error)
            }
        }
    }

    /// The runtime instance, once nobody is making it; `None` when it is the caller's turn to make one.
    async fn existing(&self) -> Result<Option<Arc<RuntimeInstance>>> {
        let mut changes = self.instance.subscribe();
        loop {
            if self.enter_creating() {
                return Ok(None);
            }
            match changes.borrow_and_update().clone() {
                // Whether it takes a container is for the sandbox to say.
                Instance::Made(instance) | Instance::Starting(instance) | Instance::Ready(instance) => {
                    return Ok(Some(instance));
                }
                Instance::Ended => return Err(self.wrong_state("has ended")),
                Instance::None => continue,
                Instance::Creating => {}
            }
            // The sender is in `self`, so this cannot fail.
            let _ = changes.changed().await;
        }
    }

    fn enter_creating(&self) -> bool {
        self.replace(|instance| matches!(instance, Instance::None).then_some(Instance::Creating))
    }

    /// Puts another instance in place if `next` says so.
    fn replace(&self, next: impl FnOnce(&Instance) -> Option<Instance>) -> bool {
        self.instance.send_if_modified(|instance| {
            let next = next(instance);
            let changes = next.is_some();
            if let Some(next) = next {
                *instance = next;
            }
            changes
        })
    }

    fn wrong_state(&self, what: &str) -> Error {
        let message = format!("sandbox {} {what}", self.context.sandbox_id);
        Error::new(ErrorKind::FailedPrecondition, message)
    }

    /// A sandbox with its first container.
    async fn create_with_sandbox(
        &self,
        request: CreateContainerRequest,
        spec: Spec,
    ) -> Result<(Arc<RuntimeInstance>, u32)> {
        if matches!(container_kind(&spec)?, ContainerKind::Member { .. }) {
            let message = format!(
                "container {}: its sandbox {} does not run",
                request.container_id, self.context.sandbox_id
            );
            return Err(Error::new(ErrorKind::FailedPrecondition, message));
        }
        let mut config = SandboxConfig::from_spec(&self.context.sandbox_id, &spec);
        let hooks_netns = containers::netns_for_hooks(&spec)?;
        if let Some(pid) = &hooks_netns {
            config.netns = Some(pid.netns());
        }
        let events = self.events.clone();
        let sandbox = self
            .recipe
            .sandbox(&self.context, &request.options, config, events)?;
        let sandbox = Arc::new(sandbox);
        *self.booting() = Some(sandbox.clone());
        let events = self.events.clone();
        let instance = RuntimeInstance::new(&self.context, sandbox, Life::OfContainer, events);
        if let Some(pid) = hooks_netns {
            instance.containers.adopt(pid);
        }
        match instance.boot_with(request, spec).await {
            Ok(pid) => Ok((instance, pid)),
            Err(error) => {
                // A VM without a container is of no use to anybody: containerd does not even know of it.
                instance.wind_down().await;
                Err(error)
            }
        }
    }

    fn booting(&self) -> std::sync::MutexGuard<'_, Option<Arc<VirtSandbox>>> {
        self.booting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the shim may end; then everything has ended already.
    async fn shut_down(&self, container_id: &str, now: bool) -> Result<bool> {
        let current = self.instance.borrow().clone();
        match current {
            Instance::Made(instance) | Instance::Starting(instance) | Instance::Ready(instance)
                if instance.life == Life::OfItsOwn =>
            {
                tracing::debug!(container_id, "shutdown: the sandbox ends by the Sandbox API");
                return Ok(false);
            }
            Instance::Ready(instance) if !now && instance.containers.has_wanted() => {
                tracing::debug!(container_id, "shutdown: containers are left");
                return Ok(false);
            }
            _ => {}
        }
        self.wind_down().await;
        self.end.send_replace(true);
        Ok(true)
    }

    /// Stops and cleans up whatever there is; nothing will be created any more. A boot under way is interrupted.
    async fn wind_down(&self) {
        loop {
            self.stop_instance().await;
            let ended = self.replace(|instance| match instance {
                Instance::None | Instance::Ready(_) => Some(Instance::Ended),
                _ => None,
            });
            if ended || matches!(*self.instance.borrow(), Instance::Ended) {
                return;
            }
        }
    }

    /// Stops and cleans up the sandbox, if there is one, and keeps what it has to say about its containers. A boot under way
    /// is interrupted.
    async fn stop_instance(&self) {
        let mut changes = self.instance.subscribe();
        loop {
            let current = changes.borrow_and_update().clone();
            let booting = match current {
                Instance::Creating => self.booting().clone(),
                Instance::Starting(instance) => Some(instance.sandbox.clone()),
                Instance::Made(instance) => {
                    // It will not be started any more: whoever starts it finds that it has ended.
                    self.replace(|current| {
                        matches!(current, Instance::Made(_)).then(|| Instance::Ready(instance.clone()))
                    });
                    continue;
                }
                Instance::Ready(instance) => {
                    to_its_end(async move { instance.wind_down().await }).await;
                    return;
                }
                Instance::None | Instance::Ended => return,
            };
            if let Some(sandbox) = booting {
                to_its_end(async move {
                    if let Err(error) = sandbox.stop().await {
                        tracing::warn!(%error, "interrupting a boot");
                    }
                })
                .await;
            }
            // The sender is in `self`, so this cannot fail.
            let _ = changes.changed().await;
        }
    }
}

/// Runs `work` even if the caller gives up waiting for it.
async fn to_its_end(work: impl Future<Output = ()> + Send + 'static) {
    if let Err(error) = tokio::spawn(work).await {
        tracing::error!(%error, "ending the sandbox");
    }
}

/// Undoes what a dead shim left behind; idempotent. Only for a sandbox whose shim is gone.
///
/// # Errors
/// `AlreadyExists` when the shim is alive: nothing has been undone then. `Internal` naming everything that could not be
/// removed.
pub async fn cleanup(namespace: &str, sandbox_id: &str, bundle: &Path) -> Result<()> {
    cleanup_paths(SandboxPaths::new(namespace, sandbox_id)?, bundle.to_owned()).await
}

/// Whether the own container of sandbox `sandbox_id` was deleted while others ran: they may still, and so may its shim.
pub fn is_orphaned(namespace: &str, sandbox_id: &str) -> bool {
    SandboxPaths::new(namespace, sandbox_id).is_ok_and(|paths| paths.orphaned().exists())
}

/// Undoes everything, then runs the poststop hooks of the containers that the shim has left behind.
pub(crate) async fn cleanup_paths(paths: SandboxPaths, bundle: PathBuf) -> Result<()> {
    let undone = tokio::task::spawn_blocking(move || {
        let mut due = Vec::new();
        let undone = undo_paths(&paths, &bundle, &mut due);
        (due, undone)
    });
    let (due, undone) = undone
        .await
        .map_err(|error| Error::new(ErrorKind::Internal, format!("cleanup: {error}")))?;
    poststop::run_all(due).await;
    undone
}

fn undo_paths(paths: &SandboxPaths, bundle: &Path, due: &mut Vec<Poststop>) -> Result<()> {
    let mut errors = Vec::new();
    let records = Records::of(&paths.state());
    match journal::replay_after(&paths.journal(), || due.extend(records.take_all())) {
        Ok(()) => {}
        Err(JournalError::Left { left, .. }) => errors.extend(left),
        Err(error @ JournalError::InUse(_)) => return Err(error.into()),
        Err(error) => errors.push(error.to_string()),
    }
    // Without a journal (a crash before its first line) these are all there can be.
    due.extend(records.take_all());
    for result in [
        mounts::unmount(&bundle.join("rootfs")),
        mounts::remove_tree(&paths.sandbox_share()),
        mounts::remove_tree(&paths.state()),
    ] {
        errors.extend(result.err().map(|error| error.to_string()));
    }
    if errors.is_empty() {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Internal,
        format!("cleanup: {}", errors.join("; ")),
    ))
}

/// Version of the runtime.
pub fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// The configuration a create request with `options` would use, checked except for the files it names
/// ([`check_assets`](config::HypervisorConfig::check_assets)).
///
/// # Errors
/// `InvalidArgument` naming the file and key, `NotFound` for a file that was asked for by name.
pub fn load_config(options: &RuntimeOptions) -> Result<ConfigFile> {
    Ok(config::load(options)?)
}
