//! The initramfs format: a "newc" cpio archive (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! A member is a header of fourteen 8-digit hexadecimal fields, the name with its NUL, and the data, each padded
//! to 4 bytes; a member called `TRAILER!!!` ends the archive. Inode numbers count up and times are zero, so the
//! bytes depend on nothing but the contents.

use std::io::{self, Write};

use crate::tree::Node;

const MAGIC: &str = "070701";
const HEADER_LENGTH: usize = 110;
const TRAILER: &str = "TRAILER!!!";

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFCHR: u32 = 0o020_000;
const DIRECTORY_MODE: u32 = 0o755;

/// Writes members to `W`.
pub struct Writer<W> {
    out: W,
    inode: u32,
}

impl<W: Write> Writer<W> {
    /// An empty archive.
    pub fn new(out: W) -> Self {
        Self { out, inode: 0 }
    }

    /// Appends one member.
    ///
    /// # Errors
    /// Writing failed, or a file is 4 GiB or larger.
    pub fn add(&mut self, path: &str, node: &Node) -> io::Result<()> {
        self.inode += 1;
        match node {
            Node::Directory => self.member(path, self.inode, S_IFDIR | DIRECTORY_MODE, 2, (0, 0), &[]),
            Node::File { mode, data } => self.member(path, self.inode, S_IFREG | mode, 1, (0, 0), data),
            Node::CharDevice { mode, major, minor } => {
                self.member(path, self.inode, S_IFCHR | mode, 1, (*major, *minor), &[])
            }
        }
    }

    /// Ends the archive and flushes it.
    ///
    /// # Errors
    /// Writing failed.
    pub fn finish(mut self) -> io::Result<W> {
        self.member(TRAILER, 0, 0, 1, (0, 0), &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn member(
        &mut self,
        name: &str,
        inode: u32,
        mode: u32,
        links: u32,
        (major, minor): (u32, u32),
        data: &[u8],
    ) -> io::Result<()> {
        let too_large = || {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{name} is larger than 4 GiB"),
            )
        };
        let size = u32::try_from(data.len()).map_err(|_| too_large())?;
        let name_size = u32::try_from(name.len() + 1).map_err(|_| too_large())?;
        // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        let fields = [
            inode, mode, 0, 0, links, 0, size, 0, 0, major, minor, name_size, 0,
        ];
        self.out.write_all(MAGIC.as_bytes())?;
        for field in fields {
            write!(self.out, "{field:08x}")?;
        }
        self.out.write_all(name.as_bytes())?;
        self.out.write_all(&[0])?;
        self.pad(HEADER_LENGTH + name.len() + 1)?;
        self.out.write_all(data)?;
        self.pad(data.len())
    }

    fn pad(&mut self, length: usize) -> io::Result<()> {
        const ALIGNMENT: usize = 4;
        let rest = length % ALIGNMENT;
        if rest == 0 {
            Ok(())
        } else {
            self.out.write_all(&[0; ALIGNMENT][rest..])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive() -> Vec<u8> {
        let mut writer = Writer::new(Vec::new());
        writer.add("dev", &Node::Directory).unwrap();
        writer
            .add(
                "dev/console",
                &Node::CharDevice {
                    mode: 0o600,
                    major: 5,
                    minor: 1,
                },
            )
            .unwrap();
        writer
            .add(
                "init",
                &Node::File {
                    mode: 0o755,
                    data: b"hello".to_vec(),
                },
            )
            .unwrap();
        writer.finish().unwrap()
    }

    #[test]
    fn header_when_written_has_the_documented_fields() {
        let bytes = archive();

        let header = std::str::from_utf8(&bytes[..110]).unwrap();
        let expected = concat!(
            "070701", "00000001", "000041ed", "00000000", "00000000", "00000002", "00000000", "00000000",
            "00000000", "00000000", "00000000", "00000000", "00000004", "00000000"
        );
        assert_eq!(header, expected);
        assert_eq!(&bytes[110..116], b"dev\0\0\0");
    }

    #[test]
    fn members_when_written_stay_aligned() {
        let bytes = archive();

        let starts: Vec<usize> = (0..bytes.len() - 5)
            .filter(|at| &bytes[*at..at + 6] == MAGIC.as_bytes())
            .collect();

        assert_eq!(starts.len(), 4);
        assert!(starts.iter().all(|start| start % 4 == 0), "{starts:?}");
        assert_eq!(bytes.len() % 4, 0);
    }
}
