//! The system calls of the share, as functions that are safe to call.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::mem::{MaybeUninit, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use fuse_backend_rs::abi::fuse_abi::{stat64, statvfs64};

/// What `statx` says about a file, in one call.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stat {
    /// The attributes.
    pub(super) attr: stat64,
    /// When it was made, in seconds and nanoseconds; not every file system says.
    pub(super) birth: Option<(i64, u32)>,
    /// The mount it was reached through. Two bind mounts of one directory are two directories: one may be read-only.
    pub(super) mount: u64,
}

pub(super) fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A name that stays in its directory: one component, not `.` or `..`.
pub(super) fn check_name(name: &CStr) -> io::Result<&CStr> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(errno(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(errno(libc::EINVAL)),
        _ => Ok(name),
    }
}

/// Opens `name` in `dir`. Never leaves `dir` except downwards into a mount, never follows a link of any kind.
pub(super) fn open_child(dir: BorrowedFd, name: &CStr, flags: i32, mode: u32) -> io::Result<OwnedFd> {
    let name = check_name(name)?;
    // SAFETY: all-zero is a valid `open_how`.
    let mut how: libc::open_how = unsafe { zeroed() };
    how.flags = u64::from((flags | libc::O_NOFOLLOW | libc::O_CLOEXEC).cast_unsigned());
    how.mode = u64::from(mode & 0o7777);
    how.resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS | libc::RESOLVE_NO_MAGICLINKS;
    // SAFETY: `name` and `how` are valid during the call, which only reads them.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_openat2,
            dir.as_raw_fd(),
            name.as_ptr(),
            &raw const how,
            size_of::<libc::open_how>(),
        )
    };
    match i32::try_from(fd) {
        // SAFETY: the call returned a new descriptor that nobody else owns.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The name of `fd` in `/proc/self/fd`.
pub(super) fn proc_name(fd: BorrowedFd) -> CString {
    // Digits only, so there is no NUL in it.
    CString::new(fd.as_raw_fd().to_string()).unwrap_or_default()
}

/// Opens the file behind an O_PATH descriptor with other flags. `proc_fds` is `/proc/self/fd`.
pub(super) fn reopen(proc_fds: BorrowedFd, fd: BorrowedFd, flags: i32) -> io::Result<File> {
    let name = proc_name(fd);
    // The link must be followed: it leads to exactly the file `fd` refers to, whatever its path is now.
    let flags = flags & !(libc::O_NOFOLLOW | libc::O_CREAT) | libc::O_CLOEXEC;
    // SAFETY: `name` is valid during the call.
    let new = unsafe { libc::openat(proc_fds.as_raw_fd(), name.as_ptr(), flags) };
    if new < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call returned a new descriptor that nobody else owns.
    Ok(unsafe { File::from_raw_fd(new) })
}

pub(super) fn stat(fd: BorrowedFd) -> io::Result<Stat> {
    statx(fd, c"", libc::AT_EMPTY_PATH).map(|(stat, _)| stat)
}

/// What `name` in `dir` is, without opening it. Leaves `dir` no more than [`open_child`] does.
pub(super) fn stat_child(dir: BorrowedFd, name: &CStr) -> io::Result<Stat> {
    let flags = libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT;
    statx(dir, check_name(name)?, flags).map(|(stat, _)| stat)
}

/// With STATX_ATTR_*.
fn statx(dir: BorrowedFd, name: &CStr, flags: i32) -> io::Result<(Stat, u64)> {
    let mut out = MaybeUninit::<libc::statx>::zeroed();
    let mask = libc::STATX_BASIC_STATS | libc::STATX_BTIME | libc::STATX_MNT_ID;
    // SAFETY: `name` is valid during the call, `out` has room for the answer.
    check(unsafe { libc::statx(dir.as_raw_fd(), name.as_ptr(), flags, mask, out.as_mut_ptr()) })?;
    // SAFETY: the kernel filled it, and zero is valid for every field anyway.
    let x = unsafe { out.assume_init() };
    // SAFETY: zero is valid for every field.
    let mut attr: stat64 = unsafe { zeroed() };
    attr.st_dev = libc::makedev(x.stx_dev_major, x.stx_dev_minor);
    attr.st_ino = x.stx_ino;
    attr.st_mode = x.stx_mode.into();
    attr.st_nlink = x.stx_nlink.into();
    attr.st_uid = x.stx_uid;
    attr.st_gid = x.stx_gid;
    attr.st_rdev = libc::makedev(x.stx_rdev_major, x.stx_rdev_minor);
    attr.st_size = x.stx_size.cast_signed();
    attr.st_blksize = x.stx_blksize.into();
    attr.st_blocks = x.stx_blocks.cast_signed();
    (attr.st_atime, attr.st_atime_nsec) = (x.stx_atime.tv_sec, x.stx_atime.tv_nsec.into());
    (attr.st_mtime, attr.st_mtime_nsec) = (x.stx_mtime.tv_sec, x.stx_mtime.tv_nsec.into());
    (attr.st_ctime, attr.st_ctime_nsec) = (x.stx_ctime.tv_sec, x.stx_ctime.tv_nsec.into());
    let stat = Stat {
        attr,
        birth: (x.stx_mask & libc::STATX_BTIME != 0).then_some((x.stx_btime.tv_sec, x.stx_btime.tv_nsec)),
        mount: x.stx_mnt_id,
    };
    Ok((stat, x.stx_attributes))
}

/// Whether the file system gives a file another time of birth while it is the same file: overlayfs does when it copies a
/// file up.
pub(super) fn changes_births(fd: BorrowedFd) -> io::Result<bool> {
    let mut out = MaybeUninit::<libc::statfs64>::zeroed();
    // SAFETY: `out` has room for the answer.
    check(unsafe { libc::fstatfs64(fd.as_raw_fd(), out.as_mut_ptr()) })?;
    // SAFETY: the kernel filled it, and zero is valid for every field anyway.
    Ok(unsafe { out.assume_init() }.f_type == libc::OVERLAYFS_SUPER_MAGIC)
}

/// Writes the whole file system back that `fd`, which is not O_PATH, is in.
pub(super) fn syncfs(fd: BorrowedFd) -> io::Result<()> {
    // SAFETY: no memory is passed.
    check(unsafe { libc::syncfs(fd.as_raw_fd()) })
}

/// Largest handle there is (MAX_HANDLE_SZ).
const HANDLE_BYTES: usize = 128;

/// What the file system itself knows the file by, with its generation: unlike the inode number it is not given to
/// another file. `None` where the file system has no such thing (overlayfs without nfs_export, some FUSE).
pub(super) fn file_handle(fd: BorrowedFd) -> Option<Vec<u8>> {
    /// `struct file_handle`, open_by_handle_at(2).
    #[repr(C)]
    struct FileHandle {
        bytes: u32,
        kind: i32,
        handle: [u8; HANDLE_BYTES],
    }
    let mut handle = FileHandle {
        bytes: HANDLE_BYTES as u32,
        kind: 0,
        handle: [0; HANDLE_BYTES],
    };
    let mut mount = 0i32;
    // SAFETY: the path is a constant, `handle` has the room it claims, `mount` has room for the answer.
    let result = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            fd.as_raw_fd(),
            c"".as_ptr(),
            &raw mut handle,
            &raw mut mount,
            libc::AT_EMPTY_PATH,
        )
    };
    let bytes = handle.handle.get(..handle.bytes as usize)?;
    (result == 0).then(|| [&handle.kind.to_ne_bytes()[..], bytes].concat())
}

