//! Machines saved while they work, and what becomes of them.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use dragonball::Vm;
use dragonball::config::{
    BalloonConfig, BlockConfig, DeviceConfig, FsConfig, FsRoot, MemoryConfig, NetConfig, PmemConfig,
    RngConfig, SharedDir, VcpuConfig, VmConfig, VsockConfig,
};
use dragonball::devices::virtio::vsock::VsockListener;
use dragonball::vm::ExitReason;
use dragonball::vm::snapshot::{MemoryMode, RestoreOptions, SaveKind};

use crate::guest::{Scratch, initramfs};
use crate::{LONG, config, net, start, wait_for};

const MODES: [MemoryMode; 3] = [
    MemoryMode::Eager,
    MemoryMode::CopyOnWrite,
    MemoryMode::Userfaultfd,
];

/// Writes numbered, checksummed blocks to the disk for ever, and ticks; ends when the disk has `limit` of them, after
/// comparing all of them.
fn disk_writer(limit: u32) -> String {
    format!(
        "i=0; while [ $i -lt {limit} ]; do\n\
           dd if=/dev/urandom of=/b bs=64k count=4 2>/dev/null; md5sum < /b >> /sums\n\
           dd if=/b of=/dev/vda bs=64k seek=$((i*4)) conv=notrunc 2>/dev/null; i=$((i+1)); echo \"block $i;\"\n\
         done; sync; echo 3 > /proc/sys/vm/drop_caches\n\
         i=0; while [ $i -lt {limit} ]; do dd if=/dev/vda bs=64k skip=$((i*4)) count=4 2>/dev/null | md5sum; i=$((i+1)); done > /again\n\
         cmp /sums /again && echo same; dmesg | grep -cE 'lockup|stall|I/O error|BUG:|WARNING:'"
    )
}

fn machine(scratch: &Scratch, script: &str) -> VmConfig {
    let mut config = config(scratch, script);
    config.vcpus = VcpuConfig { boot: 2, max: 4 };
    let disk = scratch.write("disk", &vec![0; 64 << 20]);
    config.devices = vec![
        DeviceConfig::Block(BlockConfig::new("disk", disk)),
        DeviceConfig::Rng(RngConfig { id: "rng".to_owned() }),
    ];
    config
}

fn save(vm: &Vm, dir: &Path, kind: &SaveKind) -> u64 {
    vm.pause().unwrap();
    vm.save(dir, kind).unwrap().memory_bytes
}

fn restore(dir: &Path, memory: MemoryMode) -> Vm {
    let options = RestoreOptions {
        memory,
        ..RestoreOptions::default()
    };
    Vm::restore(dir, &options).unwrap()
}

/// Waits for the end of [`disk_writer`], which must have found every block, and no complaint of the kernel.
fn expect_same(vm: &Vm, what: &str) {
    let ended = vm.wait_timeout(LONG);
    let console = vm.console();
    assert_eq!(
        ended,
        Some(ExitReason::PowerOff),
        "{what}: {:?}",
        console.tail(20)
    );
    assert_eq!(console.tail(2), ["same", "0"], "{what}");
}

/// Stops the machine, so that its disk is free for the next.
fn end(vm: Vm) {
    vm.stop().unwrap();
}

#[test]
fn disk_when_saved_with_writes_in_flight_has_every_block_after_a_restore() {
    for mode in MODES {
        let scratch = Scratch::new();
        let vm = start(machine(&scratch, &disk_writer(40)));
        wait_for(&vm, "block 5;");
        let dir = scratch.path().join("saved");
        save(&vm, &dir, &SaveKind::Full);
        end(vm);
        let vm = restore(&dir, mode);
        vm.resume().unwrap();
        expect_same(&vm, &format!("{mode:?}"));
    }
}

#[test]
fn machine_when_it_goes_on_after_a_save_is_not_disturbed() {
    let scratch = Scratch::new();
    let vm = start(machine(&scratch, &disk_writer(40)));
    for round in 0..5 {
        wait_for(&vm, &format!("block {};", round * 4 + 2));
        save(&vm, &scratch.path().join(round.to_string()), &SaveKind::Full);
        vm.resume().unwrap();
    }
    expect_same(&vm, "not replaced");
}

