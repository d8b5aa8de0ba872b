//! Device nodes the guest makes on the host.
//!
//! runc lets a container make any node and keeps it from opening most of them, by the device cgroup. The node itself is
//! real: another user of the host who finds it in a volume may open it. Here a node is for the guest alone, which has
//! devices of its own behind the numbers: it belongs to root and nobody else has access to it, and the guest can neither
//! make nor change it to be otherwise. Whiteouts, and the devices that any user may open on any Linux, are what the guest
//! asks for. A share itself never opens a node (`Share::open_file`).

use std::io;

use fuse_backend_rs::abi::fuse_abi::{SetattrValid, stat64};

use super::sys::errno;

/// Major and minor numbers of null, zero, full, random, urandom, tty and ptmx, and overlayfs' whiteout
/// (`Documentation/admin-guide/devices.txt`).
const FOR_EVERYBODY: [(u32, u32); 8] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2), (0, 0)];
/// Access of group and others.
const OTHERS: u32 = 0o077;

/// Whether a file of type and mode `mode` is a node that must stay the guest's own.
fn is_restricted(mode: u32, major: u32, minor: u32) -> bool {
    match mode & libc::S_IFMT {
        libc::S_IFBLK => true,
        libc::S_IFCHR => !FOR_EVERYBODY.contains(&(major, minor)),
        _ => false,
    }
}

/// The mode to make a node with when the guest's user `uid` asks for `mode` and `device`, a number as FUSE carries it.
///
/// # Errors
/// EPERM for a node that would belong to somebody else than root.
pub(super) fn mode_of_new(mode: u32, device: u32, uid: u32) -> io::Result<u32> {
    // `new_encode_dev` of Linux.
    let (major, minor) = (device >> 8 & 0xfff, device & 0xff | device >> 12 & 0xf_ff00);
    if !is_restricted(mode, major, minor) {
        return Ok(mode);
    }
    match uid {
        0 => Ok(mode & !OTHERS),
        _ => Err(errno(libc::EPERM)),
    }
}

/// What becomes of `new` when the guest sets the fields in `valid` of the file with the attributes `old`.
///
/// # Errors
/// EPERM for a node that would belong to somebody else than root.
pub(super) fn amend_attributes(old: &stat64, valid: SetattrValid, new: &mut stat64) -> io::Result<()> {
    if !stays_own(old) {
        return Ok(());
    }
    if valid.contains(SetattrValid::UID) && new.st_uid != 0 {
        return Err(errno(libc::EPERM));
    }
    new.st_mode &= !OTHERS;
    Ok(())
}

/// Whether the file with these attributes is a node that must stay the guest's own.
pub(super) fn stays_own(file: &stat64) -> bool {
    let (major, minor) = (libc::major(file.st_rdev), libc::minor(file.st_rdev));
    is_restricted(file.st_mode, major, minor)
}
