//! Saving and restoring tiny guests, and refusing what cannot be restored.

// All of it is a test; clippy.toml knows functions with an attribute for that only.
#![allow(clippy::expect_used, clippy::unwrap_used)]
#![allow(unsafe_code)]

mod guest;

use std::ffi::CStr;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use dragonball::Vm;
use dragonball::config::{BlockConfig, DeviceConfig, NetConfig, PmemConfig, VcpuConfig};
use dragonball::memory::image::ReadError;
use dragonball::vm::snapshot::{
    InvalidState, MemoryMode, OverrideError, RestoreError, RestoreOptions, SaveError, SaveKind, SaveReport,
    StateFileError, verify,
};
use dragonball::vm::{ExitReason, Failure, VmState};
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
    assert!(matches!(
        Vm::restore(&dir, &RestoreOptions::default()),
        Err(RestoreError::File(StateFileError::Invalid {
            reason: InvalidState::Version { .. },
            ..
        }))
    ));
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
fn memory_file_when_damaged_is_found_by_eager_restores_and_by_verify() {
    let scratch = Scratch::new();
    let dir = saved(&scratch);
    let difference = scratch.path().join("difference");
    let vm = Vm::restore(&dir, &options(MemoryMode::CopyOnWrite)).unwrap();
    vm.resume().unwrap();
    vm.pause().unwrap();
    let base = SaveKind::Difference { base: dir.clone() };
    vm.save(&difference, &base).unwrap();
    vm.stop().unwrap();
    verify(&dir).unwrap();
    verify(&difference).unwrap();
    // Where the guest's code is: in the full save, and what the difference builds on.
    let memory = fs::File::options()
        .read(true)
        .write(true)
        .open(dir.join("memory"))
        .unwrap();
    let mut byte = [0];
    memory.read_exact_at(&mut byte, guest::LOAD).unwrap();
    memory.write_all_at(&[byte[0] ^ 1], guest::LOAD).unwrap();
    for dir in [&dir, &difference] {
        for result in [
            verify(dir).map(drop),
            Vm::restore(dir, &options(MemoryMode::Eager)).map(drop),
        ] {
            assert!(
                matches!(
                    &result,
                    Err(RestoreError::Memory { source: ReadError::Damaged { offset, .. }, .. })
                        if *offset == guest::LOAD
                ),
                "{result:?}"
            );
        }
    }
    memory.write_all_at(&byte, guest::LOAD).unwrap();
    verify(&difference).unwrap();
    finish(&Vm::restore(&difference, &options(MemoryMode::Eager)).unwrap());
}

