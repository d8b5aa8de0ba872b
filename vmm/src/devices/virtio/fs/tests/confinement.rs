#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::bounds::held;
use super::client::*;
use crate::config::{FsConfig, FsRoot, SharedDir};
use crate::descriptors::Budget;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::fs::mounts::{Mount, Root};
use crate::devices::virtio::fs::share::Share;

#[test]
fn names_with_a_way_out_are_refused() {
    let mut c = Client::new();
    let sub = c.mkdir(ROOT, "sub", 0o755).unwrap();
    for node in [ROOT, sub.node] {
        for bad in ["..", ".", "", "/", "../outside/secret", "a/b", "/etc/passwd"] {
            assert_eq!(c.lookup(node, bad).unwrap_err(), libc::EINVAL, "lookup {bad:?}");
            assert_eq!(
                c.create(node, bad, libc::O_RDWR, 0o600).unwrap_err(),
                libc::EINVAL,
                "create {bad:?}"
            );
            assert_eq!(
                c.mkdir(node, bad, 0o700).unwrap_err(),
                libc::EINVAL,
                "mkdir {bad:?}"
            );
            assert_eq!(
                c.symlink(node, bad, "x").unwrap_err(),
                libc::EINVAL,
                "symlink {bad:?}"
            );
            assert_eq!(
                c.call(UNLINK, node, &name(bad), 0),
                Err(libc::EINVAL),
                "unlink {bad:?}"
            );
            assert_eq!(
                c.call(RMDIR, node, &name(bad), 0),
                Err(libc::EINVAL),
                "rmdir {bad:?}"
            );
            let rename = [fields![node, 0u32, 0u32], name("sub"), name(bad)].concat();
            assert_eq!(
                c.call(RENAME2, ROOT, &rename, 0),
                Err(libc::EINVAL),
                "rename {bad:?}"
            );
            let link = [fields![sub.node], name(bad)].concat();
            assert_eq!(c.call(LINK, node, &link, 128), Err(libc::EINVAL), "link {bad:?}");
        }
    }
}

#[test]
fn links_are_never_followed() {
    let mut c = Client::new();
    let secret = c.outside().join("secret");
    symlink(&secret, c.share().join("absolute")).unwrap();
    symlink("../outside/secret", c.share().join("relative")).unwrap();
    symlink(c.outside(), c.share().join("dir")).unwrap();
    symlink("/proc/self/root", c.share().join("magic")).unwrap();
    let before = fs::metadata(&secret).unwrap();
    for link in ["absolute", "relative", "dir", "magic"] {
        let found = c.lookup(ROOT, link).unwrap();
        assert_eq!(found.mode & libc::S_IFMT, libc::S_IFLNK);
        assert!(
            c.lookup(found.node, "secret").is_err(),
            "{link} used as a directory"
        );
        assert_eq!(c.lookup(found.node, "..").unwrap_err(), libc::EINVAL);
        for flags in [
            libc::O_RDWR,
            libc::O_PATH,
            libc::O_RDWR | libc::O_TRUNC,
            libc::O_TMPFILE,
        ] {
            assert_eq!(
                c.open(found.node, flags).unwrap_err(),
                libc::ENXIO,
                "open {link} {flags:#o}"
            );
            let create = c.create(ROOT, link, flags | libc::O_CREAT, 0o600);
            assert_eq!(create.unwrap_err(), libc::ENXIO, "create {link} {flags:#o}");
        }
        assert_eq!(
            c.call(OPENDIR, found.node, &fields![0u32, 0u32], 16),
            Err(libc::ENOTDIR)
        );
        let target = c.call(READLINK, found.node, &[], 4096).unwrap();
        assert_eq!(
            target,
            fs::read_link(c.share().join(link))
                .unwrap()
                .as_os_str()
                .as_bytes()
        );
    }
    assert_eq!(fs::read(&secret).unwrap(), b"secret");
    assert_eq!(fs::metadata(&secret).unwrap().permissions(), before.permissions());
}

