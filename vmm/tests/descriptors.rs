//! Descriptors and threads of a machine: none is inherited by executed programs, none is left behind when the host has no more.

// All of it is a test; clippy.toml knows functions with an attribute for that only.
#![allow(clippy::expect_used, clippy::unwrap_used)]
#![allow(unsafe_code)]

mod guest;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::process::Command;
use std::time::{Duration, Instant};

use dragonball::Vm;
use dragonball::config::{
    BalloonConfig, BlockConfig, DeviceConfig, FsConfig, FsRoot, NetConfig, PmemConfig, RngConfig, SharedDir,
    VmConfig, VsockConfig,
};
use dragonball::vm::ExitReason;
use dragonball::vm::snapshot::{MemoryMode, RestoreOptions, SaveKind};
use guest::{Code, LONG, Scratch, config_with, wait_for};

/// Runs the test `name` in a process of its own, where no other test opens anything; whether this is that process.
fn alone(name: &str) -> bool {
    const ALONE: &str = "DRAGONBALL_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(ALONE, "1")
        .status()
        .unwrap();
    assert!(status.success());
    false
}

fn open_descriptors() -> BTreeSet<i32> {
    let entries = fs::read_dir("/proc/self/fd").unwrap();
    let numbers = entries.map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap());
    // That of the listing itself is gone.
    let exists = |fd: &i32| fs::read_link(format!("/proc/self/fd/{fd}")).is_ok();
    numbers.filter(exists).collect()
}

/// The handshake of a driver with the device in `slot`: these of its first 32 features, and `queues` queues of 8 entries.
fn drive(code: Code, slot: u64, (features, queues): (u32, u32)) -> Code {
    let base = 0xd000_0000 + slot * 0x1000;
    let mut code = code
        .store32(base + 0x70, 0)
        .store32(base + 0x70, 1)
        .store32(base + 0x70, 3)
        .store32(base + 0x20, features)
        // VIRTIO_F_VERSION_1
        .store32(base + 0x24, 1)
        .store32(base + 0x20, 1)
        .store32(base + 0x70, 11);
    for queue in 0..queues {
        let rings = 0x100_0000 + ((slot as u32) << 16) + (queue << 12);
        code = code
            .store32(base + 0x30, queue)
            .store32(base + 0x38, 8)
            .store32(base + 0x80, rings)
            .store32(base + 0x90, rings + 0x400)
            .store32(base + 0xa0, rings + 0x800)
            .store32(base + 0x44, 1);
    }
    code.store32(base + 0x70, 15)
}

/// Features and queues of the devices of [`everything`], in slot order. The last is virtio-mem, which insists on
/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE.
const DRIVERS: [(u32, u32); 8] = [
    (0, 3),
    (0, 1),
    (0, 1),
    (0, 2),
    (0, 1),
    (0, 2),
    (0, 2),
    (1 << 1, 1),
];

/// A machine with every device, all of which the guest runs.
fn everything(scratch: &Scratch) -> VmConfig {
    let shared = scratch.path().join("shared");
    fs::create_dir_all(&shared).unwrap();
    let code = (0..)
        .zip(DRIVERS)
        .fold(Code::default().map_devices(), |code, (slot, queues)| {
            drive(code, slot, queues)
        });
    let mut config = config_with(
        scratch,
        &code.print("driven\n").spin(),
        vec![
            DeviceConfig::Block(BlockConfig::new("disk", scratch.write("disk", &[0; 4096]))),
            DeviceConfig::Rng(RngConfig { id: "rng".to_owned() }),
            DeviceConfig::Balloon(BalloonConfig {
                id: "balloon".to_owned(),
                deflate_on_oom: true,
                reporting: false,
                statistics_interval_s: 0,
            }),
            DeviceConfig::Pmem(PmemConfig {
                id: "pmem".to_owned(),
                path: scratch.write("pmem", &[0; 4096]),
                read_only: false,
            }),
            DeviceConfig::Fs(FsConfig::new(
                "share",
                "tag",
                FsRoot::Directory(SharedDir::writable(&shared)),
            )),
            DeviceConfig::Net(NetConfig::new("nic", "tap0")),
        ],
    );
    config.vsock = Some(VsockConfig {
        guest_cid: 3,
        uds_path: Some(scratch.path().join("vsock")),
    });
    config.memory.max_mib = 192;
    config
}

/// Needs root: a TAP, and a namespace for it.
fn enter_namespace() {
    // SAFETY: changes this thread only.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
}

