//! What a machine that cannot be built says.

// All of it is a test; clippy.toml knows functions with an attribute for that only.
#![allow(clippy::expect_used, clippy::unwrap_used)]

mod guest;

use std::path::PathBuf;

use dragonball::Vm;
use dragonball::config::{
    BalloonConfig, BlockConfig, CpuTemplate, DeviceConfig, NetConfig, PmemConfig, RngConfig, VcpuConfig,
    VmConfig,
};
use guest::{Code, Scratch, config, elf};

fn error(change: impl FnOnce(&Scratch, &mut VmConfig)) -> String {
    let scratch = Scratch::new();
    let mut config = config(&scratch, &Code::default().halt());
    change(&scratch, &mut config);
    let error = Vm::new(config).expect_err("it cannot be built").to_string();
    error.replace(&scratch.path().display().to_string(), "TMP")
}

#[test]
fn new_when_the_kernel_is_missing_names_it() {
    let message = error(|_, c| c.boot.kernel = PathBuf::from("/nonexistent/vmlinux"));
    assert_eq!(
        message,
        "kernel /nonexistent/vmlinux: No such file or directory (os error 2)"
    );
}

#[test]
fn new_when_the_kernel_is_text_says_what_was_found() {
    let message = error(|s, c| c.boot.kernel = s.write("k", b"#!/bin/sh\necho"));
    assert_eq!(
        message,
        "kernel TMP/k: not an x86-64 kernel: 14 bytes starting with \"#!/bin/s\""
    );
}

#[test]
fn new_when_the_kernel_is_empty_or_a_folder_says_so() {
    assert_eq!(
        error(|s, c| c.boot.kernel = s.write("k", b"")),
        "kernel TMP/k: the file is empty"
    );
    assert_eq!(
        error(|_, c| c.boot.kernel = "/tmp".into()),
        "kernel /tmp: not a regular file"
    );
}

#[test]
fn new_when_the_kernel_is_truncated_says_how_much_is_there() {
    let whole = elf(&[0xf4; 64]);
    for (length, what) in [
        (40, "ELF header ends at byte 64"),
        (100, "program headers ends at byte 120"),
        (0x1010, "a segment ends at byte 4160"),
    ] {
        let message = error(|s, c| c.boot.kernel = s.write("k", &whole[..length]));
        assert_eq!(
            message,
            format!("kernel TMP/k: truncated: {what}, the file has {length}")
        );
    }
}

#[test]
fn new_when_the_kernel_is_for_another_machine_says_so() {
    let mut other = elf(&[0xf4]);
    other[18] = 183;
    let message = error(|s, c| c.boot.kernel = s.write("k", &other));
    assert!(
        message.contains("ELF file for another machine (class 2, data 1, machine 183)"),
        "{message}"
    );
}

#[test]
fn new_when_the_bzimage_is_truncated_says_so() {
    let mut image = vec![0; 0x400];
    image[0x1f1] = 1;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    image[0x24c..0x250].copy_from_slice(&0x10_0000u32.to_le_bytes());
    let message = error(|s, c| c.boot.kernel = s.write("k", &image));
    assert_eq!(
        message,
        "kernel TMP/k: truncated: the compressed kernel ends at byte 1049600, the file has 1024"
    );
}

#[test]
fn new_when_the_initramfs_is_missing_or_too_large_says_so() {
    let message = error(|_, c| c.boot.initramfs = Some("/nonexistent/initrd".into()));
    assert_eq!(
        message,
        "initramfs /nonexistent/initrd: No such file or directory (os error 2)"
    );
    let message = error(|s, c| {
        let path = s.write("big", b"");
        std::fs::File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(70 << 20)
            .unwrap();
        c.boot.initramfs = Some(path);
    });
    assert_eq!(
        message,
        "memory: 64 MiB is too small: the kernel ends at 2 MiB and the initramfs has 70 MiB"
    );
}

#[test]
fn new_when_the_command_line_is_too_long_says_so() {
    let message = error(|_, c| c.boot.cmdline = "x".repeat(0x1_0000));
    assert_eq!(
        message,
        "kernel command line: 65536 bytes, at most 65535 are possible"
    );
}

