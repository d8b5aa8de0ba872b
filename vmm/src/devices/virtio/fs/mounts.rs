//! What a device shares: one directory as its root, or a root of our own with directories mounted in it by name.

#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use fuse_backend_rs::abi::fuse_abi::stat64;
use fuse_backend_rs::api::filesystem::ROOT_ID;

use super::sys;

/// Most directories in one device.
pub(super) const MAX_MOUNTS: usize = 1024;
/// The mount that is the root of the device.
pub(super) const ROOT_MOUNT: u64 = 0;
/// Offsets of `.` and `..` in the listing of our own root; directories are at their id.
const DOT: u64 = 1;
const DOT_DOT: u64 = 2;

/// A shared directory.
#[derive(Debug)]
pub(super) struct Mount {
    /// [`ROOT_MOUNT`], or a number never used twice, which is also its place in the listing of the root.
    pub(super) id: u64,
    /// Its name in the root; empty for the root itself.
    pub(super) name: String,
    /// Where the host has it, for errors and for the saved state.
    pub(super) path: PathBuf,
    /// The guest may not change anything, whatever it asks for.
    pub(super) read_only: bool,
    /// See [`Found::births`](super::inodes::Found::births).
    pub(super) births: bool,
    root: OwnedFd,
    closed: AtomicBool,
}

impl Mount {
    pub(super) fn new(id: u64, name: String, path: PathBuf, read_only: bool, root: OwnedFd) -> Self {
        Self {
            id,
            name,
            path,
            read_only,
            births: !sys::changes_births(root.as_fd()).unwrap_or(true),
            root,
            closed: AtomicBool::new(false),
        }
    }

    /// The directory, O_PATH.
    pub(super) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Nothing of it may be looked up or opened any more.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }
}

/// What the guest sees as the root of the device.
#[derive(Debug)]
pub(super) enum Root {
    /// A directory of the host.
    Directory(Arc<Mount>),
    /// Our own, with directories of the host in it. Read-only for the guest.
    Names(Names),
}

impl Root {
    /// All mounts.
    pub(super) fn mounts(&self) -> Vec<Arc<Mount>> {
        match self {
            Self::Directory(mount) => vec![mount.clone()],
            Self::Names(names) => names.by_name.values().cloned().collect(),
        }
    }
}

/// The directories in a root of our own.
#[derive(Debug)]
pub(super) struct Names {
    by_name: BTreeMap<String, Arc<Mount>>,
    last_id: u64,
    changed: SystemTime,
}

impl Default for Names {
    fn default() -> Self {
        Self {
            by_name: BTreeMap::new(),
            last_id: DOT_DOT,
            changed: SystemTime::now(),
        }
    }
}

/// One line of the listing of the root.
#[derive(Debug)]
pub(super) struct Line {
    /// Where the next one starts.
    pub(super) offset: u64,
    pub(super) name: String,
    /// `None` for `.` and `..`.
    pub(super) mount: Option<Arc<Mount>>,
}

impl Names {
    pub(super) fn get(&self, name: &CStr) -> Option<Arc<Mount>> {
        self.by_name.get(name.to_str().ok()?).cloned()
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    pub(super) fn len(&self) -> usize {
        self.by_name.len()
    }

    /// The id of the next mount.
    pub(super) fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    /// The last id given out.
    pub(super) fn last_id(&self) -> u64 {
        self.last_id
    }

    /// Takes ids of an earlier process as given out.
    pub(super) fn set_last_id(&mut self, id: u64) {
        self.last_id = id.max(DOT_DOT);
    }

    pub(super) fn insert(&mut self, mount: Arc<Mount>) {
        self.changed = SystemTime::now();
        self.by_name.insert(mount.name.clone(), mount);
    }

    pub(super) fn remove(&mut self, name: &str) -> Option<Arc<Mount>> {
        self.changed = SystemTime::now();
        self.by_name.remove(name)
    }

    /// Attributes of the root itself.
    pub(super) fn attributes(&self) -> stat64 {
        // SAFETY: zero is valid for every field.
        let mut attr: stat64 = unsafe { std::mem::zeroed() };
        let changed = self.changed.duration_since(UNIX_EPOCH).unwrap_or_default();
        let seconds = i64::try_from(changed.as_secs()).unwrap_or(i64::MAX);
        attr.st_ino = ROOT_ID;
        attr.st_mode = libc::S_IFDIR | 0o555;
        attr.st_nlink = 2 + self.by_name.len() as u64;
        attr.st_blksize = 4096;
        (attr.st_atime, attr.st_mtime, attr.st_ctime) = (seconds, seconds, seconds);
        attr
    }

    /// The listing after `offset`; a name mounted or unmounted meanwhile moves no other.
    pub(super) fn list(&self, offset: u64) -> Vec<Line> {
        let dots = [(DOT, "."), (DOT_DOT, "..")].map(|(offset, name)| Line {
            offset,
            name: name.to_owned(),
            mount: None,
        });
        let mut mounts: Vec<_> = self.by_name.values().collect();
        mounts.sort_by_key(|mount| mount.id);
        let mounts = mounts.into_iter().map(|mount| Line {
            offset: mount.id,
            name: mount.name.clone(),
            mount: Some(mount.clone()),
        });
        let all = dots.into_iter().chain(mounts);
        all.filter(|line| line.offset > offset).collect()
    }
}
