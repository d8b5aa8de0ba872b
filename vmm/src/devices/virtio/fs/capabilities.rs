//! What the threads of a share may do: what files need, and nothing else of root.
//!
//! | kept | for |
//! |---|---|
//! | CHOWN, FOWNER, FSETID | chown, chmod and times of files of others; setgid bits that stay |
//! | DAC_OVERRIDE, DAC_READ_SEARCH | files of others: the guest's kernel has checked permissions; file handles |
//! | SETUID, SETGID | fsuid and fsgid of the process that creates a file |
//! | SETFCAP | `security.capability` in packages |
//! | MKNOD | device nodes, as far as `device_nodes` lets them be made |
//!
//! Without SYS_ADMIN there are no `trusted.*` attributes (overlayfs in the guest needs `userxattr`, as it does for an
//! unprivileged user), no mounts and no files beyond the system's limit. Without SYS_RESOURCE quotas and reserved blocks
//! hold, as they do for a container of runc. Whoever gets hold of a thread cannot get the rest back: the bounding set
//! is as small, and no program it may start gains anything.

use std::io;

use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
};

/// What is kept.
pub(super) const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::MKNOD);

/// Gives up all capabilities of the calling thread, and of the threads it starts from now on, but [`KEPT`]; and its
/// supplementary groups, which files are not to be created with.
///
/// # Errors
/// What the kernel says. The thread must end.
pub(super) fn drop_others() -> io::Result<()> {
    // Of the thread alone: setgroups(3) of libc would change the whole process.
    set_thread_groups(&[])?;
    for number in 0..u64::BITS {
        let one = CapabilitySet::from_bits_retain(1 << number);
        if KEPT.contains(one) {
            continue;
        }
        match capability_is_in_bounding_set(one) {
            Ok(true) => remove_capability_from_bounding_set(one)?,
            Ok(false) => {}
            // Beyond the last one this kernel has.
            Err(Errno::INVAL) => break,
            Err(error) => return Err(error.into()),
        }
    }
    clear_ambient_capability_set()?;
    set_no_new_privs(true)?;
    let kept = capabilities(None)?.permitted & KEPT;
    set_capabilities(
        None,
        CapabilitySets {
            effective: kept,
            permitted: kept,
            inheritable: CapabilitySet::empty(),
        },
    )?;
    Ok(())
}
