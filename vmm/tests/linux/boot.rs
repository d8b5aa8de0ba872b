//! Booting, ending, pausing, and the devices a pod has at boot.

use std::time::Duration;

use dragonball::config::{
    BlockConfig, ConsoleConfig, DeviceConfig, FsConfig, FsRoot, MemoryConfig, RngConfig, SharedDir,
    VcpuConfig, VsockConfig,
};
use dragonball::vm::{ExitReason, HotplugError};

use crate::guest::Scratch;
use crate::kernels;
use crate::{CMDLINE, LONG, config, kernel, run, start, wait_for};

#[test]
fn boot_when_given_processors_and_memory_has_them() {
    let scratch = Scratch::new();
    for (vcpus, size_mib) in [(1, 128), (2, 256), (4, 3072), (8, 5120)] {
        let mut config = config(&scratch, "echo \"cpus $(nproc)\"; grep MemTotal /proc/meminfo");
        config.vcpus = VcpuConfig {
            boot: vcpus,
            max: vcpus,
        };
        config.memory = MemoryConfig::fixed(size_mib);
        let (reason, console) = run(config);
        assert_eq!(reason, ExitReason::PowerOff, "{console}");
        assert!(console.contains(&format!("cpus {vcpus}")), "{console}");
        let total = console
            .split_whitespace()
            .skip_while(|word| *word != "MemTotal:")
            .nth(1);
        let total: u64 = total
            .and_then(|kib| kib.parse().ok())
            .unwrap_or_else(|| panic!("{console}"));
        // The kernel keeps some for itself.
        assert!(
            total / 1024 <= size_mib && total / 1024 > size_mib * 3 / 5,
            "{total} of {size_mib}"
        );
    }
}

#[test]
fn end_when_the_guest_chooses_it_has_the_reason() {
    let scratch = Scratch::new();
    for (script, cmdline, expected) in [
        ("reboot -f", "", ExitReason::Reboot),
        ("reboot -f", " reboot=t", ExitReason::TripleFault),
        ("echo c > /proc/sysrq-trigger", "", ExitReason::Panic),
        ("exec /bin/false", "", ExitReason::Panic),
    ] {
        let mut config = config(&scratch, script);
        config.boot.cmdline += cmdline;
        let (reason, console) = run(config);
        assert_eq!(reason, expected, "{script}:\n{console}");
    }
}

#[test]
fn devices_when_present_at_boot_work() {
    let scratch = Scratch::new();
    let share = scratch.path().join("share");
    std::fs::create_dir(&share).unwrap();
    std::fs::write(share.join("hello"), "from the host\n").unwrap();
    let disk = |name: &str, read_only| {
        let path = scratch.write(name, &[name.as_bytes(), &[b'\n'; 4096]].concat());
        DeviceConfig::Block(BlockConfig {
            read_only,
            ..BlockConfig::new(name, path)
        })
    };
    let mut config = config(
        &scratch,
        "head -n1 /dev/vda; head -n1 /dev/vdb; echo new > /dev/vda; sync; echo x > /dev/vdb || echo refused\n\
         ls -d /sys/class/vsock /dev/vsock; head -c 64 /dev/hwrng | wc -c\n\
         mount -t virtiofs tag /mnt && cat /mnt/hello && echo from the guest > /mnt/reply && umount /mnt",
    );
    config.vsock = Some(VsockConfig {
        guest_cid: 3,
        uds_path: None,
    });
    config.devices = vec![
        disk("first-disk", false),
        disk("second-disk", true),
        DeviceConfig::Rng(RngConfig { id: "rng".to_owned() }),
        DeviceConfig::Fs(FsConfig::new(
            "share",
            "tag",
            FsRoot::Directory(SharedDir::writable(&share)),
        )),
    ];
    let (reason, console) = run(config);
    assert_eq!(reason, ExitReason::PowerOff, "{console}");
    for expected in [
        "first-disk",
        "second-disk",
        "refused",
        "/dev/vsock",
        "64",
        "from the host",
    ] {
        assert!(console.contains(expected), "{expected}:\n{console}");
    }
    assert_eq!(
        std::fs::read_to_string(share.join("reply")).unwrap(),
        "from the guest\n"
    );
    assert!(
        std::fs::read(scratch.path().join("first-disk"))
            .unwrap()
            .starts_with(b"new\n")
    );
}

