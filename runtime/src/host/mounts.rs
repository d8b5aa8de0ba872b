//! Mounts on the host: containerd's mount requests, binds, and getting rid of both.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};

use super::{mkdir, mountinfo, overlay};
use crate::types::Mount;

/// A mount that did not work.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// Making the mount failed.
    #[error("mount {source_path} on {} (type {fs_type}, options {options:?}): {source}", target.display())]
    Mount {
        /// What was to be mounted.
        source_path: String,
        /// Where.
        target: PathBuf,
        /// Filesystem type.
        fs_type: String,
        /// Options as requested.
        options: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Making or changing the mount point failed.
    #[error("mount point {}: {source}", target.display())]
    Target {
        /// The mount point.
        target: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Unmounting failed.
    #[error("unmount {}: {source}", target.display())]
    Unmount {
        /// The mount point.
        target: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A folder that is to be removed still has mounts, and removing it would delete what they show.
    #[error("{}: not removed, {} is still mounted", folder.display(), mount.display())]
    Busy {
        /// The folder.
        folder: PathBuf,
        /// A mount below it.
        mount: PathBuf,
    },
    /// Removing a file or folder failed.
    #[error("remove {}: {source}", path.display())]
    Remove {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// /proc/self/mountinfo cannot be read.
    #[error("/proc/self/mountinfo: {0}")]
    MountInfo(io::Error),
}

impl From<MountError> for crate::error::Error {
    fn from(error: MountError) -> Self {
        use crate::error::ErrorKind;
        let kind = match &error {
            MountError::Mount { source, .. } | MountError::Target { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => ErrorKind::NotFound,
                io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
                io::ErrorKind::InvalidInput => ErrorKind::InvalidArgument,
                _ => ErrorKind::Internal,
            },
            _ => ErrorKind::Internal,
        };
        Self::new(kind, error.to_string())
    }
}

/// Makes one mount of containerd's request on `target`.
///
/// # Errors
/// [`MountError::Mount`] naming source, target, type and options; [`MountError::Target`] for a folder that cannot be made.
pub fn mount_request(request: &Mount, target: &Path) -> Result<(), MountError> {
    let request = &*mkdir::make_folders(request)?;
    let (flags, propagation, data) = parse_options(&request.options);
    let fs_type = if flags.contains(MsFlags::MS_BIND) {
        ""
    } else {
        request.fs_type.as_str()
    };
    let error = |errno: nix::Error| MountError::Mount {
        source_path: request.source.clone(),
        target: target.to_owned(),
        fs_type: request.fs_type.clone(),
        options: request.options.join(","),
        source: errno.into(),
    };
    let some = |text: &str| {
        if text.is_empty() {
            None
        } else {
            Some(text.to_owned())
        }
    };
    let source = request.source.as_str();
    if data.len() > overlay::MAX_OPTIONS {
        return mount_long(request, target, flags, &data);
    }
    mount(
        Some(source),
        target,
        some(fs_type).as_deref(),
        flags,
        some(&data).as_deref(),
    )
    .map_err(error)?;
    // The kernel ignores every other flag of a bind mount; a second call applies them.
    let rest = flags & !(MsFlags::MS_BIND | MsFlags::MS_REC);
    if flags.contains(MsFlags::MS_BIND) && !rest.is_empty() {
        remount(target, rest).map_err(error)?;
    }
    if !propagation.is_empty() {
        mount(None::<&str>, target, None::<&str>, propagation, None::<&str>).map_err(error)?;
    }
    Ok(())
}

/// More options than mount(2) takes; it would cut them off without a word.
fn mount_long(request: &Mount, target: &Path, flags: MsFlags, data: &str) -> Result<(), MountError> {
    let mounted = match request.fs_type.as_str() {
        "overlay" => overlay::mount_long(&request.source, target, flags, data),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "{} bytes of options, {} is the most",
                data.len(),
                overlay::MAX_OPTIONS
            ),
        )),
    };
    mounted.map_err(|source| MountError::Mount {
        source_path: request.source.clone(),
        target: target.to_owned(),
        fs_type: request.fs_type.clone(),
        // Not all of them: nobody reads pages.
        options: format!("{} bytes", data.len()),
        source,
    })
}

