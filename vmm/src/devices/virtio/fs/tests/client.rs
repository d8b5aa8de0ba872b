//! Raw FUSE messages (include/uapi/linux/fuse.h, 7.33).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use vmm_sys_util::tempdir::TempDir;

use crate::config::{FsCache, FsConfig, FsRoot, SharedDir};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::fs::{Fs, FsHandle};
use crate::devices::virtio::state::{QueuePosition, StateError};
use crate::devices::virtio::test_ring::{BUFFERS, Buf, TestGuest, TestRing};

pub const LOOKUP: u32 = 1;
pub const FORGET: u32 = 2;
pub const GETATTR: u32 = 3;
pub const SETATTR: u32 = 4;
pub const READLINK: u32 = 5;
pub const SYMLINK: u32 = 6;
pub const MKNOD: u32 = 8;
pub const MKDIR: u32 = 9;
pub const UNLINK: u32 = 10;
pub const RMDIR: u32 = 11;
pub const LINK: u32 = 13;
pub const OPEN: u32 = 14;
pub const READ: u32 = 15;
pub const WRITE: u32 = 16;
pub const STATFS: u32 = 17;
pub const RELEASE: u32 = 18;
pub const SETXATTR: u32 = 21;
pub const GETXATTR: u32 = 22;
pub const LISTXATTR: u32 = 23;
pub const REMOVEXATTR: u32 = 24;
pub const FLUSH: u32 = 25;
pub const INIT: u32 = 26;
pub const OPENDIR: u32 = 27;
pub const READDIR: u32 = 28;
pub const RELEASEDIR: u32 = 29;
pub const GETLK: u32 = 31;
pub const SETLK: u32 = 32;
pub const SETLKW: u32 = 33;
pub const CREATE: u32 = 35;
pub const INTERRUPT: u32 = 36;
pub const DESTROY: u32 = 38;
pub const IOCTL: u32 = 39;
pub const BATCH_FORGET: u32 = 42;
pub const READDIRPLUS: u32 = 44;
pub const FALLOCATE: u32 = 43;
pub const RENAME2: u32 = 45;
pub const LSEEK: u32 = 46;
pub const COPY_FILE_RANGE: u32 = 47;
pub const SYNCFS: u32 = 50;
pub const TMPFILE: u32 = 51;
pub const STATX: u32 = 52;

pub const ROOT: u64 = 1;
pub const HIPRIO: usize = 0;
pub const REQUESTS: usize = 1;
/// Where requests and answers are put.
pub const REQUEST: u64 = BUFFERS;
pub const ANSWER: u64 = BUFFERS + 0x40_0000;

/// An answer, or the errno.
pub type Answer = Result<Vec<u8>, i32>;

#[derive(Debug, Clone, Copy)]
pub struct Entry {
    pub node: u64,
    pub ino: u64,
    pub size: u64,
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub timeout: u64,
    /// FUSE_ATTR_SUBMOUNT.
    pub submount: bool,
}

/// Concatenated little-endian fields.
#[macro_export]
macro_rules! fields {
    ($($value:expr),* $(,)?) => {{
        let mut bytes: Vec<u8> = Vec::new();
        $(bytes.extend_from_slice(&$value.to_le_bytes());)*
        bytes
    }};
}
pub use fields;

pub fn name(text: &str) -> Vec<u8> {
    [text.as_bytes(), b"\0"].concat()
}

fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    let mut raw = [0; 8];
    raw[..len].copy_from_slice(&bytes[at..at + len]);
    u64::from_le_bytes(raw)
}

pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    number(bytes, at, 4) as u32
}

pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    number(bytes, at, 8)
}

pub fn entry(bytes: &[u8]) -> Entry {
    Entry {
        node: u64_at(bytes, 0),
        timeout: u64_at(bytes, 16),
        submount: u32_at(bytes, 124) & 1 != 0,
        ino: u64_at(bytes, 40),
        size: u64_at(bytes, 48),
        mode: u32_at(bytes, 100),
        nlink: u32_at(bytes, 104),
        uid: u32_at(bytes, 108),
        gid: u32_at(bytes, 112),
    }
}

/// An entry of a listing by READDIRPLUS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    pub name: String,
    pub node: u64,
    pub offset: u64,
    pub attr_flags: u32,
}

/// The entries of an answer to READDIRPLUS.
pub fn entries_plus(answer: &[u8]) -> Vec<Listed> {
    let (mut entries, mut at) = (Vec::new(), 0);
    while at < answer.len() {
        // fuse_direntplus: entry_out (128), ino, off, namelen, type, name padded to 8.
        let len = u32_at(answer, at + 144) as usize;
        entries.push(Listed {
            name: String::from_utf8(answer[at + 152..at + 152 + len].to_vec()).unwrap(),
            node: u64_at(answer, at),
            offset: u64_at(answer, at + 136),
            attr_flags: u32_at(answer, at + 124),
        });
        at += (152 + len).next_multiple_of(8);
    }
    entries
}