#[test]
fn save_when_it_fails_leaves_the_one_before_and_no_scraps() {
    let scratch = Scratch::new();
    let dir = saved(&scratch);
    let names = |dir: &Path| {
        let mut names: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(&dir), ["memory", "state"]);
    for name in ["memory", "state", "."] {
        let mode = fs::metadata(dir.join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{name}: {mode:o}");
    }
    let vm = Vm::restore(&dir, &options(MemoryMode::Eager)).unwrap();
    // Something that cannot be replaced by a file is where the state is written first.
    fs::create_dir_all(dir.join("state.new/full")).unwrap();
    assert!(matches!(
        vm.save(&dir, &SaveKind::Full),
        Err(SaveError::File(StateFileError::Io { .. }))
    ));
    assert_eq!(names(&dir), ["memory", "state", "state.new"]);
    fs::remove_dir_all(dir.join("state.new")).unwrap();
    verify(&dir).unwrap();
    vm.save(&dir, &SaveKind::Full).unwrap();
    assert_eq!(names(&dir), ["memory", "state"]);
    finish(&vm);
    finish(&Vm::restore(&dir, &options(MemoryMode::Eager)).unwrap());
}

#[test]
fn machine_when_its_memory_file_is_cut_under_the_pager_ends_with_the_reason() {
    let scratch = Scratch::new();
    let dir = saved(&scratch);
    let vm = Vm::restore(&dir, &options(MemoryMode::Userfaultfd)).unwrap();
    let memory = fs::File::options().write(true).open(dir.join("memory")).unwrap();
    memory.set_len(0).unwrap();
    vm.resume().unwrap();
    match vm.wait_timeout(LONG) {
        Some(ExitReason::Failure(Failure::Page { .. })) => {}
        other => panic!("{other:?}"),
    }
    vm.stop().unwrap();
}

/// Port and memory accesses of each round of [`accessing`].
const ACCESSES: usize = 4;
/// Saves between them.
const SAVES: usize = 12;

/// Writes and reads a port and an address where nothing is, so many times; then says so and spins.
fn accessing(rounds: u32) -> Code {
    // mov ebx, rounds
    let code = Code::default()
        .map_devices()
        .raw(&[0xbb])
        .raw(&rounds.to_le_bytes());
    let round = Code::default()
        .out8(0x80, 1)
        .in8(0x80)
        .store32(0xd010_0000, 1)
        .load32(0xd010_0000)
        // dec ebx
        .raw(&[0xff, 0xcb]);
    let back = -(round.0.len() as i8 + 2);
    // jnz
    code.raw(&round.0).raw(&[0x75, back as u8]).print("done").spin()
}

/// Saves and restores a machine up to [`SAVES`] times while its guest does that, and counts what it did. Returns how often
/// it was saved before the guest was done.
fn saves_between_accesses(rounds: u32) -> usize {
    let scratch = Scratch::new();
    let mut vm = Vm::new(config_with(&scratch, &accessing(rounds), vec![])).unwrap();
    vm.start().unwrap();
    // With those of the machines before.
    let sum = |before: &[u64; ACCESSES], vm: &Vm| -> [u64; ACCESSES] {
        let exits = &vm.metrics().vcpus[0];
        let here = [exits.pio_out, exits.pio_in, exits.mmio_write, exits.mmio_read];
        std::array::from_fn(|kind| before[kind] + here[kind])
    };
    let mut before = [0; ACCESSES];
    let mut saves = 0;
    while saves < SAVES {
        let end = Instant::now() + LONG;
        // Each at another kind of access, if not at random anyway.
        let kind = saves % ACCESSES;
        let wanted = before[kind] + 50 + saves as u64;
        while sum(&before, &vm)[kind] < wanted.min(u64::from(rounds)) {
            assert!(Instant::now() < end, "{:?}", sum(&before, &vm));
        }
        vm.pause().unwrap();
        let now = sum(&before, &vm);
        if now[0] >= u64::from(rounds) {
            vm.resume().unwrap();
            break;
        }
        before = now;
        let dir = scratch.path().join(format!("{saves}"));
        vm.save(&dir, &SaveKind::Full).unwrap();
        vm.stop().unwrap();
        vm = Vm::restore(&dir, &options(MemoryMode::Eager)).unwrap();
        vm.resume().unwrap();
        saves += 1;
    }
    wait_for(&vm, "done");
    let [out, rest @ ..] = sum(&before, &vm);
    assert_eq!(
        (out, rest),
        (u64::from(rounds) + 4, [u64::from(rounds); 3]),
        "port writes (with \"done\"), port reads, memory writes, memory reads"
    );
    vm.stop().unwrap();
    saves
}

#[test]
fn accesses_when_machines_are_saved_between_them_happen_once() {
    let mut rounds = 60_000;
    // On a busy machine the guest may be done before it was saved that often.
    while saves_between_accesses(rounds) < SAVES {
        rounds *= 4;
    }
}

/// Where the second 128 MiB of the pmem window of a small machine are: the window begins at 4 GiB.
const SECOND_PMEM: u64 = (4 << 30) + (128 << 20);

/// At input, prints the byte at [`SECOND_PMEM`].
fn reading_pmem() -> Code {
    // A page directory at 0x3_1000 for the fifth GiB, with one page of 2 MiB.
    let entry = 0x3_1000 + (SECOND_PMEM >> 21 & 511) * 8;
    Code::default()
        .store32(entry, SECOND_PMEM as u32 | 0x83)
        .store32(entry + 4, (SECOND_PMEM >> 32) as u32)
        .store32(0xa000 + 4 * 8, 0x3_1003)
        .print("ready\n")
        .raw(&wait_for_input())
        .load32(SECOND_PMEM)
        .print_al()
        .power_off()
}

#[test]
fn pmem_when_another_was_removed_before_the_save_is_restored_where_it_was() {
    let scratch = Scratch::new();
    let pmem = |id: &str, mib: u64| {
        let path = scratch.write(id, &[0xa5; 4096]);
        fs::File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(mib << 20)
            .unwrap();
        DeviceConfig::Pmem(PmemConfig {
            id: id.to_owned(),
            path,
            read_only: true,
        })
    };
    let mut config = config_with(&scratch, &reading_pmem(), vec![pmem("a", 128)]);
    config.memory.pmem_window_mib = 512;
    config.hotplug_slots = 1;
    let vm = Vm::new(config).unwrap();
    vm.start().unwrap();
    wait_for(&vm, "ready");
    vm.add_device(pmem("b", 256)).unwrap();
    vm.remove_device("a").unwrap();
    vm.pause().unwrap();
    let dir = scratch.path().join("saved");
    vm.save(&dir, &SaveKind::Full).unwrap();
    vm.stop().unwrap();
    for mode in MODES {
        let vm = Vm::restore(&dir, &options(mode)).unwrap();
        vm.resume().unwrap();
        assert_eq!(vm.console_input(b"x"), 1);
        assert_eq!(vm.wait_timeout(LONG), Some(ExitReason::PowerOff));
        assert_eq!(vm.console().tail(9), ["a5"], "{mode:?}");
    }
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
        Err(RestoreError::Override(OverrideError::Unknown(names))) if names == ["disk disc"]
    ));
    let vsock = RestoreOptions {
        vsock_uds: Some(scratch.path().join("socket")),
        ..RestoreOptions::default()
    };
    assert!(matches!(
        Vm::restore(&dir, &vsock),
        Err(RestoreError::Override(OverrideError::NoVsock))
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

/// A queue of the TAP `name` of this thread's network namespace, which is made.
fn tap(name: &str) -> Arc<OwnedFd> {
    let tun = fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    // SAFETY: all-zero is a valid ifreq, and it outlives the call.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
        assert_eq!(libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request), 0);
    }
    Arc::new(tun.into())
}

