//! The life of a machine, with guests small enough for any KVM.

// All of it is a test; clippy.toml knows functions with an attribute for that only.
#![allow(clippy::expect_used, clippy::unwrap_used)]
#![allow(unsafe_code)]

mod guest;

use std::time::Duration;

use dragonball::Vm;
use dragonball::config::VcpuConfig;
use dragonball::vm::{ExitReason, VmError, VmState};
use guest::{Code, LONG, Scratch, config, run, wait_for};

#[test]
fn power_off_when_written_to_the_sleep_register_ends_the_machine() {
    let (reason, console) = run(&Code::default().print("hello\n").power_off());
    assert_eq!(reason, ExitReason::PowerOff);
    assert_eq!(console, ["hello"]);
}

#[test]
fn reboot_when_written_to_the_reset_register_ends_the_machine() {
    assert_eq!(run(&Code::default().out8(0x602, 1).halt()).0, ExitReason::Reboot);
}

#[test]
fn reboot_when_jumping_to_the_reset_vector_ends_the_machine() {
    // From real mode, as kernels do: ljmp 0xf000:0xfff0
    let code = wake(Code::default().map_devices(), &[0xea, 0xf0, 0xff, 0x00, 0xf0]).halt();
    let scratch = Scratch::new();
    let mut config = config(&scratch, &code);
    config.vcpus = VcpuConfig { boot: 2, max: 2 };
    let vm = Vm::new(config).unwrap();
    vm.start().unwrap();
    assert_eq!(vm.wait_timeout(LONG), Some(ExitReason::Reboot));
}

#[test]
fn panic_when_reported_through_pvpanic_ends_the_machine() {
    assert_eq!(run(&Code::default().out8(0x505, 1).halt()).0, ExitReason::Panic);
}

#[test]
fn triple_fault_when_no_interrupt_table_exists_ends_the_machine() {
    // ud2 with an empty IDT
    assert_eq!(
        run(&Code::default().raw(&[0x0f, 0x0b])).0,
        ExitReason::TripleFault
    );
}

#[test]
fn in_when_nothing_is_at_the_port_reads_ones() {
    let code = Code::default()
        .in8(0x80)
        .print_al()
        .in8(0x505)
        .print_al()
        .in8(0x601)
        .print_al()
        .power_off();
    assert_eq!(run(&code).1, ["ff", "01", "00"]);
}

#[test]
fn load_when_nothing_is_at_the_address_reads_ones() {
    let code = Code::default()
        .map_devices()
        .load32(0xd010_0000)
        .print_al()
        .store32(0xd010_0000, 1)
        .power_off();
    let (reason, console) = run(&code);
    assert_eq!((reason, console), (ExitReason::PowerOff, vec!["ff".to_owned()]));
}

#[test]
fn stop_when_the_guest_spins_ends_it() {
    let scratch = Scratch::new();
    let vm = Vm::new(config(&scratch, &Code::default().print("spinning\n").spin())).unwrap();
    vm.start().unwrap();
    wait_for(&vm, "spinning");
    assert_eq!(vm.state(), VmState::Running);
    assert_eq!(vm.wait_timeout(Duration::from_millis(20)), None);

    vm.stop().unwrap();

    assert_eq!(vm.wait(), ExitReason::Stopped);
    assert_eq!(vm.state(), VmState::Stopped(ExitReason::Stopped));
    vm.stop().unwrap();
}

#[test]
fn pause_and_stop_when_the_caller_had_blocked_all_signals_work() {
    let scratch = Scratch::new();
    let config = config(&scratch, &Code::default().print("spinning\n").spin());
    // A thread of its own: the mask stays with it. Real-time signals are what asynchronous runtimes and shims block.
    let thread = std::thread::spawn(move || {
        // SAFETY: an empty set is a valid value for sigfillset to fill; pthread_sigmask reads it.
        unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            assert_eq!(
                libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, std::ptr::null_mut()),
                0
            );
        }
        let vm = Vm::new(config).unwrap();
        vm.start().unwrap();
        wait_for(&vm, "spinning");
        vm.pause().unwrap();
        vm.resume().unwrap();
        vm.stop().unwrap();
    });
    let end = std::time::Instant::now() + LONG;
    while !thread.is_finished() {
        assert!(std::time::Instant::now() < end, "vCPU threads cannot be kicked");
        std::thread::sleep(Duration::from_millis(5));
    }
    thread.join().unwrap();
}

#[test]
fn stop_when_the_guest_is_halted_ends_it() {
    let scratch = Scratch::new();
    let vm = Vm::new(config(&scratch, &Code::default().print("halting\n").halt())).unwrap();
    vm.start().unwrap();
    wait_for(&vm, "halting");
    vm.stop().unwrap();
    assert_eq!(vm.wait(), ExitReason::Stopped);
}

#[test]
fn stop_when_never_started_ends_the_machine() {
    let scratch = Scratch::new();
    let vm = Vm::new(config(&scratch, &Code::default().print("never\n").halt())).unwrap();
    assert_eq!(vm.state(), VmState::Configured);
    vm.stop().unwrap();
    assert_eq!(vm.wait(), ExitReason::Stopped);
    assert!(vm.console().tail(1).is_empty());
    assert!(matches!(
        vm.start(),
        Err(VmError::State {
            operation: "start",
            ..
        })
    ));
}

/// Counts in memory and prints a dot every 65536 rounds.
fn counting() -> Code {
    // xor ecx, ecx; 1: inc ecx; test cx, cx; jnz 1b; <out '.'>; jmp 1b
    let mut code = Code::default()
        .raw(&[0x31, 0xc9, 0xff, 0xc1, 0x66, 0x85, 0xc9, 0x75, 0xf9])
        .out8(0x3f8, b'.');
    let back = -(code.0.len() as i8 + 2 - 2);
    code = code.raw(&[0xeb, back as u8]);
    code
}

