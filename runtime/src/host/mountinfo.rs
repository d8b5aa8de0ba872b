//! `/proc/self/mountinfo`, read as the bytes it is: a mount point need not be UTF-8 (proc_pid_mountinfo(5)).

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

const MOUNTINFO: &str = "/proc/self/mountinfo";

/// Mount points on and below `folder`, in the order they were mounted. The table has real paths: `folder` must be one.
///
/// # Errors
/// What reading the table said.
pub fn mounts_below(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut points = mount_points(&fs::read(MOUNTINFO)?);
    points.retain(|point| point.starts_with(folder));
    Ok(points)
}

/// Mount points of a mountinfo table, in mount order: the fifth field, octal escapes undone.
pub(crate) fn mount_points(table: &[u8]) -> Vec<PathBuf> {
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
    fn mount_points_when_escaped_are_read_in_order() {
        let table = b"22 1 0:20 / / rw - ext4 a rw\n23 22 0:21 / /a\\040b/c\\134 rw shared:1 - tmpfs t rw\n";

        assert_eq!(
            mount_points(table),
            [PathBuf::from("/"), PathBuf::from("/a b/c\\")]
        );
    }

    #[test]
    fn escapes_when_broken_stay_as_they_are() {
        assert_eq!(unescape(b"a\\9xy\\0"), b"a\\9xy\\0");
    }
}