/// A guest with a share mounted.
pub struct Client {
    pub guest: TestGuest,
    pub fs: Fs,
    pub config: FsConfig,
    pub rings: Vec<TestRing>,
    pub uid: u32,
    pub gid: u32,
    unique: u64,
    /// Holds `share`, and `outside` next to it.
    dir: TempDir,
}

impl Client {
    pub fn new() -> Self {
        Self::with(FsCache::Auto, 2)
    }

    pub fn with(cache: FsCache, threads: u8) -> Self {
        Self::configured(|config| (config.cache, config.threads) = (cache, threads))
    }

    /// A root of our own with `shares` of the test's folder in it.
    pub fn shares(cache: FsCache, shares: impl Fn(&Path) -> BTreeMap<String, SharedDir>) -> Self {
        Self::configured(|config| {
            let FsRoot::Directory(dir) = &config.root else {
                unreachable!("the default is a directory")
            };
            config.root = FsRoot::Shares(shares(dir.path.parent().unwrap()));
            config.cache = cache;
        })
    }

    /// A share of the folder `share` with two threads, but for what `change` changes.
    pub fn configured(change: impl FnOnce(&mut FsConfig)) -> Self {
        let dir = TempDir::new_with_prefix("/tmp/dragonball-fs").unwrap();
        let share = dir.as_path().join("share");
        std::fs::create_dir(&share).unwrap();
        std::fs::create_dir(dir.as_path().join("outside")).unwrap();
        std::fs::write(dir.as_path().join("outside/secret"), "secret").unwrap();
        let guest = TestGuest::new();
        let id = format!("t{}", dir.as_path().file_name().unwrap().to_str().unwrap().len());
        let mut config = FsConfig::new(id, "kataShared", FsRoot::Directory(SharedDir::writable(share)));
        config.threads = 2;
        change(&mut config);
        let mut fs = Fs::new(&config).unwrap();
        let rings = guest.activate(&mut fs, 128, true);
        let mut client = Self {
            guest,
            fs,
            config,
            rings,
            uid: 0,
            gid: 0,
            unique: 0,
            dir,
        };
        client.init().unwrap();
        client
    }

    pub fn handle(&self) -> FsHandle {
        self.fs.handle()
    }

    /// Stops the device and starts it again: a pause of the machine.
    pub fn pause(&mut self, between: impl FnOnce(&mut Self)) {
        let positions = self.fs.suspend();
        between(self);
        self.resume(&positions);
    }

    /// Moves the guest to the device of another process.
    pub fn restore(&mut self) -> Result<(), StateError> {
        let positions = self.fs.suspend();
        let state = self.fs.save()?;
        self.restore_from(&state)?;
        self.resume(&positions);
        Ok(())
    }

    /// Makes a fresh device of the configuration with `state`.
    pub fn restore_from(&mut self, state: &[u8]) -> Result<(), StateError> {
        let mut fs = Fs::new(&self.config).unwrap();
        fs.restore(state)?;
        self.fs = fs;
        Ok(())
    }

    pub fn resume(&mut self, positions: &[QueuePosition]) {
        let rings: Vec<_> = self.rings.iter().collect();
        self.guest.resume(&mut self.fs, &rings, positions, true);
    }

    pub fn share(&self) -> PathBuf {
        self.dir.as_path().join("share")
    }

    pub fn outside(&self) -> PathBuf {
        self.dir.as_path().join("outside")
    }

    pub fn base(&self) -> &Path {
        self.dir.as_path()
    }

    /// A request with its header.
    pub fn message(&mut self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        self.unique += 1;
        let len = 40 + body.len() as u32;
        let mut message = fields![len, opcode, self.unique, node, self.uid, self.gid, 1u32, 0u32];
        message.extend(body);
        message
    }

    /// Sends a request and waits for its answer of at most `room` bytes after the header.
    pub fn call(&mut self, opcode: u32, node: u64, body: &[u8], room: u32) -> Answer {
        let message = self.message(opcode, node, body);
        self.guest.write(REQUEST, &message);
        self.guest.write(ANSWER, &[0xa5; 16]);
        let head = message.len().min(40) as u32;
        let mut chain = vec![Buf::Read(REQUEST, head)];
        if message.len() > 40 {
            chain.push(Buf::Read(REQUEST + 40, message.len() as u32 - 40));
        }
        chain.push(Buf::Write(ANSWER, 16));
        // In pages, as the guest kernel does.
        let mut at = 0;
        while at < room {
            let piece = (room - at).min(0x4000);
            chain.push(Buf::Write(ANSWER + 16 + u64::from(at), piece));
            at += piece;
        }
        let used = self.rings[REQUESTS].round_trip(&chain);
        let answer = self.guest.read(ANSWER, used.len as usize);
        assert!(answer.len() >= 16, "opcode {opcode}: no answer");
        assert_eq!(
            u32_at(&answer, 0),
            used.len,
            "opcode {opcode}: length of the answer"
        );
        assert_eq!(u64_at(&answer, 8), self.unique);
        match u32_at(&answer, 4) as i32 {
            0 => Ok(answer[16..].to_vec()),
            error => Err(-error),
        }
    }

