//! Bind mounts, finished before anybody can see them.
//!
//! open_tree(2) copies the mounts, mount_setattr(2) gives the copy its propagation and flags, move_mount(2) puts it in
//! its place: no moment in which a read-only mount can be written through, and one system call for what mount(2) can
//! only do mount by mount. Linux 5.12 has all three.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::mounts::{MountError, unmount};

/// What of a bind mount is read-only.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ReadOnly {
    /// Nothing more than the source.
    #[default]
    No,
    /// The mount itself, not those below it: `ro`, as runc has it.
    Top,
    /// Everything that is mounted there now: `rro`.
    All,
}

/// How mounts that come and go at the source later matter to the copy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Propagation {
    /// Not at all.
    #[default]
    Private,
    /// They come and go at the copy, too. Nothing goes back.
    Slave,
}

/// A bind mount as it is asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bind {
    /// With everything that is mounted below the source: `rbind`.
    pub recursive: bool,
    /// Flags.
    pub read_only: ReadOnly,
    /// Later mounts.
    pub propagation: Propagation,
}

impl Bind {
    /// The whole tree, writable, private.
    pub fn tree() -> Self {
        Self {
            recursive: true,
            ..Self::default()
        }
    }
}

/// Binds `source` to `target`, which must exist.
///
/// # Errors
/// [`MountError::Mount`]; nothing is mounted then.
pub fn bind(source: &Path, target: &Path, how: Bind) -> Result<(), MountError> {
    copy(source, how)
        .and_then(|tree| attach(&tree, target))
        .map_err(|error| MountError::Mount {
            source_path: source.display().to_string(),
            target: target.to_owned(),
            fs_type: "bind".into(),
            options: format!("{how:?}"),
            source: error,
        })
}

/// Binds `folder` to itself: a mount of its own, whose mounts below are nobody else's.
///
/// # Errors
/// [`MountError::Mount`]; nothing is mounted then.
pub fn bind_to_itself(folder: &Path) -> Result<(), MountError> {
    bind(folder, folder, Bind::tree())?;
    // A mount below a shared one becomes shared itself (Documentation/filesystems/sharedsubtree.rst, 5b).
    let mount = OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let private = open_tree(CWD, folder, mount)
        .map_err(io::Error::from)
        .and_then(|mount| set(&mount, false, Attributes::private()));
    private.map_err(|source| {
        if let Err(undo) = unmount(folder) {
            tracing::warn!(%undo, "after a failed bind mount");
        }
        MountError::Target {
            target: folder.to_owned(),
            source,
        }
    })
}

fn copy(source: &Path, how: Bind) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if how.recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree = open_tree(CWD, source, flags)?;
    let propagation = match how.propagation {
        Propagation::Private => libc::MS_PRIVATE,
        Propagation::Slave => libc::MS_SLAVE,
    };
    let attributes = |read_only: bool| Attributes {
        set: if read_only { libc::MOUNT_ATTR_RDONLY } else { 0 },
        propagation,
    };
    set(&tree, true, attributes(how.read_only == ReadOnly::All))?;
    if how.read_only == ReadOnly::Top {
        set(&tree, false, attributes(true))?;
    }
    Ok(tree)
}

