//! Where the worker threads live: a mount namespace with nothing in it.
//!
//! The share is reached through a descriptor of the namespace the VM was started in, not through a copy of its mounts.
//! So what the runtime mounts below the shared directory later is there at once, whatever the propagation of the
//! host's mounts, and what it unmounts is not kept busy by a forgotten copy. The threads' own namespace is one empty,
//! read-only tmpfs: an absolute path leads nowhere, and mounts of the host cannot be changed from it (mount(2) refuses
//! paths of another namespace).

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::null;

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Moves the calling thread, and the threads it starts from now on, into an empty mount namespace; their directory is
/// `directory`, their umask 0 so that modes are as the guest asked.
///
/// `mount_point` is any existing directory.
///
/// # Errors
/// What the kernel says; CAP_SYS_ADMIN is needed. The thread is then in an undefined place and must end.
pub(super) fn enter(mount_point: &Path, directory: BorrowedFd) -> io::Result<()> {
    let point = CString::new(mount_point.as_os_str().as_bytes())?;
    let root = c"/".as_ptr();
    // SAFETY: no memory is passed. CLONE_FS also separates root, directory and umask from the other threads.
    check(unsafe { libc::unshare(libc::CLONE_FS | libc::CLONE_NEWNS) })?;
    // SAFETY: the strings are constants. From here on nothing propagates in or out.
    check(unsafe { libc::mount(null(), root, null(), libc::MS_REC | libc::MS_PRIVATE, null()) })?;
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC | libc::MS_RDONLY;
    let tmpfs = c"tmpfs".as_ptr();
    let options = c"size=4k,nr_inodes=1,mode=0555".as_ptr().cast();
    // SAFETY: the strings are constants or live until the end of the function.
    check(unsafe { libc::mount(tmpfs, point.as_ptr(), tmpfs, flags, options) })?;
    let here = c".".as_ptr();
    // SAFETY: as above.
    check(unsafe { libc::chdir(point.as_ptr()) })?;
    // The old root ends up on top of the new one and is taken off again (pivot_root(2), "pivot_root(".", ".")").
    // SAFETY: as above.
    check(unsafe { libc::syscall(libc::SYS_pivot_root, here, here) } as libc::c_int)?;
    // SAFETY: as above.
    check(unsafe { libc::umount2(here, libc::MNT_DETACH) })?;
    // SAFETY: the descriptor is open.
    check(unsafe { libc::fchdir(directory.as_raw_fd()) })?;
    // SAFETY: takes a number, cannot fail.
    unsafe { libc::umask(0) };
    Ok(())
}
