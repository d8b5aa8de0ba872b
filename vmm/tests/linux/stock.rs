//! What a machine can do with any kernel: ours, and unmodified Debian kernels with their drivers as modules.

use std::time::{Duration, Instant};

use dragonball::config::{
    BalloonConfig, BlockConfig, ConsoleConfig, DeviceConfig, FsConfig, FsRoot, MemoryConfig, NetConfig,
    PmemConfig, RngConfig, SharedDir, VcpuConfig,
};
use dragonball::vm::{ExitReason, HotplugError};

use crate::guest::Scratch;
use crate::kernels::{self, Kernel};
use crate::memory::{MIB, resident, wait_until};
use crate::net::{in_namespace, set_up_tap};
use crate::shell::Shell;
use crate::{CMDLINE, LONG};

/// Ten times what seven processors need in the lab.
const PATIENCE: Duration = Duration::from_secs(120);

fn rng(id: &str) -> DeviceConfig {
    DeviceConfig::Rng(RngConfig { id: id.to_owned() })
}

fn disk(scratch: &Scratch, name: &str) -> DeviceConfig {
    let path = scratch.write(name, &[name.as_bytes(), &[b'\n'; 4096]].concat());
    DeviceConfig::Block(BlockConfig {
        read_only: true,
        ..BlockConfig::new(name, path)
    })
}

#[test]
fn devices_when_added_removed_and_added_again_are_found_by_each_kernel() {
    for kernel in kernels::all() {
        let begin = Instant::now();
        in_namespace(|| devices_come_and_go(&kernel));
        println!("{}: {:?}", kernel.name, begin.elapsed());
    }
}

fn devices_come_and_go(kernel: &Kernel) {
    let scratch = Scratch::new();
    let mut config = Shell::config(kernel, &scratch, ConsoleConfig::Serial);
    config.memory = MemoryConfig {
        pmem_window_mib: 128,
        ..MemoryConfig::fixed(512)
    };
    config.devices = vec![
        rng("rng"),
        DeviceConfig::Balloon(BalloonConfig {
            id: "balloon".to_owned(),
            deflate_on_oom: false,
            reporting: true,
            statistics_interval_s: 0,
        }),
    ];
    config.hotplug_slots = 4;
    let guest = Shell::start(config);
    let vm = &guest.vm;
    assert_eq!(guest.run("head -c 32 /dev/hwrng | wc -c"), "32");

    // All at once: each interrupt may stand for several.
    let share = scratch.path().join("share");
    std::fs::create_dir(&share).unwrap();
    std::fs::write(share.join("hello"), "from the host\n").unwrap();
    let pmem = scratch.write("pmem", &[b"persistent\n".as_slice(), &[0; 2 << 20]].concat());
    let mut added = Vec::new();
    for device in [
        disk(&scratch, "disk-one"),
        DeviceConfig::Net(NetConfig::new("nic", "tap0")),
        DeviceConfig::Fs(FsConfig::new(
            "share",
            "tag",
            FsRoot::Directory(SharedDir::writable(&share)),
        )),
        DeviceConfig::Pmem(PmemConfig {
            id: "pmem".to_owned(),
            path: pmem,
            read_only: true,
        }),
    ] {
        let info = vm.add_device(device).unwrap();
        assert!(!info.needs_bind);
        added.push(info);
    }
    set_up_tap("tap0", 1500);
    // In Linux 6.1 a disk has its node a moment before it can be opened.
    assert_eq!(guest.run("soon 'head -n1 /dev/vda'"), "disk-one");
    guest.run("soon '[ -e /sys/class/net/eth0 ]'; ip address add 10.0.0.2/24 dev eth0; ip link set eth0 up");
    guest.run("soon 'ping -c 1 -W 1 10.0.0.1 > /dev/null'");
    assert_eq!(
        guest.run("soon 'mount -t virtiofs tag /mnt'; cat /mnt/hello; umount /mnt"),
        "from the host"
    );
    assert_eq!(guest.run("soon 'head -n1 /dev/pmem0'"), "persistent");
    assert!(matches!(
        vm.add_device(rng("none-left")),
        Err(HotplugError::NoFreeSlot { .. })
    ));

    for info in &added {
        let busy = vm.remove_device(&info.id).unwrap_err();
        assert!(matches!(busy, HotplugError::InUse(_)), "{busy}");
        guest.run(&format!(
            "echo {} > /sys/bus/platform/drivers/virtio-mmio/unbind",
            info.address.name()
        ));
        assert_eq!(
            vm.remove_device(&info.id).unwrap().address.name().to_owned(),
            info.address.name()
        );
        let gone = vm.remove_device(&info.id).unwrap_err();
        assert!(matches!(gone, HotplugError::NotFound(_)), "{gone}");
    }
    guest.run("[ ! -e /dev/vda ] && [ ! -e /dev/pmem0 ] && [ ! -e /sys/class/net/eth0 ]");

    // Only used slots are left: a disk goes where there was one, an rng where there was a network interface.
    for device in [disk(&scratch, "disk-two"), rng("rng-two")] {
        let info = vm.add_device(device).unwrap();
        assert!(info.needs_bind);
        // ENODEV until the scan that the addition started has seen the device again (drivers/acpi/bus.c,
        // __acpi_match_device).
        guest.run(&format!(
            "soon 'echo {} > /sys/bus/platform/drivers/virtio-mmio/bind'",
            info.address.name()
        ));
    }
    assert_eq!(guest.run("soon 'head -n1 /dev/vda'"), "disk-two");
    assert_eq!(
        guest.run("ls /sys/bus/virtio/drivers/virtio_rng | grep -c virtio"),
        "2"
    );

    memory_is_reported(&guest);
    generation_has_a_driver(&guest);
    power_button_is_an_event(&guest);
}