/// The flags `fd` was opened with, as far as F_GETFL tells.
pub(super) fn open_flags(fd: BorrowedFd) -> io::Result<i32> {
    // SAFETY: F_GETFL takes no argument.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(flags)
}

/// Where the file behind `fd` is, as seen from the calling thread's root. `proc_fds` is `/proc/self/fd`. Names may
/// change at any time, so this is only a hint.
pub(super) fn path_of(proc_fds: BorrowedFd, fd: BorrowedFd) -> io::Result<Vec<u8>> {
    read_link(proc_fds, &proc_name(fd))
}

pub(super) fn statfs(fd: BorrowedFd) -> io::Result<statvfs64> {
    let mut out = MaybeUninit::<statvfs64>::zeroed();
    // SAFETY: `out` has room for the answer.
    check(unsafe { libc::fstatvfs64(fd.as_raw_fd(), out.as_mut_ptr()) })?;
    // SAFETY: the kernel filled it, and zero is valid for every field anyway.
    Ok(unsafe { out.assume_init() })
}

pub(super) fn mkdir(dir: BorrowedFd, name: &CStr, mode: u32) -> io::Result<()> {
    let name = check_name(name)?;
    // SAFETY: `name` is valid during the call.
    check(unsafe { libc::mkdirat(dir.as_raw_fd(), name.as_ptr(), mode) })
}