#[test]
fn link_race_never_reaches_outside() {
    let mut c = Client::new();
    let (name_in, name_out) = (c.share().join("x"), c.share().join("y"));
    fs::write(&name_in, "inside").unwrap();
    symlink(c.outside().join("secret"), &name_out).unwrap();
    let stop = AtomicBool::new(false);
    let names = [&name_in, &name_out].map(|path| CString::new(path.as_os_str().as_bytes()).unwrap());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let (from, to) = (names[0].as_ptr(), names[1].as_ptr());
                // SAFETY: both strings live as long as `names`.
                unsafe { libc::renameat2(libc::AT_FDCWD, from, libc::AT_FDCWD, to, libc::RENAME_EXCHANGE) };
            }
        });
        for _ in 0..1500 {
            if let Ok((file, handle)) = c.create(ROOT, "x", libc::O_RDWR | libc::O_CREAT, 0o600) {
                let data = c.read(file.node, handle, 0, 100, 0);
                assert_eq!(data.unwrap(), b"inside");
                c.call(RELEASE, file.node, &fields![handle, 0u32, 0u32, 0u64], 0)
                    .unwrap();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(fs::read(c.outside().join("secret")).unwrap(), b"secret");
}

#[test]
fn directory_when_moved_out_by_the_host_leads_nowhere_else() {
    let mut c = Client::new();
    let known = c.mkdir(ROOT, "known", 0o755).unwrap();
    let used = c.mkdir(ROOT, "used", 0o755).unwrap();
    assert_eq!(c.lookup(used.node, "file").unwrap_err(), libc::ENOENT);
    for text in ["known", "used"] {
        fs::rename(c.share().join(text), c.outside().join(text)).unwrap();
    }
    // It was not in use, so only its name led to it.
    assert_eq!(c.lookup(known.node, "..").unwrap_err(), libc::ESTALE);
    assert_eq!(c.list(known.node, 4096).unwrap_err(), libc::ESTALE);
    assert_eq!(c.lookup(used.node, "..").unwrap_err(), libc::EINVAL);
    let listed = c.list(used.node, 4096).unwrap();
    assert!(listed.iter().all(|(_, node)| *node == 0), "{listed:?}");
    // What takes its place is another directory.
    fs::create_dir(c.share().join("known")).unwrap();
    assert_eq!(c.list(known.node, 4096).unwrap_err(), libc::ESTALE);
    assert_ne!(c.lookup(ROOT, "known").unwrap().node, known.node);
}

#[test]
fn special_files_are_not_opened_on_the_host() {
    let mut c = Client::new();
    for (text, mode, device) in [("null", libc::S_IFCHR, 0x103u32), ("fifo", libc::S_IFIFO, 0)] {
        let body = [fields![mode | 0o666, device, 0u32, 0u32], name(text)].concat();
        let node = entry(&c.call(MKNOD, ROOT, &body, 128).unwrap()).node;
        for flags in [libc::O_RDONLY, libc::O_RDWR, libc::O_PATH] {
            assert_eq!(c.open(node, flags).unwrap_err(), libc::ENXIO, "{text}");
        }
        assert_eq!(
            c.create(ROOT, text, libc::O_RDWR | libc::O_CREAT, 0o600)
                .unwrap_err(),
            libc::ENXIO
        );
    }
}

#[test]
fn handles_survive_hostile_flags() {
    let mut c = Client::new();
    fs::write(c.share().join("file"), "contents").unwrap();
    let file = c.lookup(ROOT, "file").unwrap();
    for open in [
        libc::O_RDONLY,
        libc::O_PATH,
        libc::O_TMPFILE,
        libc::O_DIRECT,
        libc::O_NOFOLLOW,
        !3,
    ] {
        let handle = match c.open(file.node, open) {
            Ok(handle) => handle,
            Err(error) => panic!("open with {open:#o}: errno {error}"),
        };
        for read in [
            0,
            libc::O_DIRECT,
            libc::O_ASYNC,
            libc::O_APPEND,
            libc::O_NOATIME,
            -1,
        ] {
            for _ in 0..3 {
                let data = c.read(file.node, handle, 0, 100, read);
                // O_TRUNC of the last round empties the file.
                assert!(
                    matches!(data.as_deref(), Ok(b"contents" | b"")),
                    "{open:#o} {read:#o}: {data:?}"
                );
            }
        }
    }
}

#[test]
fn handles_belong_to_their_inode() {
    let mut c = Client::new();
    let (one, handle) = c.create(ROOT, "one", libc::O_RDWR, 0o600).unwrap();
    let (two, _) = c.create(ROOT, "two", libc::O_RDWR, 0o600).unwrap();
    assert_eq!(c.read(two.node, handle, 0, 10, 0), Err(libc::EBADF));
    assert_eq!(c.write(two.node, handle, 0, b"x", 0), Err(libc::EBADF));
    let release = fields![handle, 0u32, 0u32, 0u64];
    assert_eq!(c.call(RELEASE, two.node, &release, 0), Err(libc::EBADF));
    assert!(c.read(one.node, handle, 0, 10, 0).is_ok());
    for stale in [0, 2, 999_999, u64::MAX] {
        assert_eq!(c.read(one.node, stale, 0, 10, 0).unwrap_err(), libc::EBADF);
        if stale != one.node {
            assert_eq!(c.getattr(stale).unwrap_err(), libc::ENOENT);
        }
    }
}

#[test]
fn descriptors_have_a_limit() {
    let dir = vmm_sys_util::tempdir::TempDir::new_with_prefix("/tmp/dragonball-fs").unwrap();
    let open = |path: &Path| fs::File::open(path).unwrap().into();
    let mount = Mount::new(0, String::new(), "shared".into(), false, open(dir.as_path()));
    let share = Share::new(
        Root::Directory(Arc::new(mount)),
        open(Path::new("/proc/self/fd")),
        Default::default(),
        Budget::new(4),
    )
    .unwrap();
    use fuse_backend_rs::api::filesystem::{Context, FileSystem};
    let ctx = Context::default();
    let mut nodes = Vec::new();
    // Known files cost nothing.
    for index in 0..100 {
        fs::write(dir.as_path().join(index.to_string()), "").unwrap();
        let name = CString::new(index.to_string()).unwrap();
        nodes.push(share.lookup(&ctx, ROOT, &name).unwrap().inode);
    }
    for node in &nodes {
        share.getattr(&ctx, *node, None).unwrap();
        share.readlink(&ctx, *node).unwrap_err();
    }
    assert!(held(dir.as_path()) <= 3, "{}", held(dir.as_path()));
    let error = |result: std::io::Result<()>| result.unwrap_err().raw_os_error();
    let opened: Vec<_> = nodes
        .iter()
        .map_while(|node| {
            share
                .open(&ctx, *node, 0, 0)
                .ok()
                .map(|(handle, ..)| (*node, handle))
        })
        .collect();
    assert_eq!(
        opened.len(),
        3,
        "each file that is opened is reached by a descriptor first"
    );
    share.create(&ctx, ROOT, c"last", Default::default()).unwrap();
    let create = share.create(&ctx, ROOT, c"new", Default::default());
    assert_eq!(error(create.map(drop)), Some(libc::ENFILE));
    assert!(!dir.as_path().join("new").exists());
    let open = share.open(&ctx, nodes[50], 0, 0);
    assert_eq!(error(open.map(drop)), Some(libc::ENFILE));
    // What is closed gives its place back.
    for (node, handle) in &opened[..2] {
        share
            .release(&ctx, *node, 0, handle.unwrap(), false, false, None)
            .unwrap();
    }
    share.open(&ctx, nodes[50], 0, 0).unwrap();
}

#[test]
fn root_cannot_be_forgotten_or_destroyed() {
    let mut c = Client::new();
    let sub = c.mkdir(ROOT, "sub", 0o755).unwrap();
    c.forget(ROOT, u64::MAX);
    assert!(c.lookup(ROOT, "sub").is_ok());
    let message = c.message(DESTROY, 0, &[]);
    c.guest.write(REQUEST, &message);
    let used = c.rings[REQUESTS].round_trip(&[
        crate::devices::virtio::test_ring::Buf::Read(REQUEST, 40),
        crate::devices::virtio::test_ring::Buf::Write(ANSWER, 16),
    ]);
    assert_eq!(used.len, 16, "an answer without an error");
    assert_eq!(c.getattr(sub.node).unwrap_err(), libc::ENOENT);
    assert!(c.lookup(ROOT, "sub").is_ok());
}

#[test]
fn threads_live_in_an_empty_namespace() {
    let c = Client::with(Default::default(), 3);
    let prefix = format!("fs-{}-", c.fs.id());
    let ours = fs::read_link("/proc/thread-self/ns/mnt").unwrap();
    let mut count = 0;
    for task in fs::read_dir("/proc/self/task").unwrap() {
        let task = task.unwrap().path();
        let Ok(comm) = fs::read_to_string(task.join("comm")) else {
            continue;
        };
        if !comm.starts_with(&prefix) {
            continue;
        }
        // Threads of other tests' shares look the same and may end at any time.
        let (Ok(ns), Ok(status), Ok(root)) = (
            fs::read_link(task.join("ns/mnt")),
            fs::read_to_string(task.join("status")),
            fs::read_dir(task.join("root/")),
        ) else {
            continue;
        };
        if ns == ours {
            continue;
        }
        assert_eq!(root.count(), 0);
        assert!(status.contains("Umask:\t0000"), "{status}");
        count += 1;
    }
    assert!(count >= 3, "{count} threads in namespaces of their own");
}

pub fn mount(source: &str, target: &Path, kind: &str, flags: u64) {
    let text = |text: &str| CString::new(text).unwrap();
    let (source, kind) = (text(source), text(kind));
    let target = CString::new(target.as_os_str().as_bytes()).unwrap();
    // SAFETY: all strings live until the end of the call.
    let result = unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            flags,
            std::ptr::null(),
        )
    };
    assert_eq!(result, 0, "mount {target:?}: {}", std::io::Error::last_os_error());
}