fn remount(target: &Path, flags: MsFlags) -> nix::Result<()> {
    let flags = flags | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
    mount(None::<&str>, target, None::<&str>, flags, None::<&str>)
}

/// Detaches what is mounted on `target`, all layers of it; fine when nothing is.
///
/// # Errors
/// [`MountError::Unmount`].
pub fn unmount(target: &Path) -> Result<(), MountError> {
    loop {
        match umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) if may_be_mounted(target) => {}
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => return Ok(()),
            Err(errno) => {
                return Err(MountError::Unmount {
                    target: target.to_owned(),
                    source: errno.into(),
                });
            }
        }
    }
}

/// Whether another mount may be on `target`. An unmount waits for the disk, and a container has a handful: asking costs less than
/// one more that finds nothing.
fn may_be_mounted(target: &Path) -> bool {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    match statx(CWD, target, flags, StatxFlags::empty()) {
        // Before Linux 5.8 nobody knows.
        Ok(stat) => {
            !stat.stx_attributes_mask.contains(StatxAttributes::MOUNT_ROOT)
                || stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)
        }
        Err(_) => true,
    }
}

/// Detaches every mount on and below `folder`, last mounted first. Fine when there is none, or no folder.
///
/// # Errors
/// [`MountError::Unmount`] for the first one that stays, after having tried the rest.
pub fn unmount_below(folder: &Path) -> Result<(), MountError> {
    let mut result = Ok(());
    for point in mounts_below(folder)?.iter().rev() {
        result = result.and(unmount(point));
    }
    result
}

/// Whether anything is mounted below `folder`, itself not counted.
///
/// # Errors
/// [`MountError::MountInfo`].
pub fn has_mounts_below(folder: &Path) -> Result<bool, MountError> {
    let real = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    Ok(mounts_below(&real)?.iter().any(|point| *point != real))
}

/// Removes `folder` with everything in it, after making sure that nothing is mounted there: through a mount, removing
/// would delete files of others. Fine when it does not exist.
///
/// # Errors
/// [`MountError::Busy`] when a mount is left, [`MountError::Remove`] otherwise.
pub fn remove_tree(folder: &Path) -> Result<(), MountError> {
    unmount_below(folder)?;
    if let Some(mount) = mounts_below(folder)?.into_iter().next() {
        return Err(MountError::Busy {
            folder: folder.to_owned(),
            mount,
        });
    }
    gone(folder, fs::remove_dir_all(folder))
}

/// Removes a file; fine when it does not exist.
///
/// # Errors
/// [`MountError::Remove`].
pub fn remove_file(path: &Path) -> Result<(), MountError> {
    gone(path, fs::remove_file(path))
}