pub(super) fn mknod(dir: BorrowedFd, name: &CStr, mode: u32, device: u32) -> io::Result<()> {
    let name = check_name(name)?;
    // SAFETY: `name` is valid during the call. The guest's 32-bit device number has the layout of the low half of ours.
    check(unsafe { libc::mknodat(dir.as_raw_fd(), name.as_ptr(), mode, device.into()) })
}

pub(super) fn symlink(target: &CStr, dir: BorrowedFd, name: &CStr) -> io::Result<()> {
    let name = check_name(name)?;
    // SAFETY: both strings are valid during the call.
    check(unsafe { libc::symlinkat(target.as_ptr(), dir.as_raw_fd(), name.as_ptr()) })
}

pub(super) fn link(file: BorrowedFd, dir: BorrowedFd, name: &CStr) -> io::Result<()> {
    let (old, new) = (file.as_raw_fd(), dir.as_raw_fd());
    let name = check_name(name)?;
    // SAFETY: both strings are valid during the call.
    check(unsafe { libc::linkat(old, c"".as_ptr(), new, name.as_ptr(), libc::AT_EMPTY_PATH) })
}

/// What `name` is; EBUSY when it is where the host mounted something. The kernel itself protects mount points of the
/// caller's mount namespace only, and takes mounts of others away together with their directory. The threads of the
/// share have a namespace of their own.
fn refuse_mount_point(dir: BorrowedFd, name: &CStr) -> io::Result<Stat> {
    let flags = libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT;
    let (stat, attributes) = statx(dir, name, flags)?;
    if attributes & libc::STATX_ATTR_MOUNT_ROOT as u64 == 0 {
        Ok(stat)
    } else {
        Err(errno(libc::EBUSY))
    }
}

/// Returns what was removed.
pub(super) fn unlink(dir: BorrowedFd, name: &CStr, flags: i32) -> io::Result<Stat> {
    let name = check_name(name)?;
    let victim = refuse_mount_point(dir, name)?;
    // SAFETY: `name` is valid during the call.
    check(unsafe { libc::unlinkat(dir.as_raw_fd(), name.as_ptr(), flags) })?;
    Ok(victim)
}

/// Returns what had the old name and what had the new one.
pub(super) fn rename(
    from: BorrowedFd,
    old: &CStr,
    to: BorrowedFd,
    new: &CStr,
    flags: u32,
) -> io::Result<(Stat, Option<Stat>)> {
    let (old, new) = (check_name(old)?, check_name(new)?);
    let moved = refuse_mount_point(from, old)?;
    let replaced = match refuse_mount_point(to, new) {
        Ok(stat) => Some(stat),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => None,
        Err(error) => return Err(error),
    };
    // SAFETY: both strings are valid during the call.
    check(unsafe {
        libc::renameat2(
            from.as_raw_fd(),
            old.as_ptr(),
            to.as_raw_fd(),
            new.as_ptr(),
            flags,
        )
    })?;
    Ok((moved, replaced))
}

pub(super) fn readlink(fd: BorrowedFd) -> io::Result<Vec<u8>> {
    read_link(fd, c"")
}

