//! Saves a machine once it has said something, and restores it; says how long a restore takes.
//!
//! `snapshot save DIR KERNEL INITRAMFS [CMDLINE]`, then `snapshot restore DIR [eager|copy|uffd]`: restores, and ends at the
//! guest's first output. The time counts from before the process is executed.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use dragonball::Vm;
use dragonball::config::{
    BootConfig, Confinement, ConsoleConfig, CpuConfig, DeviceConfig, MemoryConfig, RngConfig, VcpuConfig,
    VmConfig, VsockConfig,
};
use dragonball::vm::snapshot::{MemoryMode, RestoreOptions, SaveKind};

/// Nanoseconds since 1970 at which `restore` was asked for.
const ASKED: &str = "DRAGONBALL_ASKED";

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn now() -> Result<u128> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos())
}

fn wait_for_output(vm: &Vm) -> Result<()> {
    let before = vm.console().tail(1);
    for _ in 0..120_000 {
        if vm.console().tail(1) != before {
            return Ok(());
        }
        if let Some(reason) = vm.wait_timeout(Duration::from_micros(100)) {
            return Err(format!("the machine ended: {reason}").into());
        }
    }
    Err("the guest says nothing".into())
}

fn save(dir: &str, kernel: &str, initramfs: &str, cmdline: &str) -> Result<()> {
    let vm = Vm::new(VmConfig {
        id: "snapshot".to_owned(),
        vcpus: VcpuConfig { boot: 1, max: 1 },
        cpu: CpuConfig::default(),
        memory: MemoryConfig::fixed(512),
        boot: BootConfig {
            kernel: kernel.into(),
            initramfs: Some(initramfs.into()),
            cmdline: cmdline.to_owned(),
            cache_dir: std::env::temp_dir().join("dragonball"),
        },
        console: ConsoleConfig::Hvc,
        vsock: Some(VsockConfig {
            guest_cid: 3,
            uds_path: None,
        }),
        devices: vec![DeviceConfig::Rng(RngConfig { id: "rng".to_owned() })],
        hotplug_slots: 8,
        confinement: Confinement::default(),
    })?;
    vm.start()?;
    wait_for_output(&vm)?;
    vm.pause()?;
    let report = vm.save(Path::new(dir), &SaveKind::Full)?;
    println!("saved {} bytes of memory", report.memory_bytes);
    Ok(())
}

fn restore(dir: &str, mode: &str) -> Result<()> {
    let Some(asked) = std::env::var(ASKED).ok() else {
        let error = Command::new(std::env::current_exe()?)
            .args(["restore", dir, mode])
            .env(ASKED, now()?.to_string())
            .exec();
        return Err(error.into());
    };
    let main = now()?;
    let memory = match mode {
        "eager" => MemoryMode::Eager,
        "copy" => MemoryMode::CopyOnWrite,
        "uffd" => MemoryMode::Userfaultfd,
        other => return Err(format!("no mode {other:?}").into()),
    };
    let options = RestoreOptions {
        memory,
        ..RestoreOptions::default()
    };
    let vm = Vm::restore(Path::new(dir), &options)?;
    let restored = now()?;
    vm.resume()?;
    wait_for_output(&vm)?;
    let asked: u128 = asked.parse()?;
    println!(
        "{mode}: process {} us, restore {} us, first output {} us after the request",
        main.saturating_sub(asked) / 1000,
        restored.saturating_sub(main) / 1000,
        now()?.saturating_sub(asked) / 1000
    );
    Ok(())
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments[..] {
        ["save", dir, kernel, initramfs] => save(dir, kernel, initramfs, "console=hvc0 quiet"),
        ["save", dir, kernel, initramfs, cmdline] => save(dir, kernel, initramfs, cmdline),
        ["restore", dir] => restore(dir, "copy"),
        ["restore", dir, mode] => restore(dir, mode),
        _ => {
            Err("usage: snapshot save DIR KERNEL INITRAMFS [CMDLINE] | restore DIR [eager|copy|uffd]".into())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("snapshot: {error}");
            ExitCode::FAILURE
        }
    }
}
