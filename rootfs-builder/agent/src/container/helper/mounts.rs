//! A container's mounts, as runc makes them.
//!
//! libcontainer refuses what images and `ctr` send every day: a mount without a source, a destination that is a dangling
//! link, a kind of propagation. So the helper makes the mounts itself, on the container's root and in a mount namespace
//! of its own, of which libcontainer takes a copy. What it must make is what shows the container's other namespaces
//! (proc, sysfs, cgroup, mqueue), and what lies below or above those.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::symlinkat;
use oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};

use super::inside::{Kind, Root, name_of};
use crate::container::spec::namespace;
use crate::mount_options::MountOptions;

/// Filesystems that show the namespaces of whoever mounts them.
const VIEWS: [&str; 5] = ["proc", "sysfs", "cgroup", "cgroup2", "mqueue"];
/// runc's link, for programs that look for a system's memory there.
const CORE: (&str, &str) = ("/proc/kcore", "core");

/// A container that cannot have its mounts.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The root filesystem is not there.
    #[error("container root {0}: not a directory in the guest")]
    Root(PathBuf),
    /// No mount namespace for the helper.
    #[error("mount namespace of the container's helper: {0}")]
    Namespace(nix::Error),
    /// A mount failed.
    #[error("mount {source_name} on {destination}: {reason}")]
    Mount {
        /// What.
        source_name: String,
        /// Where in the container.
        destination: PathBuf,
        /// Why not.
        reason: nix::Error,
    },
    /// The working directory is not there and cannot be made.
    #[error("working directory {path}: {reason}")]
    WorkingDirectory {
        /// Its path in the container.
        path: PathBuf,
        /// Why not.
        reason: nix::Error,
    },
}

/// Makes what mounts of `spec` can be made here, and leaves it those that libcontainer has to make. Makes the working
/// directory, too.
///
/// # Errors
/// Nothing of the mounts is left once the calling process ends.
pub fn prepare(spec: &mut Spec) -> Result<(), MountError> {
    let path = spec
        .root()
        .as_ref()
        .map(|root| root.path().clone())
        .unwrap_or_default();
    let open = || Root::open(&path).map_err(|_| MountError::Root(path.clone()));
    open()?;
    if namespace(spec, LinuxNamespaceType::User).is_some() {
        // What is mounted inside of it belongs to its root user, so libcontainer does all of it there.
        return Ok(());
    }
    unshare(CloneFlags::CLONE_NEWNS).map_err(MountError::Namespace)?;
    // Nothing that is mounted here reaches the agent.
    let slave = MsFlags::MS_SLAVE | MsFlags::MS_REC;
    mount(None::<&str>, "/", None::<&str>, slave, None::<&str>).map_err(MountError::Namespace)?;
    // Again, because what was opened before belongs to the agent's namespace, and nothing can be mounted there.
    let root = open()?;

    let mut left = Vec::new();
    let mut left_at: Vec<PathBuf> = Vec::new();
    for mut entry in spec.mounts_mut().take().unwrap_or_default() {
        let fstype = entry.typ().clone().unwrap_or_default();
        let failed = |reason| MountError::Mount {
            source_name: entry
                .source()
                .as_ref()
                .map_or(fstype.clone(), |path| path.display().to_string()),
            destination: entry.destination().clone(),
            reason,
        };
        let options = MountOptions::parse(entry.options().as_deref().unwrap_or_default());
        let bind = fstype == "bind" || options.flags.contains(MsFlags::MS_BIND);
        let view = !bind && VIEWS.contains(&fstype.as_str());
        let resolved = if view {
            // Not through links: a /proc elsewhere would escape what is masked in it. libcontainer checks that.
            lexical(entry.destination())
        } else {
            root.resolve(entry.destination()).map_err(failed)?
        };
        let touches = |other: &PathBuf| other.starts_with(&resolved) || resolved.starts_with(other);
        if view || left_at.iter().any(touches) {
            if entry.source().is_none() {
                entry.set_source(Some(fstype.into()));
            }
            left_at.push(resolved);
            left.push(entry);
        } else {
            make(&root, &resolved, &entry, &fstype, &options, bind).map_err(failed)?;
        }
    }
    spec.set_mounts(Some(left));
    make_working_directory(&root, spec, &left_at)
}