/// Runs `test` on a thread with a mount namespace of its own, so that its mounts end with it.
pub fn with_private_mounts(propagation: u64, test: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: takes no memory.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_FS | libc::CLONE_NEWNS) }, 0);
            mount("none", Path::new("/"), "", libc::MS_REC | libc::MS_PRIVATE);
            mount("none", Path::new("/"), "", libc::MS_REC | propagation);
            test();
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

fn mounts_made_later_are_visible() {
    let mut c = Client::new();
    let target = c.share().join("volume");
    fs::create_dir(&target).unwrap();
    let empty = c.lookup(ROOT, "volume").unwrap();
    fs::write(c.outside().join("data"), "mounted").unwrap();
    mount(c.outside().to_str().unwrap(), &target, "", libc::MS_BIND);
    let volume = c.lookup(ROOT, "volume").unwrap();
    assert_ne!(volume.node, empty.node);
    let data = c.lookup(volume.node, "data").unwrap();
    let handle = c.open(data.node, libc::O_RDWR).unwrap();
    assert_eq!(c.read(data.node, handle, 0, 100, 0).unwrap(), b"mounted");
    assert!(
        c.list(volume.node, 4096)
            .unwrap()
            .iter()
            .any(|(text, _)| text == "data")
    );
    assert_eq!(c.lookup(volume.node, "..").unwrap_err(), libc::EINVAL);

    // The same directory again, read-only: another inode, and EROFS.
    let read_only = c.share().join("read-only");
    fs::create_dir(&read_only).unwrap();
    mount(c.outside().to_str().unwrap(), &read_only, "", libc::MS_BIND);
    mount(
        "none",
        &read_only,
        "",
        libc::MS_BIND | libc::MS_REMOUNT | libc::MS_RDONLY,
    );
    let protected = c.walk("read-only/data").unwrap();
    assert_eq!(protected.ino, data.ino);
    assert_ne!(protected.node, data.node);
    assert_eq!(c.open(protected.node, libc::O_RDWR).unwrap_err(), libc::EROFS);
    let directory = c.walk("read-only").unwrap();
    assert_eq!(
        c.create(directory.node, "new", libc::O_RDWR, 0o600).unwrap_err(),
        libc::EROFS
    );
    assert_eq!(c.call(UNLINK, directory.node, &name("data"), 0), Err(libc::EROFS));
    // A mount point is not the guest's to remove or to move.
    assert_eq!(c.call(RMDIR, ROOT, &name("read-only"), 0), Err(libc::EBUSY));
    let rename = |old: &str, new: &str| [fields![ROOT, 0u32, 0u32], name(old), name(new)].concat();
    assert_eq!(
        c.call(RENAME2, ROOT, &rename("volume", "elsewhere"), 0),
        Err(libc::EBUSY)
    );
    c.mkdir(ROOT, "other", 0o755).unwrap();
    assert_eq!(
        c.call(RENAME2, ROOT, &rename("other", "volume"), 0),
        Err(libc::EBUSY)
    );
    let handle = c.open(protected.node, libc::O_RDONLY).unwrap();
    assert_eq!(c.read(protected.node, handle, 0, 100, 0).unwrap(), b"mounted");

    // A single file, as Kubernetes mounts /etc/hosts.
    let file = c.share().join("file");
    fs::write(&file, "").unwrap();
    mount(
        c.outside().join("data").to_str().unwrap(),
        &file,
        "",
        libc::MS_BIND,
    );
    let file = c.lookup(ROOT, "file").unwrap();
    let handle = c.open(file.node, libc::O_RDONLY).unwrap();
    assert_eq!(c.read(file.node, handle, 0, 100, 0).unwrap(), b"mounted");

    // Unmounted: the guest sees the directory below again.
    let path = CString::new(target.as_os_str().as_bytes()).unwrap();
    // SAFETY: the string lives until the end of the call.
    assert_eq!(unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) }, 0);
    assert_eq!(c.lookup(ROOT, "volume").unwrap().node, empty.node);
}

