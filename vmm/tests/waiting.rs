//! Who waits for whom: operations exclude each other, and nobody who ends or looks at a machine waits for one that hangs.

// All of it is a test; clippy.toml knows functions with an attribute for that only.
#![allow(clippy::expect_used, clippy::unwrap_used)]
#![allow(unsafe_code)]

mod guest;

use std::ffi::CString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dragonball::Vm;
use dragonball::config::{DeviceConfig, NetConfig, RngConfig, VcpuConfig};
use dragonball::vm::snapshot::{RestoreOptions, SaveError, SaveKind};
use dragonball::vm::{ExitReason, HotplugError, ResizeVcpuError, VmState};
use guest::hanging::HangingFolder;
use guest::{Code, LONG, Scratch, config, config_with, wait_for};

fn rng(id: &str) -> DeviceConfig {
    DeviceConfig::Rng(RngConfig { id: id.to_owned() })
}

/// A running machine with a device and room for another.
fn running(scratch: &Scratch) -> Arc<Vm> {
    let code = Code::default().print("ready\n").spin();
    let mut config = config_with(scratch, &code, vec![rng("rng")]);
    config.hotplug_slots = 2;
    config.vcpus = VcpuConfig { boot: 1, max: 2 };
    let vm = Arc::new(Vm::new(config).unwrap());
    vm.start().unwrap();
    wait_for(&vm, "ready");
    vm
}

/// Runs `operation` on a thread.
fn beside<T: Send + 'static>(
    vm: &Arc<Vm>,
    operation: impl FnOnce(&Vm) -> T + Send + 'static,
) -> JoinHandle<T> {
    let vm = vm.clone();
    std::thread::spawn(move || operation(&vm))
}

/// Runs `operation` on a thread, and returns when that hangs in opening a FIFO.
fn hanging<T: Send + 'static>(
    vm: &Arc<Vm>,
    operation: impl FnOnce(&Vm) -> T + Send + 'static,
) -> JoinHandle<T> {
    let (tell, told) = std::sync::mpsc::channel();
    let thread = beside(vm, move |vm| {
        // SAFETY: has no preconditions.
        tell.send(unsafe { libc::gettid() }).unwrap();
        operation(vm)
    });
    let call = format!("/proc/self/task/{}/syscall", told.recv().unwrap());
    let opening = format!("{} ", libc::SYS_openat);
    let end = Instant::now() + LONG;
    // Twice in a row with a pause between: no file takes as long to open.
    let mut seen = 0;
    while seen < 2 {
        std::thread::sleep(Duration::from_millis(100));
        assert!(!thread.is_finished(), "opening a FIFO hangs");
        assert!(Instant::now() < end, "never opens it");
        let opens = std::fs::read_to_string(&call).is_ok_and(|call| call.starts_with(&opening));
        seen = if opens { seen + 1 } else { 0 };
    }
    thread
}

/// What `thread` gives, which must not wait for something that never comes.
fn soon<T>(what: &str, thread: JoinHandle<T>) -> T {
    let end = Instant::now() + LONG;
    while !thread.is_finished() {
        assert!(Instant::now() < end, "{what} hangs");
        std::thread::sleep(Duration::from_millis(1));
    }
    thread.join().unwrap()
}

/// Expects that everybody who must not wait gets an answer now, and ends the machine, whose state was `state`.
fn answers(vm: &Arc<Vm>, state: VmState) {
    let metrics = soon("metrics", beside(vm, Vm::metrics));
    assert_eq!((metrics.vcpus.len(), metrics.devices.len()), (1, 1));
    assert_eq!(soon("state", beside(vm, Vm::state)), state);
    assert_eq!(soon("thread_ids", beside(vm, Vm::thread_ids)).vcpus.len(), 1);
    assert_eq!(vm.wait_timeout(Duration::from_millis(1)), None);
    let waiting = beside(vm, Vm::wait);
    soon("stop", beside(vm, Vm::stop)).unwrap();
    assert_eq!(soon("wait", waiting), ExitReason::Stopped);
    assert!(soon("metrics", beside(vm, Vm::metrics)).devices.is_empty());
}

/// A FIFO: who opens it waits until somebody opens its other end.
fn fifo(path: PathBuf) -> PathBuf {
    let name = CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
    // SAFETY: the name is a C string.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    path
}

/// Opens and closes the other end.
fn let_go(fifo: &Path) {
    drop(File::options().write(true).open(fifo).unwrap());
}

