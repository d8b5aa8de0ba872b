//! Sharing host folders with the guest: one virtio-fs device per sandbox, bind mounts below its root.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use protocols::agent::Storage;

use super::device_manager::DeviceManager;
use crate::config::HypervisorConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::host::bind::{Bind, bind, bind_to_itself};
use crate::host::journal::{Journal, Undo};
use crate::host::mounts;
use crate::hypervisor::{DeviceType, ShareFsDevice};
use crate::paths::{GUEST_SHARE, SHARE_TAG, SandboxPaths, guest_passthrough};

/// A way to share host files with a guest.
#[async_trait]
pub trait ShareFs: Send + Sync {
    /// The mounts below the share.
    fn get_share_fs_mount(&self) -> Arc<dyn ShareFsMount>;
    /// Creates the shared folder and its device.
    async fn setup_device_before_start_vm(&self, devices: &DeviceManager) -> Result<()>;
    /// What the agent mounts to see the share.
    fn get_storages(&self) -> Vec<Storage>;
    /// Stops serving.
    fn stop(&self);
}

/// The mounts below a share.
pub trait ShareFsMount: Send + Sync {
    /// Shares a container's rootfs; returns its path in the guest.
    ///
    /// # Errors
    /// Naming source and target.
    fn share_rootfs(&self, container: &str, source: &Path) -> Result<String>;
    /// Shares a file or folder under `name`; returns its path in the guest.
    ///
    /// # Errors
    /// Naming source and target.
    fn share_volume(&self, name: &str, source: &Path, how: Bind) -> Result<String>;
    /// Stops sharing a volume.
    ///
    /// # Errors
    /// Naming the mount that stays.
    fn umount_volume(&self, name: &str) -> Result<()>;
    /// Stops sharing a container's rootfs.
    ///
    /// # Errors
    /// Naming the mount that stays.
    fn umount_rootfs(&self, container: &str) -> Result<()>;
    /// Stops sharing everything.
    ///
    /// # Errors
    /// Naming the mount that stays.
    fn cleanup(&self) -> Result<()>;
}

/// virtio-fs served by threads of this process.
pub struct InlineVirtioFs {
    device: ShareFsDevice,
    mount: Arc<ShareMounts>,
}

impl InlineVirtioFs {
    /// A share with the settings of `config`; nothing is created yet.
    pub fn new(paths: &SandboxPaths, config: &HypervisorConfig, journal: Arc<Journal>) -> Self {
        let device = ShareFsDevice {
            id: "share".into(),
            tag: SHARE_TAG.into(),
            shared_dir: paths.share(),
            cache: config.virtio_fs_cache,
            threads: config.virtio_fs_threads(),
        };
        let mount = ShareMounts {
            paths: paths.clone(),
            journal,
            shared: Mutex::default(),
        };
        Self {
            device,
            mount: Arc::new(mount),
        }
    }
}

#[async_trait]
impl ShareFs for InlineVirtioFs {
    fn get_share_fs_mount(&self) -> Arc<dyn ShareFsMount> {
        self.mount.clone()
    }

    async fn setup_device_before_start_vm(&self, devices: &DeviceManager) -> Result<()> {
        let share = self.mount.paths.share();
        let failed = |error| Error::new(ErrorKind::Internal, format!("share {}: {error}", share.display()));
        fs::create_dir_all(share.join("passthrough")).map_err(failed)?;
        // Guest root owns what it makes here; nobody else on the host has business in it.
        fs::set_permissions(&share, fs::Permissions::from_mode(0o700)).map_err(failed)?;
        self.mount.record(&Undo::Unmount(share.clone()))?;
        // The threads that serve the share look into this mount namespace: nothing has to be propagated to them.
        bind_to_itself(&share)?;
        devices
            .attach(DeviceType::ShareFs(self.device.clone()))
            .await
            .map(drop)
    }

    fn get_storages(&self) -> Vec<Storage> {
        vec![Storage {
            driver: "virtio-fs".into(),
            source: SHARE_TAG.into(),
            fstype: "virtiofs".into(),
            // Device nodes are the agent's business: its rules make the difference between EACCES and EPERM.
            options: Vec::new(),
            mount_point: format!("{GUEST_SHARE}/"),
            ..Default::default()
        }]
    }

    fn stop(&self) {
        if let Err(error) = self.mount.cleanup() {
            tracing::warn!(%error, "share");
        }
    }
}

struct ShareMounts {
    paths: SandboxPaths,
    journal: Arc<Journal>,
    shared: Mutex<HashSet<String>>,
}

impl ShareMounts {
    fn record(&self, undo: &Undo) -> Result<()> {
        Ok(self.journal.record(undo)?)
    }

    fn share(&self, name: &str, source: &Path, how: Bind) -> Result<String> {
        let target = self.paths.passthrough(name);
        let metadata = fs::metadata(source).map_err(|error| {
            let kind = match error.kind() {
                std::io::ErrorKind::NotFound => ErrorKind::NotFound,
                _ => ErrorKind::Internal,
            };
            Error::new(kind, format!("share {}: {error}", source.display()))
        })?;
        make_target(&target, metadata.is_dir()).map_err(|error| {
            Error::new(
                ErrorKind::Internal,
                format!("mount point {}: {error}", target.display()),
            )
        })?;
        self.record(&Undo::Unmount(target.clone()))?;
        bind(source, &target, how)?;
        self.shared
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(name.to_owned());
        Ok(guest_passthrough(name))
    }

    fn unshare(&self, name: &str) -> Result<()> {
        let target = self.paths.passthrough(name);
        mounts::unmount(&target)?;
        self.journal.strike(&Undo::Unmount(target.clone()));
        // The mount point only; what was shared stays untouched.
        let removed = if target.is_dir() {
            fs::remove_dir(&target)
        } else {
            fs::remove_file(&target)
        };
        if let Err(error) = removed
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::debug!(target = %target.display(), %error, "mount point stays until the sandbox ends");
        }
        self.shared
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(name);
        Ok(())
    }
}

fn make_target(target: &PathBuf, folder: bool) -> std::io::Result<()> {
    if folder {
        return fs::create_dir_all(target);
    }
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(target)
        .map(drop)
}

impl ShareFsMount for ShareMounts {
    fn share_rootfs(&self, container: &str, source: &Path) -> Result<String> {
        self.share(&format!("{container}/rootfs"), source, Bind::tree())
    }

    fn share_volume(&self, name: &str, source: &Path, how: Bind) -> Result<String> {
        self.share(name, source, how)
    }

    fn umount_volume(&self, name: &str) -> Result<()> {
        self.unshare(name)
    }

    fn umount_rootfs(&self, container: &str) -> Result<()> {
        self.unshare(&format!("{container}/rootfs"))?;
        match fs::remove_dir(self.paths.passthrough(container)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::debug!(container, %error, "share folder of the container stays until the sandbox ends");
            }
            _ => {}
        }
        Ok(())
    }

    fn cleanup(&self) -> Result<()> {
        let names: Vec<String> = {
            let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
            shared.iter().cloned().collect()
        };
        names.iter().try_for_each(|name| self.unshare(name))
    }
}
