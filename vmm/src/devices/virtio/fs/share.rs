//! The shared directories as one FUSE file system: what it holds, and who may hold what.
//!
//! Confinement: every request names at most one component below a directory, reached component by component from the
//! share's own descriptor (`reach`), and no link is followed on the host ([`sys::open_child`]). Links are the guest's to
//! resolve, inside its own tree. So there is no path to race with, and a directory moved out of the share by the host
//! takes nothing but itself along. An inode belongs to the share it was reached through; requests that name two inodes
//! must name two of the same share.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{ATTR_SUBMOUNT, OpenOptions, stat64};
use fuse_backend_rs::api::filesystem::{DirEntry, Entry, ROOT_ID};

use super::config::FsCache;
use super::credentials::KillPrivileges;
use super::descriptors::Descriptors;
use super::directory::ReadAhead;
use super::inodes::{Found, Inode, Inodes, Place};
use super::locks::Locks;
use super::mounts::{MAX_MOUNTS, Mount, Root};
use super::open_files::{Handle, Handles};
use super::sys::{self, Stat, errno};
use crate::descriptors::{Budget, Ticket};

/// Flags of open(2) the guest may choose. O_DIRECT is not among them (the guest's buffers and offsets need not be
/// aligned, and the host's page cache is wanted), neither is anything that changes what is opened (O_PATH, O_TMPFILE).
pub(super) const OPEN_FLAGS: i32 =
    libc::O_ACCMODE | libc::O_APPEND | libc::O_NONBLOCK | libc::O_DSYNC | libc::O_SYNC | libc::O_NOATIME;

/// How long the guest may believe what it knows, and what it may keep.
#[derive(Debug, Clone, Copy)]
pub(super) struct Policy {
    pub(super) timeout: Duration,
    pub(super) file: OpenOptions,
    pub(super) directory: OpenOptions,
}

impl Policy {
    fn new(cache: FsCache) -> Self {
        let none = OpenOptions::empty();
        let (timeout, file, directory) = match cache {
            FsCache::Never => (Duration::ZERO, OpenOptions::DIRECT_IO, none),
            FsCache::Auto => (Duration::from_secs(1), none, none),
            FsCache::Always => (
                Duration::from_secs(86400),
                OpenOptions::KEEP_CACHE,
                OpenOptions::KEEP_CACHE | OpenOptions::CACHE_DIR,
            ),
        };
        Self {
            timeout,
            file,
            directory,
        }
    }
}

/// What the configuration says about all directories of a device.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Options {
    pub(super) cache: FsCache,
    /// Offered to the guest.
    pub(super) writeback: bool,
    pub(super) xattr: bool,
}

/// Why a directory cannot be mounted or unmounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MountError {
    /// The root is a host directory.
    NoNames,
    Exists,
    TooMany,
    Missing,
    /// So many files of it are open in the guest.
    Busy(usize),
}

/// Takes an entry of our own root, with the mount of its name, and says whether it did.
type AddName<'a> = dyn FnMut(DirEntry, Option<&Arc<Mount>>) -> io::Result<bool> + 'a;

/// What moved.
#[derive(Debug, Default)]
pub(super) struct Moved {
    pub(super) read_bytes: AtomicU64,
    pub(super) write_bytes: AtomicU64,
}

