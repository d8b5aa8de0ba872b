//! Mounts left under a folder.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::mount::{UnmountFlags, unmount};

const MOUNTINFO: &str = "/proc/self/mountinfo";

/// Unmounts everything at and below `dir`, last mounted first. A folder without mounts is fine.
///
/// # Errors
/// The first failure, after having tried the rest.
pub fn unmount_below(dir: &Path) -> io::Result<()> {
    // The mount table has real paths.
    let Ok(dir) = dir.canonicalize() else {
        return Ok(());
    };
    let table = std::fs::read(MOUNTINFO)?;
    let mut result = Ok(());
    for point in mount_points(&table)
        .into_iter()
        .rev()
        .filter(|point| point.starts_with(&dir))
    {
        let done = unmount(&point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        if let (Err(errno), true) = (done, result.is_ok()) {
            result = Err(io::Error::new(
                io::Error::from(errno).kind(),
                format!("unmounting {}: {errno}", point.display()),
            ));
        }
    }
    result
}

/// Mount points of a mountinfo table, in mount order: the fifth field, octal escapes undone.
fn mount_points(table: &[u8]) -> Vec<PathBuf> {
    table
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(|field| PathBuf::from(OsString::from_vec(unescape(field))))
        .collect()
}

/// `\040` is a space: the kernel writes blanks and backslashes as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = (byte == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(value) => {
                bytes.push(value);
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(byte);
                rest = tail;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_unescaped_in_order() {
        let table = b"22 1 0:20 / / rw - ext4 a rw\n23 22 0:21 / /a\\040b/c\\134 rw shared:1 - tmpfs t rw\n";

        assert_eq!(
            mount_points(table),
            [PathBuf::from("/"), PathBuf::from("/a b/c\\")]
        );
    }

    #[test]
    fn broken_escapes_stay_as_they_are() {
        assert_eq!(unescape(b"a\\9xy\\0"), b"a\\9xy\\0");
    }

    #[test]
    fn folder_without_mounts_and_missing_folder_are_fine() {
        let dir = tempfile::tempdir().unwrap();

        unmount_below(dir.path()).unwrap();
        unmount_below(&dir.path().join("missing")).unwrap();
    }
}
