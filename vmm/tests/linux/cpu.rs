//! What the guest sees of the host's CPU, and whether it can go on elsewhere with it.

use std::path::Path;

use dragonball::Vm;
use dragonball::config::{CpuConfig, CpuTemplate, VcpuConfig};
use dragonball::vm::ExitReason;
use dragonball::vm::snapshot::{RestoreOptions, SaveKind};

use crate::guest::Scratch;
use crate::{LONG, config, run, start, wait_for};

/// Those of a flag list that matter here, each once, in a line of their own.
fn show(flags: &str) -> String {
    format!(
        "for flag in {flags}; do grep -qw $flag /proc/cpuinfo && echo $flag; done | tr '\\n' ' '; echo end"
    )
}

fn guest_flags(flags: &str, cpu: CpuConfig) -> String {
    let scratch = Scratch::new();
    let mut config = config(&scratch, &show(flags));
    config.cpu = cpu;
    let (reason, console) = run(config);
    assert_eq!(reason, ExitReason::PowerOff, "{console}");
    console.lines().last().unwrap_or_default().to_owned()
}

fn host_has(flag: &str) -> bool {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    cpuinfo.split_whitespace().any(|word| word == flag)
}

#[test]
fn virtualization_when_off_is_not_there_and_when_on_is_the_hosts() {
    assert_eq!(guest_flags("svm vmx", CpuConfig::default()), "end");
    let nested = CpuConfig {
        nested: true,
        ..CpuConfig::default()
    };
    let host: String = ["svm", "vmx"]
        .iter()
        .filter(|flag| host_has(flag))
        .map(|flag| format!("{flag} "))
        .collect();
    assert_eq!(guest_flags("svm vmx", nested), format!("{host}end"));
}

#[test]
fn template_when_chosen_boots_with_its_features_only() {
    let template = |template| CpuConfig {
        template,
        ..CpuConfig::default()
    };
    let flags = "sse4_2 popcnt avx avx2 avx512f";
    let v2 = guest_flags(flags, template(CpuTemplate::V2));
    assert_eq!(v2, "sse4_2 popcnt end");
    if host_has("avx2") && host_has("fma") && host_has("f16c") {
        let v3 = guest_flags(flags, template(CpuTemplate::V3));
        assert_eq!(v3, "sse4_2 popcnt avx avx2 end");
    }
}

/// Ticks, with a vCPU added after the restore.
fn survives_a_save(cpu: CpuConfig) {
    let scratch = Scratch::new();
    let mut config = config(
        &scratch,
        "i=0; while [ $i -lt 1000000 ]; do i=$((i+1)); echo tick $i; sleep 0.1; done",
    );
    config.vcpus = VcpuConfig { boot: 1, max: 2 };
    config.cpu = cpu;
    let vm = start(config);
    wait_for(&vm, "tick 3");
    let dir: &Path = &scratch.path().join("saved");
    vm.pause().unwrap();
    vm.save(dir, &SaveKind::Full).unwrap();
    drop(vm);
    let vm = Vm::restore(dir, &RestoreOptions::default()).unwrap();
    vm.resume().unwrap();
    wait_for(&vm, "tick ");
    assert_eq!(vm.resize_vcpu(2, LONG).unwrap(), (1, 2));
    vm.stop().unwrap();
}

#[test]
fn machine_when_nested_virtualization_is_on_or_a_template_chosen_is_saved_and_goes_on() {
    survives_a_save(CpuConfig {
        nested: true,
        ..CpuConfig::default()
    });
    survives_a_save(CpuConfig {
        template: CpuTemplate::V2,
        ..CpuConfig::default()
    });
}
