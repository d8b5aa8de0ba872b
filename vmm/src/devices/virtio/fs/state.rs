//! What the guest holds, in a form that another process can take up.
//!
//! An inode is saved as its path below its share and as what identifies the file, and is
//! looked up again in the same confined way as the guest would. It must be the same file: the guest goes on with its
//! cached pages and open files. What cannot be found again is refused by name, when it is saved as far as possible:
//!
//! - a file that is open and has no name any more refuses the save. One that is merely known to the guest is left out:
//!   the guest gets ENOENT for it and looks again, as when the host deletes a file behind its back;
//! - a share that was unmounted while its files were open refuses the save;
//! - a file that is gone or is another one refuses the restore. With `always` or write-back it must not have changed
//!   either: two processes restored from one state cannot both own the files.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;

use fuse_backend_rs::api::filesystem::ROOT_ID;
use serde::{Deserialize, Serialize};

use super::config::{FsCache, FsConfig, FsRoot, SharedDir, check_share_name};
use super::device::open_directory;
use super::inodes::{Found, Inode, Place};
use super::locks::{Kind, LockState};
use super::mounts::{MAX_MOUNTS, Mount, Names, ROOT_MOUNT, Root};
use super::open_files::Handle;
use super::share::{OPEN_FLAGS, Share};
use super::sys::{self, Stat};
use crate::devices::virtio::config::KnobError;
use crate::devices::virtio::state::StateError;
use crate::rate_limiter::RateLimiterState;

/// The device's state.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct FsState {
    pub(super) limiter: RateLimiterState,
    /// Requests whose answer is put off: queue and head.
    pub(super) waiting: Vec<(usize, u16)>,
    share: ShareState,
}

#[derive(Debug, Serialize, Deserialize)]
struct ShareState {
    /// Agreed on with the guest.
    writeback: bool,
    submounts: bool,
    mounts: Vec<MountState>,
    last_mount: u64,
    inodes: Vec<InodeState>,
    last_inode: u64,
    handles: Vec<HandleState>,
    last_handle: u64,
    /// Taken again by the next process, or not restored.
    locks: Vec<LockState>,
}

#[derive(Debug, Serialize, Deserialize)]
struct MountState {
    id: u64,
    name: String,
    path: PathBuf,
    read_only: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct InodeState {
    id: u64,
    lookups: u64,
    mount: u64,
    /// Below the share, components separated by `/`; empty for the share itself.
    path: Vec<u8>,
    identity: Identity,
}

#[derive(Debug, Serialize, Deserialize)]
struct HandleState {
    id: u64,
    inode: u64,
    /// As for open(2).
    flags: i32,
    flock: Option<Kind>,
}

/// What makes a file the same file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    device: u64,
    number: u64,
    file_type: u32,
    birth: Option<(i64, u32)>,
    /// See [`sys::file_handle`].
    handle: Option<Vec<u8>>,
    /// Size and modification time of a regular file.
    content: Option<(i64, i64, i64)>,
}

impl Identity {
    fn of(fd: BorrowedFd) -> io::Result<(Self, Stat)> {
        let stat = sys::stat(fd)?;
        let attr = &stat.attr;
        let file_type = attr.st_mode & libc::S_IFMT;
        let content = (attr.st_size, attr.st_mtime, attr.st_mtime_nsec);
        let identity = Self {
            device: attr.st_dev,
            number: attr.st_ino,
            file_type,
            birth: stat.birth,
            handle: sys::file_handle(fd),
            content: (file_type == libc::S_IFREG).then_some(content),
        };
        Ok((identity, stat))
    }

    /// What is different about `now`, if it matters.
    fn difference(&self, now: &Self, content_matters: bool) -> Option<&'static str> {
        let file = |i: &Self| (i.device, i.number, i.file_type, i.birth, i.handle.clone());
        if file(self) != file(now) {
            return Some("another file");
        }
        (content_matters && self.content != now.content).then_some("a changed file")
    }
}

/// Opens paths below a directory one component after the other, remembering the last ones: paths come sorted.
struct Walk<'a> {
    root: BorrowedFd<'a>,
    open: Vec<(CString, OwnedFd)>,
}