fn exists(interface: &CStr) -> bool {
    // SAFETY: the name is a C string.
    unsafe { libc::if_nametoindex(interface.as_ptr()) != 0 }
}

#[test]
fn tap_when_it_was_handed_over_open_is_not_restored_by_name() {
    // Needs root, like the TAPs. The namespace is this thread's only.
    // SAFETY: changes this thread.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
    let scratch = Scratch::new();
    let mut config = config_with(&scratch, &counting(), vec![]);
    config.hotplug_slots = 1;
    let vm = Vm::new(config).unwrap();
    let handed = Arc::into_inner(tap("handed")).unwrap();
    vm.add_net(NetConfig::new("nic", "handed"), vec![handed]).unwrap();
    vm.start().unwrap();
    wait_for(&vm, "ready");
    vm.pause().unwrap();
    let [first, second] = ["first", "second"].map(|name| scratch.path().join(name));
    vm.save(&first, &SaveKind::Full).unwrap();
    vm.stop().unwrap();
    drop(vm);
    let fds = |id: &str, name: &str| RestoreOptions {
        tap_fds: [(id.to_owned(), vec![tap(name)])].into(),
        ..RestoreOptions::default()
    };
    let refused = |dir: &Path, options: &RestoreOptions| match Vm::restore(dir, options) {
        Err(RestoreError::Override(error)) => error,
        other => panic!("{other:?}"),
    };
    for options in [RestoreOptions::default(), fds("other", "other")] {
        let error = refused(&first, &options);
        assert!(
            matches!(&error, OverrideError::TapNeeded(id) if id == "nic"),
            "{error}"
        );
    }
    let vm = Vm::restore(&first, &fds("nic", "mine")).unwrap();
    assert!(exists(c"mine") && !exists(c"handed"));
    vm.save(&second, &SaveKind::Full).unwrap();
    finish(&vm);
    refused(&second, &RestoreOptions::default());
    let named = RestoreOptions {
        taps: [("nic".to_owned(), "named".to_owned())].into(),
        ..RestoreOptions::default()
    };
    let vm = Vm::restore(&second, &named).unwrap();
    assert!(exists(c"named"));
    finish(&vm);
}
