//! Processors and many devices that come and go.

use std::time::Duration;

use dragonball::config::{DeviceConfig, RngConfig, VcpuConfig};
use dragonball::vm::{ExitReason, HotplugError, ResizeVcpuError};

use crate::guest::Scratch;
use crate::{LONG, config, start, wait_for};

/// Puts every processor online as soon as it is there, as an agent would, with a load on each; `round` in the console
/// follows what `nproc` says.
const ONLINE: &str = "for i in 1 2 3 4; do (while true; do :; done) & done\n\
    echo waiting; last=0\n\
    while [ ! -e /tmp/end ]; do\n\
      for c in /sys/devices/system/cpu/cpu*/online; do [ \"$(cat $c 2>/dev/null)\" = 0 ] && echo 1 > $c; done 2>/dev/null\n\
      now=$(grep -c ^processor /proc/cpuinfo); [ $now = $last ] || echo \"online $now;\"; last=$now\n\
    done";

#[test]
fn vcpus_when_resized_under_load_follow() {
    let scratch = Scratch::new();
    let mut config = config(&scratch, ONLINE);
    config.vcpus = VcpuConfig { boot: 1, max: 8 };
    let vm = start(config);
    wait_for(&vm, "waiting");
    // Ten times what the lab needs for all seven.
    let patience = Duration::from_secs(120);
    let rounds = std::env::var("DRAGONBALL_ROUNDS").map_or(2, |n| n.parse().unwrap());
    let mut old = 1;
    for round in 0..rounds {
        for count in [8, 2, 5, 1] {
            assert_eq!(
                vm.resize_vcpu(count, patience).unwrap(),
                (old, count),
                "round {round}"
            );
            assert_eq!(vm.thread_ids().vcpus.len(), usize::from(count));
            let end = std::time::Instant::now() + LONG;
            while vm.console().tail(1) != [format!("online {count};")] {
                assert!(std::time::Instant::now() < end, "{:?}", vm.console().tail(20));
                std::thread::sleep(Duration::from_millis(20));
            }
            old = count;
        }
    }
    assert!(matches!(
        vm.resize_vcpu(9, patience),
        Err(ResizeVcpuError::Vcpus { requested: 9, max: 8 })
    ));
    assert!(matches!(
        vm.resize_vcpu(0, patience),
        Err(ResizeVcpuError::Vcpus { .. })
    ));
    vm.stop().unwrap();
    assert!(matches!(
        vm.resize_vcpu(1, patience),
        Err(ResizeVcpuError::State(_))
    ));
}

#[test]
fn vcpus_when_the_guest_is_silent_stay_and_can_be_resized_later() {
    let scratch = Scratch::new();
    // The guest cannot answer within a millisecond, and answers the next time.
    let mut config = config(&scratch, ONLINE);
    config.vcpus = VcpuConfig { boot: 1, max: 4 };
    let vm = start(config);
    wait_for(&vm, "waiting");
    let error = vm.resize_vcpu(4, Duration::from_micros(1)).unwrap_err();
    assert!(
        matches!(
            error,
            ResizeVcpuError::Guest {
                requested: 4,
                reached: 1,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(vm.thread_ids().vcpus.len(), 1);
    std::thread::sleep(Duration::from_secs(2));
    let patience = Duration::from_secs(120);
    assert_eq!(vm.resize_vcpu(3, patience).unwrap(), (1, 3));
    wait_for(&vm, "online 3;");
    vm.stop().unwrap();
}

#[test]
fn devices_when_sixty_four_are_added_all_work() {
    let scratch = Scratch::new();
    let mut config = config(
        &scratch,
        "echo waiting; while [ $(ls /sys/bus/virtio/devices | wc -l) -lt 65 ]; do sleep 0.1; done\n\
         for r in $(ls /sys/bus/virtio/drivers/virtio_rng | grep virtio); do echo found $r; done | wc -l\n\
         head -c 32 /dev/hwrng | wc -c",
    );
    config.hotplug_slots = 64;
    let vm = start(config);
    wait_for(&vm, "waiting");
    let device = |index: usize| {
        DeviceConfig::Rng(RngConfig {
            id: format!("rng{index}"),
        })
    };
    let mut names = std::collections::HashSet::new();
    for index in 0..64 {
        assert!(names.insert(vm.add_device(device(index)).unwrap().address.name().to_owned()));
    }
    assert!(matches!(
        vm.add_device(device(64)),
        Err(HotplugError::NoFreeSlot { slots: 65, .. })
    ));
    assert_eq!(
        vm.wait_timeout(LONG),
        Some(ExitReason::PowerOff),
        "{:?}",
        vm.console().tail(20)
    );
    assert_eq!(vm.console().tail(2), ["64", "32"]);
}

#[test]
fn device_when_added_while_the_kernel_boots_is_found() {
    let scratch = Scratch::new();
    // Before, while and after the kernel looks for devices.
    for delay in [0, 50, 200, 400, 800] {
        let mut config = config(
            &scratch,
            "until [ -e /dev/hwrng ] && head -c 8 /dev/hwrng | wc -c | grep 8; do sleep 0.1; done",
        );
        config.hotplug_slots = 1;
        let vm = start(config);
        std::thread::sleep(Duration::from_millis(delay));
        let rng = RngConfig { id: "rng".to_owned() };
        vm.add_device(DeviceConfig::Rng(rng)).unwrap();
        assert_eq!(
            vm.wait_timeout(LONG),
            Some(ExitReason::PowerOff),
            "{delay} ms: {:?}",
            vm.console().tail(20)
        );
    }
}
