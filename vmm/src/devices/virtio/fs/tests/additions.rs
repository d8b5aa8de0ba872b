//! Requests beyond the oldest protocol, and what the host's kernel does for the guest's: umask, ACLs, privileges.

#![allow(unsafe_code)]

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use super::client::*;
use crate::config::SharedDir;

#[test]
fn umask_is_applied_but_where_the_directory_has_a_default_acl() {
    const DONT_MASK: u32 = 1 << 6;
    let mut c = Client::new();
    assert_ne!(u32_at(&c.init().unwrap(), 12) & DONT_MASK, 0);
    let plain = c.mkdir(ROOT, "plain", 0o777).unwrap();
    let with_acl = c.mkdir(ROOT, "acl", 0o777).unwrap();
    fs::set_permissions(c.share().join("acl"), fs::Permissions::from_mode(0o2775)).unwrap();
    // struct posix_acl_xattr_header and _entry: version 2; user, group and others (tags 1, 4, 0x20) with rwx, rwx, rx.
    let mut acl = fields![2u32];
    for (tag, perm) in [(1u16, 7u16), (4, 7), (0x20, 5)] {
        acl.extend(fields![tag, perm, u32::MAX]);
    }
    let set = [
        fields![acl.len() as u32, 0u32],
        name("system.posix_acl_default"),
        acl,
    ]
    .concat();
    c.call(SETXATTR, with_acl.node, &set, 0).unwrap();
    let umask = 0o077u32;
    for (dir, file_mode, dir_mode) in [(plain, 0o600, 0o700), (with_acl, 0o664, 0o2775)] {
        let mkdir = [fields![0o777u32, umask], name("dir")].concat();
        let made = entry(&c.call(MKDIR, dir.node, &mkdir, 128).unwrap());
        assert_eq!(made.mode & 0o7777, dir_mode);
        let create = [fields![libc::O_RDWR, 0o666u32, umask, 0u32], name("file")].concat();
        let made = entry(&c.call(CREATE, dir.node, &create, 144).unwrap());
        assert_eq!(made.mode & 0o7777, file_mode);
        let mknod = [fields![libc::S_IFIFO | 0o666u32, 0u32, umask, 0u32], name("fifo")].concat();
        let made = entry(&c.call(MKNOD, dir.node, &mknod, 128).unwrap());
        assert_eq!(made.mode & 0o7777, file_mode);
    }
    // The umask was that request's, not the thread's.
    let made = c.mkdir(ROOT, "last", 0o777).unwrap();
    assert_eq!(made.mode & 0o7777, 0o777);
}

#[test]
fn fallocate_and_copies_by_another_user_take_setuid_away() {
    let mut c = Client::new();
    let (file, handle) = c.create(ROOT, "suid", libc::O_RDWR, 0o600).unwrap();
    let (source, from) = c.create(ROOT, "source", libc::O_RDWR, 0o600).unwrap();
    c.write(source.node, from, 0, b"content", 0).unwrap();
    let path = c.share().join("suid");
    let suid = || fs::set_permissions(&path, fs::Permissions::from_mode(0o6755)).unwrap();
    let mode = || fs::metadata(&path).unwrap().mode() & 0o7777;
    let fallocate = fields![handle, 0u64, 4096u64, 0u32, 0u32];
    let copy = fields![from, 0u64, file.node, handle, 0u64, 100u64, 0u64];
    for (uid, expected) in [(0, 0o6755), (1000, 0o755)] {
        c.uid = uid;
        suid();
        c.call(FALLOCATE, file.node, &fallocate, 0).unwrap();
        assert_eq!(mode(), expected, "fallocate by {uid}");
        suid();
        c.call(COPY_FILE_RANGE, source.node, &copy, 8).unwrap();
        assert_eq!(mode(), expected, "copy by {uid}");
    }
}

#[test]
fn copy_file_range_copies_between_open_files() {
    let mut c = Client::new();
    let (one, from) = c.create(ROOT, "one", libc::O_RDWR, 0o600).unwrap();
    let (two, to) = c.create(ROOT, "two", libc::O_RDWR, 0o600).unwrap();
    c.write(one.node, from, 0, b"0123456789", 0).unwrap();
    let copy = |from: u64, at: u64, len: u64, flags: u64| fields![from, at, two.node, to, 2u64, len, flags];
    let answer = c
        .call(COPY_FILE_RANGE, one.node, &copy(from, 4, 100, 0), 8)
        .unwrap();
    assert_eq!(u32_at(&answer, 0), 6);
    assert_eq!(fs::read(c.share().join("two")).unwrap(), b"\0\x00456789");
    for (bad, errno) in [
        (copy(from, 0, 1, 1), libc::EINVAL),
        (copy(from, u64::MAX, 1, 0), libc::EINVAL),
        (copy(to, 0, 1, 0), libc::EBADF),
        (copy(999, 0, 1, 0), libc::EBADF),
    ] {
        assert_eq!(c.call(COPY_FILE_RANGE, one.node, &bad, 8), Err(errno));
    }
    // Much at once is done in part.
    fs::File::options()
        .write(true)
        .open(c.share().join("one"))
        .unwrap()
        .set_len(64 << 20)
        .unwrap();
    let answer = c
        .call(COPY_FILE_RANGE, one.node, &copy(from, 0, u64::MAX, 0), 8)
        .unwrap();
    assert!(u32_at(&answer, 0) <= 16 << 20);
}