impl<'a> Walk<'a> {
    fn new(root: BorrowedFd<'a>) -> Self {
        Self {
            root,
            open: Vec::new(),
        }
    }

    /// The file at `path`, O_PATH; never outside, never through a link.
    fn open(&mut self, path: &[u8]) -> io::Result<OwnedFd> {
        let parts: Vec<&[u8]> = match path {
            [] => Vec::new(),
            path => path.split(|byte| *byte == b'/').collect(),
        };
        let same = self.open.iter().zip(&parts);
        let same = same
            .take_while(|((name, _), part)| name.as_bytes() == **part)
            .count();
        self.open.truncate(same);
        for part in parts.into_iter().skip(same) {
            let name = CString::new(part)?;
            let dir = self.open.last().map_or(self.root, |(_, fd)| fd.as_fd());
            let fd = sys::open_child(dir, &name, libc::O_PATH, 0)?;
            self.open.push((name, fd));
        }
        self.open
            .last()
            .map_or(self.root, |(_, fd)| fd.as_fd())
            .try_clone_to_owned()
    }
}

fn shown(mount: &Mount, path: &[u8]) -> PathBuf {
    mount.path.join(OsStr::from_bytes(path))
}

fn content_matters(cache: FsCache, writeback: bool) -> bool {
    writeback || cache == FsCache::Always
}

/// A share that has no form outside this process.
#[derive(Debug, thiserror::Error)]
enum UnsaveableShare {
    #[error(
        "{0:?} was unmounted while files of it were open and the guest still holds some of them: close them first"
    )]
    Unmounted(String),
    #[error(
        "{path:?} is open in the guest ({count} times) and is deleted or was moved out of the share: close it first"
    )]
    Gone { path: PathBuf, count: usize },
    #[error("{path:?}: {source}")]
    Path { path: PathBuf, source: io::Error },
    #[error("flags of an open file: {0}")]
    Handle(io::Error),
}

