//! Mount options as mount(8) and runc write them: flags, kinds of propagation, attributes for a whole tree, and what the
//! filesystem itself understands.

use nix::mount::MsFlags;

/// Name, flag, and whether the name clears it.
const FLAGS: [(&str, MsFlags, bool); 28] = [
    ("async", MsFlags::MS_SYNCHRONOUS, true),
    ("atime", MsFlags::MS_NOATIME, true),
    ("bind", MsFlags::MS_BIND, false),
    ("defaults", MsFlags::empty(), false),
    ("dev", MsFlags::MS_NODEV, true),
    ("diratime", MsFlags::MS_NODIRATIME, true),
    ("dirsync", MsFlags::MS_DIRSYNC, false),
    ("exec", MsFlags::MS_NOEXEC, true),
    ("iversion", MsFlags::MS_I_VERSION, false),
    ("lazytime", MsFlags::MS_LAZYTIME, false),
    ("loud", MsFlags::MS_SILENT, true),
    ("noatime", MsFlags::MS_NOATIME, false),
    ("nodev", MsFlags::MS_NODEV, false),
    ("nodiratime", MsFlags::MS_NODIRATIME, false),
    ("noexec", MsFlags::MS_NOEXEC, false),
    ("noiversion", MsFlags::MS_I_VERSION, true),
    ("norelatime", MsFlags::MS_RELATIME, true),
    ("nostrictatime", MsFlags::MS_STRICTATIME, true),
    ("nosuid", MsFlags::MS_NOSUID, false),
    ("rbind", MsFlags::MS_BIND.union(MsFlags::MS_REC), false),
    ("relatime", MsFlags::MS_RELATIME, false),
    ("remount", MsFlags::MS_REMOUNT, false),
    ("ro", MsFlags::MS_RDONLY, false),
    ("rw", MsFlags::MS_RDONLY, true),
    ("silent", MsFlags::MS_SILENT, false),
    ("strictatime", MsFlags::MS_STRICTATIME, false),
    ("suid", MsFlags::MS_NOSUID, true),
    ("sync", MsFlags::MS_SYNCHRONOUS, false),
];

/// A change of its own, after the mount.
const PROPAGATION: [(&str, MsFlags); 8] = [
    ("private", MsFlags::MS_PRIVATE),
    ("rprivate", MsFlags::MS_PRIVATE.union(MsFlags::MS_REC)),
    ("rshared", MsFlags::MS_SHARED.union(MsFlags::MS_REC)),
    ("rslave", MsFlags::MS_SLAVE.union(MsFlags::MS_REC)),
    ("runbindable", MsFlags::MS_UNBINDABLE.union(MsFlags::MS_REC)),
    ("shared", MsFlags::MS_SHARED),
    ("slave", MsFlags::MS_SLAVE),
    ("unbindable", MsFlags::MS_UNBINDABLE),
];

/// Attributes of mount_setattr(2) for the mount and everything below it, and whether the name clears them.
const WHOLE_TREE: [(&str, u64, bool); 13] = [
    ("ratime", libc::MOUNT_ATTR_NOATIME, true),
    ("rdev", libc::MOUNT_ATTR_NODEV, true),
    ("rdiratime", libc::MOUNT_ATTR_NODIRATIME, true),
    ("rexec", libc::MOUNT_ATTR_NOEXEC, true),
    ("rnoatime", libc::MOUNT_ATTR_NOATIME, false),
    ("rnodev", libc::MOUNT_ATTR_NODEV, false),
    ("rnodiratime", libc::MOUNT_ATTR_NODIRATIME, false),
    ("rnoexec", libc::MOUNT_ATTR_NOEXEC, false),
    ("rnosuid", libc::MOUNT_ATTR_NOSUID, false),
    ("rro", libc::MOUNT_ATTR_RDONLY, false),
    ("rrw", libc::MOUNT_ATTR_RDONLY, true),
    ("rstrictatime", libc::MOUNT_ATTR_STRICTATIME, false),
    ("rsuid", libc::MOUNT_ATTR_NOSUID, true),
];

/// Options, sorted by who is told of them.
#[derive(Debug, PartialEq, Eq)]
pub struct MountOptions {
    /// For mount(2).
    pub flags: MsFlags,
    /// For mount(2) calls after it, in their order.
    pub propagation: Vec<MsFlags>,
    /// `attr_set` of mount_setattr(2) for the whole tree.
    pub set_below: u64,
    /// `attr_clr` of the same.
    pub clear_below: u64,
    /// For the filesystem.
    pub data: String,
}

impl MountOptions {
    /// Sorts `options`; each may be several, separated by commas. Of contrary ones the last counts.
    pub fn parse(options: &[String]) -> Self {
        let mut sorted = Self {
            flags: MsFlags::empty(),
            propagation: Vec::new(),
            set_below: 0,
            clear_below: 0,
            data: String::new(),
        };
        let mut data: Vec<&str> = Vec::new();
        for option in options
            .iter()
            .flat_map(|option| option.split(','))
            .filter(|option| !option.is_empty())
        {
            if let Some((_, flag, clears)) = FLAGS.iter().find(|(name, ..)| *name == option) {
                sorted.flags.set(*flag, !clears);
            } else if let Some((_, kind)) = PROPAGATION.iter().find(|(name, _)| *name == option) {
                sorted.propagation.push(*kind);
            } else if let Some((_, attribute, clears)) = WHOLE_TREE.iter().find(|(name, ..)| *name == option)
            {
                sorted.attribute_below(*attribute, *clears);
            } else {
                data.push(option);
            }
        }
        sorted.data = data.join(",");
        sorted
    }

    fn attribute_below(&mut self, attribute: u64, clears: bool) {
        let (to, from) = if clears {
            (&mut self.clear_below, &mut self.set_below)
        } else {
            (&mut self.set_below, &mut self.clear_below)
        };
        *to |= attribute;
        *from &= !attribute;
        if attribute & libc::MOUNT_ATTR__ATIME != 0 {
            // One of several values, not a bit: the kernel wants the old one cleared (mount_setattr(2)).
            self.clear_below |= libc::MOUNT_ATTR__ATIME;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_when_mixed_are_split_and_later_ones_win() {
        let options = ["nodev,noexec", "ro", "lowerdir=/a:/b", "rw", "size=64k"].map(str::to_owned);

        let sorted = MountOptions::parse(&options);

        assert_eq!(sorted.flags, MsFlags::MS_NODEV | MsFlags::MS_NOEXEC);
        assert_eq!(sorted.data, "lowerdir=/a:/b,size=64k");
    }

    #[test]
    fn options_when_for_propagation_or_a_tree_are_no_flags() {
        let options = ["rbind", "rslave", "rro", "rnosuid", "rrw", "shared"].map(str::to_owned);

        let sorted = MountOptions::parse(&options);

        assert_eq!(
            sorted,
            MountOptions {
                flags: MsFlags::MS_BIND | MsFlags::MS_REC,
                propagation: vec![MsFlags::MS_SLAVE | MsFlags::MS_REC, MsFlags::MS_SHARED],
                set_below: libc::MOUNT_ATTR_NOSUID,
                clear_below: libc::MOUNT_ATTR_RDONLY,
                data: String::new(),
            }
        );
    }
}