#[test]
fn mounts_made_later_are_visible_when_the_host_shares_mounts() {
    with_private_mounts(libc::MS_SHARED, mounts_made_later_are_visible);
}

#[test]
fn mounts_made_later_are_visible_when_the_host_has_private_mounts() {
    with_private_mounts(libc::MS_PRIVATE, mounts_made_later_are_visible);
}

#[test]
fn equal_inode_numbers_of_two_mounts_are_two_files() {
    with_private_mounts(libc::MS_PRIVATE, || {
        let mut c = Client::new();
        for text in ["one", "two"] {
            let path = c.share().join(text);
            fs::create_dir(&path).unwrap();
            mount("tmpfs", &path, "tmpfs", 0);
            fs::write(path.join("file"), text).unwrap();
        }
        let (one, two) = (c.walk("one/file").unwrap(), c.walk("two/file").unwrap());
        assert_eq!(one.ino, two.ino);
        assert_ne!(one.node, two.node);
        let handle = c.open(two.node, libc::O_RDONLY).unwrap();
        assert_eq!(c.read(two.node, handle, 0, 10, 0).unwrap(), b"two");
    });
}

#[test]
fn shared_directory_when_missing_or_a_file_is_refused_with_its_name() {
    let c = Client::new();
    let file = fs::File::open(c.outside().join("secret")).unwrap();
    assert!(file.as_raw_fd() > 0);
    for path in [c.base().join("missing"), c.outside().join("secret")] {
        let root = FsRoot::Directory(SharedDir::writable(&path));
        let config = FsConfig::new("fs9", "tag", root);
        let error = crate::devices::virtio::fs::Fs::new(&config)
            .unwrap_err()
            .to_string();
        assert!(error.contains(&format!("{path:?}")), "{error}");
    }
}