fn read_link(dir: BorrowedFd, name: &CStr) -> io::Result<Vec<u8>> {
    let mut target = vec![0u8; libc::PATH_MAX as usize];
    // SAFETY: the buffer has the length given.
    let len = unsafe {
        libc::readlinkat(
            dir.as_raw_fd(),
            name.as_ptr(),
            target.as_mut_ptr().cast(),
            target.len(),
        )
    };
    let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
    target.truncate(len);
    Ok(target)
}

/// Changes the mode of the file behind an O_PATH descriptor (fchmod refuses those).
pub(super) fn chmod(proc_fds: BorrowedFd, fd: BorrowedFd, mode: u32) -> io::Result<()> {
    let name = proc_name(fd);
    // SAFETY: `name` is valid during the call.
    check(unsafe { libc::fchmodat(proc_fds.as_raw_fd(), name.as_ptr(), mode & 0o7777, 0) })
}

/// Changes owner and group; `u32::MAX` leaves one as it is.
pub(super) fn chown(fd: BorrowedFd, uid: u32, gid: u32) -> io::Result<()> {
    // SAFETY: the path is a constant.
    check(unsafe { libc::fchownat(fd.as_raw_fd(), c"".as_ptr(), uid, gid, libc::AT_EMPTY_PATH) })
}

/// Sets access and modification time of the file behind an O_PATH descriptor.
pub(super) fn utimes(proc_fds: BorrowedFd, fd: BorrowedFd, times: &[libc::timespec; 2]) -> io::Result<()> {
    let name = proc_name(fd);
    // SAFETY: `name` and `times` are valid during the call.
    check(unsafe { libc::utimensat(proc_fds.as_raw_fd(), name.as_ptr(), times.as_ptr(), 0) })
}

pub(super) fn fallocate(fd: BorrowedFd, mode: u32, offset: u64, len: u64) -> io::Result<()> {
    let invalid = |_| errno(libc::EINVAL);
    let (offset, len) = (
        i64::try_from(offset).map_err(invalid)?,
        i64::try_from(len).map_err(invalid)?,
    );
    // SAFETY: no memory is passed.
    check(unsafe { libc::fallocate64(fd.as_raw_fd(), mode.cast_signed(), offset, len) })
}

pub(super) fn lseek(fd: BorrowedFd, offset: u64, whence: i32) -> io::Result<u64> {
    let offset = i64::try_from(offset).map_err(|_| errno(libc::EINVAL))?;
    // SAFETY: no memory is passed.
    let position = unsafe { libc::lseek64(fd.as_raw_fd(), offset, whence) };
    u64::try_from(position).map_err(|_| io::Error::last_os_error())
}

/// Reads directory entries (`struct linux_dirent64`) into `buffer`; returns the bytes filled.
pub(super) fn getdents(fd: BorrowedFd, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the buffer has the length given.
    let len = unsafe {
        libc::syscall(
            libc::SYS_getdents64,
            fd.as_raw_fd(),
            buffer.as_mut_ptr(),
            buffer.len(),
        )
    };
    usize::try_from(len).map_err(|_| io::Error::last_os_error())
}

/// Locks the open file `fd` (LOCK_SH, LOCK_EX) or gives its lock up (LOCK_UN), without waiting.
pub(super) fn flock(fd: BorrowedFd, operation: i32) -> io::Result<()> {
    // SAFETY: no memory is passed.
    check(unsafe { libc::flock(fd.as_raw_fd(), operation | libc::LOCK_NB) })
}

/// F_OFD_SETLK or F_OFD_GETLK of `len` bytes from `start` on, up to the end of the file if `len` is 0.
pub(super) fn ofd_lock(
    fd: BorrowedFd,
    command: i32,
    kind: i32,
    start: i64,
    len: i64,
) -> io::Result<libc::flock64> {
    // SAFETY: zero is valid for every field; `l_pid` must be.
    let mut lock: libc::flock64 = unsafe { zeroed() };
    lock.l_type = kind as i16;
    lock.l_whence = libc::SEEK_SET as i16;
    (lock.l_start, lock.l_len) = (start, len);
    // SAFETY: `lock` is valid during the call.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), command, &raw mut lock) })?;
    Ok(lock)
}