#[test]
fn block_device_when_added_removed_and_added_again_is_seen() {
    let scratch = Scratch::new();
    let mut config = config(
        &scratch,
        "ls /sys/bus/virtio/devices | wc -l; echo waiting\n\
         while [ ! -e /dev/vda ]; do sleep 0.1; done; head -n1 /dev/vda\n\
         cd /sys/bus/platform/drivers/virtio-mmio; D=$(readlink -f /sys/block/vda/device | grep -o 'LNRO0005:..'); echo $D > unbind; [ -e /dev/vda ] || echo unbound $D\n\
         until head -n1 /dev/vda | grep disk-two; do echo $D > unbind; sleep 1; echo $D > bind; done 2>/dev/null",
    );
    config.hotplug_slots = 1;
    let disk = |name: &str| {
        let path = scratch.write(name, &[name.as_bytes(), &[b'\n'; 4096]].concat());
        DeviceConfig::Block(BlockConfig {
            read_only: true,
            ..BlockConfig::new(name, path)
        })
    };
    let vm = start(config);
    wait_for(&vm, "waiting");

    let first = vm.add_device(disk("disk-one")).unwrap();
    assert!(!first.needs_bind);
    wait_for(&vm, "disk-one");
    wait_for(&vm, &format!("unbound {}", first.address.name()));
    // The guest binds the old disk again and again until it finds the new one.
    let removed = loop {
        match vm.remove_device("disk-one") {
            Err(HotplugError::InUse(_)) => std::thread::sleep(Duration::from_millis(10)),
            other => break other.unwrap(),
        }
    };
    assert_eq!(removed.address.name(), first.address.name());
    assert!(matches!(
        vm.remove_device("disk-one"),
        Err(HotplugError::NotFound(_))
    ));
    let second = vm.add_device(disk("disk-two")).unwrap();
    assert!(second.needs_bind);
    wait_for(&vm, "disk-two");
    assert_eq!(vm.wait_timeout(LONG), Some(ExitReason::PowerOff));
}

#[test]
fn pause_when_resumed_goes_on_without_complaint() {
    let scratch = Scratch::new();
    let mut config = config(
        &scratch,
        "echo waiting; i=0; while [ $i -lt 100 ]; do i=$((i+1)); echo tick $i; sleep 0.1; done; dmesg | grep -ci lockup",
    );
    config.vcpus = VcpuConfig { boot: 2, max: 2 };
    let vm = start(config);
    wait_for(&vm, "tick 3");
    vm.pause().unwrap();
    let before = vm.console().tail(1);
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(vm.console().tail(1), before);
    vm.resume().unwrap();
    assert_eq!(vm.wait_timeout(LONG), Some(ExitReason::PowerOff));
    assert_eq!(vm.console().tail(1), ["0"]);
}

#[test]
fn kernel_when_it_has_only_a_pvh_entry_boots() {
    let scratch = Scratch::new();
    let mut image = std::fs::read(kernel()).unwrap();
    // Without an ELF entry point the note is what is left.
    image[24..32].fill(0);
    let mut config = config(&scratch, "echo \"booted with $(cat /proc/cmdline)\"");
    config.boot.kernel = scratch.write("vmlinux", &image);
    let (reason, console) = run(config);
    assert_eq!(reason, ExitReason::PowerOff, "{console}");
    assert!(console.contains(&format!("booted with {CMDLINE}")), "{console}");
}

#[test]
fn stock_kernels_when_compressed_boot_and_are_cached() {
    let scratch = Scratch::new();
    let stock = kernels::stock();
    for kernel in &stock {
        let config = kernel.config(&scratch, "echo \"release $(uname -r)\"", ConsoleConfig::Serial);
        for _ in 0..2 {
            let (reason, console) = run(config.clone());
            assert_eq!(reason, ExitReason::PowerOff, "{}:\n{console}", kernel.name);
            assert!(console.contains("release"), "{}:\n{console}", kernel.name);
        }
    }
    let cached = std::fs::read_dir(scratch.path().join("cache/vmlinux")).map_or(0, Iterator::count);
    assert_eq!(cached, stock.len());
}