/// `Name:` lines of a thread's `/proc/PID/task/TID/status`.
fn status_of(task: &Path, name: &str) -> String {
    let status = fs::read_to_string(task.join("status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap().trim().to_owned()
}

fn fs_threads(c: &Client) -> Vec<std::path::PathBuf> {
    let prefix = format!("fs-{}-", c.fs.id());
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    tasks
        .map(|task| task.unwrap().path())
        .filter(|task| fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.starts_with(&prefix)))
        .collect()
}

#[test]
fn threads_keep_no_capability_but_those_for_files() {
    let mut c = Client::configured(|config| (config.id, config.threads) = ("caps".to_owned(), 3));
    // Setting the identity back must not bring anything back.
    (c.uid, c.gid) = (1000, 1000);
    let (file, handle) = c.create(ROOT, "file", libc::O_RDWR, 0o755).unwrap();
    const KILL_PRIV: u32 = 1 << 2;
    for _ in 0..50 {
        c.write(file.node, handle, 0, b"x", KILL_PRIV).unwrap();
    }
    let threads = fs_threads(&c);
    assert_eq!(threads.len(), 3);
    let kept = format!("{:016x}", crate::confinement::Role::Fs.kept().bits());
    // CHOWN 0, DAC_OVERRIDE 1, DAC_READ_SEARCH 2, FOWNER 3, FSETID 4, SETGID 6, SETUID 7, MKNOD 27, SETFCAP 31.
    assert_eq!(kept, "00000000880000df");
    for task in threads {
        for (name, expected) in [
            ("CapEff:", &*kept),
            ("CapPrm:", &*kept),
            ("CapBnd:", &*kept),
            ("CapInh:", "0000000000000000"),
            ("CapAmb:", "0000000000000000"),
            ("NoNewPrivs:", "1"),
            ("Seccomp:", "2"),
            ("Groups:", ""),
        ] {
            assert_eq!(status_of(&task, name), expected, "{name}");
        }
    }
    assert_ne!(
        status_of(Path::new("/proc/thread-self"), "CapEff:"),
        kept,
        "the process keeps its own"
    );
}

#[test]
fn attributes_when_trusted_are_out_of_reach() {
    let mut c = Client::configured(|config| config.xattr = true);
    let (file, _) = c.create(ROOT, "file", libc::O_RDWR, 0o644).unwrap();
    let host = c.share().join("file");
    let set = |c: &mut Client, key: &str, value: &[u8]| {
        let body = [fields![value.len() as u32, 0u32], name(key), value.to_vec()].concat();
        c.call(SETXATTR, file.node, &body, 0).map(drop)
    };
    let get = |c: &mut Client, key: &str| {
        c.call(
            GETXATTR,
            file.node,
            &[fields![64u32, 0u32], name(key)].concat(),
            64,
        )
    };
    assert_eq!(set(&mut c, "trusted.overlay.opaque", b"y"), Err(libc::EPERM));
    rustix::fs::setxattr(&host, "trusted.host", b"secret", rustix::fs::XattrFlags::empty()).unwrap();
    assert_eq!(get(&mut c, "trusted.host"), Err(libc::ENODATA));
    let names = c
        .call(LISTXATTR, file.node, &fields![4096u32, 0u32], 4096)
        .unwrap();
    assert!(!String::from_utf8_lossy(&names).contains("trusted"));
    // What packages carry: cap_net_raw+ep.
    let capability = fields![0x0200_0001u32, 1u32 << 13, 0u32, 0u32, 0u32];
    set(&mut c, "security.capability", &capability).unwrap();
    assert_eq!(get(&mut c, "security.capability").unwrap(), capability);
}

#[test]
fn device_nodes_when_made_by_the_guest_are_of_no_use_on_the_host() {
    let mut c = Client::configured(|config| config.xattr = true);
    let device = |major: u32, minor: u32| minor & 0xff | major << 8 | (minor & !0xff) << 12;
    let make = |c: &mut Client, text: &str, mode: u32, device: u32| {
        let body = [fields![mode, device, 0u32, 0u32], name(text)].concat();
        c.call(MKNOD, ROOT, &body, 128).map(|answer| entry(&answer))
    };
    // FATTR_MODE, FATTR_UID, FATTR_GID.
    let set = |c: &mut Client, node: u64, valid: u32, mode: u32, id: u32| {
        let body = [
            fields![
                valid, 0u32, 0u64, 0u64, 0u64, 0u64, 0u64, 0u64, 0u32, 0u32, 0u32, mode, 0u32
            ],
            fields![id, id, 0u32],
        ];
        c.call(SETATTR, node, &body.concat(), 104).map(drop)
    };
    let on_host = |c: &Client, text: &str| {
        let meta = fs::metadata(c.share().join(text)).unwrap();
        (meta.mode() & 0o7777, meta.uid(), meta.rdev())
    };
    for (text, kind, major, minor) in [
        ("disk", libc::S_IFBLK, 8, 0),
        ("partition", libc::S_IFBLK, 259, 300),
        ("memory", libc::S_IFCHR, 1, 1),
        // A block device with the number of /dev/null.
        ("ram", libc::S_IFBLK, 1, 3),
    ] {
        let node = make(&mut c, text, kind | 0o666, device(major, minor)).unwrap();
        assert_eq!((node.mode & 0o7777, node.uid), (0o600, 0));
        assert_eq!(
            on_host(&c, text),
            (0o600, 0, libc::makedev(major, minor)),
            "{text}"
        );
        set(&mut c, node.node, 1, 0o4777, 0).unwrap();
        assert_eq!(on_host(&c, text).0, 0o4700, "{text}");
        assert_eq!(set(&mut c, node.node, 2, 0, 1000), Err(libc::EPERM));
        // A group has no access to gain.
        set(&mut c, node.node, 4, 0, 6).unwrap();
        // `user::rw-,user:1000:rw-,group::---,mask::rw-,other::---`
        let entry = |tag: u16, access: u16, id: u32| fields![tag, access, id];
        let list = [
            fields![2u32],
            entry(1, 6, u32::MAX),
            entry(2, 6, 1000),
            entry(4, 0, u32::MAX),
            entry(16, 6, u32::MAX),
            entry(32, 0, u32::MAX),
        ]
        .concat();
        let body = [
            fields![list.len() as u32, 0u32],
            name("system.posix_acl_access"),
            list,
        ];
        assert_eq!(
            c.call(SETXATTR, node.node, &body.concat(), 0),
            Err(libc::EPERM),
            "{text}"
        );
        assert!(c.open(node.node, libc::O_RDWR).is_err());
    }
    for (text, mode, number) in [
        ("null", libc::S_IFCHR | 0o666, device(1, 3)),
        ("whiteout", libc::S_IFCHR, 0),
        ("fifo", libc::S_IFIFO | 0o622, 0),
    ] {
        make(&mut c, text, mode, number).unwrap();
        assert_eq!(on_host(&c, text).0, mode & 0o777, "{text}");
    }
    (c.uid, c.gid) = (1000, 1000);
    assert_eq!(
        make(&mut c, "theirs", libc::S_IFBLK | 0o600, device(8, 0)).unwrap_err(),
        libc::EPERM
    );
    make(&mut c, "fifo2", libc::S_IFIFO | 0o600, 0).unwrap();
}
