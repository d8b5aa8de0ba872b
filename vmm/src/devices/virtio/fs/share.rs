//! The shared directory as a FUSE file system.
//!
//! Confinement: every inode is an O_PATH descriptor, every request names at most one component below one, and no link
//! is followed on the host ([`sys::open_child`]). Links are the guest's to resolve, inside its own tree. So there is no
//! path to race with, and a directory moved out of the share by the host takes nothing but itself along.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{
    CreateIn, FOPEN_IN_KILL_SUIDGID, FsOptions, OpenOptions, SetattrValid, WRITE_KILL_PRIV, stat64, statvfs64,
};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, GetxattrReply, ListxattrReply, ZeroCopyReader, ZeroCopyWriter,
};

use super::credentials::{KillPrivileges, Owner};
use super::directory::Dirents;
use super::inodes::{FdBudget, Handle, Handles, Inode, Inodes};
use super::sys::{self, errno, xattr};
use crate::config::FsCache;

/// Flags of open(2) the guest may choose. O_DIRECT is not among them (the guest's buffers and offsets need not be
/// aligned, and the host's page cache is wanted), neither is anything that changes what is opened (O_PATH, O_TMPFILE).
const OPEN_FLAGS: i32 =
    libc::O_ACCMODE | libc::O_APPEND | libc::O_NONBLOCK | libc::O_DSYNC | libc::O_SYNC | libc::O_NOATIME;
/// Directory entries read from the host at a time.
const DIRENT_BUFFER: u32 = 32 << 10;

/// How long the guest may believe what it knows, and what it may keep.
#[derive(Debug, Clone, Copy)]
struct Policy {
    timeout: Duration,
    file: OpenOptions,
    directory: OpenOptions,
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

/// One shared directory, served by any number of threads.
#[derive(Debug)]
pub(super) struct Share {
    inodes: Inodes,
    handles: Handles,
    policy: Policy,
    /// `/proc/self/fd`, to open O_PATH descriptors again.
    proc_fds: OwnedFd,
}

impl Share {
    /// `root` and `proc_fds` are O_PATH descriptors of the shared directory and of `/proc/self/fd`; the guest can make
    /// the share hold at most `fd_limit` descriptors.
    pub(super) fn new(root: OwnedFd, proc_fds: OwnedFd, cache: FsCache, fd_limit: usize) -> io::Result<Self> {
        let budget = FdBudget::new(fd_limit);
        let stat = sys::stat(root.as_fd())?;
        Ok(Self {
            inodes: Inodes::new(root, &stat, budget.clone())?,
            handles: Handles::new(budget),
            policy: Policy::new(cache),
            proc_fds,
        })
    }

    /// `/proc/self/fd`.
    pub(super) fn proc_fds(&self) -> &OwnedFd {
        &self.proc_fds
    }

    /// The entry of the file behind `fd`, with one reference more for the guest.
    fn entry(&self, fd: OwnedFd) -> io::Result<Entry> {
        let stat = sys::stat(fd.as_fd())?;
        Ok(Entry {
            inode: self.inodes.remember(fd, &stat)?,
            generation: 0,
            attr: stat.attr,
            attr_flags: 0,
            attr_timeout: self.policy.timeout,
            entry_timeout: self.policy.timeout,
        })
    }

    fn find(&self, parent: &Inode, name: &CStr) -> io::Result<Entry> {
        self.entry(sys::open_child(parent.fd(), name, libc::O_PATH, 0)?)
    }

    fn reopen(&self, inode: &Inode, flags: i32) -> io::Result<File> {
        sys::reopen(self.proc_fds.as_fd(), inode.fd(), flags)
    }

    /// Opens a regular file. Devices, FIFOs and sockets are the guest's own: opening one here would reach the host's.
    fn open_file(&self, inode: &Inode, flags: u32, kill_privileges: bool) -> io::Result<File> {
        let flags = flags.cast_signed();
        match inode.file_type() {
            libc::S_IFREG => {}
            libc::S_IFDIR => return Err(errno(libc::EISDIR)),
            _ => return Err(errno(libc::ENXIO)),
        }
        let mut truncate = flags & libc::O_TRUNC;
        if truncate != 0 && kill_privileges {
            // Opening checks permissions, so the guard must be for a truncation of its own.
            let file = self.reopen(inode, libc::O_WRONLY | libc::O_NONBLOCK)?;
            let _guard = KillPrivileges::when(true)?;
            file.set_len(0)?;
            truncate = 0;
        }
        self.reopen(inode, flags & OPEN_FLAGS | truncate)
    }

