//! A root of our own with host directories in it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

use super::bounds::held;
use super::client::*;
use crate::config::{FsCache, FsConfig, FsRoot, SharedDir};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::fs::{FsMountError, Unmount};
use crate::devices::virtio::test_ring::{Buf, PATIENCE};

/// `a` is the folder `share`, writable; `ro` is the folder `outside`, read-only.
fn two() -> Client {
    Client::shares(FsCache::Auto, |base| {
        BTreeMap::from([
            ("a".to_owned(), SharedDir::writable(base.join("share"))),
            ("ro".to_owned(), SharedDir::read_only(base.join("outside"))),
        ])
    })
}

fn counter(c: &Client, name: &str) -> u64 {
    let counters = c.fs.counters();
    counters.iter().find(|(other, _)| *other == name).unwrap().1
}

#[test]
fn root_when_made_of_shares_lists_them_and_is_read_only() {
    let mut c = two();
    let root = c.getattr(ROOT).unwrap();
    assert_eq!((root.mode, root.nlink), (libc::S_IFDIR | 0o555, 4));
    let list = c.list(ROOT, 4096).unwrap();
    let names: Vec<_> = list.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, [".", "..", "a", "ro"]);
    // One entry at a time gives the same.
    assert_eq!(c.list(ROOT, 170).unwrap().len(), 4);
    let a = c.lookup(ROOT, "a").unwrap();
    assert_eq!(list[2].1, a.node);
    assert_eq!(a.timeout, 0);
    assert_eq!(c.lookup(ROOT, "b").unwrap_err(), libc::ENOENT);
    assert_eq!(c.mkdir(ROOT, "b", 0o755).unwrap_err(), libc::EROFS);
    assert_eq!(c.create(ROOT, "b", libc::O_RDWR, 0o644).unwrap_err(), libc::EROFS);
    assert_eq!(c.symlink(ROOT, "b", "x").unwrap_err(), libc::EROFS);
    assert_eq!(c.call(UNLINK, ROOT, &name("a"), 0), Err(libc::EROFS));
    assert_eq!(c.call(RMDIR, ROOT, &name("a"), 0), Err(libc::EROFS));
    let rename = [fields![a.node, 0u32, 0u32], name("a"), name("b")].concat();
    assert_eq!(c.call(RENAME2, ROOT, &rename, 0), Err(libc::EROFS));
    assert!(c.call(STATFS, ROOT, &[], 80).is_ok());
    assert_eq!(
        c.call(GETXATTR, ROOT, &[fields![0u32, 0u32], name("user.x")].concat(), 8),
        Err(libc::ENODATA)
    );
    assert!(c.open(ROOT, 0).is_err());
    assert!(c.call(READLINK, ROOT, &[], 64).is_err());
}

#[test]
fn share_when_read_only_refuses_every_change() {
    let mut c = two();
    let secret = c.walk("ro/secret").unwrap();
    let ro = c.lookup(ROOT, "ro").unwrap();
    let handle = c.open(secret.node, libc::O_RDONLY).unwrap();
    assert_eq!(c.read(secret.node, handle, 0, 16, 0).unwrap(), b"secret");
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC] {
        assert_eq!(c.open(secret.node, flags).unwrap_err(), libc::EROFS);
    }
    assert!(c.write(secret.node, handle, 0, b"x", 0).is_err());
    assert_eq!(
        c.create(ro.node, "new", libc::O_RDWR, 0o644).unwrap_err(),
        libc::EROFS
    );
    assert_eq!(c.mkdir(ro.node, "new", 0o755).unwrap_err(), libc::EROFS);
    assert_eq!(c.symlink(ro.node, "new", "x").unwrap_err(), libc::EROFS);
    let mknod = [fields![0o644u32 | libc::S_IFREG, 0u32, 0u32, 0u32], name("new")].concat();
    assert_eq!(c.call(MKNOD, ro.node, &mknod, 128), Err(libc::EROFS));
    assert_eq!(c.call(UNLINK, ro.node, &name("secret"), 0), Err(libc::EROFS));
    let rename = [fields![ro.node, 0u32, 0u32], name("secret"), name("x")].concat();
    assert_eq!(c.call(RENAME2, ro.node, &rename, 0), Err(libc::EROFS));
    // FATTR_MODE.
    let setattr = [
        fields![
            1u32, 0u32, 0u64, 0u64, 0u64, 0u64, 0u64, 0u64, 0u32, 0u32, 0u32, 0o777u32
        ],
        vec![0; 16],
    ]
    .concat();
    assert_eq!(c.call(SETATTR, secret.node, &setattr, 104), Err(libc::EROFS));
    let setxattr = [fields![1u32, 0u32], name("user.x"), b"1".to_vec()].concat();
    assert_eq!(c.call(SETXATTR, secret.node, &setxattr, 0), Err(libc::EROFS));
    assert_eq!(
        c.call(REMOVEXATTR, secret.node, &name("user.x"), 0),
        Err(libc::EROFS)
    );
    assert_eq!(fs::read(c.outside().join("secret")).unwrap(), b"secret");
}

