//! A container's mounts: what the guest makes itself, what is shared from the host, what cannot be had.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use oci_spec::runtime::{Mount as OciMount, Spec};
use protocols::agent::{Device, Storage};

use super::device_manager::DeviceManager;
use super::share_fs::ShareFsMount;
use crate::error::{Error, ErrorKind, Result};
use crate::host::blocking;
use crate::paths::GUEST_SANDBOX;

/// Default size of a pod's /dev/shm, bytes.
pub const DEFAULT_SHM_SIZE: u64 = 64 << 20;

/// A mount of a container.
#[async_trait]
pub trait Volume: Send + Sync {
    /// The mount as the guest's spec has it; `None` drops it.
    fn get_volume_mount(&self) -> Option<OciMount>;
    /// What the agent has to mount for it.
    fn get_storage(&self) -> Option<Storage>;
    /// The device it is or is on, for the agent.
    fn get_device(&self) -> Option<Device> {
        None
    }
    /// Takes it away from the guest. Idempotent.
    ///
    /// # Errors
    /// Naming the mount that stays.
    async fn cleanup(&self, devices: &DeviceManager) -> Result<()>;
}

/// All mounts of a container.
#[derive(Default)]
pub struct Volumes {
    volumes: Vec<Box<dyn Volume>>,
}

impl Volumes {
    /// Sets up every mount of `spec`.
    ///
    /// # Errors
    /// Naming the mount that is missing or not supported; nothing is left shared or attached then.
    pub async fn new(
        share: Arc<dyn ShareFsMount>,
        devices: &DeviceManager,
        container: &str,
        spec: &Arc<Spec>,
    ) -> Result<Self> {
        let failed = |error: Error, mount: &OciMount| {
            let destination = mount.destination().display();
            error.context(format!("mount {destination} of container {container}"))
        };
        let looked_at = spec.clone();
        let kinds = blocking("volumes", move || {
            Ok(looked_at
                .mounts()
                .iter()
                .flatten()
                .map(classify)
                .collect::<Vec<_>>())
        });
        let mut volumes = Self::default();
        for (index, (mount, kind)) in spec.mounts().iter().flatten().zip(kinds.await?).enumerate() {
            let volume = match kind {
                Ok(kind) => set_up(&share, container, index, mount, kind).await,
                Err(error) => Err(error),
            };
            match volume {
                Ok(volume) => volumes.volumes.push(volume),
                Err(error) => {
                    volumes.cleanup(devices).await;
                    return Err(failed(error, mount));
                }
            }
        }
        Ok(volumes)
    }

    /// The mounts for the guest's spec.
    pub fn mounts(&self) -> Vec<OciMount> {
        self.volumes
            .iter()
            .filter_map(|volume| volume.get_volume_mount())
            .collect()
    }

    /// What the agent has to mount first.
    pub fn storages(&self) -> Vec<Storage> {
        self.volumes
            .iter()
            .filter_map(|volume| volume.get_storage())
            .collect()
    }

    /// Devices the agent hands on to the container.
    pub fn devices(&self) -> Vec<Device> {
        self.volumes
            .iter()
            .filter_map(|volume| volume.get_device())
            .collect()
    }

    /// Takes all of them away; what stays is logged and left to the journal.
    pub async fn cleanup(&self, devices: &DeviceManager) {
        for volume in self.volumes.iter().rev() {
            if let Err(error) = volume.cleanup(devices).await {
                tracing::warn!(%error, "volume");
            }
        }
    }
}

/// What becomes of a mount.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    /// The guest makes it from nothing: proc, tmpfs and the like, or binds its own file.
    Guest,
    /// The pod's shared memory.
    Shm,
    /// Bind of a host file or folder.
    Share { source: PathBuf, read_only: bool },
    /// Left out, with a warning.
    Dropped,
}