impl Moved {
    pub(super) fn add_copied(&self, bytes: u64) {
        self.read_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.write_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Everything the guest sees, served by any number of threads.
#[derive(Debug)]
pub(super) struct Share {
    root: RwLock<Root>,
    pub(super) inodes: Inodes,
    pub(super) handles: Handles,
    pub(super) descriptors: Descriptors,
    pub(super) locks: Locks,
    read_ahead: ReadAhead,
    pub(super) policy: Policy,
    pub(super) options: Options,
    /// Agreed on with the guest: it may read through any handle, and appends by itself.
    writeback: AtomicBool,
    /// Agreed on with the guest: it makes a mount of its own of each of the host's.
    submounts: AtomicBool,
    pub(super) moved: Moved,
    /// Held while a file system is written back.
    pub(super) syncing: Mutex<()>,
    /// `/proc/self/fd`, to open O_PATH descriptors again.
    pub(super) proc_fds: OwnedFd,
}

impl Share {
    /// `proc_fds` is an O_PATH descriptor of `/proc/self/fd`; what the guest makes the share hold is taken from `budget`.
    pub(super) fn new(
        root: Root,
        proc_fds: OwnedFd,
        options: Options,
        budget: Arc<Budget>,
    ) -> io::Result<Self> {
        let inodes = Inodes::new();
        if let Root::Directory(mount) = &root {
            let stat = sys::stat(mount.root())?;
            inodes.insert(ROOT_ID, 1, found_share(&stat, mount))?;
        }
        Ok(Self {
            root: RwLock::new(root),
            inodes,
            handles: Handles::default(),
            descriptors: Descriptors::new(budget),
            locks: Locks::default(),
            read_ahead: ReadAhead::default(),
            policy: Policy::new(options.cache),
            options,
            writeback: AtomicBool::new(false),
            submounts: AtomicBool::new(false),
            moved: Moved::default(),
            syncing: Mutex::new(()),
            proc_fds,
        })
    }

    /// What is mounted.
    pub(super) fn root(&self) -> RwLockReadGuard<'_, Root> {
        self.root.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn root_mut(&self) -> RwLockWriteGuard<'_, Root> {
        self.root.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the directory `fd`, which is at `path` on the host, appear in the root as `name`.
    pub(super) fn mount(
        &self,
        name: &str,
        path: PathBuf,
        read_only: bool,
        fd: OwnedFd,
    ) -> Result<(), MountError> {
        let mut root = self.root_mut();
        let Root::Names(names) = &mut *root else {
            return Err(MountError::NoNames);
        };
        if names.contains(name) {
            return Err(MountError::Exists);
        }
        if names.len() >= MAX_MOUNTS {
            return Err(MountError::TooMany);
        }
        let id = names.next_id();
        names.insert(Arc::new(Mount::new(id, name.to_owned(), path, read_only, fd)));
        Ok(())
    }

    /// Takes `name` out of the root. If no file of it is open, all its descriptors are closed, whatever the guest has
    /// cached; otherwise it stays. With `lazy` the guest keeps what it holds until it forgets it.
    pub(super) fn unmount(&self, name: &str, lazy: bool) -> Result<(), MountError> {
        let mut root = self.root_mut();
        let Root::Names(names) = &mut *root else {
            return Err(MountError::NoNames);
        };
        let missing = MountError::Missing;
        let mount = std::ffi::CString::new(name).map_err(|_| missing)?;
        let mount = names.get(&mount).ok_or(missing)?;
        match self.handles.close_mount(&mount) {
            Ok(()) => {
                names.remove(name);
                drop(root);
                for id in self.inodes.remove_mount(&mount) {
                    self.descriptors.forget(id);
                }
                Ok(())
            }
            Err(_) if lazy => {
                names.remove(name);
                Ok(())
            }
            Err(open) => Err(MountError::Busy(open)),
        }
    }

    /// The guest has gone: forgets what it held. What is mounted stays.
    pub(super) fn forget_guest(&self) {
        self.locks.clear();
        self.handles.clear();
        self.inodes.clear();
        self.descriptors.clear();
        self.set_writeback(false);
        self.set_submounts(false);
    }

    pub(super) fn set_submounts(&self, on: bool) {
        self.submounts.store(on, Ordering::SeqCst);
    }

    pub(super) fn submounts(&self) -> bool {
        self.submounts.load(Ordering::SeqCst)
    }

    pub(super) fn set_writeback(&self, on: bool) {
        self.writeback.store(on, Ordering::SeqCst);
    }

    pub(super) fn writeback(&self) -> bool {
        self.writeback.load(Ordering::SeqCst)
    }

    /// `/proc/self/fd`.
    pub(super) fn proc_fds(&self) -> &OwnedFd {
        &self.proc_fds
    }

    /// What the guest is told of `inode`, to which it has been given a reference.
    pub(super) fn entry(&self, inode: &Inode, stat: &Stat, submount: bool) -> Entry {
        Entry {
            inode: inode.id(),
            generation: 0,
            attr: inode.shown(stat.attr),
            attr_flags: if submount && self.submounts() {
                ATTR_SUBMOUNT
            } else {
                0
            },
            attr_timeout: self.policy.timeout,
            entry_timeout: self.policy.timeout,
        }
    }

    /// The entry of `name` in `parent`, whose descriptor is `directory`, with one reference more for the guest. `stat`
    /// is what the name was found to be.
    pub(super) fn child(
        &self,
        parent: &Inode,
        directory: BorrowedFd,
        name: &CStr,
        stat: &Stat,
    ) -> io::Result<Entry> {
        let inode = self.remember(parent, directory, name, stat)?;
        let submount = inode.is_directory() && inode.host_mount() != parent.host_mount();
        Ok(self.entry(&inode, stat, submount))
    }

    /// As [`Self::child`], for whatever has the name.
    pub(super) fn find_below(&self, parent: &Inode, directory: BorrowedFd, name: &CStr) -> io::Result<Entry> {
        let stat = sys::stat_child(directory, name)?;
        self.child(parent, directory, name, &stat)
    }

    pub(super) fn find(&self, parent: &Arc<Inode>, name: &CStr) -> io::Result<Entry> {
        self.find_below(parent, self.fd(parent)?.as_fd(), name)
    }

    /// The entry of the root directory of `mount`. Its name is asked for each time, so that the guest notices when it is
    /// unmounted or is another directory.
    pub(super) fn mount_entry(&self, mount: &Arc<Mount>) -> io::Result<Entry> {
        let stat = sys::stat(mount.root())?;
        let inode = self.inodes.remember(found_share(&stat, mount))?;
        let mut entry = self.entry(&inode, &stat, true);
        entry.entry_timeout = Duration::ZERO;
        Ok(entry)
    }

    /// The guest gives references to an inode back.
    pub(super) fn forget_inode(&self, id: u64, count: u64) {
        if self.inodes.forget(id, count) {
            self.descriptors.forget(id);
        }
    }

    /// Opens a known file with other flags.
    pub(super) fn reopen(&self, inode: &Arc<Inode>, flags: i32) -> io::Result<File> {
        sys::reopen(self.proc_fds.as_fd(), self.fd(inode)?.as_fd(), flags)
    }

    /// A handle of `inode` for `file`, which is open for the guest.
    pub(super) fn add_handle(&self, inode: &Inode, file: File, ticket: Ticket) -> io::Result<u64> {
        let handle = Handle::new(inode.id(), inode.mount(), file, ticket);
        self.handles.add(handle)
    }

    /// The flags to open a file with when the guest asks for `flags`.
    pub(super) fn open_flags(&self, flags: i32) -> i32 {
        let mut flags = flags & OPEN_FLAGS;
        if self.writeback() {
            // The guest reads pages it writes parts of, and writes them back in any order.
            if flags & libc::O_ACCMODE == libc::O_WRONLY {
                flags = flags & !libc::O_ACCMODE | libc::O_RDWR;
            }
            flags &= !libc::O_APPEND;
        }
        flags
    }

    /// Opens a regular file. Devices, FIFOs and sockets are the guest's own: opening one here would reach the host's.
    pub(super) fn open_file(
        &self,
        inode: &Arc<Inode>,
        flags: u32,
        kill_privileges: bool,
    ) -> io::Result<File> {
        let flags = flags.cast_signed();
        match inode.file_type() {
            libc::S_IFREG => {}
            libc::S_IFDIR => return Err(errno(libc::EISDIR)),
            _ => return Err(errno(libc::ENXIO)),
        }
        if flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0 {
            inode.check_writable()?;
        }
        let mut truncate = flags & libc::O_TRUNC;
        if truncate != 0 && kill_privileges {
            // Opening checks permissions, so the guard must be for a truncation of its own.
            let file = self.reopen(inode, libc::O_WRONLY | libc::O_NONBLOCK)?;
            let _guard = KillPrivileges::when(true)?;
            file.set_len(0)?;
            truncate = 0;
        }
        self.reopen(inode, self.open_flags(flags) | truncate)
    }

    pub(super) fn attributes(
        &self,
        inode: &Arc<Inode>,
        handle: Option<&Handle>,
    ) -> io::Result<(stat64, Duration)> {
        let stat = match handle {
            Some(handle) => sys::stat(handle.as_fd())?,
            None => self.stat(inode)?,
        };
        Ok((inode.shown(stat.attr), self.policy.timeout))
    }

    pub(super) fn handle(&self, handle: Option<u64>, inode: u64) -> io::Result<Option<Arc<Handle>>> {
        handle.map(|handle| self.handles.get(handle, inode)).transpose()
    }

    /// Gives the directory's entries from `offset` on to `add`, which says whether it took the entry.
    pub(super) fn read_directory(
        &self,
        handle: &Handle,
        offset: u64,
        add: &mut dyn FnMut(DirEntry, &CStr) -> io::Result<bool>,
    ) -> io::Result<()> {
        let mut listing = handle.listing.lock().unwrap_or_else(PoisonError::into_inner);
        listing.read(handle.as_fd(), offset, &self.read_ahead, |dirent| {
            let entry = DirEntry {
                ino: dirent.inode,
                offset: dirent.offset,
                type_: dirent.file_type.into(),
                name: dirent.name.to_bytes(),
            };
            add(entry, dirent.name)
        })
    }

    /// Gives the root's own listing after `offset` to `add`, with the mount of each name.
    pub(super) fn read_names(&self, offset: u64, add: &mut AddName<'_>) -> io::Result<()> {
        let Root::Names(names) = &*self.root() else {
            return Err(errno(libc::EBADF));
        };
        for (taken, line) in names.list(offset).iter().enumerate() {
            let entry = DirEntry {
                ino: line.mount.as_ref().map_or(ROOT_ID, |mount| mount.id),
                offset: line.offset,
                type_: libc::DT_DIR.into(),
                name: line.name.as_bytes(),
            };
            match add(entry, line.mount.as_ref()) {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) if taken == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(())
    }

    /// Whether `inode` is a root of our own.
    pub(super) fn is_names(&self, inode: u64) -> bool {
        inode == ROOT_ID && matches!(&*self.root(), Root::Names(_))
    }
}

/// The directory of `mount` itself.
fn found_share<'a>(stat: &'a Stat, mount: &'a Arc<Mount>) -> Found<'a> {
    Found {
        stat,
        mount,
        births: mount.births,
        foreign: false,
        place: Place::Share,
    }
}
