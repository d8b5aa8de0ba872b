use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};

use super::client::*;
use crate::config::FsCache;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::test_ring::Buf;

#[test]
fn init_negotiates_large_requests() {
    let mut c = Client::new();
    let answer = c.init().unwrap();
    let (flags, max_write) = (u32_at(&answer, 12), u32_at(&answer, 20));
    assert_eq!(max_write, 1 << 20);
    let max_pages = 1 << 22;
    assert_ne!(flags & max_pages, 0);
    let (export_support, writeback, no_open) = (1 << 4, 1 << 16, 1 << 17);
    assert_eq!(flags & (export_support | writeback | no_open), 0);
}

#[test]
fn tree_is_built_read_and_removed() {
    let mut c = Client::new();
    let sub = c.mkdir(ROOT, "sub", 0o750).unwrap();
    let (file, handle) = c.create(sub.node, "file", libc::O_RDWR, 0o640).unwrap();
    assert_eq!(c.write(file.node, handle, 0, b"hello world", 0), Ok(11));
    assert_eq!(c.read(file.node, handle, 6, 100, 0).unwrap(), b"world");
    assert_eq!(fs::read(c.share().join("sub/file")).unwrap(), b"hello world");
    assert_eq!(c.getattr(file.node).unwrap().size, 11);
    assert_eq!(
        c.call(RELEASE, file.node, &fields![handle, 0u32, 0u32, 0u64], 0),
        Ok(vec![])
    );
    assert_eq!(c.read(file.node, handle, 0, 1, 0), Err(libc::EBADF));

    // Changed by the host: visible at once.
    fs::write(c.share().join("sub/file"), "changed").unwrap();
    let handle = c.open(file.node, libc::O_RDONLY).unwrap();
    assert_eq!(c.read(file.node, handle, 0, 100, 0).unwrap(), b"changed");
    fs::write(c.share().join("sub/new"), "x").unwrap();
    assert_eq!(c.walk("sub/new").unwrap().size, 1);

    let linked = c
        .call(LINK, sub.node, &[fields![file.node], name("hard")].concat(), 128)
        .unwrap();
    assert_eq!((entry(&linked).node, entry(&linked).nlink), (file.node, 2));
    let rename =
        |flags: u32, to: u64, old: &str, new: &str| [fields![to, flags, 0u32], name(old), name(new)].concat();
    let no_replace = rename(1, sub.node, "hard", "new");
    assert_eq!(c.call(RENAME2, sub.node, &no_replace, 0), Err(libc::EEXIST));
    c.call(RENAME2, sub.node, &rename(0, ROOT, "hard", "moved"), 0)
        .unwrap();
    assert_eq!(c.lookup(ROOT, "moved").unwrap().node, file.node);

    assert_eq!(c.call(RMDIR, ROOT, &name("sub"), 0), Err(libc::ENOTEMPTY));
    for gone in ["file", "new"] {
        c.call(UNLINK, sub.node, &name(gone), 0).unwrap();
    }
    c.call(RMDIR, ROOT, &name("sub"), 0).unwrap();
    assert_eq!(c.lookup(ROOT, "sub").unwrap_err(), libc::ENOENT);
    // Open and known files outlive their names.
    c.call(UNLINK, ROOT, &name("moved"), 0).unwrap();
    assert_eq!(c.read(file.node, handle, 0, 100, 0).unwrap(), b"changed");
    assert_eq!(c.getattr(file.node).unwrap().nlink, 0);
}