fn classify(mount: &OciMount) -> Result<Kind> {
    let destination = mount.destination();
    let options = mount.options().as_deref().unwrap_or_default();
    let option = |name: &str| options.iter().any(|option| option == name);
    let fs_type = mount.typ().as_deref().unwrap_or_default();
    let bind = fs_type == "bind" || option("bind") || option("rbind");
    if !bind {
        return match fs_type {
            "proc" | "sysfs" | "tmpfs" | "devpts" | "mqueue" | "cgroup" | "cgroup2" | "securityfs"
            | "debugfs" | "tracefs" | "bpf" => Ok(Kind::Guest),
            other => Err(Error::new(
                ErrorKind::Unimplemented,
                format!(
                    "filesystem type {other:?} is not supported inside the VM; bind-mount a host folder instead"
                ),
            )),
        };
    }
    let source = mount.source().clone().unwrap_or_default();
    if destination == Path::new("/dev/shm") {
        return Ok(Kind::Shm);
    }
    // /proc and /sys of the host would show the wrong kernel: the guest's own are bound.
    if source.starts_with("/proc") || source.starts_with("/sys") {
        return Ok(Kind::Guest);
    }
    let read_only = option("ro");
    let metadata = fs::metadata(&source).map_err(|error| {
        let kind = if error.kind() == std::io::ErrorKind::NotFound {
            ErrorKind::NotFound
        } else {
            ErrorKind::Internal
        };
        Error::new(kind, format!("source {}: {error}", source.display()))
    })?;
    let file_type = metadata.file_type();
    if source == Path::new("/dev") || file_type.is_char_device() {
        // The guest's devtmpfs has the same standard devices; others exist on the host only.
        tracing::warn!(source = %source.display(), destination = %destination.display(), "the guest's own device is mounted");
        return Ok(Kind::Guest);
    }
    if file_type.is_block_device() {
        tracing::warn!(source = %source.display(), destination = %destination.display(), "block devices are not passed to the guest: mount left out");
        return Ok(Kind::Dropped);
    }
    if file_type.is_socket() || file_type.is_fifo() {
        tracing::warn!(source = %source.display(), destination = %destination.display(), "sockets and FIFOs of the host cannot be used inside the VM");
    }
    Ok(Kind::Share { source, read_only })
}

async fn set_up(
    share: &Arc<dyn ShareFsMount>,
    container: &str,
    index: usize,
    mount: &OciMount,
    kind: Kind,
) -> Result<Box<dyn Volume>> {
    match kind {
        Kind::Guest => Ok(Box::new(GuestVolume {
            mount: Some(mount.clone()),
        })),
        Kind::Dropped => Ok(Box::new(GuestVolume { mount: None })),
        Kind::Shm => {
            let mut mount = mount.clone();
            mount.set_typ(Some("bind".into()));
            mount.set_source(Some(format!("{GUEST_SANDBOX}/shm").into()));
            mount.set_options(Some(vec!["rbind".into()]));
            Ok(Box::new(GuestVolume { mount: Some(mount) }))
        }
        Kind::Share { source, read_only } => {
            // Kata's naming: container, something unique, and the name people know it by.
            let base = mount
                .destination()
                .file_name()
                .map_or("root".into(), |name| name.to_string_lossy());
            let name = format!("{container}-{index:08x}-{base}");
            let guest_path = {
                let (share, name) = (share.clone(), name.clone());
                blocking("share", move || share.share_volume(&name, &source, read_only)).await?
            };
            let mut mount = mount.clone();
            mount.set_typ(Some("bind".into()));
            mount.set_source(Some(guest_path.into()));
            Ok(Box::new(ShareFsVolume {
                share: share.clone(),
                name,
                mount,
            }))
        }
    }
}

struct GuestVolume {
    mount: Option<OciMount>,
}

#[async_trait]
impl Volume for GuestVolume {
    fn get_volume_mount(&self) -> Option<OciMount> {
        self.mount.clone()
    }
    fn get_storage(&self) -> Option<Storage> {
        None
    }
    async fn cleanup(&self, _devices: &DeviceManager) -> Result<()> {
        Ok(())
    }
}

struct ShareFsVolume {
    share: Arc<dyn ShareFsMount>,
    name: String,
    mount: OciMount,
}

