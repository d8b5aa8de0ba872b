//! The shared directories as one FUSE file system: what it holds, and who may hold what.
//!
//! Confinement: every inode is an O_PATH descriptor, every request names at most one component below one, and no link
//! is followed on the host ([`sys::open_child`]). Links are the guest's to resolve, inside its own tree. So there is no
//! path to race with, and a directory moved out of the share by the host takes nothing but itself along. An inode
//! belongs to the share it was reached through; requests that name two inodes must name two of the same share.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{OpenOptions, stat64};
use fuse_backend_rs::api::filesystem::{DirEntry, Entry, ROOT_ID};

use super::config::FsCache;
use super::credentials::KillPrivileges;
use super::directory::Dirents;
use super::inodes::{FdBudget, Handle, Handles, Inode, Inodes};
use super::mounts::{MAX_MOUNTS, Mount, Root};
use super::sys::{self, errno};

/// Flags of open(2) the guest may choose. O_DIRECT is not among them (the guest's buffers and offsets need not be
/// aligned, and the host's page cache is wanted), neither is anything that changes what is opened (O_PATH, O_TMPFILE).
pub(super) const OPEN_FLAGS: i32 =
    libc::O_ACCMODE | libc::O_APPEND | libc::O_NONBLOCK | libc::O_DSYNC | libc::O_SYNC | libc::O_NOATIME;
/// Directory entries read from the host at a time.
const DIRENT_BUFFER: u32 = 32 << 10;

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

/// Everything the guest sees, served by any number of threads.
#[derive(Debug)]
pub(super) struct Share {
    root: RwLock<Root>,
    pub(super) inodes: Inodes,
    pub(super) handles: Handles,
    pub(super) policy: Policy,
    pub(super) options: Options,
    /// Agreed on with the guest: it may read through any handle, and appends by itself.
    writeback: AtomicBool,
    pub(super) moved: Moved,
    /// `/proc/self/fd`, to open O_PATH descriptors again.
    pub(super) proc_fds: OwnedFd,
}

impl Share {
    /// `proc_fds` is an O_PATH descriptor of `/proc/self/fd`; the guest can make the share hold at most `fd_limit`
    /// descriptors.
    pub(super) fn new(root: Root, proc_fds: OwnedFd, options: Options, fd_limit: usize) -> io::Result<Self> {
        let budget = FdBudget::new(fd_limit);
        let inodes = Inodes::new(budget.clone());
        if let Root::Directory(mount) = &root {
            let fd = mount.root().try_clone_to_owned()?;
            let stat = sys::stat(fd.as_fd())?;
            inodes.insert(ROOT_ID, 1, fd, &stat, mount)?;
        }
        Ok(Self {
            root: RwLock::new(root),
            inodes,
            handles: Handles::new(budget),
            policy: Policy::new(options.cache),
            options,
            writeback: AtomicBool::new(false),
            moved: Moved::default(),
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
                self.inodes.remove_mount(&mount);
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
        self.handles.clear();
        self.inodes.clear();
        self.set_writeback(false);
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

    /// The entry of the file behind `fd`, with one reference more for the guest.
    pub(super) fn entry(&self, fd: OwnedFd, mount: &Arc<Mount>) -> io::Result<Entry> {
        let stat = sys::stat(fd.as_fd())?;
        Ok(Entry {
            inode: self.inodes.remember(fd, &stat, mount)?,
            generation: 0,
            attr: stat.attr,
            attr_flags: 0,
            attr_timeout: self.policy.timeout,
            entry_timeout: self.policy.timeout,
        })
    }

    pub(super) fn find(&self, parent: &Inode, name: &CStr) -> io::Result<Entry> {
        let fd = sys::open_child(parent.fd(), name, libc::O_PATH, 0)?;
        self.entry(fd, parent.mount())
    }

    /// The entry of the root directory of `mount`. Its name is asked for each time, so that the guest notices when it is
    /// unmounted or is another directory.
    pub(super) fn mount_entry(&self, mount: &Arc<Mount>) -> io::Result<Entry> {
        let mut entry = self.entry(mount.root().try_clone_to_owned()?, mount)?;
        entry.entry_timeout = Duration::ZERO;
        Ok(entry)
    }

    pub(super) fn reopen(&self, inode: &Inode, flags: i32) -> io::Result<File> {
        sys::reopen(self.proc_fds.as_fd(), inode.fd(), flags)
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
    pub(super) fn open_file(&self, inode: &Inode, flags: u32, kill_privileges: bool) -> io::Result<File> {
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
        inode: &Inode,
        handle: Option<&Handle>,
    ) -> io::Result<(stat64, Duration)> {
        let fd = handle.map_or_else(|| inode.fd(), Handle::fd);
        Ok((sys::stat(fd)?.attr, self.policy.timeout))
    }

    pub(super) fn handle(&self, handle: Option<u64>, inode: u64) -> io::Result<Option<Arc<Handle>>> {
        handle.map(|handle| self.handles.get(handle, inode)).transpose()
    }

    /// Gives the directory's entries from `offset` on to `add` until it wants no more, or `size` bytes' worth is read.
    /// `add` says whether it took the entry.
    pub(super) fn read_directory(
        &self,
        handle: &Handle,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry, &CStr) -> io::Result<bool>,
    ) -> io::Result<()> {
        let mut buffer = vec![0; size.min(DIRENT_BUFFER) as usize];
        let len = {
            let _position = handle.position.lock().unwrap_or_else(PoisonError::into_inner);
            sys::lseek(handle.fd(), offset, libc::SEEK_SET)?;
            sys::getdents(handle.fd(), &mut buffer)?
        };
        buffer.truncate(len);
        for (taken, dirent) in Dirents(&buffer).enumerate() {
            let entry = DirEntry {
                ino: dirent.inode,
                offset: dirent.offset,
                type_: dirent.file_type.into(),
                name: dirent.name.to_bytes(),
            };
            match add(entry, dirent.name) {
                Ok(true) => {}
                Ok(false) => break,
                // Entries already taken must reach the guest, which counts their references.
                Err(error) if taken == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(())
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

    /// An O_PATH descriptor of the file `fd` has open.
    pub(super) fn proc_path(&self, fd: &OwnedFd) -> io::Result<OwnedFd> {
        Ok(sys::reopen(self.proc_fds.as_fd(), fd.as_fd(), libc::O_PATH)?.into())
    }
}