#[test]
fn machine_when_an_addition_hangs_in_opening_does_everything_else() {
    let scratch = Scratch::new();
    let vm = running(&scratch);
    let netns = fifo(scratch.path().join("netns"));
    let mut nic = NetConfig::new("nic", "tap0");
    nic.tap.netns = Some(netns.clone());
    let adding = hanging(&vm, |vm| vm.add_net(nic, Vec::new()).map(drop));
    let others = beside(&vm, |vm| {
        vm.add_device(rng("other")).unwrap();
        vm.remove_device("other").unwrap();
        vm.pause().unwrap();
        vm.resume().unwrap();
    });
    soon("another operation", others);
    answers(&vm, VmState::Running);
    assert!(!adding.is_finished());
    let_go(&netns);
    assert!(matches!(
        soon("the addition", adding),
        Err(HotplugError::Device { .. })
    ));
}

#[test]
fn machine_when_a_save_hangs_in_opening_its_base_goes_on() {
    let scratch = Scratch::new();
    let vm = running(&scratch);
    vm.pause().unwrap();
    let base = scratch.path().join("base");
    std::fs::create_dir_all(&base).unwrap();
    let state = fifo(base.join("state"));
    let dir = scratch.path().join("dir");
    let saving = hanging(&vm, move |vm| vm.save(&dir, &SaveKind::Difference { base }));
    let others = beside(&vm, |vm| {
        vm.resume().unwrap();
        vm.add_device(rng("other")).unwrap();
        vm.remove_device("other").unwrap();
        vm.pause().unwrap();
    });
    soon("another operation", others);
    answers(&vm, VmState::Paused);
    let_go(&state);
    assert!(matches!(soon("the save", saving), Err(SaveError::File(_))));
}

#[test]
fn machine_when_a_save_hangs_in_writing_stops_and_tells_its_metrics() {
    let scratch = Scratch::new();
    let vm = running(&scratch);
    vm.pause().unwrap();
    let mut folder = HangingFolder::mount(scratch.path().join("hanging"));
    let dir = folder.path().to_owned();
    let saving = beside(&vm, move |vm| vm.save(&dir, &SaveKind::Full));
    folder.wait_for_write();
    answers(&vm, VmState::Paused);
    assert!(!saving.is_finished());
    folder.release();
    assert!(matches!(soon("the save", saving), Err(SaveError::Io { .. })));
}

#[test]
fn save_when_a_resize_is_under_way_waits_for_its_end() {
    let scratch = Scratch::new();
    // The guest never answers.
    let vm = running(&scratch);
    let end = Instant::now() + LONG;
    let resizing = loop {
        let resizing = beside(&vm, |vm| vm.resize_vcpu(2, Duration::from_secs(3)));
        while vm.thread_ids().vcpus.len() < 2 && !resizing.is_finished() {}
        if !resizing.is_finished() {
            break resizing;
        }
        // This thread was stopped for as long as that took.
        assert!(Instant::now() < end, "the second vCPU is never seen");
    };
    vm.pause().unwrap();
    let dir = scratch.path().join("saved");
    vm.save(&dir, &SaveKind::Full).unwrap();
    // What was offered was taken back before.
    assert_eq!(vm.thread_ids().vcpus.len(), 1);
    assert!(matches!(
        soon("the resize", resizing),
        Err(ResizeVcpuError::Guest { reached: 1, .. })
    ));
    vm.stop().unwrap();
    let clone = Vm::restore(&dir, &RestoreOptions::default()).unwrap();
    assert_eq!(clone.thread_ids().vcpus.len(), 1);
    clone.resume().unwrap();
    // It can be asked for again.
    assert!(matches!(
        clone.resize_vcpu(2, Duration::from_millis(50)),
        Err(ResizeVcpuError::Guest { reached: 1, .. })
    ));
    clone.stop().unwrap();
}

#[test]
fn machine_when_stopped_beside_every_operation_ends_and_stays_ended() {
    for round in 0..8 {
        let scratch = Scratch::new();
        let vm = running(&scratch);
        let dir = scratch.path().join("saved");
        let operations = [
            beside(&vm, |vm| {
                while vm.add_device(rng("one")).is_ok() {
                    vm.remove_device("one").ok();
                }
            }),
            beside(&vm, |vm| {
                let brief = Duration::from_millis(1);
                while !matches!(
                    vm.resize_vcpu(2, brief),
                    Err(ResizeVcpuError::State(VmState::Stopped(_)))
                ) {}
            }),
            beside(&vm, move |vm| {
                while !matches!(vm.state(), VmState::Stopped(_)) {
                    vm.pause().ok();
                    vm.save(&dir, &SaveKind::Full).ok();
                    vm.resume().ok();
                }
            }),
        ];
        std::thread::sleep(Duration::from_millis(20 * round));
        soon("stop", beside(&vm, Vm::stop)).unwrap();
        for operation in operations {
            soon("an operation", operation);
        }
        assert!(matches!(
            vm.add_device(rng("late")),
            Err(HotplugError::State { .. })
        ));
        assert!(vm.thread_ids().vcpus.is_empty());
    }
    // A machine without devices, too.
    let scratch = Scratch::new();
    let vm = Vm::new(config(&scratch, &Code::default().spin())).unwrap();
    vm.stop().unwrap();
}