#[async_trait]
impl Volume for ShareFsVolume {
    fn get_volume_mount(&self) -> Option<OciMount> {
        Some(self.mount.clone())
    }
    fn get_storage(&self) -> Option<Storage> {
        None
    }
    async fn cleanup(&self, _devices: &DeviceManager) -> Result<()> {
        let (share, name) = (self.share.clone(), self.name.clone());
        blocking("volume", move || share.umount_volume(&name)).await
    }
}

/// Size of the pod's shared memory: that of the host folder bound to /dev/shm, or the default.
pub fn shm_size(spec: &Spec) -> u64 {
    let bound = spec
        .mounts()
        .iter()
        .flatten()
        .find(|mount| mount.destination() == Path::new("/dev/shm"));
    let source = bound
        .filter(|mount| mount.typ().as_deref() == Some("bind"))
        .and_then(|mount| mount.source().as_ref());
    let Some(source) = source else {
        return DEFAULT_SHM_SIZE;
    };
    match nix::sys::statfs::statfs(source) {
        Ok(stat) if stat.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC => {
            stat.blocks() * u64::try_from(stat.block_size()).unwrap_or(4096)
        }
        _ => DEFAULT_SHM_SIZE,
    }
}

/// The pod's shared memory, for CreateSandbox.
pub(super) fn shm_storage(size: u64) -> Storage {
    Storage {
        driver: "ephemeral".into(),
        source: "shm".into(),
        fstype: "tmpfs".into(),
        options: ["noexec", "nosuid", "nodev", "mode=1777", &format!("size={size}")]
            .map(String::from)
            .into(),
        mount_point: format!("{GUEST_SANDBOX}/shm"),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(destination: &str, fs_type: &str, source: &str, options: &[&str]) -> OciMount {
        let mut mount = OciMount::default();
        mount.set_destination(destination.into());
        mount.set_typ(Some(fs_type.into()));
        mount.set_source(Some(source.into()));
        mount.set_options(Some(options.iter().map(|option| (*option).to_owned()).collect()));
        mount
    }

    #[test]
    fn mounts_are_made_in_the_guest_shared_or_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_str().unwrap();
        let share = |read_only| Kind::Share {
            source: path.into(),
            read_only,
        };
        for (mount, expected) in [
            (mount("/proc", "proc", "proc", &["nosuid"]), Kind::Guest),
            (mount("/dev", "tmpfs", "tmpfs", &["mode=755"]), Kind::Guest),
            (mount("/dev/shm", "tmpfs", "shm", &["size=65536k"]), Kind::Guest),
            (mount("/dev/shm", "bind", path, &["rbind"]), Kind::Shm),
            (mount("/sys/fs/cgroup", "cgroup", "cgroup", &["ro"]), Kind::Guest),
            (mount("/data", "bind", path, &["rbind", "rw"]), share(false)),
            (mount("/data", "none", path, &["bind", "ro"]), share(true)),
            (mount("/host/proc", "bind", "/proc", &["rbind"]), Kind::Guest),
            (mount("/dev/null", "bind", "/dev/null", &["bind"]), Kind::Guest),
        ] {
            assert_eq!(classify(&mount).unwrap(), expected, "{mount:?}");
        }
    }

    #[test]
    fn missing_source_and_foreign_filesystems_are_named() {
        let error = classify(&mount("/data", "bind", "/nonexistent/x", &["rbind"])).unwrap_err();
        assert_eq!(error.kind, ErrorKind::NotFound);
        assert!(error.message.contains("/nonexistent/x"), "{error}");

        let error = classify(&mount("/data", "nfs", "host:/x", &[])).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unimplemented);
        assert!(error.message.contains("\"nfs\""), "{error}");
    }

    #[test]
    fn shm_takes_the_size_of_a_bound_tmpfs_only() {
        let mut spec = Spec::default();
        spec.set_mounts(Some(vec![mount("/dev/shm", "tmpfs", "shm", &["size=1k"])]));
        assert_eq!(shm_size(&spec), DEFAULT_SHM_SIZE);
        spec.set_mounts(Some(vec![mount("/dev/shm", "bind", "/nonexistent", &["rbind"])]));
        assert_eq!(shm_size(&spec), DEFAULT_SHM_SIZE);
    }
}
