//! Memory that comes and goes: virtio-mem, the balloon, free page reporting, persistent memory.

use std::path::Path;
use std::time::{Duration, Instant};

use dragonball::Vm;
use dragonball::config::{BalloonConfig, BlockConfig, DeviceConfig, MemoryConfig, PmemConfig};
use dragonball::vm::{BalloonError, BalloonStatus, ExitReason, HotplugError, ResizeMemoryError};

use crate::guest::Scratch;
use crate::{CMDLINE, LONG, config, run, start, wait_for};

pub const MIB: u64 = 1 << 20;
/// `total` is the guest's memory in MiB; `within LOW HIGH WHAT` waits for it.
const FUNCTIONS: &str = "\
    total() { while read k v u; do [ $k = MemTotal: ] && echo $((v/1024)); done < /proc/meminfo; }\n\
    within() { until [ $(total) -ge $1 ] && [ $(total) -le $2 ]; do sleep 0.2; done; echo \"total-$3 $(total)\"; }\n\
    mkdir -p /t\n\
    fill() { mount -t tmpfs -o size=$1m t /t; dd if=/dev/zero of=/t/f bs=1M count=$1 2>/dev/null; echo filled; }\n\
    free() { umount /t; echo freed; }\n";

/// Resident bytes of this process, guest memory included.
pub fn resident() -> u64 {
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = rollup.lines().find(|line| line.starts_with("Rss:")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib << 10
}

pub fn wait_until(what: &str, vm: &Vm, condition: impl Fn() -> bool) {
    let end = Instant::now() + LONG;
    while !condition() {
        let console = || vm.console().tail(1000).join("\n");
        assert!(Instant::now() < end, "{what} does not happen:\n{}", console());
        assert_eq!(vm.wait_timeout(Duration::from_millis(20)), None, "{}", console());
    }
}

#[test]
fn memory_when_resized_in_both_directions_follows_and_is_freed() {
    let scratch = Scratch::new();
    let script = "echo waiting; within 1850 2048 grown; fill 900; free\n\
         within 650 768 shrunk; within 880 1024 regrown; fill 300; free; dmesg | grep -i virtio_mem";
    let mut config = config(&scratch, &format!("{FUNCTIONS}{script}"));
    config.memory = MemoryConfig {
        max_mib: 2048,
        ..MemoryConfig::fixed(512)
    };
    config.boot.cmdline = format!("{CMDLINE} memhp_default_state=online_movable");
    let vm = start(config);
    wait_for(&vm, "waiting");
    assert_eq!(vm.max_memory_size(), 2048 * MIB);

    let grown = vm.resize_memory(2048 * MIB, LONG).unwrap();
    assert_eq!(grown, (512 * MIB, 2048 * MIB));
    wait_for(&vm, "freed");
    let full = resident();

    let shrunk = vm.resize_memory(768 * MIB, LONG).unwrap();
    assert_eq!(shrunk, (2048 * MIB, 768 * MIB));
    let freed = full.saturating_sub(resident());
    assert!(freed > 500 * MIB, "only {freed} of {full} bytes freed");
    wait_for(&vm, "total-shrunk");

    assert_eq!(
        vm.resize_memory(2049 * MIB, LONG),
        Err(ResizeMemoryError::AboveMaximum {
            requested: 2049 * MIB,
            maximum: 2048 * MIB
        })
    );
    assert!(matches!(
        vm.resize_memory(511 * MIB, LONG),
        Err(ResizeMemoryError::BelowMinimum { .. })
    ));
    // 1022 MiB and a byte are rounded up.
    let regrown = vm.resize_memory(1022 * MIB + 1, LONG).unwrap();
    assert_eq!(regrown, (768 * MIB, 1024 * MIB));
    assert_eq!(vm.memory_size(), 1024 * MIB);
    wait_for(&vm, "total-regrown");
    assert_eq!(vm.wait_timeout(LONG), Some(ExitReason::PowerOff));
    assert!(matches!(
        vm.resize_memory(512 * MIB, LONG),
        Err(ResizeMemoryError::State(_))
    ));
}

fn balloon(reporting: bool, statistics_interval_s: u16) -> DeviceConfig {
    DeviceConfig::Balloon(BalloonConfig {
        id: "balloon".to_owned(),
        deflate_on_oom: false,
        reporting,
        statistics_interval_s,
    })
}

#[test]
fn balloon_when_inflated_and_deflated_gives_memory_to_the_host_and_back() {
    let scratch = Scratch::new();
    let script = "fill 400; free; within 100 300 small; within 900 1024 large; fill 400; echo end";
    let mut config = config(&scratch, &format!("{FUNCTIONS}{script}"));
    config.memory = MemoryConfig::fixed(1024);
    config.devices = vec![balloon(false, 1)];
    let vm = start(config);
    wait_for(&vm, "freed");
    let full = resident();
    vm.set_balloon(768 * MIB).unwrap();
    let status = |bytes| BalloonStatus {
        target: bytes,
        actual: bytes,
    };
    wait_until("inflation", &vm, || vm.balloon().unwrap() == status(768 * MIB));
    let freed = full.saturating_sub(resident());
    assert!(freed > 150 * MIB, "only {freed} of {full} bytes freed");
    wait_for(&vm, "total-small");
    wait_until("statistics", &vm, || {
        vm.balloon_statistics()
            .is_ok_and(|s| s.values.get("total_memory").is_some_and(|t| *t < 300 * MIB))
    });
    assert!(matches!(
        vm.set_balloon(1025 * MIB),
        Err(BalloonError::TooLarge { .. })
    ));
    vm.set_balloon(0).unwrap();
    wait_for(&vm, "end");
    assert_eq!(vm.wait_timeout(LONG), Some(ExitReason::PowerOff));
}

#[test]
fn memory_when_freed_in_the_guest_is_reported_and_freed() {
    let scratch = Scratch::new();
    let script = "fill 200; while [ ! -e /dev/vda ]; do sleep 0.1; done; free; sleep 1000";
    let mut config = config(&scratch, &format!("{FUNCTIONS}{script}"));
    config.memory = MemoryConfig::fixed(512);
    config.devices = vec![balloon(true, 0)];
    config.hotplug_slots = 1;
    let vm = start(config);
    wait_for(&vm, "filled");
    let full = resident();
    // What tells the guest to go on.
    vm.add_device(DeviceConfig::Block(BlockConfig::new(
        "signal",
        scratch.write("signal", &[0; 4096]),
    )))
    .unwrap();
    wait_for(&vm, "freed");
    wait_until("reporting", &vm, || full.saturating_sub(resident()) > 180 * MIB);
    let metrics = vm.metrics();
    let device = metrics.devices.iter().find(|d| d.id == "balloon").unwrap();
    assert!(device.counters["reported_bytes"] > 180 * MIB);
    assert!(matches!(
        vm.add_device(balloon(false, 0)),
        Err(HotplugError::Config(_) | HotplugError::Exists(_))
    ));
}

fn pmem(id: &str, path: &Path, read_only: bool) -> DeviceConfig {
    DeviceConfig::Pmem(PmemConfig {
        id: id.to_owned(),
        path: path.to_owned(),
        read_only,
    })
}

/// Sums a field of all mappings of `path` in this process, in bytes.
fn mapped(path: &Path, field: &str) -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let path = path.to_str().unwrap();
    let mut ours = false;
    let mut sum = 0;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if !first.ends_with(':') {
            ours = line.ends_with(path);
        } else if ours && first == field {
            sum += words.next().unwrap().parse::<u64>().unwrap() << 10;
        }
    }
    sum
}