/// Copies up to `len` bytes from one file to another, sharing blocks where the file system can; returns how many.
pub(super) fn copy_file_range(
    from: BorrowedFd,
    from_offset: u64,
    to: BorrowedFd,
    to_offset: u64,
    len: usize,
) -> io::Result<usize> {
    let invalid = |_| errno(libc::EINVAL);
    let mut from_offset = i64::try_from(from_offset).map_err(invalid)?;
    let mut to_offset = i64::try_from(to_offset).map_err(invalid)?;
    let (from, to) = (from.as_raw_fd(), to.as_raw_fd());
    // SAFETY: both offsets are valid during the call, which takes no flags.
    let copied = unsafe { libc::copy_file_range(from, &raw mut from_offset, to, &raw mut to_offset, len, 0) };
    usize::try_from(copied).map_err(|_| io::Error::last_os_error())
}

/// A file without a name in the file system of the directory `dir`. `proc_fds` is `/proc/self/fd`.
pub(super) fn tmpfile(proc_fds: BorrowedFd, dir: BorrowedFd, flags: i32, mode: u32) -> io::Result<File> {
    let name = proc_name(dir);
    let flags = flags | libc::O_TMPFILE | libc::O_CLOEXEC;
    // SAFETY: `name` is valid during the call.
    let fd = unsafe { libc::openat(proc_fds.as_raw_fd(), name.as_ptr(), flags, mode & 0o7777) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call returned a new descriptor that nobody else owns.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// What closing the descriptor would report: NFS and friends write back at close.
pub(super) fn flush(file: &File) -> io::Result<()> {
    use std::os::fd::IntoRawFd;
    let copy = file.try_clone()?.into_raw_fd();
    // SAFETY: the descriptor was just made and is given up here.
    check(unsafe { libc::close(copy) })
}

/// Extended attributes of the file behind an O_PATH descriptor, links included. The f*xattr calls refuse O_PATH, and
/// the others take no directory descriptor, so the path is relative: **the thread's directory must be
/// `/proc/self/fd`**, which `jail` sees to.
pub(super) mod xattr {
    use super::*;

    /// Linux' XATTR_SIZE_MAX and XATTR_LIST_MAX.
    const MAX: u32 = 65536;

    pub(in super::super) fn set(fd: BorrowedFd, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        let (path, flags) = (proc_name(fd), flags.cast_signed());
        // SAFETY: the strings and the value are valid during the call.
        check(unsafe {
            libc::setxattr(
                path.as_ptr(),
                name.as_ptr(),
                value.as_ptr().cast(),
                value.len(),
                flags,
            )
        })
    }

    pub(in super::super) fn remove(fd: BorrowedFd, name: &CStr) -> io::Result<()> {
        // SAFETY: the strings are valid during the call.
        check(unsafe { libc::removexattr(proc_name(fd).as_ptr(), name.as_ptr()) })
    }

    /// The value, or with `size` 0 its length.
    pub(in super::super) fn get(fd: BorrowedFd, name: &CStr, size: u32) -> io::Result<(usize, Vec<u8>)> {
        let path = proc_name(fd);
        // SAFETY: the strings are valid during the call, the buffer has the length given.
        read(size, |buffer, len| unsafe {
            libc::getxattr(path.as_ptr(), name.as_ptr(), buffer.cast(), len)
        })
    }

    /// All names, each ended by a NUL, or with `size` 0 their length.
    pub(in super::super) fn list(fd: BorrowedFd, size: u32) -> io::Result<(usize, Vec<u8>)> {
        let path = proc_name(fd);
        // SAFETY: the string is valid during the call, the buffer has the length given.
        read(size, |buffer, len| unsafe {
            libc::listxattr(path.as_ptr(), buffer.cast(), len)
        })
    }

    fn read(size: u32, call: impl FnOnce(*mut u8, usize) -> isize) -> io::Result<(usize, Vec<u8>)> {
        let mut buffer = vec![0; size.min(MAX) as usize];
        let len = call(buffer.as_mut_ptr(), buffer.len());
        let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
        buffer.truncate(len);
        Ok((len, buffer))
    }
}
