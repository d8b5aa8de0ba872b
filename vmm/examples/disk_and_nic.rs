//! A machine with a disk and a network interface, from nothing to its end: `disk_and_nic VMLINUX INITRAMFS DISK TAP`.
//!
//! The TAP is set up before (`ip tuntap add tap0 mode tap; ip address add 10.0.0.1/24 dev tap0; ip link set tap0 up`); in the guest
//! they are `/dev/vda` and `eth0`.

use std::error::Error;
use std::io;
use std::os::fd::AsFd;

use dragonball::Vm;
use dragonball::config::{
    BlockConfig, BootConfig, Confinement, ConsoleConfig, CpuConfig, DeviceConfig, MemoryConfig, NetConfig,
    VcpuConfig, VmConfig,
};
use dragonball::vm::ExitReason;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kernel, initramfs, disk, tap] = arguments.as_slice() else {
        return Err("usage: disk_and_nic VMLINUX INITRAMFS DISK TAP".into());
    };
    let vm = Vm::new(VmConfig {
        id: "example".to_owned(),
        vcpus: VcpuConfig { boot: 1, max: 1 },
        cpu: CpuConfig::default(),
        memory: MemoryConfig::fixed(256),
        boot: BootConfig {
            kernel: kernel.into(),
            initramfs: Some(initramfs.into()),
            cmdline: "console=hvc0 pci=off panic=-1".to_owned(),
            cache_dir: std::env::temp_dir().join("dragonball"),
        },
        console: ConsoleConfig::Hvc,
        vsock: None,
        devices: vec![
            DeviceConfig::Block(BlockConfig::new("disk", disk)),
            DeviceConfig::Net(NetConfig::new("nic", tap)),
        ],
        hotplug_slots: 0,
        confinement: Confinement::default(),
    })?;
    vm.console()
        .set_sink(io::stdout().as_fd().try_clone_to_owned()?)?;
    vm.start()?;
    match vm.wait() {
        ExitReason::PowerOff | ExitReason::Reboot => Ok(()),
        other => Err(other.to_string().into()),
    }
}