#[test]
fn megabyte_requests_pass_through() {
    let mut c = Client::new();
    let data: Vec<u8> = (0..1u32 << 20).map(|i| (i % 253) as u8).collect();
    let (file, handle) = c.create(ROOT, "big", libc::O_RDWR, 0o600).unwrap();
    assert_eq!(c.write(file.node, handle, 4096, &data, 0), Ok(1 << 20));
    assert_eq!(c.read(file.node, handle, 4096, 1 << 20, 0).unwrap(), data);
    assert_eq!(
        c.read(file.node, handle, 4096 + (1 << 20) - 3, 4096, 0).unwrap(),
        data[data.len() - 3..]
    );
    let seek = |offset: u64, whence: u32| fields![handle, offset, whence, 0u32];
    assert_eq!(
        u64_at(&c.call(LSEEK, file.node, &seek(0, 3), 8).unwrap(), 0),
        4096
    );
    assert_eq!(c.call(LSEEK, file.node, &seek(0, 0), 8), Err(libc::EINVAL));
}

#[test]
fn directory_when_large_is_listed_completely() {
    let mut c = Client::new();
    for index in 0..500 {
        fs::write(c.share().join(format!("file-{index}")), "").unwrap();
    }
    let mut names = c.list(ROOT, 4096).unwrap();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 502);
    for (text, node) in names {
        if text == "." || text == ".." {
            assert_eq!(node, 0);
        } else {
            assert_eq!(c.lookup(ROOT, &text).unwrap().node, node);
        }
    }
}

#[test]
fn readdir_gives_names_without_references() {
    let mut c = Client::new();
    fs::write(c.share().join("only"), "").unwrap();
    let handle = u64_at(&c.call(OPENDIR, ROOT, &fields![0u32, 0u32], 16).unwrap(), 0);
    let body = fields![handle, 0u64, 4096u32, 0u32, 0u64, 0u32, 0u32];
    let answer = c.call(READDIR, ROOT, &body, 4096).unwrap();
    assert!(answer.windows(4).any(|window| window == b"only"));
}

#[test]
fn modes_are_as_asked_whatever_our_umask() {
    let mut c = Client::new();
    let (file, _) = c.create(ROOT, "file", libc::O_RDWR, 0o666).unwrap();
    assert_eq!(file.mode, libc::S_IFREG | 0o666);
    assert_eq!(c.mkdir(ROOT, "dir", 0o1777).unwrap().mode, libc::S_IFDIR | 0o1777);
    let body = [fields![libc::S_IFIFO | 0o622, 0u32, 0u32, 0u32], name("fifo")].concat();
    assert_eq!(
        entry(&c.call(MKNOD, ROOT, &body, 128).unwrap()).mode,
        libc::S_IFIFO | 0o622
    );
    assert!(
        fs::metadata(c.share().join("fifo"))
            .unwrap()
            .file_type()
            .is_fifo()
    );
}

#[test]
fn files_belong_to_their_creator() {
    let mut c = Client::new();
    // Only root may write here by the host's rules; the guest's kernel has decided otherwise.
    fs::set_permissions(c.share(), fs::Permissions::from_mode(0o755)).unwrap();
    (c.uid, c.gid) = (1234, 4321);
    let (file, handle) = c.create(ROOT, "file", libc::O_RDWR, 0o600).unwrap();
    assert_eq!((file.uid, file.gid), (1234, 4321));
    let dir = c.mkdir(ROOT, "dir", 0o700).unwrap();
    assert_eq!((dir.uid, dir.gid), (1234, 4321));
    let link = c.symlink(ROOT, "link", "file").unwrap();
    assert_eq!((link.uid, link.gid), (1234, 4321));
    assert_eq!(c.write(file.node, handle, 0, b"x", 0), Ok(1));
    // And the worker is root again.
    (c.uid, c.gid) = (0, 0);
    for index in 0..8 {
        let (file, _) = c
            .create(ROOT, &format!("root-{index}"), libc::O_RDWR, 0o600)
            .unwrap();
        assert_eq!((file.uid, file.gid), (0, 0));
    }
    c.uid = u32::MAX;
    assert_eq!(c.mkdir(ROOT, "nobody", 0o700).unwrap_err(), libc::EPERM);
}

fn setattr(valid: u32, size: u64, mode: u32, uid: u32) -> Vec<u8> {
    let (time, nsec) = (1_000_000_000u64, 5u32);
    let times = fields![time, time, 0u64, nsec, nsec, 0u32];
    [
        fields![valid, 0u32, 0u64, size, 0u64],
        times,
        fields![mode, 0u32, uid, 0u32, 0u32],
    ]
    .concat()
}