#[test]
fn tmpfile_has_no_name_until_it_is_linked() {
    let mut c = Client::new();
    let dir = c.mkdir(ROOT, "dir", 0o755).unwrap();
    let tmpfile = |flags: i32| [fields![flags, 0o640u32, 0o22u32, 0u32], name("")].concat();
    let answer = c.call(TMPFILE, dir.node, &tmpfile(libc::O_RDWR), 144).unwrap();
    let (file, handle) = (entry(&answer), u64_at(&answer, 128));
    assert_eq!((file.mode, file.nlink), (libc::S_IFREG | 0o640, 0));
    c.write(file.node, handle, 0, b"content", 0).unwrap();
    assert_eq!(fs::read_dir(c.share().join("dir")).unwrap().count(), 0);
    assert_eq!(c.getattr(file.node).unwrap().size, 7);
    let link = [fields![file.node], name("linked")].concat();
    assert_eq!(entry(&c.call(LINK, ROOT, &link, 128).unwrap()).node, file.node);
    c.release(file.node, handle).unwrap();
    assert_eq!(c.getattr(file.node).unwrap().nlink, 1);
    assert_eq!(fs::read(c.share().join("linked")).unwrap(), b"content");
    // One that is not linked is gone when it is closed.
    let answer = c.call(TMPFILE, dir.node, &tmpfile(libc::O_RDWR), 144).unwrap();
    let (file, handle) = (entry(&answer), u64_at(&answer, 128));
    c.release(file.node, handle).unwrap();
    assert_eq!(c.getattr(file.node).unwrap_err(), libc::ESTALE);
    c.forget(file.node, 1);
    assert_eq!(c.getattr(file.node).unwrap_err(), libc::ENOENT);
    assert!(c.call(TMPFILE, dir.node, &tmpfile(libc::O_RDONLY), 144).is_err());
    let linked = c.lookup(ROOT, "linked").unwrap().node;
    assert!(c.call(TMPFILE, linked, &tmpfile(libc::O_RDWR), 144).is_err());
}

#[test]
fn statx_tells_the_time_of_birth() {
    let mut c = Client::new();
    fs::write(c.share().join("file"), "content").unwrap();
    let file = c.lookup(ROOT, "file").unwrap();
    let body = fields![0u32, 0u32, 0u64, 0u32, 0xfffu32];
    let answer = c.call(STATX, file.node, &body, 288).unwrap();
    assert_eq!(answer.len(), 288);
    let meta = fs::metadata(c.share().join("file")).unwrap();
    assert_eq!(u64_at(&answer, 64), meta.ino());
    assert_eq!(u64_at(&answer, 72), 7);
    let birth = meta
        .created()
        .unwrap()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    assert_ne!(u32_at(&answer, 32) & libc::STATX_BTIME, 0);
    assert_eq!(
        (u64_at(&answer, 112), u32_at(&answer, 120)),
        (birth.as_secs(), birth.subsec_nanos())
    );
    assert_eq!(c.call(STATX, 999, &body, 288), Err(libc::ENOENT));
    // A root of our own has no birth, but attributes.
    let mut shares = Client::shares(Default::default(), |base| {
        [("a".to_owned(), SharedDir::writable(base.join("share")))].into()
    });
    let answer = shares.call(STATX, ROOT, &body, 288).unwrap();
    assert_eq!(u32_at(&answer, 32), libc::STATX_BASIC_STATS);
}

/// Whether all blocks of the file at `path` are allocated, which ext4 and xfs do when they write them; `None` where the
/// file system does not say.
fn is_written(path: &Path) -> Option<bool> {
    // struct fiemap with room for one extent; FS_IOC_FIEMAP.
    const FIEMAP: libc::c_ulong = 0xc020_660b;
    const DELALLOC: u64 = 4;
    let file = fs::File::open(path).unwrap();
    let mut map = [0u64; 4 + 7];
    map[1] = u64::MAX;
    // fm_extent_count, after fm_flags and fm_mapped_extents.
    map[3] = 1;
    // SAFETY: the buffer has the room it says.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), FIEMAP, map.as_mut_ptr()) };
    let flags = map[4 + 5] & 0xffff_ffff;
    (result == 0).then_some(map[2] >> 32 != 0 && flags & DELALLOC == 0)
}

#[test]
fn syncfs_writes_the_file_system_back() {
    let mut c = Client::new();
    let (file, handle) = c.create(ROOT, "file", libc::O_RDWR, 0o600).unwrap();
    let path = c.share().join("file");
    for node in [ROOT, file.node] {
        let data = vec![7; 1 << 20];
        c.call(
            SETATTR,
            file.node,
            &[fields![8u32, 0u32, 0u64, 0u64, 0u64], vec![0; 56]].concat(),
            104,
        )
        .unwrap();
        c.write(file.node, handle, 0, &data, 0).unwrap();
        let before = is_written(&path);
        c.call(SYNCFS, node, &fields![0u64], 0).unwrap();
        // tmpfs has nothing to write.
        if let Some(written) = is_written(&path) {
            assert!(written, "before: {before:?}");
        }
    }
    assert_eq!(c.call(SYNCFS, 999, &fields![0u64], 0), Err(libc::ENOENT));
    let mut shares = Client::shares(Default::default(), |base| {
        [("a".to_owned(), SharedDir::writable(base.join("share")))].into()
    });
    shares.call(SYNCFS, ROOT, &fields![0u64], 0).unwrap();
}
