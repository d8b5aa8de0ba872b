//! The requests of the guest (`server` calls these, one per FUSE message).

#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{
    CreateIn, FOPEN_IN_KILL_SUIDGID, FsOptions, OpenOptions, SetattrValid, WRITE_KILL_PRIV, stat64, statvfs64,
};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, GetxattrReply, ListxattrReply, ZeroCopyReader, ZeroCopyWriter,
};

use super::credentials::{KillPrivileges, Owner, set_umask};
use super::device_nodes;
use super::inodes::Inode;
use super::mounts::Root;
use super::open_files::Handle;
use super::share::Share;
use super::sys::{self, errno, xattr};

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

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        let writeback = match self.options.writeback {
            true => FsOptions::WRITEBACK_CACHE,
            false => FsOptions::empty(),
        };
        self.set_writeback(capable.contains(FsOptions::WRITEBACK_CACHE) && self.options.writeback);
        self.set_submounts(capable.contains(FsOptions::SUBMOUNTS));
        Ok(writeback
            | FsOptions::ASYNC_READ
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::POSIX_LOCKS
            | FsOptions::FLOCK_LOCKS
            | FsOptions::BIG_WRITES
            | FsOptions::DONT_MASK
            | FsOptions::AUTO_INVAL_DATA
            | FsOptions::DO_READDIRPLUS
            | FsOptions::READDIRPLUS_AUTO
            | FsOptions::ASYNC_DIO
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::HANDLE_KILLPRIV_V2
            | FsOptions::SUBMOUNTS
            | FsOptions::MAX_PAGES)
    }

    fn destroy(&self) {
        self.forget_guest();
    }

    fn lookup(&self, _ctx: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        if self.is_names(parent) {
            let mount = match &*self.root() {
                Root::Names(names) => names.get(sys::check_name(name)?),
                Root::Directory(_) => None,
            };
            return self.mount_entry(&mount.ok_or_else(|| errno(libc::ENOENT))?);
        }
        self.find(&self.inodes.get(parent)?, name)
    }

    fn forget(&self, _ctx: &Context, inode: u64, count: u64) {
        self.forget_inode(inode, count);
    }

    fn getattr(&self, _ctx: &Context, inode: u64, handle: Option<u64>) -> io::Result<(stat64, Duration)> {
        if self.is_names(inode)
            && let Root::Names(names) = &*self.root()
        {
            return Ok((names.attributes(), Duration::ZERO));
        }
        let handle = self.handle(handle, inode)?;
        self.attributes(&self.inodes.get(inode)?, handle.as_deref())
    }

    fn setattr(
        &self,
        _ctx: &Context,
        inode: u64,
        mut attr: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        let handle = self.handle(handle, inode)?;
        let inode = self.inodes.get(inode)?;
        inode.check_writable()?;
        if inode.is_device() {
            let old = sys::stat(self.fd(&inode)?.as_fd())?.attr;
            device_nodes::amend_attributes(&old, valid, &mut attr)?;
        }
        if valid.contains(SetattrValid::MODE) {
            sys::chmod(self.proc_fds.as_fd(), self.fd(&inode)?.as_fd(), attr.st_mode)?;
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let or_keep = |flag, id| if valid.contains(flag) { id } else { u32::MAX };
            let uid = or_keep(SetattrValid::UID, attr.st_uid);
            sys::chown(
                self.fd(&inode)?.as_fd(),
                uid,
                or_keep(SetattrValid::GID, attr.st_gid),
            )?;
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
            sys::utimes(self.proc_fds.as_fd(), self.fd(&inode)?.as_fd(), &times)?;
        }
        self.attributes(&inode, handle.as_deref())
    }

    fn readlink(&self, _ctx: &Context, inode: u64) -> io::Result<Vec<u8>> {
        sys::readlink(self.fd(&self.inodes.get(inode)?)?.as_fd())
    }

    fn symlink(&self, ctx: &Context, target: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        let parent = self.inodes.get(parent)?;
        parent.check_writable()?;
        let directory = self.fd(&parent)?;
        {
            let _owner = Owner::become_owner(ctx.uid, ctx.gid)?;
            sys::symlink(target, directory.as_fd(), name)?;
        }
        self.find_below(&parent, directory.as_fd(), name)
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
        parent.check_writable()?;
        let directory = self.fd(&parent)?;
        {
            set_umask(umask)?;
            let _owner = Owner::become_owner(ctx.uid, ctx.gid)?;
            let mode = device_nodes::mode_of_new(mode, device, ctx.uid)?;
            sys::mknod(directory.as_fd(), name, mode, device)?;
        }
        self.find_below(&parent, directory.as_fd(), name)
    }

    fn mkdir(&self, ctx: &Context, parent: u64, name: &CStr, mode: u32, umask: u32) -> io::Result<Entry> {
        let parent = self.inodes.get(parent)?;
        parent.check_writable()?;
        let directory = self.fd(&parent)?;
        {
            set_umask(umask)?;
            let _owner = Owner::become_owner(ctx.uid, ctx.gid)?;
            sys::mkdir(directory.as_fd(), name, mode)?;
        }
        self.find_below(&parent, directory.as_fd(), name)
    }

    fn unlink(&self, _ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        let parent = self.inodes.get(parent)?;
        parent.check_writable()?;
        self.remove(&parent, name, 0)
    }

    fn rmdir(&self, _ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        let parent = self.inodes.get(parent)?;
        parent.check_writable()?;
        self.remove(&parent, name, libc::AT_REMOVEDIR)
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
        let (from, to) = (self.inodes.get(from)?, self.inodes.get(to)?);
        check_pair(&from, &to)?;
        let (from_fd, to_fd) = (self.fd(&from)?, self.fd(&to)?);
        let (moved, replaced) = sys::rename(from_fd.as_fd(), old, to_fd.as_fd(), new, flags)?;
        match replaced {
            Some(stat) if flags & libc::RENAME_EXCHANGE != 0 => self.inodes.moved(&stat, &from, old),
            Some(stat) => self.inodes.deleted(&stat, &to),
            None => {}
        }
        self.inodes.moved(&moved, &to, new);
        Ok(())
    }

    fn link(&self, _ctx: &Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        let (inode, parent) = (self.inodes.get(inode)?, self.inodes.get(parent)?);
        check_pair(&inode, &parent)?;
        let directory = self.fd(&parent)?;
        sys::link(self.fd(&inode)?.as_fd(), directory.as_fd(), name)?;
        self.find_below(&parent, directory.as_fd(), name)
    }

    fn open(
        &self,
        _ctx: &Context,
        inode: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let kill_privileges = fuse_flags & FOPEN_IN_KILL_SUIDGID != 0;
        let known = self.inodes.get(inode)?;
        let ticket = self.descriptors.ticket()?;
        let file = self.open_file(&known, flags, kill_privileges)?;
        let handle = self.add_handle(&known, file, ticket)?;
        Ok((Some(handle), self.policy.file, None))
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
        parent.check_writable()?;
        let (directory, ticket) = (self.fd(&parent)?, self.descriptors.ticket()?);
        let created = {
            set_umask(args.umask)?;
            let _owner = Owner::become_owner(ctx.uid, ctx.gid)?;
            let flags = self.open_flags(flags) | libc::O_CREAT | libc::O_EXCL;
            sys::open_child(directory.as_fd(), name, flags, args.mode)
        };
        let (entry, created) = match created {
            Ok(fd) => {
                let stat = sys::stat(fd.as_fd())?;
                (
                    self.child(&parent, directory.as_fd(), name, &stat)?,
                    Some(File::from(fd)),
                )
            }
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) && flags & libc::O_EXCL == 0 => {
                (self.find_below(&parent, directory.as_fd(), name)?, None)
            }
            Err(error) => return Err(error),
        };
        let opened = self.inodes.get(entry.inode).and_then(|inode| {
            let kill_privileges = args.fuse_flags & FOPEN_IN_KILL_SUIDGID != 0;
            let file = match created {
                Some(file) => file,
                None => self.open_file(&inode, args.flags, kill_privileges)?,
            };
            self.add_handle(&inode, file, ticket)
        });
        match opened {
            Ok(handle) => Ok((entry, Some(handle), self.policy.file, None)),
            Err(error) => {
                // The guest does not learn of the entry, so it will not forget it either.
                self.forget_inode(entry.inode, 1);
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
        let count = w.write_from(&mut *borrow(handle.file()), size as usize, offset)?;
        self.moved.read_bytes.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
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
        let count = r.read_to(&mut *borrow(handle.file()), size as usize, offset)?;
        self.moved.write_bytes.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }

    fn flush(&self, _ctx: &Context, inode: u64, handle: u64, lock_owner: u64) -> io::Result<()> {
        let handle = self.handles.get(handle, inode)?;
        self.locks.close(inode, lock_owner);
        sys::flush(handle.file())
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
        ctx: &Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let _guard = KillPrivileges::when(kills_privileges(ctx))?;
        sys::fallocate(self.handles.get(handle, inode)?.as_fd(), mode, offset, length)
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
        // Not when the last request that uses the handle ends.
        let open = self.handles.get(handle, inode)?;
        if open.flock().is_some() {
            open.set_flock(None)?;
            self.locks.set_released();
        }
        self.locks.close_handle(inode, handle);
        self.handles.remove(handle, inode)
    }

    fn statfs(&self, _ctx: &Context, inode: u64) -> io::Result<statvfs64> {
        if self.is_names(inode) {
            // SAFETY: zero is valid for every field: a file system of no size.
            let mut none: statvfs64 = unsafe { std::mem::zeroed() };
            (none.f_bsize, none.f_frsize, none.f_namemax) = (4096, 4096, 255);
            return Ok(none);
        }
        sys::statfs(self.fd(&self.inodes.get(inode)?)?.as_fd())
    }

    fn setxattr(&self, _ctx: &Context, inode: u64, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        let inode = self.xattr_inode(inode)?;
        inode.check_writable()?;
        let fd = self.fd(&inode)?;
        // An access list would let others in.
        if inode.is_device() && device_nodes::stays_own(&sys::stat(fd.as_fd())?.attr) {
            return Err(errno(libc::EPERM));
        }
        xattr::set(fd.as_fd(), name, value, flags)
    }

    fn getxattr(&self, _ctx: &Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let (len, value) = xattr::get(self.fd(&self.xattr_inode(inode)?)?.as_fd(), name, size)?;
        Ok(match size {
            0 => GetxattrReply::Count(u32::try_from(len).unwrap_or(u32::MAX)),
            _ => GetxattrReply::Value(value),
        })
    }

    fn listxattr(&self, _ctx: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        let (len, names) = xattr::list(self.fd(&self.xattr_inode(inode)?)?.as_fd(), size)?;
        Ok(match size {
            0 => ListxattrReply::Count(u32::try_from(len).unwrap_or(u32::MAX)),
            _ => ListxattrReply::Names(names),
        })
    }

    fn removexattr(&self, _ctx: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        let inode = self.xattr_inode(inode)?;
        inode.check_writable()?;
        xattr::remove(self.fd(&inode)?.as_fd(), name)
    }

    fn opendir(&self, _ctx: &Context, inode: u64, _flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        if self.is_names(inode) {
            return Ok((None, OpenOptions::empty()));
        }
        let directory = self.inodes.get(inode)?;
        if !directory.is_directory() {
            return Err(errno(libc::ENOTDIR));
        }
        let ticket = self.descriptors.ticket()?;
        let file = self.reopen(&directory, libc::O_RDONLY | libc::O_DIRECTORY)?;
        let handle = self.add_handle(&directory, file, ticket)?;
        Ok((Some(handle), self.policy.directory))
    }

    fn readdir(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        _size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry) -> io::Result<usize>,
    ) -> io::Result<()> {
        if self.is_names(inode) {
            return self.read_names(offset, &mut |entry, _| Ok(add_entry(entry)? > 0));
        }
        let handle = self.handles.get(handle, inode)?;
        self.read_directory(&handle, offset, &mut |entry, _| Ok(add_entry(entry)? > 0))
    }

    fn readdirplus(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        _size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let mut add = |entry: DirEntry, found: Entry| {
            let added = add_entry(entry, found);
            if !matches!(added, Ok(1..)) {
                self.forget_inode(found.inode, 1);
            }
            Ok(added? > 0)
        };
        if self.is_names(inode) {
            return self.read_names(offset, &mut |entry, mount| {
                let found = mount.and_then(|mount| self.mount_entry(mount).ok());
                add(entry, found.unwrap_or_default())
            });
        }
        let handle = self.handles.get(handle, inode)?;
        let directory = self.inodes.get(inode)?;
        self.read_directory(&handle, offset, &mut |entry, name| {
            // Inode 0, no attributes, no reference: for `.` and `..`, and for what is gone since the host listed it or
            // cannot be held. The guest asks for those by name.
            let found = self.find_below(&directory, handle.as_fd(), name);
            add(entry, found.unwrap_or_default())
        })
    }

    fn fsyncdir(&self, ctx: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        if self.is_names(inode) {
            return Ok(());
        }
        self.fsync(ctx, inode, datasync, handle)
    }

    fn releasedir(&self, _ctx: &Context, inode: u64, _flags: u32, handle: u64) -> io::Result<()> {
        if self.is_names(inode) {
            return Ok(());
        }
        self.handles.remove(handle, inode)
    }

    fn lseek(&self, _ctx: &Context, inode: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        // The guest keeps positions itself and asks for these two only.
        let whence = whence.cast_signed();
        if !matches!(whence, libc::SEEK_DATA | libc::SEEK_HOLE) {
            return Err(errno(libc::EINVAL));
        }
        // The position of a directory belongs to its listing.
        if self.inodes.get(inode)?.is_directory() {
            return Err(errno(libc::EINVAL));
        }
        let handle = self.handles.get(handle, inode)?;
        let _position = handle.listing.lock().unwrap_or_else(PoisonError::into_inner);
        sys::lseek(handle.as_fd(), offset, whence)
    }
}