fn memory_is_reported(guest: &Shell) {
    guest.run(
        "mkdir /t; mount -t tmpfs -o size=150m t /t; dd if=/dev/zero of=/t/f bs=1M count=100 2>/dev/null",
    );
    let full = resident();
    guest.run("umount /t");
    wait_until("reporting", &guest.vm, || {
        full.saturating_sub(resident()) > 80 * MIB
    });
}

/// Linux has the driver since 5.18, on ACPI since it exists; Debian's 6.1 cloud kernel leaves it out.
fn generation_has_a_driver(guest: &Shell) {
    if guest.run("uname -r").starts_with("6.1.") {
        return;
    }
    let bound = guest.run("ls -d /sys/bus/*/drivers/vmgenid/*:*");
    assert!(bound.contains("DBAL0001:00"), "{bound}");
}

/// Ends the machine by its power button if the kernel has its driver (ours has no input devices), as an init would.
fn power_button_is_an_event(guest: &Shell) {
    let name = guest.run("cat /sys/class/input/event0/device/name || echo none");
    assert_eq!(
        name.contains("Power Button"),
        guest.run("uname -r").contains("cloud")
    );
    if name.contains("Power Button") {
        // Open before the press: an event goes to who listens.
        guest.run("exec 5< /dev/input/event0");
        guest.vm.press_power_button().unwrap();
        // struct input_event behind its time: EV_KEY, KEY_POWER (116), pressed.
        let event = guest.run("dd bs=24 count=1 <&5 2>/dev/null | hexdump -C");
        assert!(event.contains("01 00 74 00 01 00 00 00"), "{event}");
    }
    guest.vm.console_input(b"poweroff -f\n");
    assert_eq!(guest.vm.wait_timeout(LONG), Some(ExitReason::PowerOff));
}

/// Puts the processors there are online, waits until there are `count` and prints how many work.
fn online(count: u8) -> String {
    format!(
        "soon 'for c in /sys/devices/system/cpu/cpu*/online; do [ $(cat $c) = 0 ] && echo 1 > $c; done; \
         [ $(grep -c ^processor /proc/cpuinfo) = {count} ]'; nproc"
    )
}

