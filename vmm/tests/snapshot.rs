//! Saving and restoring tiny guests, and refusing what cannot be restored.

mod guest;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use dragonball::Vm;
use dragonball::config::{BlockConfig, DeviceConfig, VcpuConfig};
use dragonball::vm::snapshot::{MemoryMode, RestoreError, RestoreOptions, SaveError, SaveKind, SaveReport};
use dragonball::vm::{ExitReason, VmState};
use guest::{Code, LONG, Scratch, config_with, wait_for};

/// jmp back to the beginning of the poll until COM1 has input.
fn wait_for_input() -> Vec<u8> {
    // 1: in al, 0x3fd; test al, 1; jz 1b
    let poll = Code::default().in8(0x3fd).raw(&[0xa8, 1]);
    let back = -(poll.0.len() as i8 + 2);
    poll.raw(&[0x74, back as u8]).0
}

/// Prints, spins until the byte at 0x40000 is set by nobody, with what it knows in registers and memory; a restored one
/// cannot tell. It ends when COM1 has input.
fn counting() -> Code {
    Code::default()
        .store32(0x4_0000, 0x1234_56ab)
        // mov r15d, 0xcd
        .raw(&[0x41, 0xbf, 0xcd, 0, 0, 0])
        .print("ready\n")
        .raw(&wait_for_input())
        .load32(0x4_0000)
        .print_al()
        // mov eax, r15d
        .raw(&[0x44, 0x89, 0xf8])
        .print_al()
        .power_off()
}

/// A saved machine with a disk.
fn saved(scratch: &Scratch) -> PathBuf {
    let disk = scratch.write("disk", &[0; 4096]);
    let devices = vec![DeviceConfig::Block(BlockConfig::new("disk", disk))];
    let mut config = config_with(scratch, &counting(), devices);
    config.vcpus = VcpuConfig { boot: 1, max: 2 };
    let vm = Vm::new(config).unwrap();
    let dir = scratch.path().join("saved");
    assert!(matches!(
        vm.save(&dir, &SaveKind::Full),
        Err(SaveError::State(VmState::Configured))
    ));
    vm.start().unwrap();
    wait_for(&vm, "ready");
    assert!(matches!(
        vm.save(&dir, &SaveKind::Full),
        Err(SaveError::State(VmState::Running))
    ));
    vm.pause().unwrap();
    vm.save(&dir, &SaveKind::Full).unwrap();
    vm.stop().unwrap();
    dir
}

/// Types a byte, and expects the registers and memory of the saved machine.
fn finish(vm: &Vm) {
    assert_eq!(vm.state(), VmState::Paused);
    vm.resume().unwrap();
    assert_eq!(vm.console_input(b"x"), 1);
    assert_eq!(
        vm.wait_timeout(LONG),
        Some(ExitReason::PowerOff),
        "{:?}",
        vm.console().tail(9)
    );
    assert_eq!(vm.console().tail(9), ["ab", "cd"]);
}

const MODES: [MemoryMode; 3] = [
    MemoryMode::Eager,
    MemoryMode::CopyOnWrite,
    MemoryMode::Userfaultfd,
];

fn options(memory: MemoryMode) -> RestoreOptions {
    RestoreOptions {
        memory,
        ..RestoreOptions::default()
    }
}

#[test]
fn machine_when_restored_in_each_mode_goes_on_where_it_was() {
    let scratch = Scratch::new();
    let dir = saved(&scratch);
    for mode in [
        MemoryMode::Eager,
        MemoryMode::CopyOnWrite,
        MemoryMode::Userfaultfd,
        MemoryMode::CopyOnWrite,
    ] {
        finish(&Vm::restore(&dir, &options(mode)).unwrap());
    }
}

/// The environment variable that makes the test below the other process.
const DIRECTORY: &str = "DRAGONBALL_TEST_RESTORE";

