//! The filesystems every container and the agent itself rely on.

use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};

use super::{InitError, read};

/// The only cgroup hierarchy: containers see version 2, and so does everything in the agent.
pub const CGROUP_ROOT: &str = "/sys/fs/cgroup";

struct Entry {
    fstype: &'static str,
    target: &'static str,
    flags: MsFlags,
    data: Option<&'static str>,
}

const SAFE: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);
const SAFEST: MsFlags = SAFE.union(MsFlags::MS_NOEXEC);

/// In mount order. `/run` stays executable: "local" volumes of containers live there.
const TABLE: [Entry; 9] = [
    Entry {
        fstype: "proc",
        target: "proc",
        flags: SAFEST,
        data: None,
    },
    Entry {
        fstype: "sysfs",
        target: "sys",
        flags: SAFEST,
        data: None,
    },
    Entry {
        fstype: "cgroup2",
        target: "sys/fs/cgroup",
        flags: SAFEST,
        data: Some("nsdelegate"),
    },
    Entry {
        fstype: "devtmpfs",
        target: "dev",
        flags: MsFlags::MS_NOSUID,
        data: Some("mode=0755"),
    },
    Entry {
        fstype: "devpts",
        target: "dev/pts",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        data: Some("gid=5,mode=0620,ptmxmode=0666"),
    },
    Entry {
        fstype: "tmpfs",
        target: "dev/shm",
        flags: SAFEST,
        data: Some("mode=1777"),
    },
    Entry {
        fstype: "mqueue",
        target: "dev/mqueue",
        flags: SAFEST,
        data: None,
    },
    Entry {
        fstype: "tmpfs",
        target: "run",
        flags: SAFE,
        data: Some("mode=0755"),
    },
    Entry {
        fstype: "tmpfs",
        target: "tmp",
        flags: SAFE,
        data: Some("mode=1777"),
    },
];

/// Kernels may leave these out; a container that wants one fails by itself.
const OPTIONAL: [&str; 1] = ["mqueue"];

const LINKS: [(&str, &str); 4] = [
    ("dev/fd", "/proc/self/fd"),
    ("dev/stdin", "/proc/self/fd/0"),
    ("dev/stdout", "/proc/self/fd/1"),
    ("dev/stderr", "/proc/self/fd/2"),
];

/// Mounts the table below `root`, and makes the links in its `dev`.
pub fn mount_all(root: &Path) -> Result<(), InitError> {
    for entry in &TABLE {
        let target = root.join(entry.target);
        make_directory(&target)?;
        match mount(
            Some(entry.fstype),
            &target,
            Some(entry.fstype),
            entry.flags,
            entry.data,
        ) {
            Ok(()) => {}
            Err(nix::Error::ENODEV) if OPTIONAL.contains(&entry.fstype) => {}
            Err(source) => {
                return Err(InitError::Mount {
                    fstype: entry.fstype,
                    target,
                    source,
                });
            }
        }
    }
    for (link, to) in LINKS {
        let path = root.join(link);
        match std::os::unix::fs::symlink(to, &path) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(InitError::File { path, source: error });
            }
            _ => {}
        }
    }
    Ok(())
}

/// Hands every controller of the kernel down to the containers' cgroups.
pub fn enable_cgroup_controllers() -> Result<(), InitError> {
    let root = Path::new(CGROUP_ROOT);
    let available = read(&root.join("cgroup.controllers"))?;
    let enable: Vec<String> = available
        .split_whitespace()
        .map(|name| format!("+{name}"))
        .collect();
    let path = root.join("cgroup.subtree_control");
    std::fs::write(&path, enable.join(" ")).map_err(|source| InitError::File { path, source })
}

pub fn make_directory(path: &Path) -> Result<(), InitError> {
    std::fs::create_dir_all(path).map_err(|source| InitError::Directory {
        path: PathBuf::from(path),
        source,
    })
}
