//! Files that are known but not open, reached again by name.

#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;

use super::client::*;
use super::confinement::{mount, with_private_mounts};

/// More directories than descriptors are kept, so that none of those known before is at hand.
fn use_up_descriptors(c: &mut Client) {
    fs::create_dir(c.share().join("others")).unwrap();
    let others = c.lookup(ROOT, "others").unwrap();
    for index in 0..2000 {
        let text = format!("{index}");
        fs::create_dir(c.share().join("others").join(&text)).unwrap();
        let other = c.lookup(others.node, &text).unwrap();
        assert_eq!(c.lookup(other.node, "x").unwrap_err(), libc::ENOENT);
    }
}

#[test]
fn file_when_directories_above_it_were_renamed_by_the_guest_is_reached() {
    let mut c = Client::new();
    let a = c.mkdir(ROOT, "a", 0o755).unwrap();
    let b = c.mkdir(a.node, "b", 0o755).unwrap();
    let (file, handle) = c.create(b.node, "file", libc::O_RDWR, 0o600).unwrap();
    c.write(file.node, handle, 0, b"content", 0).unwrap();
    c.release(file.node, handle).unwrap();
    c.rename(ROOT, "a", ROOT, "z", 0).unwrap();
    c.rename(b.node, "file", a.node, "moved", 0).unwrap();
    c.rename(a.node, "b", ROOT, "b", 0).unwrap();
    use_up_descriptors(&mut c);
    for node in [a.node, b.node, file.node] {
        assert!(c.getattr(node).is_ok());
    }
    let handle = c.open(file.node, libc::O_RDONLY).unwrap();
    assert_eq!(c.read(file.node, handle, 0, 16, 0).unwrap(), b"content");
    assert_eq!(c.lookup(a.node, "moved").unwrap().node, file.node);
    assert_eq!(c.lookup(ROOT, "b").unwrap().node, b.node);
}

#[test]
fn exchange_swaps_the_names_of_two_known_files() {
    const RENAME_EXCHANGE: u32 = 2;
    let mut c = Client::new();
    let dir = c.mkdir(ROOT, "dir", 0o755).unwrap();
    let (file, handle) = c.create(dir.node, "inner", libc::O_RDWR, 0o600).unwrap();
    c.release(file.node, handle).unwrap();
    let (other, handle) = c.create(ROOT, "other", libc::O_RDWR, 0o600).unwrap();
    c.release(other.node, handle).unwrap();
    c.rename(ROOT, "dir", ROOT, "other", RENAME_EXCHANGE).unwrap();
    use_up_descriptors(&mut c);
    assert_eq!(c.lookup(ROOT, "other").unwrap().node, dir.node);
    assert_eq!(c.lookup(ROOT, "dir").unwrap().node, other.node);
    assert_eq!(c.getattr(other.node).unwrap().ino, other.ino);
    assert_eq!(c.getattr(file.node).unwrap().ino, file.ino);
    assert_eq!(
        c.rename(ROOT, "dir", ROOT, "absent", RENAME_EXCHANGE),
        Err(libc::ENOENT)
    );
}

#[test]
fn whiteout_is_left_behind_by_a_rename_and_made_by_mknod() {
    const RENAME_WHITEOUT: u32 = 4;
    let mut c = Client::new();
    let (file, handle) = c.create(ROOT, "file", libc::O_RDWR, 0o600).unwrap();
    c.release(file.node, handle).unwrap();
    c.rename(ROOT, "file", ROOT, "moved", RENAME_WHITEOUT).unwrap();
    assert_eq!(c.lookup(ROOT, "moved").unwrap().node, file.node);
    let body = [fields![libc::S_IFCHR, 0u32, 0u32, 0u32], name("made")].concat();
    c.call(MKNOD, ROOT, &body, 128).unwrap();
    for text in ["file", "made"] {
        let whiteout = c.lookup(ROOT, text).unwrap();
        assert_eq!(whiteout.mode & libc::S_IFMT, libc::S_IFCHR, "{text}");
        assert_eq!(fs::symlink_metadata(c.share().join(text)).unwrap().rdev(), 0);
    }
}