/// A state that is none of this share, or of files that are not any more what the guest knows.
#[derive(Debug, thiserror::Error)]
enum ShareStateError {
    #[error("the root was made of several shares, the configuration has one directory")]
    SeveralShares,
    #[error("the configuration has one directory")]
    OneDirectory,
    #[error("{0} shares, at most {MAX_MOUNTS}")]
    TooManyMounts(usize),
    #[error(transparent)]
    MountName(#[from] KnobError),
    #[error("{path:?}: {source}")]
    Directory { path: PathBuf, source: io::Error },
    #[error("share {name:?} has number {id}")]
    MountNumber { name: String, id: u64 },
    #[error("inode {inode} is of share {mount}, which there is not")]
    NoMount { inode: u64, mount: u64 },
    #[error("inode {inode} with {lookups} references")]
    References { inode: u64, lookups: u64 },
    #[error("{path:?}: {source}: the guest knows this file and needs it")]
    File { path: PathBuf, source: io::Error },
    #[error("{path:?} is {change}: the guest knows it as it was when the state was saved")]
    Changed { path: PathBuf, change: &'static str },
    #[error("{path:?} is locked by another process: the guest had the lock")]
    Locked { path: PathBuf },
    #[error("open file {id} of inode {inode}: {source}")]
    Handle { id: u64, inode: u64, source: io::Error },
    #[error("a lock of the guest cannot be taken again: {0}")]
    Lock(io::Error),
}

/// What the guest holds of `share`. `device` is the id, for errors. Called while no worker runs.
pub(super) fn save(
    device: &str,
    share: &Share,
    limiter: RateLimiterState,
    waiting: Vec<(usize, u16)>,
) -> Result<FsState, StateError> {
    let unsupported = |error: UnsaveableShare| StateError::unsupported(device, error);
    let (mounts, last_mount) = match &*share.root() {
        root @ Root::Directory(_) => (root.mounts(), ROOT_MOUNT),
        root @ Root::Names(names) => (root.mounts(), names.last_id()),
    };
    let (handles, last_handle) = share.handles.all();
    let mut open = HashMap::new();
    for (_, handle) in &handles {
        *open.entry(handle.inode()).or_insert(0) += 1;
    }
    let (known, last_inode) = share.inodes.all();
    let mut inodes = Vec::new();
    for mount in &mounts {
        let of_mount = known.iter().filter(|inode| inode.mount().id == mount.id);
        inodes.extend(save_inodes(share, mount, of_mount, &open).map_err(unsupported)?);
    }
    let gone = known
        .iter()
        .find(|inode| mounts.iter().all(|m| m.id != inode.mount().id));
    if let Some(inode) = gone {
        let mount = inode.mount();
        return Err(unsupported(UnsaveableShare::Unmounted(mount.name.clone())));
    }
    let handles = handles.iter().map(|(id, handle)| {
        let flags = sys::open_flags(handle.as_fd())? & (OPEN_FLAGS | libc::O_DIRECTORY);
        Ok(HandleState {
            id: *id,
            inode: handle.inode(),
            flags,
            flock: handle.flock(),
        })
    });
    let handles = handles
        .collect::<io::Result<_>>()
        .map_err(|error| unsupported(UnsaveableShare::Handle(error)))?;
    let mounts = mounts.iter().map(|mount| MountState {
        id: mount.id,
        name: mount.name.clone(),
        path: mount.path.clone(),
        read_only: mount.read_only,
    });
    Ok(FsState {
        limiter,
        waiting,
        share: ShareState {
            writeback: share.writeback(),
            submounts: share.submounts(),
            mounts: mounts.collect(),
            last_mount,
            inodes,
            last_inode,
            handles,
            last_handle,
            locks: share.locks.save(),
        },
    })
}

/// Where `inode` is as seen from the root of the worker threads: what the kernel says of a descriptor, else its names.
fn path_of(share: &Share, root: &[u8], inode: &Arc<Inode>) -> io::Result<Vec<u8>> {
    if let Some(fd) = share.fd_at_hand(inode) {
        return sys::path_of(share.proc_fds.as_fd(), fd.as_fd());
    }
    Ok(match share.path(inode)? {
        path if path.is_empty() => root.to_vec(),
        path => [root.strip_suffix(b"/").unwrap_or(root), b"/", &path].concat(),
    })
}

fn save_inodes<'a>(
    share: &Share,
    mount: &Mount,
    inodes: impl Iterator<Item = &'a Arc<Inode>>,
    open: &HashMap<u64, usize>,
) -> Result<Vec<InodeState>, UnsaveableShare> {
    let failed = |source: io::Error| UnsaveableShare::Path {
        path: mount.path.clone(),
        source,
    };
    let root = sys::path_of(share.proc_fds.as_fd(), mount.root()).map_err(failed)?;
    let mut paths = Vec::new();
    for inode in inodes {
        match path_of(share, &root, inode) {
            Ok(path) => paths.push((path, inode)),
            // Nothing leads to it any more; it is not open.
            Err(error) if error.raw_os_error() == Some(libc::ESTALE) => {}
            Err(error) => return Err(failed(error)),
        }
    }
    paths.sort_by(|a, b| a.0.cmp(&b.0));
    let mut walk = Walk::new(mount.root());
    let mut saved = Vec::new();
    for (path, inode) in paths {
        // The path is what the kernel or the guest says; whether it leads to the inode is tried.
        let found = below(&root, &path).and_then(|below| {
            let fd = walk.open(below).ok()?;
            let (identity, stat) = Identity::of(fd.as_fd()).ok()?;
            inode.check(&stat).ok()?;
            Some((below.to_vec(), identity))
        });
        match (found, open.get(&inode.id())) {
            (Some((path, identity)), _) => saved.push(InodeState {
                id: inode.id(),
                lookups: inode.lookups(),
                mount: mount.id,
                path,
                identity,
            }),
            (None, None) => {
                guest_log!(DEBUG, path = ?lossy(&path), "fs: the guest knows a file without a name, left out");
            }
            (None, Some(count)) => {
                return Err(UnsaveableShare::Gone {
                    path: lossy(&path),
                    count: *count,
                });
            }
        }
    }
    Ok(saved)
}

fn lossy(path: &[u8]) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(path))
}

/// `path` relative to `root`, both absolute.
fn below<'p>(root: &[u8], path: &'p [u8]) -> Option<&'p [u8]> {
    match path.strip_prefix(root.strip_suffix(b"/").unwrap_or(root))? {
        [] => Some(&[]),
        [b'/', rest @ ..] => Some(rest),
        _ => None,
    }
}