#[test]
fn shares_are_apart() {
    let mut c = two();
    let (a, ro) = (c.lookup(ROOT, "a").unwrap(), c.lookup(ROOT, "ro").unwrap());
    c.handle().mount("b", &SharedDir::writable(c.share())).unwrap();
    let b = c.lookup(ROOT, "b").unwrap();
    let (file, _) = c.create(a.node, "file", libc::O_RDWR, 0o644).unwrap();
    // One host directory, two shares: other inodes, and no way from one to the other.
    let twin = c.lookup(b.node, "file").unwrap();
    assert_ne!(twin.node, file.node);
    assert_eq!(twin.ino, file.ino);
    let rename = [fields![b.node, 0u32, 0u32], name("file"), name("moved")].concat();
    assert_eq!(c.call(RENAME2, a.node, &rename, 0), Err(libc::EXDEV));
    let link = [fields![file.node], name("linked")].concat();
    assert_eq!(c.call(LINK, b.node, &link, 128), Err(libc::EXDEV));
    assert_eq!(c.call(LINK, ro.node, &link, 128), Err(libc::EROFS));
}

#[test]
fn confinement_holds_in_every_share() {
    let mut c = two();
    fs::create_dir(c.share().join("sub")).unwrap();
    symlink(c.outside(), c.share().join("absolute")).unwrap();
    symlink("../outside/secret", c.share().join("relative")).unwrap();
    symlink("../../../../outside", c.share().join("sub/up")).unwrap();
    let a = c.lookup(ROOT, "a").unwrap();
    let sub = c.lookup(a.node, "sub").unwrap();
    for (node, bad) in [
        (ROOT, "."),
        (ROOT, ".."),
        (ROOT, "a/sub"),
        (ROOT, ""),
        (a.node, ".."),
        (sub.node, "../.."),
    ] {
        assert_eq!(c.lookup(node, bad).unwrap_err(), libc::EINVAL, "{bad:?}");
    }
    for (node, link) in [(a.node, "absolute"), (a.node, "relative"), (sub.node, "up")] {
        let link = c.lookup(node, link).unwrap();
        assert_eq!(link.mode & libc::S_IFMT, libc::S_IFLNK);
        assert!(c.lookup(link.node, "secret").is_err());
        assert!(c.open(link.node, libc::O_RDONLY).is_err());
        assert!(c.call(OPENDIR, link.node, &fields![0u32, 0u32], 16).is_err());
    }
}

#[test]
fn lookup_races_with_links_and_renames_never_leave_the_share() {
    let mut c = two();
    let stop = Arc::new(AtomicBool::new(false));
    let (share, outside, ended) = (c.share(), c.outside(), stop.clone());
    fs::create_dir_all(share.join("dir/inner")).unwrap();
    fs::write(share.join("dir/secret"), "inside").unwrap();
    let racer = std::thread::spawn(move || {
        // `dir` is by turns a directory, a link out of the share, and outside of it.
        while !ended.load(Ordering::Relaxed) {
            fs::rename(share.join("dir"), share.join("kept")).unwrap();
            symlink(&outside, share.join("dir")).unwrap();
            fs::remove_file(share.join("dir")).unwrap();
            fs::rename(share.join("kept"), outside.join("kept")).unwrap();
            fs::rename(outside.join("kept"), share.join("dir")).unwrap();
        }
    });
    let a = c.lookup(ROOT, "a").unwrap();
    let (mut read, mut rounds) = (0, 0);
    let deadline = Instant::now() + PATIENCE;
    while rounds < 3000 || read == 0 {
        assert!(
            Instant::now() < deadline,
            "never read the file in {rounds} rounds"
        );
        rounds += 1;
        let Ok(dir) = c.lookup(a.node, "dir") else {
            continue;
        };
        let _ = c.lookup(dir.node, "inner");
        if let Ok(file) = c.lookup(dir.node, "secret")
            && let Ok(handle) = c.open(file.node, libc::O_RDONLY)
        {
            assert_eq!(c.read(file.node, handle, 0, 16, 0).unwrap(), b"inside");
            c.call(RELEASE, file.node, &fields![handle, 0u32, 0u32, 0u64], 0)
                .unwrap();
            read += 1;
        }
    }
    stop.store(true, Ordering::Relaxed);
    racer.join().unwrap();
}

