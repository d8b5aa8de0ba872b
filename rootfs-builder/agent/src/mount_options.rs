//! Mount options as mount(8) writes them, split into flags and what the filesystem itself understands.

use nix::mount::MsFlags;

/// Name, flag, and whether the name clears it.
const TABLE: [(&str, MsFlags, bool); 28] = [
    ("async", MsFlags::MS_SYNCHRONOUS, true),
    ("atime", MsFlags::MS_NOATIME, true),
    ("bind", MsFlags::MS_BIND, false),
    ("defaults", MsFlags::empty(), false),
    ("dev", MsFlags::MS_NODEV, true),
    ("diratime", MsFlags::MS_NODIRATIME, true),
    ("dirsync", MsFlags::MS_DIRSYNC, false),
    ("exec", MsFlags::MS_NOEXEC, true),
    ("lazytime", MsFlags::MS_LAZYTIME, false),
    ("noatime", MsFlags::MS_NOATIME, false),
    ("nodev", MsFlags::MS_NODEV, false),
    ("nodiratime", MsFlags::MS_NODIRATIME, false),
    ("noexec", MsFlags::MS_NOEXEC, false),
    ("norelatime", MsFlags::MS_RELATIME, true),
    ("nosuid", MsFlags::MS_NOSUID, false),
    ("private", MsFlags::MS_PRIVATE, false),
    ("rbind", MsFlags::MS_BIND.union(MsFlags::MS_REC), false),
    ("relatime", MsFlags::MS_RELATIME, false),
    ("remount", MsFlags::MS_REMOUNT, false),
    ("ro", MsFlags::MS_RDONLY, false),
    ("rprivate", MsFlags::MS_PRIVATE.union(MsFlags::MS_REC), false),
    ("rslave", MsFlags::MS_SLAVE.union(MsFlags::MS_REC), false),
    ("rw", MsFlags::MS_RDONLY, true),
    ("shared", MsFlags::MS_SHARED, false),
    ("slave", MsFlags::MS_SLAVE, false),
    ("strictatime", MsFlags::MS_STRICTATIME, false),
    ("suid", MsFlags::MS_NOSUID, true),
    ("sync", MsFlags::MS_SYNCHRONOUS, false),
];

/// Flags and data for mount(2).
pub fn parse(options: &[String]) -> (MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut data: Vec<&str> = Vec::new();
    for option in options
        .iter()
        .flat_map(|option| option.split(','))
        .filter(|option| !option.is_empty())
    {
        match TABLE.iter().find(|(name, ..)| *name == option) {
            Some((_, flag, true)) => flags.remove(*flag),
            Some((_, flag, false)) => flags.insert(*flag),
            None => data.push(option),
        }
    }
    (flags, data.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_when_mixed_are_split_and_later_ones_win() {
        let options = ["nodev,noexec", "ro", "lowerdir=/a:/b", "rw", "size=64k"].map(str::to_owned);

        let (flags, data) = parse(&options);

        assert_eq!(flags, MsFlags::MS_NODEV | MsFlags::MS_NOEXEC);
        assert_eq!(data, "lowerdir=/a:/b,size=64k");
    }
}
