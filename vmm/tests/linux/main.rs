//! Real Linux guests. They need a KVM that can run Linux (directly or in the lab), hence the feature; `DRAGONBALL_KERNEL`
//! names our kernel, `DRAGONBALL_STOCK` folders of unmodified Debian kernels, separated by colons, the newest first: each has
//! `vmlinuz` and, in `modules/lib/modules/<release>`, their drivers, as `kernel-config/stock.sh` prints it.
//!
//! `cargo test -p dragonball --features e2e --test linux -- --test-threads 1`

// All of it is a test; clippy.toml knows functions with an attribute for that only.
#![allow(clippy::expect_used, clippy::unwrap_used)]
#![allow(unsafe_code)]

#[path = "../guest/mod.rs"]
mod guest;

mod block;
mod boot;
mod console;
mod cpu;
mod fs;
mod hotplug;
mod kernels;
mod memory;
mod net;
mod shell;
mod snapshot;
mod stock;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use dragonball::Vm;
use dragonball::config::{ConsoleConfig, MemoryConfig, VmConfig};
use dragonball::vm::ExitReason;
use guest::{Code, Scratch, initramfs};

/// Ten times what a busy emulated machine needs.
const LONG: Duration = Duration::from_secs(300);
const CMDLINE: &str = "console=hvc0 panic=-1 pci=off quiet loglevel=1";

fn kernel() -> PathBuf {
    std::env::var_os("DRAGONBALL_KERNEL")
        .expect("DRAGONBALL_KERNEL names a vmlinux")
        .into()
}

/// A machine that boots our kernel into `script`.
fn config(scratch: &Scratch, script: &str) -> VmConfig {
    let mut config = guest::config(scratch, &Code::default());
    config.id = "linux".to_owned();
    config.memory = MemoryConfig::fixed(256);
    config.console = ConsoleConfig::Hvc;
    config.boot.kernel = kernel();
    config.boot.initramfs = Some(initramfs::build(scratch, script));
    config.boot.cmdline = CMDLINE.to_owned();
    config
}

fn start(config: VmConfig) -> Vm {
    let vm = Vm::new(config).unwrap();
    vm.start().unwrap();
    vm
}

/// Runs a machine to its end.
fn run(config: VmConfig) -> (ExitReason, String) {
    let vm = start(config);
    let reason = vm.wait_timeout(LONG);
    let console = vm.console().tail(1000).join("\n");
    (
        reason.unwrap_or_else(|| panic!("the guest does not end:\n{console}")),
        console,
    )
}

fn wait_for(vm: &Vm, text: &str) {
    let end = Instant::now() + LONG;
    loop {
        // In this order: what was printed before the end counts.
        let ended = vm.wait_timeout(Duration::from_millis(20));
        let console = vm.console().tail(1000).join("\n");
        if console.contains(text) {
            return;
        }
        assert_eq!(ended, None, "ended without {text:?}:\n{console}");
        assert!(Instant::now() < end, "no {text:?}:\n{console}");
    }
}
