//! Mounts the kernel makes by itself: every mount of the host in a virtio-fs share becomes one of the guest's when a path
//! leads there (`fuse_dentry_automount`), and stays when the host's is gone and nobody looks for it again. Who used it takes
//! it away.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use nix::mount::{MntFlags, umount2};

/// Detaches the mounts of the host's that were made for container `id`: its root filesystem, in a folder of its name,
/// and its volumes, whose names begin with it. Blocks.
pub fn detach_of(id: &str) {
    let table = match fs::read("/proc/self/mountinfo") {
        Ok(table) => table,
        Err(error) => {
            tracing::warn!("/proc/self/mountinfo: {error}");
            return;
        }
    };
    // Inner ones come last.
    let targets = shares(&table).into_iter().rev();
    for target in targets.filter(|target| belongs_to(target, id)) {
        match umount2(&target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            // The kernel noticed by itself that the host's is gone.
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
            Err(error) => tracing::warn!("unmount {}: {error}", target.display()),
        }
    }
}

// Of a container whose id goes on after this one and a dash, too: it has mounts of its own by then, and the kernel makes
// these again if a path leads there.
fn belongs_to(target: &Path, id: &str) -> bool {
    target.components().any(|part| {
        let Component::Normal(name) = part else {
            return false;
        };
        let rest = name.as_bytes().strip_prefix(id.as_bytes());
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"-"))
    })
}

/// Where virtio-fs is mounted, according to `/proc/self/mountinfo` (proc_pid_mountinfo(5)).
fn shares(table: &[u8]) -> Vec<PathBuf> {
    let lines = table.split(|byte| *byte == b'\n');
    lines
        .filter_map(|line| {
            let mut fields = line.split(|byte| *byte == b' ');
            let target = fields.nth(4)?;
            // After optional fields, a separator and the type.
            fields.find(|field| *field == b"-")?;
            (fields.next()? == b"virtiofs").then(|| unescape(target))
        })
        .collect()
}

/// Blanks and backslashes are three octal digits after a backslash.
fn unescape(field: &[u8]) -> PathBuf {
    let (mut path, mut rest) = (Vec::new(), field);
    while let [first, after @ ..] = rest {
        let digits = after.get(..3).filter(|_| *first == b'\\');
        let value = digits.and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 8).ok());
        match value {
            Some(byte) => {
                path.push(byte);
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                path.push(*first);
                rest = after;
            }
        }
    }
    PathBuf::from(OsString::from_vec(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_when_mountinfo_has_blanks_and_optional_fields_are_found() {
        let table = b"36 35 0:30 / / rw - ext4 /dev/vda rw\n\
            40 36 0:40 / /run/shared rw,nodev shared:1 master:2 - virtiofs kataShared rw\n\
            41 40 0:41 / /run/shared/a\\040b\\134c rw - virtiofs none rw\n\
            42 36 0:42 / /tmp rw - tmpfs virtiofs rw\n\nshort line\n";
        assert_eq!(
            shares(table),
            [Path::new("/run/shared"), Path::new("/run/shared/a b\\c")]
        );
    }

    #[test]
    fn mounts_of_a_container_are_those_of_its_name() {
        let share = "/run/kata-containers/shared/containers/passthrough";
        let of = |rest: &str| belongs_to(Path::new(&format!("{share}/{rest}")), "web");
        assert!(of("web/rootfs"));
        assert!(of("web-0000002a-data"));
        assert!(!of("web2/rootfs"));
        assert!(!of("other-web/rootfs"));
        assert!(!belongs_to(Path::new("/"), "web"));
    }
}
