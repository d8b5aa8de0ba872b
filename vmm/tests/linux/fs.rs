//! Shares: directories that come and go, write-back, and many small files.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use dragonball::config::{DeviceConfig, FsCache, FsConfig, FsRoot, SharedDir};
use dragonball::devices::virtio::fs::{FsMountError, Unmount};
use dragonball::vm::{DeviceError, ExitReason};

use crate::guest::Scratch;
use crate::{LONG, config, run, start, wait_for};

fn folder(scratch: &Scratch, name: &str) -> std::path::PathBuf {
    let path = scratch.path().join(name);
    std::fs::create_dir(&path).unwrap();
    path
}

#[test]
fn shares_when_mounted_and_unmounted_while_running_come_and_go() {
    let scratch = Scratch::new();
    let (boot, late) = (folder(&scratch, "boot"), folder(&scratch, "late"));
    std::fs::write(boot.join("hello"), "from boot\n").unwrap();
    std::fs::write(late.join("hello"), "from late\n").unwrap();
    for cache in [FsCache::Auto, FsCache::Always] {
        let mut config = config(
            &scratch,
            "mount -t virtiofs tag /mnt && ls /mnt && cat /mnt/boot/hello\n\
             touch /mnt/boot/x || echo boot is read-only; mkdir /mnt/new || echo root is read-only\n\
             echo waiting; until [ -e /mnt/late/hello ]; do sleep 0.1; done; cat /mnt/late/hello\n\
             exec 5< /mnt/late/hello; echo opened; until [ -e /mnt/late/go ]; do sleep 0.1; done; exec 5<&-; echo closed\n\
             while [ -e /mnt/late ]; do sleep 0.1; done; echo gone; ls /mnt\n\
             until cat /mnt/late/again 2>/dev/null; do sleep 0.1; done; umount /mnt && echo unmounted",
        );
        config.devices = vec![DeviceConfig::Fs(FsConfig {
            cache,
            threads: 2,
            ..FsConfig::new(
                "share",
                "tag",
                FsRoot::Shares(BTreeMap::from([("boot".to_owned(), SharedDir::read_only(&boot))])),
            )
        })];
        let vm = start(config);
        wait_for(&vm, "waiting");
        vm.fs_mount("share", "late", &SharedDir::writable(&late)).unwrap();
        wait_for(&vm, "opened");
        match vm.fs_unmount("share", "late", Unmount::IfUnused) {
            Err(DeviceError::Refused(error)) => {
                let error = error.downcast_ref::<FsMountError>().unwrap();
                assert!(matches!(error, FsMountError::Busy { open: 1.., .. }), "{error}");
            }
            other => panic!("{other:?}"),
        }
        std::fs::write(late.join("go"), "").unwrap();
        wait_for(&vm, "closed");
        // The guest's kernel closes in its own time.
        let end = std::time::Instant::now() + LONG;
        while let Err(error) = vm.fs_unmount("share", "late", Unmount::IfUnused) {
            assert!(std::time::Instant::now() < end, "{error}");
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        wait_for(&vm, "gone");
        std::fs::write(late.join("again"), "second mount\n").unwrap();
        vm.fs_mount("share", "late", &SharedDir::writable(&late)).unwrap();
        wait_for(&vm, "unmounted");
        assert_eq!(vm.wait_timeout(LONG), Some(ExitReason::PowerOff));
        let console = vm.console().tail(1000).join("\n");
        for expected in [
            "from boot",
            "boot is read-only",
            "root is read-only",
            "from late",
            "second mount",
        ] {
            assert!(console.contains(expected), "{expected}:\n{console}");
        }
        std::fs::remove_file(late.join("go")).unwrap();
        std::fs::remove_file(late.join("again")).unwrap();
    }
    assert!(!boot.join("x").exists());
}

#[test]
fn tree_when_unpacked_with_and_without_writeback_is_complete_on_the_host() {
    let scratch = Scratch::new();
    for (name, cache, writeback) in [
        ("plain", FsCache::Auto, false),
        ("writeback", FsCache::Auto, true),
        ("always", FsCache::Always, true),
    ] {
        let share = folder(&scratch, name);
        let mut config = config(
            &scratch,
            "mount -t virtiofs tag /mnt && mkdir /tmp; cd /tmp && mkdir tree && cd tree\n\
             for d in 0 1 2 3 4 5 6 7 8 9; do mkdir -p d$d/sub; for f in 0 1 2 3 4 5 6 7 8 9; do\n\
             echo \"content $d $f\" > d$d/sub/f$f; chmod 640 d$d/sub/f$f; ln -s f$f d$d/sub/l$f; done; done\n\
             head -c 3000000 /dev/urandom > big; cd /tmp; tar cf t.tar tree\n\
             cd /mnt && tar xf /tmp/t.tar && cp -r tree copy && mv copy moved && rm -r moved/d0\n\
             md5sum < tree/big; cd /tmp && md5sum < tree/big\n\
             echo start > /mnt/log; for i in 1 2 3 4 5 6 7 8 9; do echo line $i >> /mnt/log; done\n\
             diff -r /tmp/tree /mnt/tree && echo same; umount /mnt || { cd /; umount /mnt; } && echo unmounted",
        );
        config.devices = vec![DeviceConfig::Fs(FsConfig {
            cache,
            writeback,
            threads: 2,
            ..FsConfig::new("share", "tag", FsRoot::Directory(SharedDir::writable(&share)))
        })];
        let (reason, console) = run(config);
        assert_eq!(reason, ExitReason::PowerOff, "{name}:\n{console}");
        assert!(
            console.contains("same") && console.contains("unmounted"),
            "{name}:\n{console}"
        );
        check_tree(&share.join("tree"), 10);
        check_tree(&share.join("moved"), 9);
        let log = std::fs::read_to_string(share.join("log")).unwrap();
        assert_eq!(log.lines().count(), 10, "{name}: {log}");
        let sums: Vec<_> = console
            .lines()
            .filter(|line| line.trim_end().ends_with("  -"))
            .collect();
        assert!(sums.len() == 2 && sums[0] == sums[1], "{name}: {sums:?}");
    }
}

fn check_tree(tree: &Path, folders: usize) {
    let found = std::fs::read_dir(tree).unwrap().flatten();
    assert_eq!(
        found.filter(|entry| entry.path().is_dir()).count(),
        folders,
        "{tree:?}"
    );
    for d in 10 - folders..10 {
        for f in 0..10 {
            let path = tree.join(format!("d{d}/sub/f{f}"));
            assert_eq!(
                std::fs::read_to_string(&path).unwrap(),
                format!("content {d} {f}\n")
            );
            assert_eq!(
                std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
                0o640
            );
            let link = std::fs::read_link(tree.join(format!("d{d}/sub/l{f}"))).unwrap();
            assert_eq!(link, Path::new(&format!("f{f}")));
        }
    }
}