#[test]
fn difference_when_saved_against_a_full_save_is_smaller_and_restores() {
    let scratch = Scratch::new();
    let vm = start(machine(&scratch, &disk_writer(30)));
    wait_for(&vm, "block 3;");
    let (base, difference) = (scratch.path().join("base"), scratch.path().join("difference"));
    let full = save(&vm, &base, &SaveKind::Full);
    vm.resume().unwrap();
    wait_for(&vm, "block 6;");
    let small = save(&vm, &difference, &SaveKind::Difference { base: base.clone() });
    assert!(small < full / 2, "{small} of {full}");
    end(vm);
    for mode in MODES {
        // Each of them writes the same blocks to the same disk.
        let vm = restore(&difference, mode);
        vm.resume().unwrap();
        expect_same(&vm, &format!("{mode:?}"));
    }
}

#[test]
fn difference_when_writes_are_tracked_has_what_devices_wrote_and_gave_back() {
    let scratch = Scratch::new();
    let mut config = machine(&scratch, &disk_writer(40));
    config.memory.track_writes = true;
    config.devices.push(DeviceConfig::Balloon(BalloonConfig {
        id: "balloon".to_owned(),
        deflate_on_oom: true,
        reporting: true,
        statistics_interval_s: 0,
    }));
    let vm = start(config);
    let folder = |name: &str| scratch.path().join(name);
    let mut block = 0;
    let mut difference = |vm: &Vm, base: &str, name: &str| {
        block += 3;
        wait_for(vm, &format!("block {block};"));
        vm.pause().unwrap();
        let base = folder(base);
        let kind = SaveKind::Difference { base };
        let report = vm.save(&folder(name), &kind).unwrap();
        assert!(report.by_log, "{name}: {report:?}");
        report.pages_read
    };
    wait_for(&vm, "block 2;");
    vm.pause().unwrap();
    let all = vm.save(&folder("base"), &SaveKind::Full).unwrap().pages_read;
    vm.resume().unwrap();
    let little = difference(&vm, "base", "fresh");
    assert!(little < all, "{little} of {all}");
    end(vm);
    // Each goes on where the one before it was saved.
    let (mut base, mut last) = ("base".to_owned(), "fresh".to_owned());
    for mode in MODES {
        let options = RestoreOptions {
            memory: mode,
            track_writes: true,
            ..RestoreOptions::default()
        };
        let vm = Vm::restore(&folder(&last), &options).unwrap();
        vm.resume().unwrap();
        last = format!("{mode:?}");
        difference(&vm, &base, &last);
        // Against a save of its own, while it works.
        base = format!("{last}-full");
        vm.save(&folder(&base), &SaveKind::Full).unwrap();
        vm.resume().unwrap();
        last += "-difference";
        difference(&vm, &base, &last);
        end(vm);
    }
    let vm = restore(&folder(&last), MemoryMode::CopyOnWrite);
    vm.resume().unwrap();
    expect_same(&vm, "by log");
}

#[test]
fn pmem_when_the_machine_has_pages_of_its_own_has_them_after_a_restore() {
    let scratch = Scratch::new();
    // Zeros over what is not zero, in two steps.
    let mut config = config(
        &scratch,
        "until [ -e /dev/pmem0 ]; do sleep 0.1; done\n\
         zero() { dd if=/dev/zero of=/dev/pmem0 bs=4k seek=$1 count=64 conv=fsync 2>/dev/null; md5sum < /dev/pmem0 > /sum; }\n\
         zero 0; echo first; sleep 2; zero 64; echo second; sleep 2; echo 3 > /proc/sys/vm/drop_caches\n\
         md5sum < /dev/pmem0 | cmp - /sum && echo same",
    );
    let content = vec![5; 4 << 20];
    let image = scratch.write("image", &content);
    config.devices = vec![DeviceConfig::Pmem(PmemConfig {
        id: "image".to_owned(),
        path: image.clone(),
        read_only: true,
    })];
    let vm = start(config);
    let [base, difference] = ["base", "difference"].map(|name| scratch.path().join(name));
    wait_for(&vm, "first");
    save(&vm, &base, &SaveKind::Full);
    vm.resume().unwrap();
    wait_for(&vm, "second");
    save(&vm, &difference, &SaveKind::Difference { base: base.clone() });
    end(vm);
    for dir in [&base, &difference] {
        for mode in MODES {
            let vm = restore(dir, mode);
            vm.resume().unwrap();
            let what = format!("{} {mode:?}", dir.display());
            assert_eq!(vm.wait_timeout(LONG), Some(ExitReason::PowerOff), "{what}");
            let console = vm.console().tail(9);
            assert!(console.contains(&"same".to_owned()), "{what}: {console:?}");
        }
    }
    assert!(std::fs::read(&image).unwrap() == content, "the file was changed");
}

