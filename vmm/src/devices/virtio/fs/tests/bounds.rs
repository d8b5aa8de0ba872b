//! What a guest's caches cost the host: descriptors and time do not grow with what the guest knows.

use std::fs;
use std::path::Path;
use std::time::Instant;

use super::client::*;
use crate::config::SharedDir;
use crate::devices::virtio::test_ring::PATIENCE;

/// Descriptors of this process below `path`.
pub fn held(path: &Path) -> usize {
    let fds = fs::read_dir("/proc/self/fd").unwrap().flatten();
    fds.filter(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.starts_with(path)))
        .count()
}

#[test]
fn tree_when_large_holds_few_descriptors() {
    const DIRECTORIES: usize = 100;
    const FILES: usize = 200;
    let mut c = Client::new();
    let begin = Instant::now();
    let mut known = Vec::new();
    for dir in 0..DIRECTORIES {
        let dir = c.mkdir(ROOT, &format!("dir{dir}"), 0o755).unwrap();
        for file in 0..FILES {
            let (file, handle) = c
                .create(dir.node, &format!("file{file}"), libc::O_RDWR, 0o644)
                .unwrap();
            c.call(RELEASE, file.node, &fields![handle, 0u32, 0u32, 0u64], 0)
                .unwrap();
            known.push(file);
        }
    }
    let made = begin.elapsed();
    let (begin, most) = (Instant::now(), held(&c.share()));
    for file in &known {
        assert_eq!(c.getattr(file.node).unwrap().ino, file.ino);
    }
    println!(
        "made in {made:?}, looked at in {:?}, {most} descriptors",
        begin.elapsed()
    );
    assert!(most < 300, "{most} descriptors");
}

#[test]
fn listing_when_files_are_removed_meanwhile_ends() {
    const FILES: usize = 5000;
    let mut c = Client::new();
    for index in 0..FILES {
        fs::write(c.share().join(format!("file{index:04}")), "").unwrap();
    }
    let (begin, mut removed, mut rounds) = (Instant::now(), 0, 0);
    while removed < 2000 {
        let handle = u64_at(&c.call(OPENDIR, ROOT, &fields![0u32, 0u32], 16).unwrap(), 0);
        let (mut offset, mut names) = (0u64, 0);
        loop {
            let body = fields![handle, offset, 4096u32, 0u32, 0u64, 0u32, 0u32];
            let answer = c.call(READDIRPLUS, ROOT, &body, 4096).unwrap();
            let entries = entries_plus(&answer);
            let Some(last) = entries.last() else { break };
            offset = last.offset;
            names += entries.len();
            for _ in 0..4 {
                if removed < 2000 {
                    let text = format!("file{:04}", removed * 2);
                    c.call(UNLINK, ROOT, &name(&text), 0).unwrap();
                    removed += 1;
                }
            }
        }
        assert!((FILES - 2000..=FILES + 2).contains(&names), "{names}");
        c.call(RELEASEDIR, ROOT, &fields![handle, 0u32, 0u32, 0u64], 0)
            .unwrap();
        rounds += 1;
    }
    println!("{rounds} listings in {:?}", begin.elapsed());
}

#[test]
fn descriptors_when_nothing_is_asked_for_are_closed() {
    let mut c = Client::new();
    fs::create_dir(c.share().join("dir")).unwrap();
    let dir = c.lookup(ROOT, "dir").unwrap();
    let deadline = Instant::now() + PATIENCE;
    // The directory of the share itself, and the one in it; closed again already if this test was stopped for long.
    loop {
        assert_eq!(c.lookup(dir.node, "absent").unwrap_err(), libc::ENOENT);
        let open = held(&c.share());
        if open == 2 {
            break;
        }
        assert!(open == 1 && Instant::now() < deadline, "{open}");
    }
    let deadline = Instant::now() + PATIENCE;
    while held(&c.share()) > 1 {
        assert!(Instant::now() < deadline, "{}", held(&c.share()));
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert_eq!(c.lookup(dir.node, "absent").unwrap_err(), libc::ENOENT);
}

#[test]
fn positions_when_they_are_beyond_any_listing_are_refused_or_empty() {
    let mut c = Client::new();
    fs::write(c.share().join("file"), "").unwrap();
    let handle = u64_at(&c.call(OPENDIR, ROOT, &fields![0u32, 0u32], 16).unwrap(), 0);
    for offset in [1 << 63, (1 << 63) + 1, u64::MAX - 1, u64::MAX] {
        let body = fields![handle, offset, 4096u32, 0u32, 0u64, 0u32, 0u32];
        for opcode in [READDIR, READDIRPLUS] {
            assert_eq!(c.call(opcode, ROOT, &body, 4096), Err(libc::EINVAL));
        }
    }
    assert_eq!(c.list(ROOT, 4096).unwrap().len(), 3);
    let mut shares = Client::shares(Default::default(), |base| {
        [("a".to_owned(), SharedDir::writable(base.join("share")))].into()
    });
    for offset in [1 << 63, u64::MAX] {
        let body = fields![0u64, offset, 4096u32, 0u32, 0u64, 0u32, 0u32];
        assert_eq!(shares.call(READDIR, ROOT, &body, 4096), Ok(vec![]));
        assert_eq!(shares.call(READDIRPLUS, ROOT, &body, 4096), Ok(vec![]));
    }
}
