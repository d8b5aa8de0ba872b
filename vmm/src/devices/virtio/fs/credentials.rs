//! Whose file it becomes: the file system identity of a worker thread, changed for the length of one call.
//!
//! The guest's kernel has checked permissions already (virtio-fs mounts with default_permissions), including
//! supplementary groups and capabilities the host cannot see. The identity therefore only decides who owns what is
//! created; CAP_DAC_OVERRIDE stays.
//!
//! fsuid and fsgid belong to the thread and, unlike setresuid, are not spread over the process by libc.

#![allow(unsafe_code)]

use std::cell::Cell;
use std::io;

/// `_LINUX_CAPABILITY_VERSION_3`.
const VERSION: u32 = 0x2008_0522;
const CAP_DAC_OVERRIDE: u32 = 1;
/// Any identity but root loses the file capabilities.
const NOBODY: u32 = 65534;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Sets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Makes what the thread creates belong to somebody; root again when dropped.
#[derive(Debug)]
pub(super) struct Owner(());

impl Owner {
    /// # Errors
    /// EPERM when the identity is invalid or the process may not take it.
    pub(super) fn become_owner(uid: u32, gid: u32) -> io::Result<Option<Self>> {
        if uid == 0 && gid == 0 {
            return Ok(None);
        }
        // From here on dropping restores both, whatever was reached.
        let owner = Self(());
        // The group first: without root's identity it may not be changed any more.
        set_fsgid(gid)?;
        if uid != 0 {
            set_fsuid(uid)?;
            raise_dac_override()?;
        }
        Ok(Some(owner))
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        restore();
    }
}

thread_local! {
    /// The calling thread's umask, once it has one of its own.
    static UMASK: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Makes `umask` that of what the calling thread creates from now on. The host's kernel then applies it as it would for
/// the guest's process: not where the directory has a default ACL.
///
/// # Errors
/// What unshare(2) says: threads share the umask until they ask for one of their own.
pub(super) fn set_umask(umask: u32) -> io::Result<()> {
    let umask = umask & 0o777;
    UMASK.with(|now| {
        if now.get() == Some(umask) {
            return Ok(());
        }
        // SAFETY: takes a number; root, directory and umask of the thread stay what they are.
        if now.get().is_none() && unsafe { libc::unshare(libc::CLONE_FS) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: takes a number, cannot fail.
        unsafe { libc::umask(umask) };
        now.set(Some(umask));
        Ok(())
    })
}

/// Takes CAP_FSETID away, so that a write or truncation clears setuid and setgid bits and file capabilities, as it
/// would for the guest's unprivileged process; root again when dropped.
///
/// For calls on open descriptors only: permissions are not checked there.
#[derive(Debug)]
pub(super) struct KillPrivileges(());

impl KillPrivileges {
    pub(super) fn when(wanted: bool) -> io::Result<Option<Self>> {
        if !wanted {
            return Ok(None);
        }
        let guard = Self(());
        set_fsuid(NOBODY)?;
        Ok(Some(guard))
    }
}

impl Drop for KillPrivileges {
    fn drop(&mut self) {
        restore();
    }
}

/// Taking fsuid 0 back also brings the file capabilities back (capabilities(7)).
fn restore() {
    for result in [set_fsuid(0), set_fsgid(0)] {
        if let Err(error) = result {
            guest_log!(ERROR, %error, "fs: cannot become root again");
        }
    }
}

fn set_fsuid(uid: u32) -> io::Result<()> {
    // SAFETY: the calls only take numbers. They report no error; -1 changes nothing and returns the present value.
    let now = unsafe {
        libc::setfsuid(uid);
        libc::setfsuid(u32::MAX)
    };
    if now.cast_unsigned() == uid {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::EPERM))
    }
}

fn set_fsgid(gid: u32) -> io::Result<()> {
    // SAFETY: as above.
    let now = unsafe {
        libc::setfsgid(gid);
        libc::setfsgid(u32::MAX)
    };
    if now.cast_unsigned() == gid {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::EPERM))
    }
}

fn raise_dac_override() -> io::Result<()> {
    let header = Header {
        version: VERSION,
        pid: 0,
    };
    let mut sets = [Sets::default(); 2];
    // SAFETY: version 3 reads the header and writes two sets.
    if unsafe { libc::syscall(libc::SYS_capget, &raw const header, sets.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    sets[0].effective |= sets[0].permitted & (1 << CAP_DAC_OVERRIDE);
    // SAFETY: version 3 reads the header and two sets.
    if unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
