//! Where the worker threads live: a mount namespace with nothing in it.
//!
//! The share is reached through a descriptor of the namespace the VM was started in, not through a copy of its mounts.
//! So what the runtime mounts below the shared directory later is there at once, whatever the propagation of the
//! host's mounts, and what it unmounts is not kept busy by a forgotten copy. The threads' own namespace is one empty,
//! read-only tmpfs: an absolute path leads nowhere, and mounts of the host cannot be changed from it (mount(2) refuses
//! paths of another namespace).

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::null;

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Moves the calling thread, and the threads it starts from now on, into an empty mount namespace; their directory is
/// `directory`, their umask 0 so that modes are as the guest asked.
///
/// # Errors
/// What the kernel says; CAP_SYS_ADMIN is needed. The thread is then in an undefined place and must end.
pub(super) fn enter(directory: BorrowedFd) -> io::Result<()> {
    // Any directory that certainly exists: this mount point goes with the old root.
    let point = c"/proc".as_ptr();
    let root = c"/".as_ptr();
    // SAFETY: no memory is passed. CLONE_FS also separates root, directory and umask from the other threads.
    check(unsafe { libc::unshare(libc::CLONE_FS | libc::CLONE_NEWNS) })?;
    // SAFETY: the strings are constants. From here on nothing propagates out.
    check(unsafe { libc::mount(null(), root, null(), libc::MS_REC | libc::MS_SLAVE, null()) })?;
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC | libc::MS_RDONLY;
    let tmpfs = c"tmpfs".as_ptr();
    let options = c"size=4k,nr_inodes=1,mode=0555".as_ptr().cast();
    // SAFETY: the strings are constants.
    check(unsafe { libc::mount(tmpfs, point, tmpfs, flags, options) })?;
    let here = c".".as_ptr();
    // SAFETY: as above.
    check(unsafe { libc::chdir(point) })?;
    // SAFETY: as above. The old root ends up on top of the new one (pivot_root(2), "pivot_root(".", ".")").
    match check(unsafe { libc::syscall(libc::SYS_pivot_root, here, here) } as libc::c_int) {
        // SAFETY: as above. Takes the old root off, and with it the copies of all mounts of the host.
        Ok(()) => check(unsafe { libc::umount2(here, libc::MNT_DETACH) })?,
        // On an initramfs the root cannot be exchanged, only covered (what switch_root does).
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            // SAFETY: as above.
            check(unsafe { libc::mount(here, root, null(), libc::MS_MOVE, null()) })?;
            // SAFETY: as above.
            check(unsafe { libc::chroot(here) })?;
        }
        Err(error) => return Err(error),
    }
    // SAFETY: the descriptor is open.
    check(unsafe { libc::fchdir(directory.as_raw_fd()) })?;
    // SAFETY: takes a number, cannot fail.
    unsafe { libc::umask(0) };
    Ok(())
}