    /// Offers everything, as `struct fuse_init_in` of a recent kernel.
    pub fn init(&mut self) -> Answer {
        let unused = [0; 44];
        let body = [&fields![7u32, 41u32, 0x20000u32, u32::MAX, u32::MAX][..], &unused].concat();
        self.call(INIT, 0, &body, 64)
    }

    pub fn lookup(&mut self, parent: u64, text: &str) -> Result<Entry, i32> {
        self.call(LOOKUP, parent, &name(text), 128)
            .map(|answer| entry(&answer))
    }

    /// Looks a path below the root up, component by component.
    pub fn walk(&mut self, path: &str) -> Result<Entry, i32> {
        let mut node = ROOT;
        let mut last = Err(libc::EINVAL);
        for part in path.split('/') {
            let found = self.lookup(node, part)?;
            node = found.node;
            last = Ok(found);
        }
        last
    }

    pub fn release(&mut self, node: u64, handle: u64) -> Answer {
        self.call(RELEASE, node, &fields![handle, 0u32, 0u32, 0u64], 0)
    }

    pub fn rename(&mut self, from: u64, old: &str, to: u64, new: &str, flags: u32) -> Answer {
        let body = [fields![to, flags, 0u32], name(old), name(new)].concat();
        self.call(RENAME2, from, &body, 0)
    }

    pub fn mkdir(&mut self, parent: u64, text: &str, mode: u32) -> Result<Entry, i32> {
        let body = [fields![mode, 0u32], name(text)].concat();
        self.call(MKDIR, parent, &body, 128).map(|answer| entry(&answer))
    }

    pub fn create(&mut self, parent: u64, text: &str, flags: i32, mode: u32) -> Result<(Entry, u64), i32> {
        let body = [fields![flags, mode, 0u32, 0u32], name(text)].concat();
        self.call(CREATE, parent, &body, 144)
            .map(|answer| (entry(&answer), u64_at(&answer, 128)))
    }

    pub fn symlink(&mut self, parent: u64, text: &str, target: &str) -> Result<Entry, i32> {
        let body = [name(text), name(target)].concat();
        self.call(SYMLINK, parent, &body, 128)
            .map(|answer| entry(&answer))
    }

    pub fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        self.call(OPEN, node, &fields![flags, 0u32], 16)
            .map(|answer| u64_at(&answer, 0))
    }

    pub fn read(&mut self, node: u64, handle: u64, offset: u64, size: u32, flags: i32) -> Answer {
        self.call(
            READ,
            node,
            &fields![handle, offset, size, 0u32, 0u64, flags, 0u32],
            size,
        )
    }

    pub fn write(
        &mut self,
        node: u64,
        handle: u64,
        offset: u64,
        data: &[u8],
        write_flags: u32,
    ) -> Result<u32, i32> {
        let body = fields![handle, offset, data.len() as u32, write_flags, 0u64, 0u32, 0u32];
        self.call(WRITE, node, &[&body, data].concat(), 8)
            .map(|answer| u32_at(&answer, 0))
    }

    pub fn getattr(&mut self, node: u64) -> Result<Entry, i32> {
        let answer = self.call(GETATTR, node, &fields![0u32, 0u32, 0u64], 104)?;
        // attr_out has the attributes at 16, entry_out at 40.
        Ok(entry(&[vec![0; 24], answer].concat()))
    }

    /// Names and nodes of a directory, by READDIRPLUS.
    pub fn list(&mut self, node: u64, size: u32) -> Result<Vec<(String, u64)>, i32> {
        let handle = u64_at(&self.call(OPENDIR, node, &fields![0u32, 0u32], 16)?, 0);
        let mut names = Vec::new();
        let mut offset = 0u64;
        loop {
            let body = fields![handle, offset, size, 0u32, 0u64, 0u32, 0u32];
            let answer = self.call(READDIRPLUS, node, &body, size)?;
            let entries = entries_plus(&answer);
            let Some(last) = entries.last() else {
                return Ok(names);
            };
            offset = last.offset;
            names.extend(entries.iter().map(|entry| (entry.name.clone(), entry.node)));
        }
    }

    pub fn forget(&mut self, node: u64, count: u64) {
        let message = self.message(FORGET, node, &fields![count]);
        self.guest.write(REQUEST, &message);
        let used = self.rings[HIPRIO].round_trip(&[Buf::Read(REQUEST, message.len() as u32)]);
        assert_eq!(used.len, 0);
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.fs.reset();
    }
}