fn gone(path: &Path, result: io::Result<()>) -> Result<(), MountError> {
    match result {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(MountError::Remove {
            path: path.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}

fn mounts_below(folder: &Path) -> Result<Vec<PathBuf>, MountError> {
    // The mount table has real paths. What cannot be resolved (a dead FUSE mount) is looked for as it is named.
    let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    mountinfo::mounts_below(&folder).map_err(MountError::MountInfo)
}

/// Mount flags, propagation flags and the filesystem's own options of an fstab-like list.
fn parse_options(options: &[String]) -> (MsFlags, MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut propagation = MsFlags::empty();
    let mut data = Vec::new();
    for option in options {
        let (set, clear) = match option.as_str() {
            "" | "defaults" | "rw" | "loop" => (MsFlags::empty(), MsFlags::empty()),
            "ro" => (MsFlags::MS_RDONLY, MsFlags::empty()),
            "bind" => (MsFlags::MS_BIND, MsFlags::empty()),
            "rbind" => (MsFlags::MS_BIND | MsFlags::MS_REC, MsFlags::empty()),
            "nosuid" => (MsFlags::MS_NOSUID, MsFlags::empty()),
            "suid" => (MsFlags::empty(), MsFlags::MS_NOSUID),
            "nodev" => (MsFlags::MS_NODEV, MsFlags::empty()),
            "dev" => (MsFlags::empty(), MsFlags::MS_NODEV),
            "noexec" => (MsFlags::MS_NOEXEC, MsFlags::empty()),
            "exec" => (MsFlags::empty(), MsFlags::MS_NOEXEC),
            "noatime" => (MsFlags::MS_NOATIME, MsFlags::empty()),
            "nodiratime" => (MsFlags::MS_NODIRATIME, MsFlags::empty()),
            "relatime" => (MsFlags::MS_RELATIME, MsFlags::empty()),
            "strictatime" => (MsFlags::MS_STRICTATIME, MsFlags::empty()),
            "sync" => (MsFlags::MS_SYNCHRONOUS, MsFlags::empty()),
            "dirsync" => (MsFlags::MS_DIRSYNC, MsFlags::empty()),
            "private" => {
                propagation |= MsFlags::MS_PRIVATE;
                continue;
            }
            "rprivate" => {
                propagation |= MsFlags::MS_PRIVATE | MsFlags::MS_REC;
                continue;
            }
            "slave" => {
                propagation |= MsFlags::MS_SLAVE;
                continue;
            }
            "rslave" => {
                propagation |= MsFlags::MS_SLAVE | MsFlags::MS_REC;
                continue;
            }
            "shared" => {
                propagation |= MsFlags::MS_SHARED;
                continue;
            }
            "rshared" => {
                propagation |= MsFlags::MS_SHARED | MsFlags::MS_REC;
                continue;
            }
            other => {
                data.push(other);
                continue;
            }
        };
        flags = (flags | set) & !clear;
    }
    (flags, propagation, data.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::bind::{Bind, ReadOnly, bind};

    #[test]
    fn options_when_split_are_flags_and_data() {
        let options = [
            "ro",
            "rbind",
            "nosuid",
            "suid",
            "rslave",
            "lowerdir=/a:/b",
            "index=off",
        ]
        .map(String::from);

        let (flags, propagation, data) = parse_options(&options);

        assert_eq!(flags, MsFlags::MS_RDONLY | MsFlags::MS_BIND | MsFlags::MS_REC);
        assert_eq!(propagation, MsFlags::MS_SLAVE | MsFlags::MS_REC);
        assert_eq!(data, "lowerdir=/a:/b,index=off");
    }

    #[test]
    fn unmount_when_mounts_are_stacked_takes_all() {
        let folder = tempfile::tempdir().unwrap();
        let (source, target) = (folder.path().join("source"), folder.path().join("target"));
        for path in [&source, &target] {
            fs::create_dir(path).unwrap();
        }
        for _ in 0..3 {
            mount(
                Some(&source),
                &target,
                None::<&str>,
                MsFlags::MS_BIND,
                None::<&str>,
            )
            .unwrap();
        }

        unmount(&target).unwrap();

        assert_eq!(mounts_below(folder.path()).unwrap(), Vec::<PathBuf>::new());
        assert!(!may_be_mounted(&target));
    }

    #[test]
    fn remove_tree_when_bound_leaves_the_source_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (source, tree) = (folder.path().join("source"), folder.path().join("tree"));
        let target = tree.join("target");
        fs::create_dir_all(&source).unwrap();
        fs::create_dir_all(&target).unwrap();
        fs::write(source.join("precious"), "x").unwrap();
        let read_only = Bind {
            read_only: ReadOnly::Top,
            ..Bind::tree()
        };
        bind(&source, &target, read_only).unwrap();
        assert!(fs::write(target.join("new"), "x").is_err(), "read-only");

        remove_tree(&tree).unwrap();

        assert!(!tree.exists());
        assert!(source.join("precious").exists());
        remove_tree(&tree).unwrap();
    }

    #[test]
    fn options_when_beyond_a_page_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let request = Mount {
            fs_type: "tmpfs".into(),
            source: "tmpfs".into(),
            options: vec!["size=4k,".repeat(600), "nonsense".into()],
            ..Default::default()
        };
        let text = mount_request(&request, folder.path()).unwrap_err().to_string();
        assert!(text.contains("4095"), "{text}");
    }

    #[test]
    fn mount_when_it_fails_names_everything() {
        let request = Mount {
            fs_type: "ext4".into(),
            source: "/nonexistent".into(),
            ..Default::default()
        };
        let folder = tempfile::tempdir().unwrap();
        let text = mount_request(&request, folder.path()).unwrap_err().to_string();
        assert!(text.contains("/nonexistent") && text.contains("ext4"), "{text}");
    }
}