#[test]
fn machine_when_restored_in_a_fresh_process_goes_on_where_it_was() {
    if let Some(dir) = std::env::var_os(DIRECTORY) {
        finish(&Vm::restore(Path::new(&dir), &RestoreOptions::default()).unwrap());
        return;
    }
    let scratch = Scratch::new();
    let dir = saved(&scratch);
    let status = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "machine_when_restored_in_a_fresh_process_goes_on_where_it_was",
        ])
        .env(DIRECTORY, &dir)
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn clone_when_saved_again_restores() {
    let scratch = Scratch::new();
    let dir = saved(&scratch);
    let vm = Vm::restore(&dir, &options(MemoryMode::CopyOnWrite)).unwrap();
    let (full, difference) = (scratch.path().join("full"), scratch.path().join("difference"));
    vm.save(&full, &SaveKind::Full).unwrap();
    let against = |base: &Path| SaveKind::Difference {
        base: base.to_owned(),
    };
    let report = vm.save(&difference, &against(&dir)).unwrap();
    assert!(report.memory_bytes < 64 << 10, "{report:?}");
    assert!(matches!(
        vm.save(&scratch.path().join("third"), &against(&difference)),
        Err(SaveError::Base { .. })
    ));
    assert!(matches!(
        vm.save(&dir, &against(&dir)),
        Err(SaveError::Base { .. })
    ));
    vm.stop().unwrap();
    for dir in [&full, &difference] {
        for mode in MODES {
            finish(&Vm::restore(dir, &options(mode)).unwrap());
        }
    }
    // The base is gone, or is another save.
    vm_error(&difference, |_| fs::remove_dir_all(&dir).unwrap(), "No such file");
}

/// Restores what `change` made of a save; the message must contain `expected`.
fn vm_error(dir: &Path, change: impl FnOnce(&Path), expected: &str) {
    change(dir);
    let error = Vm::restore(dir, &RestoreOptions::default()).unwrap_err();
    assert!(error.to_string().contains(expected), "{error}");
}

#[test]
fn restore_when_the_files_are_damaged_says_how() {
    let scratch = Scratch::new();
    let dir = saved(&scratch);
    let good = fs::read(dir.join("state")).unwrap();
    let state = |bytes: &[u8]| {
        let bytes = bytes.to_vec();
        move |dir: &Path| fs::write(dir.join("state"), bytes).unwrap()
    };
    vm_error(&dir, state(&good[..good.len() / 2]), "cut off");
    vm_error(&dir, state(&good[..10]), "no state file");
    vm_error(
        &dir,
        state(b"\x7fELF and more, and more, and more"),
        "no state file",
    );
    let changed = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        bytes
    };
    vm_error(&dir, state(&changed(good.len() / 3)), "damaged");
    vm_error(&dir, state(&changed(8)), "format version");
    vm_error(
        &dir,
        |dir| fs::remove_file(dir.join("state")).unwrap(),
        "No such file",
    );
    state(&good)(&dir);
    let memory = fs::File::options().write(true).open(dir.join("memory")).unwrap();
    let len = memory.metadata().unwrap().len();
    memory.set_len(len - 4096).unwrap();
    vm_error(&dir, |_| {}, "the machine's memory has");
    memory.set_len(len).unwrap();
    vm_error(
        &dir,
        |dir| fs::remove_file(dir.join("memory")).unwrap(),
        "No such file",
    );
}

#[test]
fn restore_when_told_to_override_uses_it_or_says_what_is_missing() {
    let scratch = Scratch::new();
    let dir = saved(&scratch);
    let other = scratch.write("other-disk", &[0; 4096]);
    fs::remove_file(scratch.path().join("disk")).unwrap();
    let error = Vm::restore(&dir, &RestoreOptions::default()).unwrap_err();
    assert!(error.to_string().contains("disk"), "{error}");
    let disks = |id: &str| RestoreOptions {
        disks: [(id.to_owned(), other.clone())].into(),
        ..RestoreOptions::default()
    };
    assert!(matches!(
        Vm::restore(&dir, &disks("disc")),
        Err(RestoreError::Override(message)) if message == "the saved machine has no disk disc"
    ));
    let vsock = RestoreOptions {
        vsock_uds: Some(scratch.path().join("socket")),
        ..RestoreOptions::default()
    };
    assert!(matches!(
        Vm::restore(&dir, &vsock),
        Err(RestoreError::Override(_))
    ));
    // A smaller disk is not the one the guest knows.
    let small = scratch.write("small-disk", &[0; 512]);
    let options = RestoreOptions {
        disks: [("disk".to_owned(), small)].into(),
        ..RestoreOptions::default()
    };
    assert!(matches!(
        Vm::restore(&dir, &options),
        Err(RestoreError::Device(_))
    ));
    finish(&Vm::restore(&dir, &disks("disk")).unwrap());
}

/// Writes a byte to the page at 0x40000 and says so; at input, writes another to the page at 0x50000 and says so; at more
/// input, prints both.
fn writing() -> Code {
    Code::default()
        .store32(0x4_0000, 0xab)
        .print("first\n")
        .raw(&wait_for_input())
        .in8(0x3f8)
        .store32(0x5_0000, 0xcd)
        .print("second\n")
        .raw(&wait_for_input())
        .load32(0x4_0000)
        .print_al()
        .load32(0x5_0000)
        .print_al()
        .power_off()
}

