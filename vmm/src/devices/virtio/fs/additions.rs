//! Requests that came after fuse-backend-rs' trait: SYNCFS (7.34), TMPFILE (7.37), STATX (7.39), and COPY_FILE_RANGE (7.28).

#![allow(unsafe_code)]

use std::collections::HashSet;
use std::io;
use std::os::fd::AsFd;
use std::sync::PoisonError;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, OpenOptions};
use fuse_backend_rs::api::filesystem::{Context, Entry, ROOT_ID};
use vm_memory::ByteValued;

use super::credentials::{KillPrivileges, Owner, set_umask};
use super::filesystem::kills_privileges;
use super::inodes::{Found, Place};
use super::mounts::Root;
use super::share::Share;
use super::sys::{self, Stat, errno};

/// Most bytes copied by one COPY_FILE_RANGE, so that none keeps a thread busy for long. Programs ask for the rest again.
const MAX_COPY: u64 = 16 << 20;

/// `struct fuse_copy_file_range_in`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct CopyFileRangeIn {
    pub(super) from: u64,
    pub(super) from_offset: u64,
    pub(super) to_node: u64,
    pub(super) to: u64,
    pub(super) to_offset: u64,
    pub(super) len: u64,
    pub(super) flags: u64,
}

// SAFETY: integers only, without padding.
unsafe impl ByteValued for CopyFileRangeIn {}

/// `struct fuse_statx_in`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct StatxIn {
    pub(super) getattr_flags: u32,
    reserved: u32,
    pub(super) fh: u64,
    sync_flags: u32,
    mask: u32,
}

// SAFETY: integers only, without padding.
unsafe impl ByteValued for StatxIn {}

/// `struct fuse_sx_time`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct StatxTime {
    seconds: i64,
    nanoseconds: u32,
    reserved: i32,
}

impl StatxTime {
    fn new(seconds: i64, nanoseconds: i64) -> Self {
        Self {
            seconds,
            // Below 1,000,000,000.
            nanoseconds: nanoseconds as u32,
            reserved: 0,
        }
    }
}

/// `struct fuse_statx_out` with its `struct fuse_statx`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct StatxOut {
    attr_valid: u64,
    attr_valid_nsec: u32,
    flags: u32,
    spare: [u64; 2],
    mask: u32,
    blksize: u32,
    attributes: u64,
    nlink: u32,
    uid: u32,
    gid: u32,
    mode: u16,
    spare0: u16,
    ino: u64,
    size: u64,
    blocks: u64,
    attributes_mask: u64,
    atime: StatxTime,
    btime: StatxTime,
    ctime: StatxTime,
    mtime: StatxTime,
    rdev_major: u32,
    rdev_minor: u32,
    dev_major: u32,
    dev_minor: u32,
    spare2: [u64; 14],
}

// SAFETY: integers only, without padding.
unsafe impl ByteValued for StatxOut {}

impl StatxOut {
    fn new(stat: &Stat, timeout: Duration) -> Self {
        let attr = &stat.attr;
        let birth = stat.birth.map_or(0, |_| libc::STATX_BTIME);
        let (seconds, nanoseconds) = stat.birth.unwrap_or_default();
        Self {
            attr_valid: timeout.as_secs(),
            attr_valid_nsec: timeout.subsec_nanos(),
            mask: libc::STATX_BASIC_STATS | birth,
            blksize: attr.st_blksize as u32,
            nlink: attr.st_nlink as u32,
            uid: attr.st_uid,
            gid: attr.st_gid,
            mode: attr.st_mode as u16,
            ino: attr.st_ino,
            size: attr.st_size.cast_unsigned(),
            blocks: attr.st_blocks.cast_unsigned(),
            atime: StatxTime::new(attr.st_atime, attr.st_atime_nsec),
            btime: StatxTime::new(seconds, nanoseconds.into()),
            ctime: StatxTime::new(attr.st_ctime, attr.st_ctime_nsec),
            mtime: StatxTime::new(attr.st_mtime, attr.st_mtime_nsec),
            rdev_major: libc::major(attr.st_rdev),
            rdev_minor: libc::minor(attr.st_rdev),
            ..Self::default()
        }
    }
}

