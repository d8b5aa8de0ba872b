//! Pauses, which the guest does not notice, and restores in another process.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::time::Duration;

use super::client::*;
use crate::config::{FsCache, FsRoot, SharedDir};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::fs::Unmount;
use crate::devices::virtio::state::StateError;
use crate::devices::virtio::test_ring::Buf;

fn tree(c: &Client) {
    fs::create_dir_all(c.share().join("dir/sub")).unwrap();
    fs::write(c.share().join("dir/sub/file"), "content").unwrap();
    symlink("nowhere", c.share().join("dir/link")).unwrap();
    for index in 0..50 {
        fs::write(c.share().join(format!("dir/many{index:02}")), "").unwrap();
    }
}

fn reason(result: Result<(), StateError>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn pause_keeps_inodes_handles_and_requests_in_the_ring() {
    let mut c = Client::new();
    tree(&c);
    let file = c.walk("dir/sub/file").unwrap();
    let handle = c.open(file.node, libc::O_RDWR).unwrap();
    for _ in 0..3 {
        c.pause(|_| {});
        assert_eq!(c.read(file.node, handle, 0, 16, 0).unwrap(), b"content");
    }
    // A request whose kick came to nobody.
    let message = c.message(LOOKUP, ROOT, &name("dir"));
    c.pause(|c| {
        c.guest.write(REQUEST, &message);
        c.rings[REQUESTS].submit(&[Buf::Read(REQUEST, message.len() as u32), Buf::Write(ANSWER, 144)]);
    });
    assert_eq!(c.rings[REQUESTS].wait_used().len, 144);
}

#[test]
fn suspend_when_requests_are_waiting_leaves_them_for_later() {
    let mut c = Client::with(FsCache::Auto, 1);
    let message = c.message(GETATTR, ROOT, &fields![0u32, 0u32, 0u64]);
    c.guest.write(REQUEST, &message);
    for _ in 0..60 {
        c.rings[REQUESTS].submit(&[Buf::Read(REQUEST, message.len() as u32), Buf::Write(ANSWER, 120)]);
    }
    c.rings[REQUESTS].kick();
    let mut served = 0;
    c.pause(|c| {
        while c.rings[REQUESTS].try_used().is_some() {
            served += 1;
        }
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(c.rings[REQUESTS].try_used(), None, "served while suspended");
    });
    for _ in served..60 {
        assert_eq!(c.rings[REQUESTS].wait_used().len, 120);
    }
}

#[test]
fn restore_keeps_inodes_handles_and_listings() {
    for shares in [false, true] {
        let mut c = match shares {
            true => Client::shares(FsCache::Auto, |base| {
                BTreeMap::from([("a".to_owned(), SharedDir::writable(base.join("share")))])
            }),
            false => Client::new(),
        };
        tree(&c);
        let prefix = if shares { "a/" } else { "" };
        let dir = c.walk(&format!("{prefix}dir")).unwrap();
        let file = c.walk(&format!("{prefix}dir/sub/file")).unwrap();
        let link = c.lookup(dir.node, "link").unwrap();
        let (new, appender) = c
            .create(dir.node, "new", libc::O_WRONLY | libc::O_APPEND, 0o600)
            .unwrap();
        let reader = c.open(file.node, libc::O_RDONLY).unwrap();
        let listing = u64_at(&c.call(OPENDIR, dir.node, &fields![0u32, 0u32], 16).unwrap(), 0);
        c.restore().unwrap();
        assert_eq!(c.getattr(dir.node).unwrap().ino, dir.ino);
        assert_eq!(c.read(file.node, reader, 0, 16, 0).unwrap(), b"content");
        assert!(
            c.write(file.node, reader, 0, b"x", 0).is_err(),
            "was opened for reading"
        );
        c.write(new.node, appender, 0, b"one", 0).unwrap();
        c.write(new.node, appender, 0, b"two", 0).unwrap();
        assert_eq!(fs::read(c.share().join("dir/new")).unwrap(), b"onetwo");
        assert_eq!(c.call(READLINK, link.node, &[], 64).unwrap(), b"nowhere");
        let body = fields![listing, 0u64, 4096u32, 0u32, 0u64, 0u32, 0u32];
        assert!(!c.call(READDIR, dir.node, &body, 4096).unwrap().is_empty());
        // References and ids go on: what is known keeps its number, what is new gets one never used.
        let again = c.lookup(dir.node, "new").unwrap();
        assert_eq!(again.node, new.node);
        let fresh = c.lookup(dir.node, "many07").unwrap();
        assert!(fresh.node > new.node && fresh.node > link.node);
        c.forget(link.node, 1);
        assert_eq!(c.getattr(link.node).unwrap_err(), libc::ENOENT);
        // And once more, from the second process.
        c.restore().unwrap();
        assert_eq!(c.read(file.node, reader, 0, 16, 0).unwrap(), b"content");
    }
}

#[test]
fn restore_keeps_what_was_mounted_meanwhile_and_takes_changed_paths() {
    let mut c = Client::shares(FsCache::Auto, |base| {
        BTreeMap::from([
            ("a".to_owned(), SharedDir::writable(base.join("share"))),
            ("gone".to_owned(), SharedDir::writable(base.join("share"))),
        ])
    });
    c.handle()
        .mount("late", &SharedDir::read_only(c.outside()))
        .unwrap();
    c.handle().unmount("gone", Unmount::IfUnused).unwrap();
    let secret = c.walk("late/secret").unwrap();
    // The next process finds "a" elsewhere; the guest knows nothing of it.
    let other = c.base().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("here"), "").unwrap();
    let FsRoot::Shares(shares) = &mut c.config.root else {
        unreachable!()
    };
    shares.insert("a".to_owned(), SharedDir::writable(other));
    c.restore().unwrap();
    assert_eq!(c.open(secret.node, libc::O_RDWR).unwrap_err(), libc::EROFS);
    assert!(c.open(secret.node, libc::O_RDONLY).is_ok());
    assert!(c.walk("a/here").is_ok());
    assert_eq!(c.lookup(ROOT, "gone").unwrap_err(), libc::ENOENT);
    c.handle().mount("gone", &SharedDir::writable(c.share())).unwrap();
    assert!(c.lookup(ROOT, "gone").is_ok());
}

