//! Volumes and root filesystems: what the host asks to be available at a path in the guest.

pub mod submounts;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{Gid, chown, syncfs};
use protocols::agent::Storage;
use protocols::types::FSGroupChangePolicy;
use tokio::time::sleep;

use crate::container::devices;
use crate::hotplug::Hotplug;
use crate::mount_options::MountOptions;

/// Names of the drivers, for `GetGuestDetails`.
pub const DRIVERS: [&str; 6] = ["virtio-fs", "overlayfs", "local", "ephemeral", "mmioblk", "blk"];

/// overlayfs driver option that names a folder to be made first (its upper or work folder).
const CREATE_FOLDER: &str = "io.katacontainers.volume.overlayfs.create_directory=";
const DEVICE_POLL: Duration = Duration::from_millis(2);
/// Permissions of a shared volume's group: it may do what the owner may, and new files stay in the group.
const GROUP_RW: u32 = 0o2060;
const GROUP_SEARCH: u32 = 0o0010;

/// A volume that could not be made available.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// No such driver here.
    #[error("storage driver {0:?}: not supported by this agent")]
    Driver(String),
    /// A mount point that is not an absolute path.
    #[error("storage mount point {0:?}: not an absolute path")]
    MountPoint(String),
    /// Mounting failed.
    #[error("mount {source_name} ({fstype}) on {target}: {reason}")]
    Mount {
        /// What.
        source_name: String,
        /// Its type.
        fstype: String,
        /// Where.
        target: PathBuf,
        /// Why not.
        reason: nix::Error,
    },
    /// A folder or file could not be made or changed.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// An option with a bad value.
    #[error("storage option {0:?}: not valid")]
    Option(String),
    /// The device never appeared.
    #[error("device {path}: did not appear within {} s", timeout.as_secs())]
    Device {
        /// Its path.
        path: String,
        /// How long was waited.
        timeout: Duration,
    },
}

/// Volumes in use, by mount point, with the number of their users.
#[derive(Default)]
pub struct Mounted {
    by_path: HashMap<PathBuf, (usize, Release)>,
}

/// What a volume is, as far as its end goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A folder of the guest's, which goes with its contents.
    Folder,
    /// A mount of memory or of the host's share.
    Mount,
    /// A mount with data of its own, which outlive it.
    Disk,
}

impl Kind {
    fn of(storage: &Storage) -> Self {
        match storage.driver.as_str() {
            "local" => Self::Folder,
            "virtio-fs" | "ephemeral" => Self::Mount,
            _ => Self::Disk,
        }
    }
}

/// How to undo one volume.
#[derive(Clone, Debug)]
pub struct Release {
    path: PathBuf,
    kind: Kind,
}

impl Mounted {
    /// Adds a user to the volume at `path`; false if there is none.
    pub fn share(&mut self, path: &Path) -> bool {
        self.by_path.get_mut(path).map(|(users, _)| *users += 1).is_some()
    }

    /// Notes a new volume with one user.
    pub fn insert(&mut self, path: PathBuf, storage: &Storage) {
        let release = Release {
            path: path.clone(),
            kind: Kind::of(storage),
        };
        self.by_path.insert(path, (1, release));
    }

    /// Removes a user; what to do if it was the last.
    #[must_use]
    pub fn release(&mut self, path: &Path) -> Option<Release> {
        let (users, release) = self.by_path.get_mut(path)?;
        *users -= 1;
        if *users > 0 {
            return None;
        }
        let release = release.clone();
        self.by_path.remove(path);
        Some(release)
    }

    /// Releases everything, inner mounts first.
    pub fn release_all(self) {
        let mut releases: Vec<Release> = self.by_path.into_values().map(|(_, release)| release).collect();
        releases.sort_unstable_by(|one, other| other.path.cmp(&one.path));
        releases.into_iter().for_each(|release| release.run());
    }
}

impl Release {
    /// Unmounts, and removes the mount point if it is empty; a "local" volume goes with its contents. What was written to a
    /// disk has reached it afterwards. Blocks.
    pub fn run(&self) {
        if self.kind == Kind::Disk {
            // An unmount does it only if nobody else has the filesystem: the mount namespace of a container that has ended is
            // taken down a moment after its last process. And it does not tell of errors.
            if let Err(error) = write_back(&self.path) {
                tracing::error!(
                    "write back {}: {error}; what was written last may be lost",
                    self.path.display()
                );
            }
        }
        if self.kind != Kind::Folder {
            let unmounted = umount2(&self.path, MntFlags::empty()).or_else(|busy| {
                tracing::info!("unmount {}: {busy}; detached", self.path.display());
                umount2(&self.path, MntFlags::MNT_DETACH)
            });
            if let Err(error) = unmounted {
                tracing::warn!("unmount {}: {error}", self.path.display());
            }
            // Not empty: it existed before, with something in it.
            let _ = fs::remove_dir(&self.path);
        } else if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!("remove {}: {error}", self.path.display());
        }
    }
}

fn write_back(path: &Path) -> io::Result<()> {
    Ok(syncfs(fs::File::open(path)?)?)
}

