//! What a thread keeps of root.
//!
//! Credentials belong to threads; the wrappers of libc spread a change over the process, so everything here is the system
//! call itself. A thread that has given up its capabilities still has user id 0, and with it what files of root grant to their
//! owner: it is the filter that keeps it from opening any.

#![allow(unsafe_code)]

use std::io;

use rustix::io::Errno;
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set,
    clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
    set_capabilities_secure_bits, set_thread_groups,
};

use super::role::Role;

impl Role {
    /// The capabilities a thread of this role keeps.
    ///
    /// | kept | by | for |
    /// |---|---|---|
    /// | CHOWN, FOWNER, FSETID | fs | chown, chmod and times of files of others; setgid bits that stay |
    /// | DAC_OVERRIDE, DAC_READ_SEARCH | fs | files of others: the guest's kernel has checked permissions; file handles |
    /// | SETUID, SETGID | fs | fsuid and fsgid of the process that creates a file |
    /// | SETFCAP | fs | `security.capability` in packages |
    /// | MKNOD | fs | device nodes, as far as `device_nodes` lets them be made |
    /// | DAC_OVERRIDE | connector | sockets of tools that do not run as root |
    ///
    /// Without SYS_ADMIN a share has no `trusted.*` attributes (overlayfs in the guest needs `userxattr`, as it does for an
    /// unprivileged user), no mounts and no files beyond the system's limit. Without SYS_RESOURCE quotas and reserved blocks
    /// hold, as they do for a container of runc.
    pub(crate) const fn kept(self) -> CapabilitySet {
        match self {
            Self::Fs => CapabilitySet::CHOWN
                .union(CapabilitySet::FOWNER)
                .union(CapabilitySet::FSETID)
                .union(CapabilitySet::DAC_OVERRIDE)
                .union(CapabilitySet::DAC_READ_SEARCH)
                .union(CapabilitySet::SETUID)
                .union(CapabilitySet::SETGID)
                .union(CapabilitySet::SETFCAP)
                .union(CapabilitySet::MKNOD),
            Self::Connector => CapabilitySet::DAC_OVERRIDE,
            _ => CapabilitySet::empty(),
        }
    }
}

/// Gives up all capabilities of the calling thread, and of the threads it starts from now on, but `kept`; the way back to
/// them, by programs with file capabilities, by user id 0, by an ambient set; and its supplementary groups.
///
/// # Errors
/// What the kernel says. The thread must end.
pub(super) fn drop_others(kept: CapabilitySet) -> io::Result<()> {
    let now = capabilities(None)?;
    // A process that is not root has nothing of this to give up.
    if now.effective.contains(CapabilitySet::SETGID) {
        set_thread_groups(&[])?;
    }
    if now.effective.contains(CapabilitySet::SETPCAP) {
        shrink_bounding_set(kept)?;
        set_capabilities_secure_bits(secure_bits(kept))?;
    }
    clear_ambient_capability_set()?;
    let kept = now.permitted & kept;
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

fn shrink_bounding_set(kept: CapabilitySet) -> io::Result<()> {
    for number in 0..u64::BITS {
        let one = CapabilitySet::from_bits_retain(1 << number);
        if kept.contains(one) {
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
    Ok(())
}

/// User id 0 means nothing for a program that is executed, nothing is carried over, and none of that can be undone
/// (capabilities(7), "the securebits flags"). A thread that changes its fsuid relies on the kernel to take capabilities away
/// and to give them back (NO_SETUID_FIXUP is off, for good).
fn secure_bits(kept: CapabilitySet) -> CapabilitiesSecureBits {
    type Bits = CapabilitiesSecureBits;
    let always = Bits::NO_ROOT
        | Bits::NO_ROOT_LOCKED
        | Bits::NO_SETUID_FIXUP_LOCKED
        | Bits::KEEP_CAPS_LOCKED
        | Bits::NO_CAP_AMBIENT_RAISE
        | Bits::NO_CAP_AMBIENT_RAISE_LOCKED;
    match kept.contains(CapabilitySet::SETUID) {
        true => always,
        false => always | Bits::NO_SETUID_FIXUP,
    }
}