#[test]
fn unmount_when_files_are_open_is_refused_or_lazy() {
    let mut c = two();
    fs::write(c.share().join("file"), "content").unwrap();
    let file = c.walk("a/file").unwrap();
    let handle = c.open(file.node, libc::O_RDONLY).unwrap();
    let error = c.handle().unmount("a", Unmount::IfUnused).unwrap_err();
    assert!(matches!(&error, FsMountError::Busy { open: 1, .. }), "{error}");
    assert!(error.to_string().contains("1 files"), "{error}");
    c.handle().unmount("a", Unmount::Lazy).unwrap();
    assert_eq!(c.lookup(ROOT, "a").unwrap_err(), libc::ENOENT);
    assert_eq!(c.read(file.node, handle, 0, 16, 0).unwrap(), b"content");
    c.handle().mount("a", &SharedDir::writable(c.share())).unwrap();
    let again = c.walk("a/file").unwrap();
    assert_ne!(again.node, file.node);
    c.handle().unmount("a", Unmount::IfUnused).unwrap();
    assert_eq!(c.read(file.node, handle, 0, 16, 0).unwrap(), b"content");
}

#[test]
fn unmount_when_nothing_is_open_lets_go_of_the_host() {
    let mut c = two();
    let share = c.share();
    let mut kept = 0;
    for index in 0..20 {
        fs::write(share.join(format!("file{index}")), "").unwrap();
        let file = c.walk(&format!("a/file{index}")).unwrap();
        // Leaves a descriptor that is kept for a while.
        assert!(c.call(READLINK, file.node, &[], 64).is_err());
        kept = kept.max(held(&share));
    }
    assert!(kept > 0);
    let a = c.lookup(ROOT, "a").unwrap();
    let file = c.lookup(a.node, "file1").unwrap();
    c.handle().unmount("a", Unmount::IfUnused).unwrap();
    assert_eq!(held(&share), 0);
    assert_eq!(counter(&c, "mounts"), 1);
    // What the guest still has in its cache leads nowhere, and giving it back does no harm.
    assert_eq!(c.getattr(file.node).unwrap_err(), libc::ENOENT);
    assert_eq!(c.lookup(a.node, "file2").unwrap_err(), libc::ENOENT);
    c.forget(file.node, 1);
    assert!(matches!(
        c.handle().unmount("a", Unmount::IfUnused),
        Err(FsMountError::Missing { .. })
    ));
}

#[test]
fn mount_when_it_cannot_be_is_refused_with_the_reason() {
    let c = two();
    let dir = SharedDir::writable(c.share());
    assert!(matches!(
        c.handle().mount("a", &dir),
        Err(FsMountError::Exists { .. })
    ));
    for bad in ["", ".", "..", "a/b", "a\0b", &"x".repeat(256)] {
        assert!(
            matches!(c.handle().mount(bad, &dir), Err(FsMountError::Name(_))),
            "{bad:?}"
        );
    }
    let missing = SharedDir::writable(c.base().join("missing"));
    let error = c.handle().mount("m", &missing).unwrap_err().to_string();
    assert!(error.contains("missing"), "{error}");
    let plain = Client::new();
    assert!(matches!(
        plain.handle().mount("a", &dir),
        Err(FsMountError::NoNames { .. })
    ));
    assert!(matches!(
        plain.handle().unmount("a", Unmount::Lazy),
        Err(FsMountError::NoNames { .. })
    ));
}

#[test]
fn mounts_when_they_come_and_go_under_load_do_no_harm() {
    let mut c = two();
    fs::write(c.share().join("file"), "content").unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let (handle, dir, ended) = (c.handle(), SharedDir::writable(c.share()), stop.clone());
    let round = Arc::new(AtomicU32::new(0));
    let rounds = round.clone();
    let changer = std::thread::spawn(move || {
        let mut done = 0u32;
        while !ended.load(Ordering::Relaxed) {
            handle.mount("b", &dir).unwrap();
            // Now and then long enough for a whole round of the guest.
            let round = rounds.load(Ordering::Relaxed);
            while done.is_multiple_of(8)
                && rounds.load(Ordering::Relaxed) < round + 2
                && !ended.load(Ordering::Relaxed)
            {
                std::thread::yield_now();
            }
            while handle.unmount("b", Unmount::IfUnused).is_err() {}
            done += 1;
        }
        done
    });
    let (mut seen, mut done) = (0, 0);
    let deadline = Instant::now() + PATIENCE;
    while done < 3000 || seen == 0 {
        assert!(seen > 0 || Instant::now() < deadline, "the mount never came");
        done += 1;
        if let Ok(file) = c.walk("b/file")
            && let Ok(handle) = c.open(file.node, libc::O_RDONLY)
        {
            assert_eq!(c.read(file.node, handle, 0, 16, 0).unwrap(), b"content");
            c.call(RELEASE, file.node, &fields![handle, 0u32, 0u32, 0u64], 0)
                .unwrap();
            seen += 1;
        }
        let names = c.list(ROOT, 4096).unwrap();
        assert!(names.iter().any(|(name, _)| name == "ro"));
        round.fetch_add(1, Ordering::Relaxed);
    }
    stop.store(true, Ordering::Relaxed);
    assert!(changer.join().unwrap() > 0);
}