fn make(
    root: &Root,
    resolved: &Path,
    entry: &Mount,
    fstype: &str,
    options: &MountOptions,
    bind: bool,
) -> nix::Result<()> {
    if bind {
        let source = entry.source().clone().unwrap_or_default();
        let metadata = std::fs::metadata(&source).map_err(errno)?;
        let kind = if metadata.is_dir() {
            Kind::Directory
        } else {
            Kind::File
        };
        let target = root.make(resolved, kind)?;
        let recursive = options.flags & MsFlags::MS_REC;
        mount(
            Some(&source),
            &name_of(&target),
            None::<&str>,
            MsFlags::MS_BIND | recursive,
            None::<&str>,
        )?;
        // A bind mount takes its flags from its source; others are a second step, for the top only.
        let flags = options.flags - MsFlags::MS_BIND - MsFlags::MS_REC - MsFlags::MS_REMOUNT;
        if !flags.is_empty() {
            let top = root.make(resolved, kind)?;
            let remount = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | flags;
            mount(None::<&str>, &name_of(&top), None::<&str>, remount, None::<&str>)?;
        }
        return finish(&root.make(resolved, kind)?, options);
    }
    let target = root.make(resolved, Kind::Directory)?;
    let device_folder = entry.destination() == Path::new("/dev");
    let mut flags = options.flags;
    if device_folder {
        // Nodes and links are still to be made in it.
        flags.remove(MsFlags::MS_RDONLY);
    }
    let name = entry.source().clone().unwrap_or_else(|| fstype.into());
    let data = Some(options.data.as_str()).filter(|data| !data.is_empty());
    mount(Some(&name), &name_of(&target), Some(fstype), flags, data)?;
    let top = root.make(resolved, Kind::Directory)?;
    if device_folder {
        // A full or foreign /dev may have it, or no room for it.
        let _ = symlinkat(CORE.0, &top, CORE.1);
    }
    finish(&top, options)
}

/// What mount(2) does not do in the same call.
fn finish(top: &OwnedFd, options: &MountOptions) -> nix::Result<()> {
    if options.set_below | options.clear_below != 0 {
        set_attributes_below(top, options)?;
    }
    for kind in &options.propagation {
        mount(None::<&str>, &name_of(top), None::<&str>, *kind, None::<&str>)?;
    }
    Ok(())
}

fn set_attributes_below(top: &OwnedFd, options: &MountOptions) -> nix::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: options.set_below,
        attr_clr: options.clear_below,
        propagation: 0,
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    // SAFETY: mount_setattr reads an empty path and one `mount_attr` of the size it is told; both outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            top.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    nix::errno::Errno::result(result).map(drop)
}

/// runc makes it, with everything above it. Below what is mounted later it cannot be made yet, and exists or does not.
fn make_working_directory(root: &Root, spec: &Spec, left_at: &[PathBuf]) -> Result<(), MountError> {
    let path = match spec.process() {
        Some(process) => process.cwd().clone(),
        None => return Ok(()),
    };
    let failed = |reason| MountError::WorkingDirectory {
        path: path.clone(),
        reason,
    };
    if left_at.iter().any(|below| lexical(&path).starts_with(below)) {
        return Ok(());
    }
    let resolved = root.resolve(&path).map_err(failed)?;
    if left_at.iter().any(|below| resolved.starts_with(below)) {
        return Ok(());
    }
    root.make(&resolved, Kind::Directory).map(drop).map_err(failed)
}

/// The path as it is written, from the root on.
fn lexical(path: &Path) -> PathBuf {
    let mut names = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => names.push(name),
            Component::ParentDir => drop(names.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    names
}

fn errno(error: io::Error) -> nix::Error {
    nix::Error::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_when_written_with_dots_is_seen_from_the_root() {
        for (path, expected) in [("/proc/../sys/./x", "sys/x"), ("../../a", "a"), ("/", "")] {
            assert_eq!(lexical(Path::new(path)), Path::new(expected));
        }
    }
}