fn attach(tree: &OwnedFd, target: &Path) -> io::Result<()> {
    move_mount(tree, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(())
}

struct Attributes {
    set: u64,
    propagation: libc::c_ulong,
}

impl Attributes {
    fn private() -> Self {
        Self {
            set: 0,
            propagation: libc::MS_PRIVATE,
        }
    }
}

/// Changes the mount of `tree`, and with `recursive` those below it.
fn set(tree: &OwnedFd, recursive: bool, attributes: Attributes) -> io::Result<()> {
    let mount_attr = libc::mount_attr {
        attr_set: attributes.set,
        attr_clr: 0,
        propagation: attributes.propagation,
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    mount_setattr(std::os::fd::AsFd::as_fd(tree), flags, &mount_attr)
}

fn mount_setattr(tree: BorrowedFd<'_>, flags: libc::c_int, attributes: &libc::mount_attr) -> io::Result<()> {
    // SAFETY: the descriptor is open, the path is an empty constant, and the size is that of the structure behind the
    // pointer.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::*;
    use crate::host::mounts::{mount_request, remove_tree};
    use crate::types::Mount;

    /// A folder with a tmpfs on `source/below`, both private, as the host may have them; and a free `target`.
    struct Host {
        folder: tempfile::TempDir,
    }

    impl Host {
        fn new() -> Self {
            let host = Self {
                folder: tempfile::tempdir().unwrap(),
            };
            for name in ["source", "target"] {
                fs::create_dir(host.path(name)).unwrap();
            }
            // A tree of its own: the machine's propagation plays no part.
            bind_to_itself(&host.path("source")).unwrap();
            host.mount("source/below");
            host
        }

        fn path(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }

        fn mount(&self, name: &str) {
            fs::create_dir_all(self.path(name)).unwrap();
            let tmpfs = Mount {
                fs_type: "tmpfs".into(),
                source: "tmpfs".into(),
                ..Default::default()
            };
            mount_request(&tmpfs, &self.path(name)).unwrap();
        }

        fn share(&self, name: &str) {
            let shared = Attributes {
                set: 0,
                propagation: libc::MS_SHARED,
            };
            let mount = open_tree(CWD, self.path(name), OpenTreeFlags::OPEN_TREE_CLOEXEC).unwrap();
            set(&mount, true, shared).unwrap();
        }

        fn writable(&self, name: &str) -> bool {
            fs::write(self.path(name).join("new"), "x").is_ok()
        }
    }

    impl Drop for Host {
        fn drop(&mut self) {
            for name in ["target", "source"] {
                remove_tree(&self.path(name)).unwrap();
            }
        }
    }

    #[test]
    fn bind_when_read_only_is_the_top_mount_or_everything() {
        for (read_only, top, below) in [
            (ReadOnly::No, true, true),
            (ReadOnly::Top, false, true),
            (ReadOnly::All, false, false),
        ] {
            let host = Host::new();
            let how = Bind {
                read_only,
                ..Bind::tree()
            };

            bind(&host.path("source"), &host.path("target"), how).unwrap();

            assert_eq!(host.writable("target"), top, "{read_only:?}");
            assert_eq!(host.writable("target/below"), below, "{read_only:?}");
            assert!(
                host.writable("source") && host.writable("source/below"),
                "{read_only:?}"
            );
        }
    }

    #[test]
    fn bind_when_not_recursive_leaves_mounts_below() {
        let host = Host::new();
        fs::write(host.path("source/below/file"), "x").unwrap();

        bind(&host.path("source"), &host.path("target"), Bind::default()).unwrap();

        assert!(host.path("target/below").is_dir() && !host.path("target/below/file").exists());
    }

    #[test]
    fn bind_when_slave_sees_later_mounts() {
        for (propagation, seen) in [(Propagation::Slave, true), (Propagation::Private, false)] {
            let host = Host::new();
            host.share("source");
            let how = Bind {
                propagation,
                ..Bind::tree()
            };
            bind(&host.path("source"), &host.path("target"), how).unwrap();

            host.mount("source/later");
            fs::write(host.path("source/later/file"), "x").unwrap();
            assert_eq!(host.path("target/later/file").exists(), seen, "{propagation:?}");

            unmount(&host.path("source/later")).unwrap();
            assert!(!host.path("target/later/file").exists());

            host.mount("target/own");
            fs::write(host.path("target/own/file"), "x").unwrap();
            assert!(!host.path("source/own/file").exists(), "nothing goes back");
        }
    }

    #[test]
    fn bind_when_it_fails_names_source_and_target() {
        let host = Host::new();
        let error = bind(Path::new("/nonexistent/x"), &host.path("target"), Bind::tree()).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/x"), "{error}");
        assert!(bind(&host.path("source"), &host.path("nowhere"), Bind::tree()).is_err());
        assert!(host.writable("target"));
    }
}