#[test]
fn file_when_renamed_by_the_host_is_stale_until_it_is_looked_up_again() {
    let mut c = Client::new();
    fs::create_dir(c.share().join("dir")).unwrap();
    fs::write(c.share().join("dir/file"), "content").unwrap();
    let dir = c.lookup(ROOT, "dir").unwrap();
    let file = c.lookup(dir.node, "file").unwrap();
    fs::rename(c.share().join("dir/file"), c.share().join("moved")).unwrap();
    assert_eq!(c.getattr(file.node).unwrap_err(), libc::ESTALE);
    assert_eq!(c.open(file.node, libc::O_RDONLY).unwrap_err(), libc::ESTALE);
    // Another file with the name is not taken for it.
    fs::write(c.share().join("dir/file"), "another").unwrap();
    assert_eq!(c.getattr(file.node).unwrap_err(), libc::ESTALE);
    assert_eq!(c.open(file.node, libc::O_RDONLY).unwrap_err(), libc::ESTALE);
    assert_ne!(c.lookup(dir.node, "file").unwrap().node, file.node);
    assert_eq!(c.lookup(ROOT, "moved").unwrap().node, file.node);
    let handle = c.open(file.node, libc::O_RDONLY).unwrap();
    assert_eq!(c.read(file.node, handle, 0, 16, 0).unwrap(), b"content");
}

#[test]
fn hard_link_when_the_name_it_was_found_by_is_deleted_is_found_by_the_other() {
    let mut c = Client::new();
    let (file, handle) = c.create(ROOT, "one", libc::O_RDWR, 0o600).unwrap();
    c.release(file.node, handle).unwrap();
    c.call(LINK, ROOT, &[fields![file.node], name("two")].concat(), 128)
        .unwrap();
    c.call(UNLINK, ROOT, &name("two"), 0).unwrap();
    let again = c.lookup(ROOT, "one").unwrap();
    assert_eq!((again.node, again.nlink), (file.node, 1));
    assert!(c.open(file.node, libc::O_RDONLY).is_ok());
}

#[test]
fn number_when_it_comes_back_as_another_file_is_another_node() {
    let mut c = Client::new();
    let mut same = 0;
    for round in 0..200 {
        let (one, handle) = c.create(ROOT, "file", libc::O_RDWR, 0o600).unwrap();
        c.release(one.node, handle).unwrap();
        // The guest has not forgotten the file yet. On ext4 the next one has its number, and perhaps its time of birth.
        c.call(UNLINK, ROOT, &name("file"), 0).unwrap();
        let (two, handle) = c.create(ROOT, "file", libc::O_RDWR, 0o600).unwrap();
        c.release(two.node, handle).unwrap();
        assert_ne!(one.node, two.node, "round {round}");
        same += u32::from(one.ino == two.ino);
        // What is forgotten late takes nothing away from the new one.
        c.forget(one.node, 1);
        assert_eq!(c.lookup(ROOT, "file").unwrap().node, two.node);
        c.call(UNLINK, ROOT, &name("file"), 0).unwrap();
    }
    println!("{same} of 200 numbers came back");
}

#[test]
fn deleted_directory_the_guest_still_knows_is_not_its_successor() {
    let mut c = Client::new();
    for _ in 0..50 {
        let one = c.mkdir(ROOT, "dir", 0o755).unwrap();
        c.call(RMDIR, ROOT, &name("dir"), 0).unwrap();
        let two = c.mkdir(ROOT, "dir", 0o755).unwrap();
        assert_ne!(one.node, two.node);
        assert!(c.mkdir(one.node, "inside", 0o755).is_err());
        assert!(c.mkdir(two.node, "inside", 0o755).is_ok());
        fs::remove_dir_all(c.share().join("dir")).unwrap();
    }
}

#[test]
fn ring_of_names_when_the_host_moves_directories_about_ends() {
    let mut c = Client::new();
    let a = c.mkdir(ROOT, "a", 0o755).unwrap();
    let b = c.mkdir(a.node, "b", 0o755).unwrap();
    fs::rename(c.share().join("a/b"), c.share().join("b")).unwrap();
    fs::rename(c.share().join("a"), c.share().join("b/a")).unwrap();
    // `b` is at hand, so `a` is found in it, while `b` was found in `a`.
    assert_eq!(c.lookup(ROOT, "b").unwrap().node, b.node);
    assert_eq!(c.lookup(b.node, "a").unwrap().node, a.node);
    fs::rename(c.share().join("b/a"), c.share().join("a")).unwrap();
    fs::rename(c.share().join("b"), c.share().join("a/b")).unwrap();
    use_up_descriptors(&mut c);
    for node in [a.node, b.node] {
        let answer = c.call(READLINK, node, &[], 64);
        assert!(matches!(answer, Err(libc::ESTALE | libc::EINVAL)), "{answer:?}");
    }
    assert_eq!(c.walk("a/b").unwrap().node, b.node);
    assert!(c.mkdir(b.node, "inside", 0o755).is_ok());
}