#[test]
fn setattr_changes_mode_owner_size_and_times() {
    let mut c = Client::new();
    let (file, _) = c.create(ROOT, "file", libc::O_RDWR, 0o600).unwrap();
    let all = 1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 5;
    c.call(SETATTR, file.node, &setattr(all, 12345, 0o4711, 77), 104)
        .unwrap();
    let meta = fs::metadata(c.share().join("file")).unwrap();
    assert_eq!(
        (meta.len(), meta.uid(), meta.mtime(), meta.mtime_nsec()),
        (12345, 77, 1_000_000_000, 5)
    );
    // chown clears setuid on the host as it does on any Linux.
    assert_eq!(meta.mode() & 0o7777, 0o711);
    c.symlink(ROOT, "link", "file").unwrap();
    let link = c.lookup(ROOT, "link").unwrap();
    c.call(SETATTR, link.node, &setattr(1 << 1, 0, 0, 99), 104)
        .unwrap();
    assert_eq!(
        fs::metadata(c.share().join("file")).unwrap().uid(),
        77,
        "followed the link"
    );
    assert_eq!(c.getattr(link.node).unwrap().uid, 99);
    let too_large = setattr(1 << 3, u64::MAX, 0, 0);
    assert_eq!(c.call(SETATTR, file.node, &too_large, 104), Err(libc::EINVAL));
}

#[test]
fn privileges_are_killed_only_when_asked() {
    let mut c = Client::new();
    let (file, handle) = c.create(ROOT, "suid", libc::O_RDWR, 0o600).unwrap();
    let path = c.share().join("suid");
    let suid = || fs::set_permissions(&path, fs::Permissions::from_mode(0o4755)).unwrap();
    let mode = || fs::metadata(&path).unwrap().mode() & 0o7777;
    suid();
    c.write(file.node, handle, 0, b"root", 0).unwrap();
    assert_eq!(mode(), 0o4755);
    c.write(file.node, handle, 0, b"user", 4).unwrap();
    assert_eq!(mode(), 0o755);
    suid();
    c.call(SETATTR, file.node, &setattr(1 << 3 | 1 << 11, 1, 0, 0), 104)
        .unwrap();
    assert_eq!(mode(), 0o755);
    suid();
    c.call(OPEN, file.node, &fields![libc::O_TRUNC, 1u32], 16)
        .unwrap();
    assert_eq!((mode(), fs::metadata(&path).unwrap().len()), (0o755, 0));
}

#[test]
fn attributes_are_set_listed_and_removed() {
    let mut c = Client::new();
    let (file, _) = c.create(ROOT, "file", libc::O_RDWR, 0o600).unwrap();
    let link = c.symlink(ROOT, "link", "/nowhere").unwrap();
    for node in [file.node, ROOT] {
        let set = [fields![5u32, 0u32], name("user.dragonball"), b"value".to_vec()].concat();
        c.call(SETXATTR, node, &set, 0).unwrap();
        let get = |size: u32| [fields![size, 0u32], name("user.dragonball")].concat();
        assert_eq!(u32_at(&c.call(GETXATTR, node, &get(0), 8).unwrap(), 0), 5);
        assert_eq!(c.call(GETXATTR, node, &get(100), 100).unwrap(), b"value");
        assert_eq!(c.call(GETXATTR, node, &get(3), 100), Err(libc::ERANGE));
        assert_eq!(c.call(GETXATTR, node, &get(u32::MAX), 100).unwrap(), b"value");
        let names = c.call(LISTXATTR, node, &fields![4096u32, 0u32], 4096).unwrap();
        assert!(names.windows(16).any(|window| window == b"user.dragonball\0"));
        c.call(REMOVEXATTR, node, &name("user.dragonball"), 0).unwrap();
        assert_eq!(c.call(GETXATTR, node, &get(100), 100), Err(libc::ENODATA));
    }
    // A link has none of these, and does not lead to those of another file.
    let set = [fields![5u32, 0u32], name("user.dragonball"), b"value".to_vec()].concat();
    assert_eq!(c.call(SETXATTR, link.node, &set, 0), Err(libc::EPERM));
}