    fn attributes(&self, inode: &Inode, handle: Option<&Handle>) -> io::Result<(stat64, Duration)> {
        let fd = handle.map_or_else(|| inode.fd(), Handle::fd);
        Ok((sys::stat(fd)?.attr, self.policy.timeout))
    }

    fn handle(&self, handle: Option<u64>, inode: u64) -> io::Result<Option<Arc<Handle>>> {
        handle.map(|handle| self.handles.get(handle, inode)).transpose()
    }

    /// Gives the directory's entries from `offset` on to `add` until it wants no more, or `size` bytes' worth is read.
    /// `add` says whether it took the entry.
    fn read_directory(
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
}

fn set_times(attr: &stat64, valid: SetattrValid) -> Option<[libc::timespec; 2]> {
    let time = |set: SetattrValid, now: SetattrValid, tv_sec, tv_nsec| {
        let omit = libc::timespec {
            tv_sec: 0,
            tv_nsec: libc::UTIME_OMIT,
        };
        let current = libc::timespec {
            tv_sec: 0,
            tv_nsec: libc::UTIME_NOW,
        };
        match (valid.contains(now), valid.contains(set)) {
            (true, _) => current,
            (false, true) => libc::timespec { tv_sec, tv_nsec },
            (false, false) => omit,
        }
    };
    let wanted =
        SetattrValid::ATIME | SetattrValid::MTIME | SetattrValid::ATIME_NOW | SetattrValid::MTIME_NOW;
    valid.intersects(wanted).then(|| {
        [
            time(
                SetattrValid::ATIME,
                SetattrValid::ATIME_NOW,
                attr.st_atime,
                attr.st_atime_nsec,
            ),
            time(
                SetattrValid::MTIME,
                SetattrValid::MTIME_NOW,
                attr.st_mtime,
                attr.st_mtime_nsec,
            ),
        ]
    })
}

impl FileSystem for Share {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, _capable: FsOptions) -> io::Result<FsOptions> {
        Ok(FsOptions::ASYNC_READ
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::BIG_WRITES
            | FsOptions::AUTO_INVAL_DATA
            | FsOptions::DO_READDIRPLUS
            | FsOptions::READDIRPLUS_AUTO
            | FsOptions::ASYNC_DIO
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::HANDLE_KILLPRIV_V2
            | FsOptions::MAX_PAGES)
    }

    fn destroy(&self) {
        self.handles.clear();
        self.inodes.clear();
    }

    fn lookup(&self, _ctx: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.find(&*self.inodes.get(parent)?, name)
    }

    fn forget(&self, _ctx: &Context, inode: u64, count: u64) {
        self.inodes.forget(inode, count);
    }

    fn getattr(&self, _ctx: &Context, inode: u64, handle: Option<u64>) -> io::Result<(stat64, Duration)> {
        let handle = self.handle(handle, inode)?;
        self.attributes(&*self.inodes.get(inode)?, handle.as_deref())
    }

    fn setattr(
        &self,
        _ctx: &Context,
        inode: u64,
        attr: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        let handle = self.handle(handle, inode)?;
        let inode = self.inodes.get(inode)?;
        if valid.contains(SetattrValid::MODE) {
            sys::chmod(self.proc_fds.as_fd(), inode.fd(), attr.st_mode)?;
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let or_keep = |flag, id| if valid.contains(flag) { id } else { u32::MAX };
            let uid = or_keep(SetattrValid::UID, attr.st_uid);
            sys::chown(inode.fd(), uid, or_keep(SetattrValid::GID, attr.st_gid))?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let size = u64::try_from(attr.st_size).map_err(|_| errno(libc::EINVAL))?;
            let flags = (libc::O_WRONLY | libc::O_NONBLOCK).cast_unsigned();
            let opened = handle
                .is_none()
                .then(|| self.open_file(&inode, flags, false))
                .transpose()?;
            let _guard = KillPrivileges::when(valid.contains(SetattrValid::KILL_SUIDGID))?;
            if let Some(file) = opened.as_ref().or(handle.as_deref().map(Handle::file)) {
                file.set_len(size)?;
            }
        }
        if let Some(times) = set_times(&attr, valid) {
            sys::utimes(self.proc_fds.as_fd(), inode.fd(), &times)?;
        }
        self.attributes(&inode, handle.as_deref())
    }

