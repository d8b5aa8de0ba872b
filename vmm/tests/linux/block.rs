//! Disks of real guests: both engines, several queues, direct I/O, discard, limits, resize.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use dragonball::config::{
    BlockConfig, BlockEngine, DeviceConfig, RateLimiterConfig, TokenBucketConfig, VcpuConfig,
};
use dragonball::vm::{DeviceError, ExitReason};

use crate::guest::Scratch;
use crate::{LONG, config, run, start, wait_for};

const ENGINES: [BlockEngine; 2] = [BlockEngine::IoUring, BlockEngine::Sync];

/// An image of `mib` MiB whose bytes repeat nowhere within a page.
fn image(scratch: &Scratch, name: &str, mib: usize) -> PathBuf {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    let bytes: Vec<u8> = words.take((mib << 20) / 8).flatten().collect();
    scratch.write(name, &bytes)
}

fn sum(path: &Path) -> String {
    let output = std::process::Command::new("/bin/busybox")
        .arg("md5sum")
        .arg(path)
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()[..32].to_owned()
}

fn word_after<'a>(console: &'a str, key: &str) -> &'a str {
    let mut words = console.split_whitespace().skip_while(|word| *word != key);
    words.nth(1).unwrap_or_else(|| panic!("no {key}:\n{console}"))
}

#[test]
fn disk_when_read_and_written_has_the_same_bytes_on_both_sides() {
    let scratch = Scratch::new();
    for (engine, direct) in [
        (BlockEngine::IoUring, false),
        (BlockEngine::Sync, false),
        (BlockEngine::IoUring, true),
        (BlockEngine::Sync, true),
    ] {
        let source = image(&scratch, "source", 32);
        let target = scratch.write("target", &vec![0; 32 << 20]);
        let mut config = config(
            &scratch,
            "md5sum /dev/vda | sed 's/^/source: /'\n\
             dd if=/dev/vda of=/dev/vdb bs=64k 2>/dev/null; sync; echo 3 > /proc/sys/vm/drop_caches\n\
             md5sum /dev/vdb | sed 's/^/target: /'\n\
             echo x 2>/dev/null > /dev/vda || echo refused; echo serial: $(cat /sys/block/vda/serial) $(cat /sys/block/vdb/serial)\n\
             echo cache: $(cat /sys/block/vdb/queue/write_cache)",
        );
        config.devices = vec![
            DeviceConfig::Block(BlockConfig {
                read_only: true,
                engine,
                direct,
                serial: Some("S/N 1".to_owned()),
                ..BlockConfig::new("source", &source)
            }),
            DeviceConfig::Block(BlockConfig {
                engine,
                direct,
                ..BlockConfig::new("target", &target)
            }),
        ];
        let (reason, console) = run(config);
        assert_eq!(reason, ExitReason::PowerOff, "{console}");
        let expected = sum(&source);
        assert_eq!(word_after(&console, "source:"), expected, "{console}");
        assert_eq!(word_after(&console, "target:"), expected, "{console}");
        assert_eq!(sum(&target), expected, "{engine:?} direct {direct}");
        for text in ["refused", "serial: S/N 1 target", "cache: write back"] {
            assert!(console.contains(text), "{text}:\n{console}");
        }
    }
}