#[test]
fn create_when_the_file_exists_opens_or_refuses_it() {
    let mut c = Client::new();
    fs::write(c.share().join("old"), "contents").unwrap();
    let (file, handle) = c
        .create(ROOT, "old", libc::O_RDWR | libc::O_CREAT, 0o600)
        .unwrap();
    assert_eq!(c.read(file.node, handle, 0, 100, 0).unwrap(), b"contents");
    let exclusive = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL;
    assert_eq!(c.create(ROOT, "old", exclusive, 0o600).unwrap_err(), libc::EEXIST);
    let truncate = libc::O_RDONLY | libc::O_CREAT | libc::O_TRUNC;
    assert_eq!(c.create(ROOT, "old", truncate, 0o600).unwrap().0.node, file.node);
    assert_eq!(c.getattr(file.node).unwrap().size, 0);
}

#[test]
fn append_goes_to_the_end() {
    let mut c = Client::new();
    fs::write(c.share().join("log"), "one").unwrap();
    let log = c.lookup(ROOT, "log").unwrap();
    let handle = c.open(log.node, libc::O_WRONLY | libc::O_APPEND).unwrap();
    c.write(log.node, handle, 0, b"two", 0).unwrap();
    assert_eq!(fs::read(c.share().join("log")).unwrap(), b"onetwo");
}

#[test]
fn cache_policies_set_timeouts_and_open_flags() {
    for (cache, timeout, flags) in [
        (FsCache::Never, 0, 1),
        (FsCache::Auto, 1, 0),
        (FsCache::Always, 86400, 2),
    ] {
        let mut c = Client::with(cache, 1);
        let (file, _) = c.create(ROOT, "file", libc::O_RDWR, 0o600).unwrap();
        assert_eq!(file.timeout, timeout);
        let opened = c.call(OPEN, file.node, &fields![0u32, 0u32], 16).unwrap();
        assert_eq!(u32_at(&opened, 8), flags, "{cache:?}");
    }
}

#[test]
fn many_requests_are_served_in_parallel_and_each_once() {
    let mut c = Client::with(FsCache::Auto, 4);
    fs::write(c.share().join("file"), "x").unwrap();
    let message = c.message(LOOKUP, ROOT, &name("file"));
    c.guest.write(REQUEST, &message);
    for round in 0..20 {
        for index in 0..40 {
            let answer = ANSWER + index * 0x1000;
            c.rings[REQUESTS].submit(&[
                Buf::Read(REQUEST, 40),
                Buf::Read(REQUEST + 40, 5),
                Buf::Write(answer, 144),
            ]);
            if index % 3 == round % 3 {
                c.rings[REQUESTS].kick();
            }
        }
        c.rings[REQUESTS].kick();
        for _ in 0..40 {
            assert_eq!(c.rings[REQUESTS].wait_used().len, 144);
        }
    }
    let node = c.lookup(ROOT, "file").unwrap().node;
    // 801 references: 800 are not enough to forget it.
    c.forget(node, 800);
    assert!(c.getattr(node).is_ok());
    c.forget(node, 1);
    assert_eq!(c.getattr(node).unwrap_err(), libc::ENOENT);
}

#[test]
fn statfs_answers() {
    let mut c = Client::new();
    let answer = c.call(STATFS, ROOT, &[], 80).unwrap();
    assert!(u64_at(&answer, 0) > 0, "blocks");
}

#[test]
fn config_space_has_tag_and_queues() {
    let c = Client::new();
    let mut space = [0xff; 44];
    c.fs.read_config(0, &mut space);
    assert_eq!(&space[..11], b"kataShared\0");
    assert_eq!(space[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
}