/// Types `command` and waits for the line that answers it: the command itself, a blank, the answer and a semicolon.
fn ask(vm: &Vm, command: &str) -> String {
    let line = format!("{command}\n");
    assert_eq!(vm.console_input(line.as_bytes()), line.len());
    let end = Instant::now() + LONG;
    loop {
        let lines = vm.console().tail(3);
        let answer = |line: &String| Some(line.strip_prefix(command)?.strip_suffix(';')?.trim().to_owned());
        if let Some(answer) = lines.iter().find_map(answer) {
            return answer;
        }
        assert!(Instant::now() < end, "no answer to {command:?}: {lines:?}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn unix_time() -> f64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.unwrap().as_secs_f64()
}

/// How far the guest's CLOCK_REALTIME is ahead of the host's, in seconds. The guest reads it somewhere between question and
/// answer; the quickest of 50 answers, which takes some 2 ms in the lab, tells the most. On a busy machine it takes more of them.
fn clock_ahead(vm: &Vm) -> f64 {
    let mut best = (f64::INFINITY, 0.0);
    let end = Instant::now() + LONG;
    for attempt in 0.. {
        let (round_trip, ahead) = best;
        if attempt >= 50 && round_trip < 0.02 {
            return ahead;
        }
        assert!(
            Instant::now() < end,
            "an answer takes {round_trip} s, which says nothing"
        );
        let before = unix_time();
        let guest: f64 = ask(vm, &format!("time {attempt}")).parse().unwrap();
        let after = unix_time();
        if after - before < best.0 {
            best = (after - before, guest - (before + after) / 2.0);
        }
    }
    unreachable!("there is always another attempt")
}

#[test]
fn clones_when_restored_differ_in_random_numbers_and_know_the_time_within_50_ms() {
    let scratch = Scratch::new();
    let config = config(
        &scratch,
        "exec < /dev/hvc0; stty -echo; echo ready\n\
         while read -r what number; do case $what in\n\
           time) echo \"time $number $EPOCHREALTIME;\";;\n\
           random) echo \"random $(head -c 16 /dev/urandom | md5sum | cut -c1-32);\";;\n\
         esac; done",
    );
    let vm = start(config);
    wait_for(&vm, "ready");
    // Not 0: until its boot has come to kvmclock Linux counts ticks, and misses those of the time without interrupts
    // (kernel/time/timekeeping.c, timekeeping_init), 0.3 s in the lab. A runtime sets the clock; a clone must keep it.
    let original = clock_ahead(&vm);
    let dir = scratch.path().join("saved");
    save(&vm, &dir, &SaveKind::Full);
    end(vm);
    // Time that passes while nothing runs.
    std::thread::sleep(Duration::from_secs(3));
    let mut seen = HashSet::new();
    for mode in MODES {
        let vm = restore(&dir, mode);
        vm.resume().unwrap();
        let clone = clock_ahead(&vm);
        let difference = (clone - original).abs();
        assert!(
            difference < 0.05,
            "{mode:?}: {clone} s ahead, {original} s when it was saved"
        );
        // Not before: Linux learns of the new generation from a notification, which it handles on a kernel thread.
        let random = ask(&vm, "random");
        assert!(seen.insert(random), "two clones have the same random numbers");
        end(vm);
    }
}

/// The next connection of the guest, which sends a word at a time: checks that one arrives.
fn expect_ticks(listener: &VsockListener) -> UnixStream {
    let mut stream = listener.accept_timeout(LONG).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    let mut word = [0; 5];
    stream.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"tick\n");
    stream
}

/// Sends `word` to the guest's echo server and waits for it.
fn expect_echo(stream: &mut UnixStream, word: &str) {
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream.write_all(word.as_bytes()).unwrap();
    let mut back = vec![0; word.len()];
    stream.read_exact(&mut back).unwrap();
    assert_eq!(back, word.as_bytes());
}

#[test]
fn vsock_when_restored_resets_what_was_open_and_connects_again_both_ways() {
    let scratch = Scratch::new();
    let script = "socat VSOCK-LISTEN:7000,reuseaddr,fork EXEC:cat &\n\
         while :; do echo connecting; while sleep 0.1; do echo tick; done | socat - VSOCK-CONNECT:2:5000; done";
    let mut config = config(&scratch, "");
    let extras = initramfs::Extras {
        programs: vec!["/usr/bin/socat".into()],
        ..initramfs::Extras::default()
    };
    config.boot.initramfs = Some(initramfs::build_with(
        &scratch,
        &extras,
        &format!("export PATH=$PATH:/usr/bin\n{script}"),
    ));
    let path = scratch.path().join("vsock");
    config.vsock = Some(VsockConfig {
        guest_cid: 5,
        uds_path: Some(path),
    });
    let vm = Vm::new(config).unwrap();
    let listener = vm.vsock_listen(5000).unwrap();
    vm.start().unwrap();
    let mut from_guest = expect_ticks(&listener);
    let mut to_guest = vm.vsock_connect(7000, LONG).unwrap();
    expect_echo(&mut to_guest, "before");
    let dir = scratch.path().join("saved");
    save(&vm, &dir, &SaveKind::Full);
    drop(listener);
    end(vm);
    // On the host nothing stays open behind the machine.
    assert!(from_guest.read_to_end(&mut Vec::new()).is_ok());
    assert_eq!(to_guest.read_to_end(&mut Vec::new()).unwrap(), 0);

    for mode in MODES {
        let path = scratch.path().join(format!("{mode:?}"));
        let options = RestoreOptions {
            memory: mode,
            vsock_uds: Some(path.clone()),
            ..RestoreOptions::default()
        };
        let vm = Vm::restore(&dir, &options).unwrap();
        let listener = vm.vsock_listen(5000).unwrap();
        vm.resume().unwrap();
        // The guest learns that its connection is gone (reads say ENOTCONN: net/vmw_vsock/af_vsock.c), and makes another.
        let _from_guest = expect_ticks(&listener);
        wait_for(&vm, "Transport endpoint is not connected");
        let mut to_guest = vm.vsock_connect(7000, LONG).unwrap();
        expect_echo(&mut to_guest, "in process");
        let mut outside = UnixStream::connect(&path).unwrap();
        outside.set_read_timeout(Some(LONG)).unwrap();
        outside.write_all(b"CONNECT 7000\n").unwrap();
        let mut reply = String::new();
        // One byte at a time: what follows the line is the guest's.
        let mut byte = [0];
        while !reply.ends_with('\n') {
            outside.read_exact(&mut byte).unwrap();
            reply.push(byte[0].into());
        }
        assert!(reply.starts_with("OK "), "{reply:?}");
        expect_echo(&mut outside, "from outside");
        end(vm);
    }
}

#[test]
fn devices_when_restored_all_work() {
    let scratch = Scratch::new();
    let share = scratch.path().join("share");
    std::fs::create_dir(&share).unwrap();
    let mut config = machine(
        &scratch,
        "mount -t virtiofs tag /mnt; exec 3>/mnt/growing; echo before >&3\n\
         echo ready; until [ -e /mnt/go ]; do sleep 0.1; done\n\
         echo after >&3; exec 3>&-; cat /mnt/growing\n\
         head -c 64 /dev/hwrng | wc -c; grep MemTotal /proc/meminfo; nproc",
    );
    config.memory = MemoryConfig {
        max_mib: 1024,
        ..MemoryConfig::fixed(512)
    };
    config.boot.cmdline += " memhp_default_state=online_movable";
    config.vsock = Some(VsockConfig {
        guest_cid: 5,
        uds_path: None,
    });
    config.devices.push(DeviceConfig::Balloon(BalloonConfig {
        id: "balloon".to_owned(),
        deflate_on_oom: true,
        reporting: true,
        statistics_interval_s: 0,
    }));
    config.devices.push(DeviceConfig::Fs(FsConfig::new(
        "share",
        "tag",
        FsRoot::Directory(SharedDir::writable(&share)),
    )));
    let vm = start(config);
    wait_for(&vm, "ready");
    let patience = Duration::from_secs(120);
    vm.resize_memory(768 << 20, patience).unwrap();
    let dir = scratch.path().join("saved");
    save(&vm, &dir, &SaveKind::Full);
    end(vm);

    let vm = restore(&dir, MemoryMode::CopyOnWrite);
    vm.resume().unwrap();
    // Everything that was possible before is possible now.
    assert_eq!(vm.resize_memory(1 << 30, patience).unwrap().1, 1 << 30);
    assert_eq!(vm.resize_vcpu(3, patience).unwrap(), (2, 3));
    assert_eq!(vm.resize_vcpu(2, patience).unwrap(), (3, 2));
    std::fs::write(share.join("go"), "").unwrap();
    assert_eq!(
        vm.wait_timeout(LONG),
        Some(ExitReason::PowerOff),
        "{:?}",
        vm.console().tail(20)
    );
    let console = vm.console().tail(5);
    assert_eq!(console[..3], ["before", "after", "64"]);
    let kib: u64 = console[3].split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(kib > 900 << 10, "{kib} KiB");
    assert_eq!(console[4], "2");
}

#[test]
fn tcp_streams_when_the_machine_is_replaced_go_on() {
    net::in_namespace(|| {
        // It outlives the first machine, with its address.
        assert!(net::host("ip tuntap add dev tap0 mode tap vnet_hdr"));
        net::set_up_tap("tap0", 1500);
        let scratch = Scratch::new();
        let script = format!(
            "{}echo ready; nc 10.0.0.1 5000 < /dev/null > /big; nc 10.0.0.1 5001 < /big",
            net::SET_UP
        );
        let mut config = config(&scratch, &script);
        config.devices = vec![net::interface(NetConfig::new("net0", "tap0"))];
        let sent = net::pattern(3);
        let bytes = sent.clone();
        // The second half is slow until the machine was replaced, so that this happens in its middle.
        let replaced = Arc::new(AtomicBool::new(false));
        let hurry = replaced.clone();
        let download = net::serve(5000, move |mut stream| {
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let slow = rest.len() < bytes.len() / 2 && !hurry.load(Ordering::SeqCst);
                let len = bytes.len() / if slow { 5000 } else { 100 };
                let (piece, after) = rest.split_at(len.min(rest.len()));
                stream.write_all(piece).unwrap();
                std::thread::sleep(Duration::from_millis(20));
                rest = after;
            }
        });
        let upload = net::take(5001);
        let vm = start(config);
        wait_for(&vm, "ready");
        let deadline = Instant::now() + LONG;
        while net::counter(&vm, "net0", "rx_bytes") < 1 << 20 {
            assert!(Instant::now() < deadline, "no data");
            std::thread::sleep(Duration::from_millis(5));
        }
        let dir = scratch.path().join("saved");
        save(&vm, &dir, &SaveKind::Full);
        end(vm);
        let vm = restore(&dir, MemoryMode::CopyOnWrite);
        vm.resume().unwrap();
        replaced.store(true, Ordering::SeqCst);
        assert_eq!(
            vm.wait_timeout(LONG),
            Some(ExitReason::PowerOff),
            "{:?}",
            vm.console().tail(20)
        );
        download.join().unwrap();
        assert!(upload.join().unwrap() == sent);
    });
}