#[test]
fn xattr_when_turned_off_is_not_there() {
    let mut c = Client::configured(|config| config.xattr = false);
    fs::write(c.share().join("file"), "").unwrap();
    let file = c.lookup(ROOT, "file").unwrap();
    let set = [fields![1u32, 0u32], name("user.x"), b"1".to_vec()].concat();
    assert_eq!(c.call(SETXATTR, file.node, &set, 0), Err(libc::ENOSYS));
    let get = [fields![0u32, 0u32], name("user.x")].concat();
    assert_eq!(c.call(GETXATTR, file.node, &get, 8), Err(libc::ENOSYS));
    assert_eq!(
        c.call(LISTXATTR, file.node, &fields![0u32, 0u32], 8),
        Err(libc::ENOSYS)
    );
    assert_eq!(
        c.call(REMOVEXATTR, file.node, &name("user.x"), 0),
        Err(libc::ENOSYS)
    );
}

#[test]
fn writeback_when_agreed_makes_written_files_readable_and_appends_the_guests() {
    const WRITEBACK_CACHE: u32 = 1 << 16;
    let mut c = Client::configured(|config| config.writeback = true);
    assert_ne!(u32_at(&c.init().unwrap(), 12) & WRITEBACK_CACHE, 0);
    let (file, handle) = c
        .create(ROOT, "file", libc::O_WRONLY | libc::O_APPEND, 0o600)
        .unwrap();
    c.write(file.node, handle, 0, b"0123456789", 0).unwrap();
    c.write(file.node, handle, 2, b"xx", 0).unwrap();
    assert_eq!(c.read(file.node, handle, 0, 16, 0).unwrap(), b"01xx456789");
    let handle = c.open(file.node, libc::O_WRONLY).unwrap();
    assert_eq!(c.read(file.node, handle, 0, 4, 0).unwrap(), b"01xx");
    let mut plain = Client::new();
    assert_eq!(u32_at(&plain.init().unwrap(), 12) & WRITEBACK_CACHE, 0);
}

#[test]
fn rate_limiter_when_dry_delays_and_loses_nothing() {
    use crate::config::TokenBucketConfig;
    let mut c = Client::configured(|config| {
        config.rate_limiter.ops = Some(TokenBucketConfig {
            size: 10,
            one_time_burst: 0,
            refill_time_ms: 100,
        });
    });
    let start = Instant::now();
    let message = c.message(GETATTR, ROOT, &fields![0u32, 0u32, 0u64]);
    c.guest.write(REQUEST, &message);
    let mut asked = 0u32;
    // On a busy machine requests may be served no faster than tokens come.
    while counter(&c, "throttled") == 0 {
        assert!(start.elapsed() < PATIENCE, "never throttled in {asked} requests");
        for _ in 0..40 {
            let chain = [Buf::Read(REQUEST, message.len() as u32), Buf::Write(ANSWER, 120)];
            c.rings[REQUESTS].submit(&chain);
        }
        c.rings[REQUESTS].kick();
        for _ in 0..40 {
            assert_eq!(c.rings[REQUESTS].wait_used().len, 120);
        }
        asked += 40;
    }
    // All of them less the 10 at hand, 10 ms each; in the worst case the bucket was full again at the start.
    let least = std::time::Duration::from_millis(10) * (asked - 11);
    assert!(start.elapsed() >= least, "{:?}", start.elapsed());
}

#[test]
fn configuration_when_it_makes_no_sense_is_refused() {
    let check = |change: &dyn Fn(&mut FsConfig)| {
        let mut config = FsConfig::new("fs", "tag", FsRoot::Shares(BTreeMap::new()));
        change(&mut config);
        crate::config::DeviceConfig::Fs(config).validate()
    };
    check(&|_| {}).unwrap();
    for size in [0, 8, 100, 2048] {
        check(&|config| config.queue_size = size).unwrap_err();
    }
    check(&|config| config.queue_size = 16).unwrap();
    check(&|config| (config.writeback, config.cache) = (true, FsCache::Never)).unwrap_err();
    let named = |name: &str| FsRoot::Shares(BTreeMap::from([(name.to_owned(), SharedDir::writable("/"))]));
    check(&|config| config.root = named("..")).unwrap_err();
    check(&|config| config.root = named("a")).unwrap();
}