    fn readlink(&self, _ctx: &Context, inode: u64) -> io::Result<Vec<u8>> {
        sys::readlink(self.inodes.get(inode)?.fd())
    }

    fn symlink(&self, ctx: &Context, target: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        let parent = self.inodes.get(parent)?;
        {
            let _owner = Owner::become_owner(ctx.uid, ctx.gid)?;
            sys::symlink(target, parent.fd(), name)?;
        }
        self.find(&parent, name)
    }

    fn mknod(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        device: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        let parent = self.inodes.get(parent)?;
        {
            let _owner = Owner::become_owner(ctx.uid, ctx.gid)?;
            sys::mknod(parent.fd(), name, mode & !(umask & 0o777), device)?;
        }
        self.find(&parent, name)
    }

    fn mkdir(&self, ctx: &Context, parent: u64, name: &CStr, mode: u32, umask: u32) -> io::Result<Entry> {
        let parent = self.inodes.get(parent)?;
        {
            let _owner = Owner::become_owner(ctx.uid, ctx.gid)?;
            sys::mkdir(parent.fd(), name, mode & !(umask & 0o777))?;
        }
        self.find(&parent, name)
    }

    fn unlink(&self, _ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        sys::unlink(self.inodes.get(parent)?.fd(), name, 0)
    }

    fn rmdir(&self, _ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        sys::unlink(self.inodes.get(parent)?.fd(), name, libc::AT_REMOVEDIR)
    }

    fn rename(
        &self,
        _ctx: &Context,
        from: u64,
        old: &CStr,
        to: u64,
        new: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        sys::rename(
            self.inodes.get(from)?.fd(),
            old,
            self.inodes.get(to)?.fd(),
            new,
            flags,
        )
    }

    fn link(&self, _ctx: &Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        let (inode, parent) = (self.inodes.get(inode)?, self.inodes.get(parent)?);
        sys::link(inode.fd(), parent.fd(), name)?;
        self.find(&parent, name)
    }

    fn open(
        &self,
        _ctx: &Context,
        inode: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let kill_privileges = fuse_flags & FOPEN_IN_KILL_SUIDGID != 0;
        let file = self.open_file(&*self.inodes.get(inode)?, flags, kill_privileges)?;
        Ok((Some(self.handles.add(inode, file)?), self.policy.file, None))
    }

    fn create(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        let parent = self.inodes.get(parent)?;
        let flags = args.flags.cast_signed();
        let mode = args.mode & !(args.umask & 0o777);
        let created = {
            let _owner = Owner::become_owner(ctx.uid, ctx.gid)?;
            let exclusive = libc::O_CREAT | libc::O_EXCL;
            sys::open_child(parent.fd(), name, flags & OPEN_FLAGS | exclusive, mode)
        };
        let (entry, file) = match created {
            Ok(fd) => {
                let path = self.proc_path(&fd)?;
                (self.entry(path)?, Ok(File::from(fd)))
            }
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) && flags & libc::O_EXCL == 0 => {
                let entry = self.find(&parent, name)?;
                let kill_privileges = args.fuse_flags & FOPEN_IN_KILL_SUIDGID != 0;
                let inode = self.inodes.get(entry.inode)?;
                (entry, self.open_file(&inode, args.flags, kill_privileges))
            }
            Err(error) => return Err(error),
        };
        match file.and_then(|file| self.handles.add(entry.inode, file)) {
            Ok(handle) => Ok((entry, Some(handle), self.policy.file, None)),
            Err(error) => {
                // The guest does not learn of the entry, so it will not forget it either.
                self.inodes.forget(entry.inode, 1);
                Err(error)
            }
        }
    }

    fn read(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        w: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _flags: u32,
    ) -> io::Result<usize> {
        let handle = self.handles.get(handle, inode)?;
        w.write_from(&mut *borrow(handle.file()), size as usize, offset)
    }

    fn write(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        r: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _delayed_write: bool,
        _flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let handle = self.handles.get(handle, inode)?;
        let _guard = KillPrivileges::when(fuse_flags & WRITE_KILL_PRIV != 0)?;
        r.read_to(&mut *borrow(handle.file()), size as usize, offset)
    }

    fn flush(&self, _ctx: &Context, inode: u64, handle: u64, _lock_owner: u64) -> io::Result<()> {
        sys::flush(self.handles.get(handle, inode)?.file())
    }