impl Share {
    fn remove(&self, parent: &Arc<Inode>, name: &CStr, flags: i32) -> io::Result<()> {
        let victim = sys::unlink(self.fd(parent)?.as_fd(), name, flags)?;
        self.inodes.deleted(&victim, parent);
        Ok(())
    }

    /// The inode of a request about extended attributes.
    ///
    /// # Errors
    /// ENOSYS when they are turned off: Linux then stops asking.
    fn xattr_inode(&self, inode: u64) -> io::Result<Arc<Inode>> {
        if !self.options.xattr {
            return Err(errno(libc::ENOSYS));
        }
        if self.is_names(inode) {
            return Err(errno(libc::ENODATA));
        }
        self.inodes.get(inode)
    }
}

/// Whether a change by this caller takes setuid and setgid off a file, where the guest does not say so: of FALLOCATE and
/// COPY_FILE_RANGE it says nothing, so only root is taken to have CAP_FSETID.
pub(super) fn kills_privileges(ctx: &Context) -> bool {
    ctx.uid != 0
}

/// Both inodes must be in one share, which the guest may change.
fn check_pair(one: &Inode, other: &Inode) -> io::Result<()> {
    one.check_writable()?;
    other.check_writable()?;
    match one.mount().id == other.mount().id {
        true => Ok(()),
        false => Err(errno(libc::EXDEV)),
    }
}

/// `file` as the mutable `File` the zero-copy traits want; it is never closed through the copy.
fn borrow(file: &File) -> ManuallyDrop<File> {
    // SAFETY: the descriptor stays open while the caller holds `file`, and ManuallyDrop does not close it.
    ManuallyDrop::new(unsafe { File::from_raw_fd(file.as_raw_fd()) })
}