/// Makes `storage` available at its mount point.
///
/// # Errors
/// Its driver is unknown, its device does not come, or it cannot be mounted.
pub async fn add(storage: &Storage, hotplug: &Hotplug) -> Result<(), StorageError> {
    let target = PathBuf::from(&storage.mount_point);
    if !target.is_absolute() || target.components().any(|part| part == Component::ParentDir) {
        return Err(StorageError::MountPoint(storage.mount_point.clone()));
    }
    let fstype = match storage.driver.as_str() {
        "virtio-fs" => "virtiofs",
        "overlayfs" => "overlay",
        "ephemeral" | "local" => "tmpfs",
        "mmioblk" | "blk" => {
            wait_for_device(&storage.source, hotplug).await?;
            "ext4"
        }
        _ => return Err(StorageError::Driver(storage.driver.clone())),
    };
    let fstype = if storage.fstype.is_empty() {
        fstype.to_owned()
    } else {
        storage.fstype.clone()
    };
    let storage = storage.clone();
    // virtio-fs and disks answer when the host does.
    let work = move || add_blocking(&storage, &target, &fstype);
    let failed = |error| StorageError::File {
        path: PathBuf::new(),
        source: io::Error::other(error),
    };
    tokio::task::spawn_blocking(work).await.map_err(failed)?
}

/// Waits until the device node `path` exists: a hot-plugged device takes a moment.
///
/// # Errors
/// It does not appear.
pub async fn wait_for_device(path: &str, hotplug: &Hotplug) -> Result<(), StorageError> {
    let appears = async {
        while !Path::new(path).exists() {
            sleep(DEVICE_POLL).await;
        }
    };
    hotplug.wait(appears).await.ok_or_else(|| StorageError::Device {
        path: path.to_owned(),
        timeout: hotplug.patience(),
    })
}

fn add_blocking(storage: &Storage, target: &Path, fstype: &str) -> Result<(), StorageError> {
    make_folder(target)?;
    if storage.driver == "local" {
        return prepare_local(storage, target);
    }
    for option in &storage.driver_options {
        if let Some(folder) = option.strip_prefix(CREATE_FOLDER) {
            make_folder(Path::new(folder))?;
        }
    }
    let options = MountOptions::parse(&storage.options);
    let mut flags = options.flags;
    if !devices::supported() {
        flags.insert(MsFlags::MS_NODEV);
    }
    let failed = |reason| StorageError::Mount {
        source_name: storage.source.clone(),
        fstype: fstype.to_owned(),
        target: target.to_owned(),
        reason,
    };
    let data = Some(options.data.as_str()).filter(|data| !data.is_empty());
    mount(Some(storage.source.as_str()), target, Some(fstype), flags, data).map_err(failed)?;
    for kind in options.propagation {
        mount(None::<&str>, target, None::<&str>, kind, None::<&str>).map_err(failed)?;
    }
    apply_group(storage, target, flags)
}

/// A "local" volume is a plain folder in the guest; `mode=0777` among its options is its permissions.
fn prepare_local(storage: &Storage, target: &Path) -> Result<(), StorageError> {
    for option in &storage.options {
        let Some(mode) = option.strip_prefix("mode=") else {
            continue;
        };
        let mode = u32::from_str_radix(mode, 8).map_err(|_| StorageError::Option(option.clone()))?;
        set_mode(target, mode)?;
    }
    apply_group(storage, target, MsFlags::empty())
}

/// Kubernetes' fsGroup, for the volume's top folder.
fn apply_group(storage: &Storage, target: &Path, flags: MsFlags) -> Result<(), StorageError> {
    let Some(group) = storage.fs_group.as_ref() else {
        return Ok(());
    };
    if flags.contains(MsFlags::MS_RDONLY) {
        return Ok(());
    }
    let failed = |source| StorageError::File {
        path: target.to_owned(),
        source,
    };
    let metadata = fs::metadata(target).map_err(failed)?;
    let unchanged = std::os::unix::fs::MetadataExt::gid(&metadata) == group.group_id;
    if unchanged && group.group_change_policy == FSGroupChangePolicy::OnRootMismatch.into() {
        return Ok(());
    }
    chown(target, None, Some(Gid::from_raw(group.group_id))).map_err(|error| failed(error.into()))?;
    set_mode(target, metadata.permissions().mode() | GROUP_RW | GROUP_SEARCH)
}

fn set_mode(path: &Path, mode: u32) -> Result<(), StorageError> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(|source| StorageError::File {
        path: path.to_owned(),
        source,
    })
}

fn make_folder(path: &Path) -> Result<(), StorageError> {
    fs::create_dir_all(path).map_err(|source| StorageError::File {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volume_when_shared_is_released_by_its_last_user() {
        let mut mounted = Mounted::default();
        let path = PathBuf::from("/run/x");
        mounted.insert(
            path.clone(),
            &Storage {
                driver: "local".into(),
                ..Default::default()
            },
        );

        assert!(mounted.share(&path));
        assert!(mounted.release(&path).is_none());
        assert!(
            mounted
                .release(&path)
                .is_some_and(|release| release.kind == Kind::Folder)
        );
        assert!(!mounted.share(&path));
        assert!(mounted.release(&path).is_none());
    }

    #[tokio::test]
    async fn storage_when_bad_is_refused_with_its_value() {
        let with = |driver: &str, mount_point: &str| Storage {
            driver: driver.into(),
            mount_point: mount_point.into(),
            ..Default::default()
        };

        let impatient = Hotplug::new(Duration::from_millis(5), false);

        let error = add(&with("nvdimm", "/run/x"), &impatient).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "storage driver \"nvdimm\": not supported by this agent"
        );
        let error = add(&with("local", "/run/../etc"), &impatient).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "storage mount point \"/run/../etc\": not an absolute path"
        );
        let missing = Storage {
            source: "/dev/none".into(),
            ..with("mmioblk", "/run/x")
        };
        let error = add(&missing, &impatient).await.unwrap_err();
        assert_eq!(error.to_string(), "device /dev/none: did not appear within 0 s");
    }
}