#[test]
fn pmem_when_mounted_with_dax_is_the_file_shared_by_machines() {
    let scratch = Scratch::new();
    let image = scratch.path().join("image");
    let file = std::fs::File::create(&image).unwrap();
    // Not a multiple of 2 MiB.
    file.set_len(33 * MIB + 4096).unwrap();
    drop(file);
    let mut maker = config(
        &scratch,
        "until [ -e /dev/pmem0 ]; do sleep 0.1; done\n\
         mke2fs -b 4096 /dev/pmem0 8000 >/dev/null && mount -t ext4 -o dax /dev/pmem0 /mnt && echo mounted\n\
         dd if=/bin/busybox of=/mnt/file bs=1M 2>/dev/null; echo hello > /mnt/hello; umount /mnt; sync",
    );
    maker.devices = vec![pmem("root", &image, false)];
    let (reason, console) = run(maker);
    assert_eq!(reason, ExitReason::PowerOff, "{console}");
    assert!(console.contains("mounted"), "{console}");
    let content = std::fs::read(&image).unwrap();
    assert!(content.windows(6).any(|w| w == b"hello\n"), "nothing was written");

    // A device from boot in one machine, a hotplugged one in the other.
    let script = "while [ ! -e /dev/pmem0 ]; do sleep 0.1; done\n\
         mount -t ext4 -o dax,ro /dev/pmem0 /mnt && cat /mnt/hello && cmp /mnt/file /bin/busybox && echo same\n\
         grep -o 'dax[=a-z]*' /proc/mounts; until [ -e /dev/vda ]; do sleep 0.1; done\n\
         umount /mnt; dd if=/dev/zero of=/dev/pmem0 bs=1M count=4 conv=fsync 2>/dev/null && echo overwritten\n\
         cd /sys/bus/platform/drivers/virtio-mmio; for d in LNRO*; do grep -q 0x001b $d/virtio*/device && echo $d > unbind; done; echo unbound; sleep 1000";
    let mut first = config(&scratch, script);
    first.hotplug_slots = 1;
    first.devices = vec![pmem("root", &image, true)];
    let mut second = config(&scratch, script);
    second.id = "second".to_owned();
    second.hotplug_slots = 2;
    second.memory.pmem_window_mib = 128;
    let (first, second) = (start(first), start(second));
    second.add_device(pmem("late", &image, true)).unwrap();
    assert!(matches!(
        second.add_device(pmem("none-left", &image, true)),
        Err(HotplugError::Device { .. })
    ));
    for vm in [&first, &second] {
        wait_for(vm, "same");
        wait_for(vm, "dax");
    }
    // Each page is there once, whoever reads it.
    assert!(mapped(&image, "Rss:") > 2 * MIB);
    assert_eq!(mapped(&image, "Anonymous:"), 0);

    let signal = scratch.write("signal", &[0; 4096]);
    for vm in [&first, &second] {
        vm.add_device(DeviceConfig::Block(BlockConfig {
            read_only: true,
            ..BlockConfig::new("signal", signal.clone())
        }))
        .unwrap();
        wait_for(vm, "overwritten");
        wait_for(vm, "unbound");
    }
    assert!(mapped(&image, "Anonymous:") >= 8 * MIB);
    assert!(std::fs::read(&image).unwrap() == content, "the file was changed");
    wait_until("removal", &second, || {
        !matches!(second.remove_device("late"), Err(HotplugError::InUse(_)))
    });
    assert!(matches!(
        second.remove_device("late"),
        Err(HotplugError::NotFound(_))
    ));
    assert!(mapped(&image, "Anonymous:") < 8 * MIB);
}