#[test]
fn save_when_an_open_file_has_no_name_is_refused_by_name() {
    let mut c = Client::new();
    let (file, handle) = c.create(ROOT, "unlinked", libc::O_RDWR, 0o600).unwrap();
    c.call(UNLINK, ROOT, &name("unlinked"), 0).unwrap();
    let positions = c.fs.suspend();
    let error = c.fs.save().unwrap_err();
    assert!(matches!(error, StateError::Unsupported { .. }), "{error}");
    assert!(error.to_string().contains("unlinked"), "{error}");
    // The guest goes on, and once it has closed the file it can be saved.
    c.resume(&positions);
    c.write(file.node, handle, 0, b"x", 0).unwrap();
    c.call(RELEASE, file.node, &fields![handle, 0u32, 0u32, 0u64], 0)
        .unwrap();
    c.restore().unwrap();
    assert_eq!(c.getattr(file.node).unwrap_err(), libc::ENOENT);
}

#[test]
fn save_when_a_lazily_unmounted_share_is_in_use_is_refused() {
    let mut c = Client::shares(FsCache::Auto, |base| {
        BTreeMap::from([("a".to_owned(), SharedDir::writable(base.join("share")))])
    });
    tree(&c);
    let file = c.walk("a/dir/sub/file").unwrap();
    c.open(file.node, libc::O_RDONLY).unwrap();
    c.handle().unmount("a", Unmount::Lazy).unwrap();
    c.fs.suspend();
    let error = c.fs.save().unwrap_err().to_string();
    assert!(error.contains("\"a\""), "{error}");
}

#[test]
fn restore_when_a_file_is_gone_or_another_is_refused_by_name() {
    let mut c = Client::new();
    tree(&c);
    c.walk("dir/sub/file").unwrap();
    c.fs.suspend();
    let state = c.fs.save().unwrap();
    let path = c.share().join("dir/sub/file");
    fs::rename(&path, c.share().join("moved")).unwrap();
    let error = reason(c.restore_from(&state));
    assert!(error.contains("dir/sub/file"), "{error}");
    fs::write(&path, "content").unwrap();
    let error = reason(c.restore_from(&state));
    assert!(
        error.contains("dir/sub/file") && error.contains("another file"),
        "{error}"
    );
    // A link to the right file, in place of the folder, is not followed either.
    fs::remove_file(&path).unwrap();
    fs::rename(c.share().join("moved"), &path).unwrap();
    fs::rename(c.share().join("dir/sub"), c.outside().join("sub")).unwrap();
    symlink(c.outside().join("sub"), c.share().join("dir/sub")).unwrap();
    assert!(reason(c.restore_from(&state)).contains("dir/sub"));
    fs::remove_file(c.share().join("dir/sub")).unwrap();
    fs::rename(c.outside().join("sub"), c.share().join("dir/sub")).unwrap();
    c.restore_from(&state).unwrap();
}

#[test]
fn restore_when_the_guest_owns_the_files_refuses_changed_content() {
    for cache in [FsCache::Auto, FsCache::Always] {
        let mut c = Client::with(cache, 1);
        tree(&c);
        c.walk("dir/sub/file").unwrap();
        c.fs.suspend();
        let state = c.fs.save().unwrap();
        fs::write(c.share().join("dir/sub/file"), "changed content").unwrap();
        let result = c.restore_from(&state);
        assert_eq!(result.is_err(), cache == FsCache::Always, "{result:?}");
    }
}

#[test]
fn restore_when_the_bytes_are_damaged_never_leaves_the_share() {
    let mut c = Client::new();
    tree(&c);
    let file = c.walk("dir/sub/file").unwrap();
    c.open(file.node, libc::O_RDWR).unwrap();
    c.fs.suspend();
    let good = c.fs.save().unwrap();
    for len in 0..good.len() {
        assert!(c.restore_from(&good[..len]).is_err(), "{len} bytes");
    }
    // Every byte damaged in several ways: refused or harmless, and never a panic.
    for at in 0..good.len() {
        for value in [0, 1, b'/', b'.', 0x7f, 0xff] {
            let mut bad = good.clone();
            bad[at] = value;
            let _ = c.restore_from(&bad);
        }
    }
    // The path of the file leads outside.
    let text = b"dir/sub/file";
    let at = good
        .windows(text.len())
        .position(|window| window == text)
        .unwrap();
    for evil in [
        b"../outside/s",
        b"/etc/passwd/",
        b"dir/../../xx",
        b"dir//sub/fil",
        b"dir/\0ub/file",
    ] {
        let mut bad = good.clone();
        bad[at..at + text.len()].copy_from_slice(evil);
        assert!(c.restore_from(&bad).is_err());
    }
}