#[test]
fn processors_and_memory_when_resized_are_followed_by_each_kernel() {
    for kernel in kernels::all() {
        let begin = Instant::now();
        let scratch = Scratch::new();
        // The other console: on Debian's 6.1 it comes with a module.
        let mut config = Shell::config(&kernel, &scratch, ConsoleConfig::Hvc);
        config.vcpus = VcpuConfig { boot: 1, max: 4 };
        config.memory = MemoryConfig {
            max_mib: 1536,
            ..MemoryConfig::fixed(512)
        };
        let guest = Shell::start(config);
        processors_follow(&guest);
        memory_follows(&guest);
        guest.vm.stop().unwrap();
        println!("{}: {:?}", kernel.name, begin.elapsed());
    }
}

fn processors_follow(guest: &Shell) {
    guest.run("for i in 1 2 3 4; do while :; do :; done & done");
    let mut old = 1;
    for count in [4, 2, 3] {
        assert_eq!(guest.vm.resize_vcpu(count, PATIENCE).unwrap(), (old, count));
        assert_eq!(guest.run(&online(count)), count.to_string());
        old = count;
    }
    guest.run("kill $(jobs -p)");
}

fn memory_follows(guest: &Shell) {
    let total = || -> u64 {
        let line = guest.run("grep MemTotal /proc/meminfo");
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    };
    guest.run("echo online_movable > /sys/devices/system/memory/auto_online_blocks");
    let before = total();
    assert_eq!(
        guest.vm.resize_memory(1536 * MIB, LONG).unwrap(),
        (512 * MIB, 1536 * MIB)
    );
    // The kernel may still be putting the last block online.
    wait_until("growth", &guest.vm, || total() == before + 1024 * MIB);
    assert_eq!(
        guest.vm.resize_memory(640 * MIB, LONG).unwrap(),
        (1536 * MIB, 640 * MIB)
    );
    wait_until("shrinking", &guest.vm, || total() == before + 128 * MIB);
}

#[test]
fn devices_when_sixty_four_are_added_are_found_by_a_stock_kernel() {
    for kernel in kernels::stock().into_iter().take(1) {
        let scratch = Scratch::new();
        let mut config = Shell::config(&kernel, &scratch, ConsoleConfig::Serial);
        config.hotplug_slots = 64;
        let guest = Shell::start(config);
        for index in 0..64 {
            guest.vm.add_device(rng(&format!("rng{index}"))).unwrap();
        }
        guest.run("soon '[ $(ls /sys/bus/virtio/drivers/virtio_rng | grep -c virtio) = 64 ]'");
        assert_eq!(guest.run("head -c 32 /dev/hwrng | wc -c"), "32");
        guest.vm.stop().unwrap();
    }
}

/// Linux says yes to processors it has no room for (drivers/acpi/acpi_processor.c, `acpi_processor_add`) and gives them back
/// like any other.
#[test]
fn vcpus_when_the_kernel_has_no_room_for_them_can_be_taken_back() {
    let scratch = Scratch::new();
    let mut config = Shell::config(&Kernel::ours(), &scratch, ConsoleConfig::Hvc);
    config.vcpus = VcpuConfig { boot: 1, max: 4 };
    config.boot.cmdline = format!("{CMDLINE} nr_cpus=2");
    let guest = Shell::start(config);

    assert_eq!(guest.vm.resize_vcpu(4, PATIENCE).unwrap(), (1, 4));

    assert_eq!(guest.run(&online(2)), "2");
    assert_eq!(guest.vm.resize_vcpu(1, PATIENCE).unwrap(), (4, 1));
    assert_eq!(guest.vm.thread_ids().vcpus.len(), 1);
    assert_eq!(guest.vm.resize_vcpu(2, PATIENCE).unwrap(), (1, 2));
    assert_eq!(guest.run(&online(2)), "2");
    guest.vm.stop().unwrap();
}