fn dots(vm: &Vm) -> usize {
    vm.console().tail(1).first().map_or(0, String::len)
}

#[test]
fn pause_when_running_stops_progress_until_resume() {
    let scratch = Scratch::new();
    let vm = Vm::new(config(&scratch, &counting())).unwrap();
    assert!(matches!(
        vm.pause(),
        Err(VmError::State {
            operation: "pause",
            ..
        })
    ));
    vm.start().unwrap();
    wait_for(&vm, ".");
    for _ in 0..5 {
        vm.pause().unwrap();
        assert_eq!(vm.state(), VmState::Paused);
        let paused = dots(&vm);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(dots(&vm), paused);
        assert!(matches!(vm.pause(), Err(VmError::State { .. })));
        vm.resume().unwrap();
        let end = std::time::Instant::now() + LONG;
        while dots(&vm) == paused {
            assert!(std::time::Instant::now() < end);
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    vm.pause().unwrap();
    vm.stop().unwrap();
    assert!(matches!(vm.resume(), Err(VmError::State { .. })));
}

#[test]
fn wait_when_called_by_many_tells_all() {
    let scratch = Scratch::new();
    let vm = Vm::new(config(&scratch, &Code::default().spin())).unwrap();
    vm.start().unwrap();
    std::thread::scope(|scope| {
        let waiters: Vec<_> = (0..4).map(|_| scope.spawn(|| vm.wait())).collect();
        vm.stop().unwrap();
        for waiter in waiters {
            assert_eq!(waiter.join().unwrap(), ExitReason::Stopped);
        }
    });
}

/// The boot processor puts real-mode code at 0x8000 and sends INIT and SIPI to processor 1.
fn wake(mut code: Code, second: &[u8]) -> Code {
    for (index, chunk) in second.chunks(4).enumerate() {
        let mut word = [0x90; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        code = code.store32(0x8000 + 4 * index as u64, u32::from_le_bytes(word));
    }
    let (icr_low, icr_high) = (0xfee0_0300, 0xfee0_0310);
    // Enable the local APIC (spurious interrupt vector register).
    code = code.store32(0xfee0_00f0, 0x1ff);
    code = code.store32(icr_high, 1 << 24).store32(icr_low, 0x0000_4500);
    code.store32(icr_high, 1 << 24).store32(icr_low, 0x0000_4608)
}

/// Processor 1 prints from real mode, tells the boot processor through memory and halts.
fn two_processors() -> Code {
    // mov dx, 0x3f8; mov al, 'B'; out dx, al; mov [0x8800], al; cli; 1: hlt; jmp 1b
    let second = [
        0xba, 0xf8, 0x03, 0xb0, b'B', 0xee, 0xa2, 0x00, 0x88, 0xfa, 0xf4, 0xeb, 0xfd,
    ];
    let code = wake(Code::default().map_devices().store32(0x8800, 0), &second);
    // 1: mov eax, [0x8800]; cmp al, 'B'; jne 1b
    let wait = Code::default().load32(0x8800).raw(&[0x3c, b'B']);
    let back = -(wait.0.len() as i8 + 2);
    code.raw(&wait.0)
        .raw(&[0x75, back as u8])
        .print("A\n")
        .power_off()
}

#[test]
fn second_processor_when_woken_by_the_first_runs() {
    let scratch = Scratch::new();
    let mut config = config(&scratch, &two_processors());
    config.vcpus = VcpuConfig { boot: 2, max: 4 };
    let vm = Vm::new(config).unwrap();
    let threads = vm.thread_ids();
    assert_eq!(
        threads.vcpus.iter().map(|(index, _)| *index).collect::<Vec<_>>(),
        [0, 1]
    );
    vm.start().unwrap();
    assert_eq!(vm.wait_timeout(LONG), Some(ExitReason::PowerOff));
    assert_eq!(vm.console().tail(1), ["BA"]);
}

#[test]
fn threads_and_descriptors_when_machines_come_and_go_do_not_accumulate() {
    let count = |what: &str| std::fs::read_dir(format!("/proc/self/{what}")).unwrap().count();
    let names = || {
        let mut names = Vec::new();
        for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
            names.push(std::fs::read_to_string(task.path().join("comm")).unwrap_or_default());
        }
        names
    };
    // In a process of its own, other tests' machines would count.
    if std::env::var_os("DRAGONBALL_ALONE").is_none() {
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "threads_and_descriptors_when_machines_come_and_go_do_not_accumulate",
            ])
            .env("DRAGONBALL_ALONE", "1")
            .status()
            .unwrap();
        assert!(status.success());
        return;
    }
    let round = || {
        assert_eq!(run(&Code::default().power_off()).0, ExitReason::PowerOff);
        let scratch = Scratch::new();
        let mut broken = config(&scratch, &Code::default().halt());
        broken.boot.initramfs = Some(scratch.path().join("missing"));
        Vm::new(broken).unwrap_err();
    };
    round();
    let settled = || {
        let end = std::time::Instant::now() + LONG;
        while names()
            .iter()
            .any(|name| name.starts_with("vmm") || name.starts_with("vcpu"))
        {
            assert!(std::time::Instant::now() < end, "{:?}", names());
            std::thread::sleep(Duration::from_millis(5));
        }
        (count("fd"), count("task"))
    };
    let before = settled();
    for _ in 0..5 {
        round();
    }
    // The kernel ends threads of its own, of KVM and of io_uring, a little later.
    let end = std::time::Instant::now() + LONG;
    while settled() != before {
        let now = settled();
        assert!(
            std::time::Instant::now() < end,
            "{now:?} of {before:?}: {:?}",
            names()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}