#[test]
fn file_system_when_used_by_two_processors_on_four_queues_is_sound() {
    let scratch = Scratch::new();
    for engine in ENGINES {
        let path = scratch.write("disk", &vec![0xff; 64 << 20]);
        let mut config = config(
            &scratch,
            "mke2fs /dev/vda > /dev/null && mount -t ext4 /dev/vda /mnt && echo mounted\n\
             echo queues: $(ls /sys/block/vda/mq | wc -l)\n\
             for i in 1 2 3 4; do ( dd if=/dev/urandom of=/mnt/f$i bs=64k count=64 conv=fsync 2>/dev/null; md5sum < /mnt/f$i > /mnt/s$i ) & done; wait\n\
             sync; umount /mnt; echo 3 > /proc/sys/vm/drop_caches; mount -t ext4 /dev/vda /mnt\n\
             for i in 1 2 3 4; do [ \"$(md5sum < /mnt/f$i)\" = \"$(cat /mnt/s$i)\" ] && echo same $i; done\n\
             rm /mnt/f*; sync; fstrim /mnt && echo trimmed; umount /mnt",
        );
        config.vcpus = VcpuConfig { boot: 2, max: 2 };
        config.devices = vec![DeviceConfig::Block(BlockConfig {
            engine,
            queues: 4,
            ..BlockConfig::new("disk", &path)
        })];
        let before = std::fs::metadata(&path).unwrap().blocks();
        let (reason, console) = run(config);
        assert_eq!(reason, ExitReason::PowerOff, "{console}");
        for text in [
            "mounted",
            "queues: 2",
            "same 1",
            "same 2",
            "same 3",
            "same 4",
            "trimmed",
        ] {
            assert!(console.contains(text), "{engine:?}: {text}:\n{console}");
        }
        let after = std::fs::metadata(&path).unwrap().blocks();
        assert!(
            after * 2 < before,
            "discarded little: {before} and {after} sectors"
        );
    }
}

#[test]
fn disk_when_resized_is_seen_by_the_guest() {
    let scratch = Scratch::new();
    let path = scratch.write("disk", &vec![1; 4 << 20]);
    let grow = |len: u64| {
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_len(len).unwrap();
    };
    let mut config = config(
        &scratch,
        "echo before: $(cat /sys/block/vda/size)\n\
         while [ $(cat /sys/block/vda/size) = 8192 ]; do sleep 0.1; done; echo after: $(cat /sys/block/vda/size)\n\
         dmesg | grep 'new size'; dd if=/dev/vda bs=1M skip=4 2>/dev/null | wc -c",
    );
    config.devices = vec![DeviceConfig::Block(BlockConfig::new("disk", &path))];
    let vm = start(config);
    wait_for(&vm, "before: 8192");
    assert!(matches!(vm.resize_disk("other"), Err(DeviceError::NotFound(_))));
    assert!(matches!(vm.resize_disk("console"), Err(DeviceError::Kind { .. })));
    grow(2 << 20);
    let error = vm.resize_disk("disk").unwrap_err();
    assert!(matches!(error, DeviceError::Refused(_)), "{error}");
    grow(6 << 20);

    assert_eq!(vm.resize_disk("disk").unwrap(), 6 << 20);

    wait_for(&vm, "after: 12288");
    wait_for(&vm, "new size");
    wait_for(&vm, "2097152");
    assert_eq!(vm.wait_timeout(LONG), Some(ExitReason::PowerOff));
}

#[test]
fn disk_when_limited_is_slower_and_whole() {
    let scratch = Scratch::new();
    for engine in ENGINES {
        let path = image(&scratch, "disk", 4);
        // 1 MiB per second after the first.
        let bandwidth = TokenBucketConfig {
            size: 1 << 20,
            one_time_burst: 0,
            refill_time_ms: 1000,
        };
        let mut config = config(
            &scratch,
            "a=$(cut -d. -f1 /proc/uptime); md5sum /dev/vda | sed 's/^/sum: /'; b=$(cut -d. -f1 /proc/uptime)\n\
             [ $((b - a)) -ge 2 ] && echo slow",
        );
        config.devices = vec![DeviceConfig::Block(BlockConfig {
            engine,
            rate_limiter: Some(RateLimiterConfig {
                bandwidth: Some(bandwidth),
                ops: None,
            }),
            ..BlockConfig::new("disk", &path)
        })];
        let (reason, console) = run(config);
        assert_eq!(reason, ExitReason::PowerOff, "{console}");
        assert_eq!(word_after(&console, "sum:"), sum(&path), "{console}");
        assert!(console.contains("slow"), "{engine:?}:\n{console}");
    }
}
