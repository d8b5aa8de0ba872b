//! Boots a kernel and an initramfs, with the guest's console on stdout; for trying the VMM by itself.
//!
//! `boot --kernel vmlinux --initramfs initrd [--cmdline TEXT] [--vcpus N] [--memory MIB] [--serial | --no-console]
//! [--disk FILE]… [--sync-disk FILE]… [--uring-disk FILE]… [--share DIR]… [--net TAP]… [--vsock SOCKET] [--rng] [--slots N]
//! [--timeout SECONDS]`

use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use dragonball::Vm;
use dragonball::config::{
    BlockConfig, BlockEngine, BootConfig, Confinement, ConsoleConfig, CpuConfig, DeviceConfig, FsConfig,
    FsRoot, MemoryConfig, NetConfig, RngConfig, SharedDir, VcpuConfig, VmConfig, VsockConfig,
};
use dragonball::vm::ExitReason;

struct Arguments {
    config: VmConfig,
    timeout: Duration,
}

fn parse() -> Result<Arguments, String> {
    let mut config = VmConfig {
        id: "boot".to_owned(),
        vcpus: VcpuConfig { boot: 1, max: 1 },
        cpu: CpuConfig::default(),
        memory: MemoryConfig::fixed(256),
        boot: BootConfig {
            kernel: PathBuf::new(),
            initramfs: None,
            cmdline: "console=hvc0 panic=-1".to_owned(),
            cache_dir: std::env::temp_dir().join("dragonball"),
        },
        console: ConsoleConfig::Hvc,
        vsock: None,
        devices: Vec::new(),
        hotplug_slots: 0,
        confinement: Confinement::default(),
    };
    let mut timeout = Duration::from_secs(120);
    let mut arguments = std::env::args().skip(1);
    while let Some(option) = arguments.next() {
        let number = config.devices.len();
        let mut value = || arguments.next().ok_or_else(|| format!("{option} needs a value"));
        let integer = |text: String| text.parse::<u64>().map_err(|e| format!("{option} {text}: {e}"));
        match option.as_str() {
            "--kernel" => config.boot.kernel = value()?.into(),
            "--initramfs" => config.boot.initramfs = Some(value()?.into()),
            "--cmdline" => config.boot.cmdline = value()?,
            "--vcpus" => {
                let count = u8::try_from(integer(value()?)?).map_err(|e| e.to_string())?;
                config.vcpus = VcpuConfig {
                    boot: count,
                    max: count,
                };
            }
            "--memory" => config.memory = MemoryConfig::fixed(integer(value()?)?),
            "--serial" => config.console = ConsoleConfig::Serial,
            "--no-console" => config.console = ConsoleConfig::Off,
            "--rng" => config.devices.push(DeviceConfig::Rng(RngConfig {
                id: format!("rng{number}"),
            })),
            "--slots" => {
                config.hotplug_slots = u8::try_from(integer(value()?)?).map_err(|e| e.to_string())?;
            }
            "--timeout" => timeout = Duration::from_secs(integer(value()?)?),
            "--disk" => config.devices.push(DeviceConfig::Block(BlockConfig::new(
                format!("disk{number}"),
                value()?,
            ))),
            "--sync-disk" | "--uring-disk" => config.devices.push(DeviceConfig::Block(BlockConfig {
                engine: match option.as_str() {
                    "--sync-disk" => BlockEngine::Sync,
                    _ => BlockEngine::IoUring,
                },
                ..BlockConfig::new(format!("disk{number}"), value()?)
            })),
            "--vsock" => {
                config.vsock = Some(VsockConfig {
                    guest_cid: 3,
                    uds_path: Some(value()?.into()),
                });
            }
            "--net" => {
                let net = NetConfig::new(&format!("net{number}"), &value()?);
                config.devices.push(DeviceConfig::Net(net));
            }
            "--share" => config.devices.push(DeviceConfig::Fs(FsConfig::new(
                format!("share{number}"),
                format!("share{number}"),
                FsRoot::Directory(SharedDir::writable(value()?)),
            ))),
            other => return Err(format!("unknown option {other}")),
        }
    }
    Ok(Arguments { config, timeout })
}

fn boot(arguments: Arguments) -> Result<ExitReason, String> {
    let vm = Vm::new(arguments.config).map_err(|e| e.to_string())?;
    let stdout = io::stdout()
        .as_fd()
        .try_clone_to_owned()
        .map_err(|e| e.to_string())?;
    vm.console().set_sink(stdout).map_err(|e| e.to_string())?;
    vm.start().map_err(|e| e.to_string())?;
    let started = std::time::Instant::now();
    let reason = vm.wait_timeout(arguments.timeout);
    let metrics = vm.metrics();
    let timings = vm.timings();
    eprintln!(
        "boot: built in {:?}, ran {:?}",
        timings.built.instant - timings.build_started.instant,
        started.elapsed()
    );
    reason.ok_or_else(|| {
        // Stopping cannot fail; what matters is the timeout.
        let _ = vm.stop();
        format!("timeout; {metrics:?}")
    })
}

fn main() -> ExitCode {
    match parse().and_then(boot) {
        Ok(reason) => {
            eprintln!("boot: {reason}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("boot: {error}");
            ExitCode::FAILURE
        }
    }
}