#[test]
fn new_when_a_number_is_out_of_range_names_it() {
    assert!(error(|_, c| c.memory.size_mib = 8).contains("8 MiB is below the minimum"));
    assert!(error(|_, c| c.memory.size_mib = u64::MAX).contains("above the maximum of 1048576 MiB"));
    assert!(error(|_, c| c.vcpus = VcpuConfig { boot: 0, max: 1 }).contains("0 at boot"));
    assert!(error(|_, c| c.vcpus = VcpuConfig { boot: 1, max: 255 }).contains("255 at most"));
    assert_eq!(
        error(|_, c| c.hotplug_slots = 97),
        "devices: 97 virtio-mmio slots requested (devices and hotplug slots), at most 96 exist"
    );
}

#[test]
fn new_when_a_disk_is_missing_names_device_and_file() {
    let disk = BlockConfig {
        read_only: true,
        ..BlockConfig::new("root", "/nonexistent/disk")
    };
    let message = error(|_, c| c.devices.push(DeviceConfig::Block(disk)));
    assert!(
        message.starts_with("device root: ") && message.contains("/nonexistent/disk"),
        "{message}"
    );
}

#[test]
fn new_when_two_devices_share_an_id_names_it() {
    let rng = || {
        DeviceConfig::Rng(RngConfig {
            id: "same".to_owned(),
        })
    };
    assert_eq!(
        error(|_, c| c.devices = vec![rng(), rng()]),
        "configuration: device id \"same\" is used twice"
    );
}

#[test]
fn new_when_a_tap_cannot_be_had_names_device_and_namespace() {
    let mut net = NetConfig::new("net0", "tap0");
    net.tap.netns = Some("/nonexistent/netns".into());
    let message = error(|_, c| c.devices.push(DeviceConfig::Net(net)));
    assert!(
        message.starts_with("device net0: ") && message.contains("/nonexistent/netns"),
        "{message}"
    );
    let message = error(|_, c| c.devices.push(DeviceConfig::Net(NetConfig::new("net0", "a/b"))));
    assert_eq!(
        message,
        "configuration: device \"net0\": tap.name is \"a/b\": need an interface name (1 to 15 characters, no / : %)"
    );
}

#[test]
fn new_when_a_memory_window_makes_no_sense_names_it() {
    assert_eq!(
        error(|_, c| c.memory.max_mib = 63),
        "configuration: memory: max_mib is 63, need 64 (size_mib) to 1048576"
    );
    assert!(error(|_, c| c.memory.max_mib = u64::MAX).contains("to 1048576"));
    assert_eq!(
        error(|_, c| c.memory.pmem_window_mib = u64::MAX),
        "configuration: memory: pmem_window_mib is 18446744073709551615, at most 1048576 are possible"
    );
    let balloon = |id: &str| {
        DeviceConfig::Balloon(BalloonConfig {
            id: id.to_owned(),
            deflate_on_oom: true,
            reporting: true,
            statistics_interval_s: 0,
        })
    };
    assert_eq!(
        error(|_, c| c.devices = vec![balloon("one"), balloon("two")]),
        "configuration: device \"two\" is a second balloon; a machine has one"
    );
    assert_eq!(
        error(|_, c| {
            c.memory.max_mib = 1024;
            c.devices = vec![balloon("mem")];
        }),
        "configuration: device id \"mem\" is used twice"
    );
}

#[test]
fn new_when_a_pmem_file_cannot_be_used_names_device_and_file() {
    let pmem = |path: &str| {
        DeviceConfig::Pmem(PmemConfig {
            id: "layer".to_owned(),
            path: path.into(),
            read_only: true,
        })
    };
    let message = error(|_, c| c.devices = vec![pmem("/nonexistent/layer")]);
    assert!(
        message.starts_with("device layer: ") && message.contains("/nonexistent/layer"),
        "{message}"
    );
    let message = error(|_, c| c.devices = vec![pmem("/dev/zero")]);
    assert!(
        message.contains("neither a regular file nor a block device"),
        "{message}"
    );
}

#[test]
fn new_when_nested_virtualization_meets_a_template_is_refused() {
    assert_eq!(
        error(|_, c| (c.cpu.nested, c.cpu.template) = (true, CpuTemplate::V3)),
        "configuration: cpu: nested is true with template x86-64-v3: need template none"
    );
}