#[test]
fn file_of_an_overlay_when_it_is_copied_up_stays_the_same() {
    with_private_mounts(libc::MS_PRIVATE, || {
        let mut c = Client::new();
        for text in ["lower", "upper", "work"] {
            fs::create_dir(c.outside().join(text)).unwrap();
        }
        fs::create_dir(c.outside().join("lower/dir")).unwrap();
        fs::write(c.outside().join("lower/dir/file"), "lower").unwrap();
        let merged = c.share().join("merged");
        fs::create_dir(&merged).unwrap();
        let path = |text: &str| c.outside().join(text).display().to_string();
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            path("lower"),
            path("upper"),
            path("work")
        );
        let options = CString::new(options).unwrap();
        let target = CString::new(merged.as_os_str().as_bytes()).unwrap();
        let kind = c"overlay".as_ptr();
        // SAFETY: all strings live until the end of the call.
        let mounted = unsafe { libc::mount(kind, target.as_ptr(), kind, 0, options.as_ptr().cast()) };
        assert_eq!(mounted, 0, "{}", std::io::Error::last_os_error());
        let dir = c.walk("merged/dir").unwrap();
        let file = c.lookup(dir.node, "file").unwrap();
        let reader = c.open(file.node, libc::O_RDONLY).unwrap();
        assert_eq!(c.read(file.node, reader, 0, 16, 0).unwrap(), b"lower");
        let writer = c.open(file.node, libc::O_RDWR).unwrap();
        c.write(file.node, writer, 0, b"upper", 0).unwrap();
        assert_eq!(c.lookup(dir.node, "file").unwrap().node, file.node);
        c.release(file.node, reader).unwrap();
        c.release(file.node, writer).unwrap();
        use_up_descriptors(&mut c);
        assert_eq!(c.lookup(dir.node, "file").unwrap().node, file.node);
        let reader = c.open(file.node, libc::O_RDONLY).unwrap();
        assert_eq!(c.read(file.node, reader, 0, 16, 0).unwrap(), b"upper");
    });
}

#[test]
fn mounts_of_the_host_are_announced_and_their_files_have_numbers_of_their_own() {
    with_private_mounts(libc::MS_PRIVATE, || {
        let mut c = Client::new();
        for text in ["one", "two"] {
            let path = c.share().join(text);
            fs::create_dir(&path).unwrap();
            mount("tmpfs", &path, "tmpfs", 0);
            fs::write(path.join("file"), text).unwrap();
        }
        // A file as a mount, as Kubernetes has /etc/hosts: the guest knows no such mounts.
        fs::write(c.share().join("hosts"), "").unwrap();
        mount(
            c.share().join("one/file").to_str().unwrap(),
            &c.share().join("hosts"),
            "",
            libc::MS_BIND,
        );
        fs::create_dir(c.share().join("plain")).unwrap();
        for text in ["one", "two"] {
            assert!(c.lookup(ROOT, text).unwrap().submount);
        }
        assert!(!c.lookup(ROOT, "plain").unwrap().submount);
        assert!(!c.walk("one/file").unwrap().submount);
        let hosts = c.lookup(ROOT, "hosts").unwrap();
        assert!(!hosts.submount);
        let inside = c.walk("one/file").unwrap();
        assert_ne!(hosts.ino, inside.ino, "a number of the mount around it");
        assert!(hosts.ino >= 1 << 63);
        assert_eq!(c.getattr(hosts.node).unwrap().ino, hosts.ino);
        let listed = u64_at(&c.call(OPENDIR, ROOT, &fields![0u32, 0u32], 16).unwrap(), 0);
        let body = fields![listed, 0u64, 4096u32, 0u32, 0u64, 0u32, 0u32];
        let entries = entries_plus(&c.call(READDIRPLUS, ROOT, &body, 4096).unwrap());
        for entry in entries {
            let expected = matches!(entry.name.as_str(), "one" | "two");
            assert_eq!(entry.attr_flags & 1 != 0, expected, "{entry:?}");
        }
        c.restore().unwrap();
        assert!(c.lookup(ROOT, "one").unwrap().submount);
        assert_eq!(c.getattr(hosts.node).unwrap().ino, hosts.ino);
        assert_eq!(c.lookup(ROOT, "hosts").unwrap().node, hosts.node);
    });
}
