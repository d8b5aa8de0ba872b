//! A container's root filesystem: mounted on the host as containerd asks, shared with the guest.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use oci_spec::runtime::{Root, Spec};
use protocols::agent::{Device, Storage};

use super::device_manager::DeviceManager;
use super::share_fs::ShareFsMount;
use crate::error::{Error, ErrorKind, Result};
use crate::host::journal::{Journal, Undo};
use crate::host::{blocking, mounts};
use crate::types::Mount;

/// A container's root filesystem.
#[async_trait]
pub trait Rootfs: Send + Sync {
    /// Its path in the guest.
    fn get_guest_rootfs_path(&self) -> String;
    /// What the agent has to mount for it; `None` for a folder of the share.
    fn get_storage(&self) -> Option<Storage>;
    /// Takes it away from the guest and unmounts it. Idempotent.
    ///
    /// # Errors
    /// Naming the mount that stays.
    async fn cleanup(&self, devices: &DeviceManager) -> Result<()>;
    /// The device it is on, for the agent; `None` for a folder of the share.
    fn get_device(&self) -> Option<Device> {
        None
    }
    /// Whether the guest may write to it: what it writes is somebody's when the guest is gone.
    fn takes_writes(&self) -> bool;
}

/// A root filesystem below the virtio-fs share.
#[derive(Clone)]
pub struct ShareFsRootfs {
    mount: Arc<dyn ShareFsMount>,
    journal: Arc<Journal>,
    container: String,
    guest_path: String,
    takes_writes: bool,
    mounts: Vec<Mount>,
    /// Unmounted at the end, in this order.
    targets: Vec<PathBuf>,
}

impl ShareFsRootfs {
    /// Mounts `mounts` on the bundle's `rootfs` (without mounts: takes the spec's `root.path`) and shares it.
    ///
    /// # Errors
    /// `NotFound` or `InvalidArgument` naming the folder, or the mount that failed; nothing is left mounted then.
    pub fn new(
        mount: Arc<dyn ShareFsMount>,
        journal: Arc<Journal>,
        container: &str,
        bundle: &Path,
        mounts: &[Mount],
        spec: &Spec,
    ) -> Result<Self> {
        let mut rootfs = Self {
            mount,
            journal,
            container: container.to_owned(),
            guest_path: String::new(),
            takes_writes: spec.root().as_ref().and_then(Root::readonly) != Some(true),
            mounts: mounts.to_vec(),
            targets: Vec::new(),
        };
        match rootfs.set_up(bundle, spec) {
            Ok(()) => Ok(rootfs),
            Err(error) => {
                if let Err(undo) = rootfs.unmount() {
                    tracing::warn!(error = %undo, container, "after a failed rootfs");
                }
                Err(error.context(format!("rootfs of container {container}")))
            }
        }
    }

    fn set_up(&mut self, bundle: &Path, spec: &Spec) -> Result<()> {
        let folder = if self.mounts.is_empty() {
            spec_root(bundle, spec)?
        } else {
            bundle.join("rootfs")
        };
        for request in self.mounts.clone() {
            let target = match request.target.as_str() {
                "" => folder.clone(),
                relative => below(bundle, relative)?,
            };
            make_folder(&target)?;
            self.journal.record(&Undo::Unmount(target.clone()))?;
            self.targets.insert(0, target.clone());
            mounts::mount_request(&request, &target)?;
        }
        if !folder.is_dir() {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("{} is not a folder", folder.display()),
            ));
        }
        // Shared writable even for a read-only root: mount points may have to be made first. The guest remounts it.
        self.guest_path = self.mount.share_rootfs(&self.container, &folder)?;
        Ok(())
    }

    fn unmount(&self) -> Result<()> {
        let unshared = self.mount.umount_rootfs(&self.container);
        for target in &self.targets {
            mounts::unmount(target)?;
            self.journal.strike(&Undo::Unmount(target.clone()));
        }
        unshared
    }
}

/// Checks what can be checked before a VM is booted for it.
///
/// # Errors
/// As [`ShareFsRootfs::new`] for a missing folder.
pub fn check(bundle: &Path, mounts: &[Mount], spec: &Spec) -> Result<()> {
    if mounts.is_empty() {
        spec_root(bundle, spec).map(drop)
    } else {
        Ok(())
    }
}

fn spec_root(bundle: &Path, spec: &Spec) -> Result<PathBuf> {
    let root = spec.root().as_ref().ok_or_else(|| {
        Error::new(
            ErrorKind::InvalidArgument,
            format!("{}: no root", bundle.join("config.json").display()),
        )
    })?;
    let path = bundle.join(root.path());
    match fs::metadata(&path) {
        Ok(metadata) if metadata.is_dir() => Ok(path),
        Ok(_) => Err(Error::new(
            ErrorKind::InvalidArgument,
            format!("{} is not a folder", path.display()),
        )),
        Err(error) => {
            let kind = match error.kind() {
                io::ErrorKind::NotFound => ErrorKind::NotFound,
                _ => ErrorKind::Internal,
            };
            Err(Error::new(kind, format!("{}: {error}", path.display())))
        }
    }
}

/// `relative` below `bundle`, without a way out.
fn below(bundle: &Path, relative: &str) -> Result<PathBuf> {
    let relative = Path::new(relative.trim_start_matches('/'));
    let normal = relative
        .components()
        .all(|part| matches!(part, std::path::Component::Normal(_)));
    if !normal {
        let message = format!("mount target {} leaves the bundle", relative.display());
        return Err(Error::new(ErrorKind::InvalidArgument, message));
    }
    Ok(bundle.join(relative))
}

fn make_folder(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(|error| {
        Error::new(
            ErrorKind::Internal,
            format!("create {}: {error}", folder.display()),
        )
    })
}

#[async_trait]
impl Rootfs for ShareFsRootfs {
    fn get_guest_rootfs_path(&self) -> String {
        self.guest_path.clone()
    }

    fn get_storage(&self) -> Option<Storage> {
        None
    }

    fn takes_writes(&self) -> bool {
        self.takes_writes
    }

    async fn cleanup(&self, _devices: &DeviceManager) -> Result<()> {
        let rootfs = self.clone();
        blocking("rootfs", move || rootfs.unmount()).await
    }
}