/// Makes `share`, fresh and of `config`, hold what `state` says. What is mounted is what was mounted; a directory that
/// the configuration names too is the configuration's, so that it can be another path.
pub(super) fn restore(config: &FsConfig, share: &Share, state: FsState) -> Result<(), StateError> {
    let device = &config.id;
    let invalid = |error: ShareStateError| StateError::invalid(device, error);
    let state = state.share;
    let mounts = restore_mounts(config, share, &state).map_err(invalid)?;
    let content_matters = content_matters(config.cache, state.writeback);
    let mut handles: HashMap<u64, Vec<HandleState>> = HashMap::new();
    for handle in state.handles {
        handles.entry(handle.inode).or_default().push(handle);
    }
    restore_inodes(share, &mounts, state.inodes, &mut handles, content_matters).map_err(invalid)?;
    // Of the root, which has not been saved; any other one is of an inode that is missing.
    for handle in handles.values().flatten() {
        let failed = |source: io::Error| {
            invalid(ShareStateError::Handle {
                id: handle.id,
                inode: handle.inode,
                source,
            })
        };
        let inode = share.inodes.get(handle.inode).map_err(failed)?;
        let fd = share.fd(&inode).map_err(failed)?;
        restore_handle(share, &inode, fd.as_fd(), handle).map_err(failed)?;
    }
    for lock in state.locks {
        let failed = |source| invalid(ShareStateError::Lock(source));
        share.restore_locks(lock).map_err(failed)?;
    }
    share.inodes.set_last_id(state.last_inode);
    share.handles.set_last_id(state.last_handle);
    share.set_writeback(state.writeback);
    share.set_submounts(state.submounts);
    Ok(())
}

type Mounts = BTreeMap<u64, Arc<Mount>>;

fn restore_mounts(config: &FsConfig, share: &Share, state: &ShareState) -> Result<Mounts, ShareStateError> {
    let mut root = share.root_mut();
    match (&mut *root, &config.root) {
        (Root::Directory(mount), _) => match state.mounts.as_slice() {
            [only] if only.id == ROOT_MOUNT => Ok(Mounts::from([(ROOT_MOUNT, mount.clone())])),
            _ => Err(ShareStateError::SeveralShares),
        },
        (Root::Names(names), FsRoot::Shares(shares)) => {
            let mut fresh = Names::default();
            let mut mounts = Mounts::new();
            if state.mounts.len() > MAX_MOUNTS {
                return Err(ShareStateError::TooManyMounts(state.mounts.len()));
            }
            for saved in &state.mounts {
                check_share_name(&config.id, &saved.name)?;
                let own = SharedDir {
                    path: saved.path.clone(),
                    read_only: saved.read_only,
                };
                let SharedDir { path, read_only } = shares.get(&saved.name).unwrap_or(&own).clone();
                let fd = open_directory(&path).map_err(|source| ShareStateError::Directory {
                    path: path.clone(),
                    source,
                })?;
                let mount = Arc::new(Mount::new(saved.id, saved.name.clone(), path, read_only, fd));
                let in_order = saved.id > Names::default().last_id() && saved.id <= state.last_mount;
                if !in_order
                    || fresh.contains(&saved.name)
                    || mounts.insert(saved.id, mount.clone()).is_some()
                {
                    return Err(ShareStateError::MountNumber {
                        name: saved.name.clone(),
                        id: saved.id,
                    });
                }
                fresh.insert(mount);
            }
            fresh.set_last_id(state.last_mount);
            *names = fresh;
            Ok(mounts)
        }
        (Root::Names(_), FsRoot::Directory(_)) => Err(ShareStateError::OneDirectory),
    }
}