/// What programs executed by this process would inherit of what was opened since `before`.
fn inherited(before: &BTreeSet<i32>) -> Vec<String> {
    let inherits = |fd: &&i32| {
        // SAFETY: the call takes numbers only.
        let flags = unsafe { libc::fcntl(**fd, libc::F_GETFD) };
        flags & libc::FD_CLOEXEC == 0
    };
    let now = open_descriptors();
    let name = |fd: &i32| format!("{fd}: {:?}", fs::read_link(format!("/proc/self/fd/{fd}")));
    now.difference(before).filter(inherits).map(name).collect()
}

#[test]
fn descriptors_when_every_device_runs_are_closed_on_exec() {
    if !alone("descriptors_when_every_device_runs_are_closed_on_exec") {
        return;
    }
    enter_namespace();
    let scratch = Scratch::new();
    let before = open_descriptors();
    let vm = Vm::new(everything(&scratch)).unwrap();
    vm.start().unwrap();
    wait_for(&vm, "driven");
    let devices = vm.metrics().devices;
    assert_eq!(devices.len(), DRIVERS.len());
    assert!(devices.iter().all(|device| device.active), "{devices:?}");
    assert!(open_descriptors().len() > before.len() + 20);
    assert_eq!(inherited(&before), [""; 0]);
    vm.pause().unwrap();
    let dir = scratch.path().join("saved");
    vm.save(&dir, &SaveKind::Full).unwrap();
    assert_eq!(inherited(&before), [""; 0]);
    vm.stop().unwrap();
    drop(vm);
    let options = RestoreOptions {
        memory: MemoryMode::Userfaultfd,
        track_writes: true,
        ..RestoreOptions::default()
    };
    let vm = Vm::restore(&dir, &options).unwrap();
    vm.resume().unwrap();
    assert_eq!(inherited(&before), [""; 0]);
    vm.stop().unwrap();
}

/// Waits until no thread of a machine is left, and says how many descriptors there are.
fn settled() -> usize {
    let end = Instant::now() + LONG;
    loop {
        let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
        let names = tasks.map(|task| fs::read_to_string(task.path().join("comm")).unwrap_or_default());
        let ours: Vec<String> = names
            .filter(|name| {
                ["vmm", "vcpu", "fs-"]
                    .iter()
                    .any(|prefix| name.starts_with(prefix))
            })
            .collect();
        if ours.is_empty() {
            return open_descriptors().len();
        }
        assert!(Instant::now() < end, "left behind: {ours:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Descriptors this process may have; shares raise the soft limit to the hard one, so both are set.
const LIMIT: u64 = 256;

/// Runs `operation` while this process can open `free` more descriptors.
fn with_free<T>(free: usize, operation: impl FnOnce() -> T) -> T {
    let mut held: Vec<File> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
    held.truncate(held.len() - free);
    operation()
}

/// Gives `make` one descriptor more each time, until it succeeds: what fails must leave nothing.
fn starve<E: std::fmt::Debug>(make: impl Fn() -> Result<Vm, E>) {
    let before = settled();
    for free in 0..150 {
        let made = with_free(free, &make);
        let succeeded = made.is_ok();
        if let Ok(vm) = made {
            vm.stop().unwrap();
            assert_eq!(vm.wait(), ExitReason::Stopped);
        }
        let end = Instant::now() + LONG;
        while settled() != before && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(settled(), before, "with {free} descriptors");
        if succeeded {
            assert!(free > 10, "with {free} descriptors already");
            return;
        }
    }
    panic!("150 descriptors are not enough: {:?}", make());
}

#[test]
fn machine_when_descriptors_run_out_at_any_point_leaves_nothing() {
    if !alone("machine_when_descriptors_run_out_at_any_point_leaves_nothing") {
        return;
    }
    enter_namespace();
    let limits = libc::rlimit {
        rlim_cur: LIMIT,
        rlim_max: LIMIT,
    };
    // SAFETY: the structure outlives the call.
    let limited = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limits) };
    assert_eq!(limited, 0);
    let scratch = Scratch::new();
    let mut config = everything(&scratch);
    config.memory.track_writes = true;
    starve(|| Vm::new(config.clone()));
    let vm = Vm::new(config).unwrap();
    vm.start().unwrap();
    wait_for(&vm, "driven");
    vm.pause().unwrap();
    let dir = scratch.path().join("saved");
    vm.save(&dir, &SaveKind::Full).unwrap();
    vm.stop().unwrap();
    drop(vm);
    for memory in [
        MemoryMode::Eager,
        MemoryMode::CopyOnWrite,
        MemoryMode::Userfaultfd,
    ] {
        let options = RestoreOptions {
            memory,
            track_writes: true,
            ..RestoreOptions::default()
        };
        starve(|| Vm::restore(&dir, &options));
    }
}