/// A machine that tracks writes, paused after its first.
fn tracked(scratch: &Scratch) -> Vm {
    let mut config = config_with(scratch, &writing(), vec![]);
    config.memory.track_writes = true;
    let vm = Vm::new(config).unwrap();
    vm.start().unwrap();
    wait_for(&vm, "first");
    vm.pause().unwrap();
    vm
}

fn difference(vm: &Vm, base: &Path, dir: &Path) -> SaveReport {
    let base = base.to_owned();
    vm.save(dir, &SaveKind::Difference { base }).unwrap()
}

/// Lets it write for the second time, and pauses it.
fn write_more(vm: &Vm) {
    vm.resume().unwrap();
    assert_eq!(vm.console_input(b"x"), 1);
    wait_for(vm, "second");
    vm.pause().unwrap();
}

/// Expects both writes of a machine saved or restored after the second.
fn finish_writing(vm: &Vm) {
    vm.resume().unwrap();
    assert_eq!(vm.console_input(b"x"), 1);
    assert_eq!(vm.wait_timeout(LONG), Some(ExitReason::PowerOff));
    let console = vm.console().tail(9);
    assert!(
        console.ends_with(&["ab".to_owned(), "cd".to_owned()]),
        "{console:?}"
    );
}

fn tracked_clone(dir: &Path, memory: MemoryMode) -> Vm {
    let options = RestoreOptions {
        track_writes: true,
        ..options(memory)
    };
    Vm::restore(dir, &options).unwrap()
}

#[test]
fn difference_when_writes_are_tracked_looks_at_little_and_restores() {
    let scratch = Scratch::new();
    let vm = tracked(&scratch);
    let [old, base, first, second, other] =
        ["old", "base", "first", "second", "other"].map(|name| scratch.path().join(name));
    let full = vm.save(&old, &SaveKind::Full).unwrap();
    assert!(!full.by_log);
    vm.save(&base, &SaveKind::Full).unwrap();
    let nothing = difference(&vm, &base, &first);
    assert!(nothing.by_log && nothing.pages_read == 0, "{nothing:?}");
    write_more(&vm);
    // One that fails half way does not start the log anew.
    let file = scratch.write("file", b"");
    assert!(vm.save(&file, &SaveKind::Full).is_err());
    let little = difference(&vm, &base, &second);
    assert!(
        little.by_log && (1..=16).contains(&little.pages_read),
        "{little:?}"
    );
    // The log is not about this one.
    let compared = difference(&vm, &old, &other);
    assert!(
        !compared.by_log && compared.pages_read > little.pages_read,
        "{compared:?}"
    );
    assert_eq!(compared.memory_bytes, little.memory_bytes);
    finish_writing(&vm);
    for mode in MODES {
        finish_writing(&Vm::restore(&second, &options(mode)).unwrap());
    }
}

#[test]
fn clone_when_it_tracks_writes_saves_differences_by_log() {
    let scratch = Scratch::new();
    let vm = tracked(&scratch);
    let [base, first, second, full, third] =
        ["base", "first", "second", "full", "third"].map(|name| scratch.path().join(name));
    vm.save(&base, &SaveKind::Full).unwrap();
    vm.stop().unwrap();
    for mode in MODES {
        let clone = tracked_clone(&base, mode);
        write_more(&clone);
        let report = difference(&clone, &base, &first);
        assert!(report.by_log && report.pages_read > 0, "{mode:?}: {report:?}");
        let written = report.memory_bytes;
        clone.stop().unwrap();
        // Of a difference, against the same base.
        let clone = tracked_clone(&first, mode);
        let report = difference(&clone, &base, &second);
        assert!(
            report.by_log && report.memory_bytes >= written,
            "{mode:?}: {report:?}"
        );
        // A save of its own becomes the base.
        clone.save(&full, &SaveKind::Full).unwrap();
        let report = difference(&clone, &full, &third);
        assert!(report.by_log && report.pages_read == 0, "{mode:?}: {report:?}");
        assert!(!difference(&clone, &base, &second).by_log, "{mode:?}");
        clone.stop().unwrap();
        for dir in [&first, &second, &full, &third] {
            finish_writing(&Vm::restore(dir, &options(mode)).unwrap());
        }
        // Without being asked for, there is no log.
        let clone = Vm::restore(&base, &options(mode)).unwrap();
        assert!(!difference(&clone, &base, &second).by_log, "{mode:?}");
        clone.stop().unwrap();
    }
}
