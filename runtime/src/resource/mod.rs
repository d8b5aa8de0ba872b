//! What a pod needs around its VM: each resource is set up, described to the agent, and undone.

pub mod cgroup;
pub mod cpu_mem;
pub mod device_manager;
pub mod network;
pub mod rootfs;
pub mod share_fs;
pub mod volume;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use oci_spec::runtime::Spec;
use protocols::agent::Storage;

use crate::agent::Agent;
use crate::config::HypervisorConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::host::blocking;
use crate::host::journal::{Journal, Undo};
use crate::hypervisor::Hypervisor;
use crate::paths::SandboxPaths;
use crate::types::Mount;
use cgroup::CgroupsResource;
use device_manager::DeviceManager;
use network::{Network, NetworkSettings, PodNetwork};
use rootfs::{Rootfs, ShareFsRootfs};
use share_fs::{InlineVirtioFs, ShareFs};
use volume::Volumes;

/// How long changes of the network are gathered.
const SETTLE: Duration = Duration::from_millis(50);

/// How long it is left alone at most when the guest's network cannot follow.
const PATIENCE: Duration = Duration::from_secs(30);

/// The resources of one sandbox.
pub struct ResourceManager {
    paths: SandboxPaths,
    journal: Arc<Journal>,
    devices: DeviceManager,
    share_fs: Arc<dyn ShareFs>,
    cgroups: Option<CgroupsResource>,
    network: Box<dyn Network>,
    /// Some container has had a rootfs or volume that takes writes.
    shared_writable: AtomicBool,
}

/// What the spec of the first container says about the sandbox's resources.
#[derive(Debug, Clone, Default)]
pub struct SandboxResources {
    /// Host cgroup.
    pub cgroups_path: Option<PathBuf>,
    /// Network namespace; `None` for the host's own or a fresh one.
    pub netns: Option<PathBuf>,
    /// How it is connected.
    pub network: NetworkSettings,
}

impl ResourceManager {
    /// Creates the sandbox's folders and notes how to get rid of them.
    ///
    /// # Errors
    /// `AlreadyExists` when the sandbox's state folder is in use, otherwise what could not be created.
    pub fn new(
        paths: SandboxPaths,
        hypervisor: Arc<dyn Hypervisor>,
        config: &HypervisorConfig,
        resources: &SandboxResources,
    ) -> Result<Self> {
        let journal = Arc::new(open_journal(&paths)?);
        let share_fs = Arc::new(InlineVirtioFs::new(&paths, config, journal.clone()));
        let cgroups = resources
            .cgroups_path
            .as_deref()
            .map(CgroupsResource::new)
            .transpose()?;
        let (netns, settings) = (resources.netns.clone(), resources.network.clone());
        let network = Box::new(PodNetwork::new(netns, settings, journal.clone()));
        Ok(Self {
            paths,
            journal,
            devices: DeviceManager::new(hypervisor),
            share_fs,
            cgroups,
            network,
            shared_writable: AtomicBool::new(false),
        })
    }

    /// Where the sandbox keeps its records on the host.
    pub fn state_folder(&self) -> PathBuf {
        self.paths.state()
    }