    fn fsync(&self, _ctx: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        let handle = self.handles.get(handle, inode)?;
        if datasync {
            handle.file().sync_data()
        } else {
            handle.file().sync_all()
        }
    }

    fn fallocate(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        sys::fallocate(self.handles.get(handle, inode)?.fd(), mode, offset, length)
    }

    fn release(
        &self,
        _ctx: &Context,
        inode: u64,
        _flags: u32,
        handle: u64,
        _flush: bool,
        _flock_release: bool,
        _lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.handles.remove(handle, inode)
    }

    fn statfs(&self, _ctx: &Context, inode: u64) -> io::Result<statvfs64> {
        sys::statfs(self.inodes.get(inode)?.fd())
    }

    fn setxattr(&self, _ctx: &Context, inode: u64, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        xattr::set(self.inodes.get(inode)?.fd(), name, value, flags)
    }

    fn getxattr(&self, _ctx: &Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let (len, value) = xattr::get(self.inodes.get(inode)?.fd(), name, size)?;
        Ok(match size {
            0 => GetxattrReply::Count(u32::try_from(len).unwrap_or(u32::MAX)),
            _ => GetxattrReply::Value(value),
        })
    }

    fn listxattr(&self, _ctx: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        let (len, names) = xattr::list(self.inodes.get(inode)?.fd(), size)?;
        Ok(match size {
            0 => ListxattrReply::Count(u32::try_from(len).unwrap_or(u32::MAX)),
            _ => ListxattrReply::Names(names),
        })
    }

    fn removexattr(&self, _ctx: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        xattr::remove(self.inodes.get(inode)?.fd(), name)
    }

    fn opendir(&self, _ctx: &Context, inode: u64, _flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        let directory = self.inodes.get(inode)?;
        if directory.file_type() != libc::S_IFDIR {
            return Err(errno(libc::ENOTDIR));
        }
        let file = self.reopen(&directory, libc::O_RDONLY | libc::O_DIRECTORY)?;
        Ok((Some(self.handles.add(inode, file)?), self.policy.directory))
    }

    fn readdir(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let handle = self.handles.get(handle, inode)?;
        self.read_directory(&handle, size, offset, &mut |entry, _| Ok(add_entry(entry)? > 0))
    }

    fn readdirplus(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let handle = self.handles.get(handle, inode)?;
        let directory = self.inodes.get(inode)?;
        // An entry with attributes takes five times the room of one without; what does not fit was looked up in vain.
        let host_size = (size / 4).max(1024).min(size);
        self.read_directory(&handle, host_size, offset, &mut |entry, name| {
            // Inode 0, no attributes, no reference: for `.` and `..`, and for what is gone since the host listed it or
            // cannot be held. The guest asks for those by name.
            let found = self.find(&directory, name).unwrap_or_default();
            let added = add_entry(entry, found);
            if !matches!(added, Ok(1..)) {
                self.inodes.forget(found.inode, 1);
            }
            Ok(added? > 0)
        })
    }

    fn fsyncdir(&self, ctx: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.fsync(ctx, inode, datasync, handle)
    }

    fn releasedir(&self, _ctx: &Context, inode: u64, _flags: u32, handle: u64) -> io::Result<()> {
        self.handles.remove(handle, inode)
    }

    fn lseek(&self, _ctx: &Context, inode: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        // The guest keeps positions itself and asks for these two only.
        let whence = whence.cast_signed();
        if !matches!(whence, libc::SEEK_DATA | libc::SEEK_HOLE) {
            return Err(errno(libc::EINVAL));
        }
        let handle = self.handles.get(handle, inode)?;
        let _position = handle.position.lock().unwrap_or_else(PoisonError::into_inner);
        sys::lseek(handle.fd(), offset, whence)
    }
}

impl Share {
    /// An O_PATH descriptor of the file `fd` has open.
    fn proc_path(&self, fd: &OwnedFd) -> io::Result<OwnedFd> {
        Ok(sys::reopen(self.proc_fds.as_fd(), fd.as_fd(), libc::O_PATH)?.into())
    }
}

/// `file` as the mutable `File` the zero-copy traits want; it is never closed through the copy.
fn borrow(file: &File) -> ManuallyDrop<File> {
    // SAFETY: the descriptor stays open while the caller holds `file`, and ManuallyDrop does not close it.
    ManuallyDrop::new(unsafe { File::from_raw_fd(file.as_raw_fd()) })
}