fn restore_inodes(
    share: &Share,
    mounts: &Mounts,
    mut inodes: Vec<InodeState>,
    handles: &mut HashMap<u64, Vec<HandleState>>,
    content_matters: bool,
) -> Result<(), ShareStateError> {
    // Sorted again: the file is not trusted, and the walk is quick only for neighbours.
    inodes.sort_by(|a, b| (a.mount, &a.path).cmp(&(b.mount, &b.path)));
    let mut walk: Option<(u64, Walk)> = None;
    // Directories come before what is in them.
    let mut places: HashMap<(u64, &[u8]), Arc<Inode>> = HashMap::new();
    if let Ok(root) = share.inodes.get(ROOT_ID) {
        places.insert((ROOT_MOUNT, b""), root);
    }
    for state in &inodes {
        let missing = || ShareStateError::NoMount {
            inode: state.id,
            mount: state.mount,
        };
        let mount = mounts.get(&state.mount).ok_or_else(missing)?;
        if state.id <= ROOT_ID || state.lookups == 0 {
            return Err(ShareStateError::References {
                inode: state.id,
                lookups: state.lookups,
            });
        }
        if walk.as_ref().is_none_or(|(of, _)| *of != state.mount) {
            walk = Some((state.mount, Walk::new(mount.root())));
        }
        let path = shown(mount, &state.path);
        let failed = |source: io::Error| ShareStateError::File {
            path: path.clone(),
            source,
        };
        let Some((_, walk)) = &mut walk else { continue };
        let fd = walk.open(&state.path).map_err(failed)?;
        let (identity, stat) = Identity::of(fd.as_fd()).map_err(failed)?;
        if let Some(change) = state.identity.difference(&identity, content_matters) {
            return Err(ShareStateError::Changed { path, change });
        }
        let (directory, name) = split(&state.path);
        let parent = places.get(&(state.mount, directory));
        let crossed = parent.is_some_and(|parent| parent.host_mount() != stat.mount);
        let found = Found {
            stat: &stat,
            mount,
            births: !sys::changes_births(fd.as_fd()).map_err(failed)?,
            foreign: crossed && stat.attr.st_mode & libc::S_IFMT != libc::S_IFDIR,
            place: place(&state.path, parent, name),
        };
        let inode = share
            .inodes
            .insert(state.id, state.lookups, found)
            .map_err(failed)?;
        for handle in handles.remove(&state.id).iter().flatten() {
            let failed = |e: io::Error| match e.raw_os_error() {
                Some(libc::EAGAIN) => ShareStateError::Locked { path: path.clone() },
                _ => failed(e),
            };
            restore_handle(share, &inode, fd.as_fd(), handle).map_err(failed)?;
        }
        places.insert((state.mount, &state.path), inode);
    }
    Ok(())
}

/// The directory and the last name of a path.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (
            path.get(..at).unwrap_or_default(),
            path.get(at + 1..).unwrap_or_default(),
        ),
        None => (b"", path),
    }
}

fn place(path: &[u8], parent: Option<&Arc<Inode>>, name: &[u8]) -> Place {
    match (path, parent, CString::new(name)) {
        ([], ..) => Place::Share,
        (_, Some(parent), Ok(name)) => Place::Name {
            parent: parent.id(),
            name,
        },
        _ => Place::Unknown,
    }
}

fn restore_handle(share: &Share, inode: &Inode, fd: BorrowedFd, handle: &HandleState) -> io::Result<()> {
    let flags = match inode.file_type() {
        libc::S_IFDIR => libc::O_RDONLY | libc::O_DIRECTORY,
        libc::S_IFREG => handle.flags & OPEN_FLAGS,
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    };
    if flags & libc::O_ACCMODE != libc::O_RDONLY {
        inode.check_writable()?;
    }
    let ticket = share.descriptors.ticket()?;
    let file = sys::reopen(share.proc_fds.as_fd(), fd, flags)?;
    let file = Handle::new(inode.id(), inode.mount(), file, ticket);
    if handle.flock.is_some() {
        file.set_flock(handle.flock)?;
    }
    share.handles.insert(handle.id, file)
}

#[cfg(test)]
mod tests {
    use super::below;

    #[test]
    fn below_when_the_path_is_elsewhere_finds_nothing() {
        assert_eq!(below(b"/a/b", b"/a/b"), Some(&b""[..]));
        assert_eq!(below(b"/a/b", b"/a/b/c/d"), Some(&b"c/d"[..]));
        assert_eq!(below(b"/a/b", b"/a/bc"), None);
        assert_eq!(below(b"/", b"/a"), Some(&b"a"[..]));
        assert_eq!(below(b"/a", b"/b"), None);
    }
}