    /// Notes, for `delete`, that containers go on without the sandbox' own: it is called for that one, whose shim it is to
    /// leave alone, and for the others when that has died.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn note_orphaned(&self) -> std::io::Result<()> {
        std::fs::write(self.paths.orphaned(), "")
    }

    /// The VM's devices.
    pub fn devices(&self) -> &DeviceManager {
        &self.devices
    }

    /// Makes the guest's network what its namespace on the host is now.
    ///
    /// # Errors
    /// Those of [`Network::rescan`].
    pub async fn sync_network(&self, agent: &dyn Agent) -> Result<()> {
        self.network.rescan(&self.devices, agent).await
    }

    /// Keeps the guest's network what its namespace's is, until the namespace goes.
    pub async fn follow_network(self: Arc<Self>, agent: Arc<dyn Agent>) {
        let Some(mut changes) = self.network.changes().await else {
            return;
        };
        let mut pause = SETTLE;
        loop {
            let (resources, agent) = (self.clone(), agent.clone());
            // To its end, whoever ends this: half an interface is nobody's.
            let synced = tokio::spawn(async move { resources.sync_network(agent.as_ref()).await });
            match synced.await {
                Ok(Ok(())) => pause = SETTLE,
                Ok(Err(error)) => {
                    tracing::warn!(%error, "the guest's network is not what its namespace's is");
                    // What was made for an interface and taken back is a change, too.
                    pause = (pause * 2).min(PATIENCE);
                }
                Err(error) => tracing::error!(%error, "following the pod's network"),
            }
            if !changes.next().await {
                return;
            }
            // Few changes come alone.
            tokio::time::sleep(pause).await;
        }
    }

    /// Puts the bandwidth that a pod's annotations ask for on its interfaces.
    ///
    /// # Errors
    /// Those of [`Network::limit`].
    pub async fn limit_network(&self, annotations: &HashMap<String, String>) -> Result<()> {
        self.network.limit(&self.devices, annotations).await
    }

    /// Lets nothing of the network be made from now on; [`Self::cleanup`] undoes what was.
    pub async fn close_network(&self) {
        self.network.close().await;
    }

    /// Cgroup, network and share, beside each other: everything the VM is built with.
    ///
    /// # Errors
    /// What could not be set up.
    pub async fn prepare_before_start_vm(&self) -> Result<()> {
        let (cgroups, network, share) = tokio::join!(
            self.join_cgroups(),
            self.network.setup(&self.devices),
            self.share_fs.setup_device_before_start_vm(&self.devices),
        );
        cgroups.and(network).and(share)
    }

    /// The memory that the guest will touch is charged to the pod, so this comes before the VM. The kernel moves a
    /// process only after a grace period of RCU: it takes milliseconds in each hierarchy.
    async fn join_cgroups(&self) -> Result<()> {
        let Some(cgroups) = self.cgroups.clone() else {
            return Ok(());
        };
        let journal = self.journal.clone();
        blocking("cgroup", move || cgroups.setup_before_start_vm(&journal)).await
    }

    /// Storages of the sandbox, for CreateSandbox.
    pub fn storages(&self, shm_size: u64) -> Vec<Storage> {
        let mut storages = self.share_fs.get_storages();
        storages.push(volume::shm_storage(shm_size));
        storages
    }

    /// Makes a container's rootfs reachable for the guest: mounts it and shares it.
    ///
    /// # Errors
    /// Naming the mount that failed, or the folder that is missing.
    pub async fn handle_rootfs(
        &self,
        container: &str,
        bundle: &Path,
        mounts: &[Mount],
        spec: &Arc<Spec>,
    ) -> Result<Box<dyn Rootfs>> {
        let (mount, journal) = (self.share_fs.get_share_fs_mount(), self.journal.clone());
        let (container, bundle, mounts) = (container.to_owned(), bundle.to_owned(), mounts.to_owned());
        let spec = spec.clone();
        let rootfs = blocking("rootfs", move || {
            ShareFsRootfs::new(mount, journal, &container, &bundle, &mounts, &spec)
                .map(|rootfs| Box::new(rootfs) as Box<dyn Rootfs>)
        });
        let rootfs = rootfs.await?;
        self.note_writes(rootfs.takes_writes());
        Ok(rootfs)
    }

    /// Makes what a container's mounts need from the host reachable for the guest.
    ///
    /// # Errors
    /// Naming the mount that is missing or not supported; nothing is left shared then.
    pub async fn handle_volumes(&self, container: &str, spec: &Arc<Spec>) -> Result<Volumes> {
        let share = self.share_fs.get_share_fs_mount();
        let volumes = Volumes::new(share, &self.devices, self.paths.id(), container, spec).await?;
        self.note_writes(volumes.take_writes());
        Ok(volumes)
    }

    fn note_writes(&self, possible: bool) {
        self.shared_writable.fetch_or(possible, Ordering::Relaxed);
    }

    /// Whether the guest may have something to write back that somebody wants when it is gone. Once true, always true:
    /// that a container was removed does not say that its data have arrived.
    ///
    /// Virtio-fs is no exception, though the guest does not cache what is written with write(2). Dirty pages of a mapped file
    /// become requests when the mapping goes, and a process may end before they are answered or even sent: Linux 6.1 and 6.12
    /// write copies of the pages and only wait for them in fsync(2), close(2) and sync(2) (fs/fuse/file.c).
    pub fn guest_may_owe_data(&self) -> bool {
        self.shared_writable.load(Ordering::Relaxed) || self.devices.has_had_writable_disk()
    }

    /// Undoes everything, also what a caller forgot. Blocks. Idempotent.
    ///
    /// # Errors
    /// `Internal` naming everything that is left.
    pub fn cleanup(&self) -> Result<()> {
        self.share_fs.stop();
        self.journal
            .replay()
            .map_err(|error| Error::from(error).context("cleanup of sandbox"))
    }

    /// Folder for files that the pod shares with its containers; it goes with the sandbox.
    pub fn pod_files(&self) -> PathBuf {
        self.paths.state().join("etc")
    }

    /// Figures of the host side, for the sandbox's status.
    pub fn info(&self) -> HashMap<String, String> {
        HashMap::from([
            ("state".to_owned(), self.paths.state().display().to_string()),
            ("devices".to_owned(), self.devices.attached().join(", ")),
        ])
    }
}

fn open_journal(paths: &SandboxPaths) -> Result<Journal> {
    let journal = Journal::open(&paths.journal())?;
    // First in, last out: the state folder goes when everything else is gone.
    journal.record(&Undo::RemoveTree(paths.state()))?;
    journal.record(&Undo::RemoveTree(paths.sandbox_share()))?;
    let jail = paths.jail();
    std::fs::create_dir_all(&jail)
        .map_err(|error| Error::new(ErrorKind::Internal, format!("create {}: {error}", jail.display())))?;
    Ok(journal)
}