impl Share {
    /// Attributes with the time of birth.
    ///
    /// # Errors
    /// As for GETATTR.
    pub(super) fn statx(&self, node: u64, handle: Option<u64>) -> io::Result<StatxOut> {
        if self.is_names(node)
            && let Root::Names(names) = &*self.root()
        {
            let stat = Stat {
                attr: names.attributes(),
                birth: None,
                mount: 0,
            };
            return Ok(StatxOut::new(&stat, Duration::ZERO));
        }
        let inode = self.inodes.get(node)?;
        let mut stat = match self.handle(handle, node)? {
            Some(handle) => sys::stat(handle.as_fd())?,
            None => self.stat(&inode)?,
        };
        stat.attr = inode.shown(stat.attr);
        Ok(StatxOut::new(&stat, self.policy.timeout))
    }

    /// Writes back what the file system of `node` has not written yet; for the root, all file systems the guest knows
    /// files of. Guests that make no mounts of the host's ask for the root only.
    ///
    /// # Errors
    /// What the host says of the first file system that cannot be written.
    pub(super) fn syncfs(&self, node: u64) -> io::Result<()> {
        // One at a time: a guest that asks again and again shall not have all threads wait for the host's disks.
        let _one = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        let inodes = match node {
            ROOT_ID => self.inodes.host_mounts(),
            node => vec![self.inodes.get(node)?],
        };
        let mut synced = HashSet::new();
        let mut result = Ok(());
        for inode in inodes {
            // Only these can be opened without an effect on somebody else.
            if !matches!(inode.file_type(), libc::S_IFDIR | libc::S_IFREG) {
                continue;
            }
            let one = self
                .reopen(&inode, libc::O_RDONLY | libc::O_NONBLOCK)
                .and_then(|file| {
                    let device = sys::stat(file.as_fd())?.attr.st_dev;
                    match synced.insert(device) {
                        true => sys::syncfs(file.as_fd()),
                        false => Ok(()),
                    }
                });
            // What the guest knew and is gone needs no sync.
            if let Err(error) = one
                && error.raw_os_error() != Some(libc::ESTALE)
                && result.is_ok()
            {
                result = Err(error);
            }
        }
        result
    }

    /// A file without a name, open, in the file system of the directory `node`.
    ///
    /// # Errors
    /// EOPNOTSUPP where the file system has no such files.
    pub(super) fn tmpfile(
        &self,
        ctx: &Context,
        node: u64,
        args: CreateIn,
    ) -> io::Result<(Entry, u64, OpenOptions)> {
        let parent = self.inodes.get(node)?;
        parent.check_writable()?;
        let (directory, ticket) = (self.fd(&parent)?, self.descriptors.ticket()?);
        let flags = args.flags.cast_signed();
        let file = {
            set_umask(args.umask)?;
            let _owner = Owner::become_owner(ctx.uid, ctx.gid)?;
            let flags = self.open_flags(flags) | flags & libc::O_EXCL;
            sys::tmpfile(self.proc_fds.as_fd(), directory.as_fd(), flags, args.mode)?
        };
        let stat = sys::stat(file.as_fd())?;
        let inode = self.inodes.remember(Found {
            stat: &stat,
            mount: parent.mount(),
            births: parent.births(),
            foreign: false,
            // Until it is linked, if ever.
            place: Place::Unknown,
        })?;
        match self.add_handle(&inode, file, ticket) {
            Ok(handle) => Ok((self.entry(&inode, &stat, false), handle, self.policy.file)),
            Err(error) => {
                self.forget_inode(inode.id(), 1);
                Err(error)
            }
        }
    }

    /// Copies between two open files; returns the bytes copied.
    ///
    /// # Errors
    /// What the host says. Of EXDEV and EOPNOTSUPP Linux makes reads and writes.
    pub(super) fn copy_file_range(
        &self,
        ctx: &Context,
        node: u64,
        copy: &CopyFileRangeIn,
    ) -> io::Result<u32> {
        if copy.flags != 0 {
            return Err(errno(libc::EINVAL));
        }
        let (from, to) = (
            self.handles.get(copy.from, node)?,
            self.handles.get(copy.to, copy.to_node)?,
        );
        let len = copy.len.min(MAX_COPY);
        let _guard = KillPrivileges::when(kills_privileges(ctx))?;
        let (from, to) = (from.as_fd(), to.as_fd());
        let copied = sys::copy_file_range(from, copy.from_offset, to, copy.to_offset, len as usize)?;
        self.moved.add_copied(copied as u64);
        // At most MAX_COPY.
        Ok(copied as u32)
    }
}
