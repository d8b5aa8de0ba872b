//! `kata-ctl`, on whatever host the tests run.

// All of it is a test; clippy.toml knows functions with an attribute for that only.
#![allow(clippy::expect_used, clippy::unwrap_used)]

// The tiny guests of the VMM's tests: what is saved here is a machine like theirs.
#[path = "../../../vmm/tests/guest/mod.rs"]
mod guest;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};

use dragonball::Vm;
use dragonball::vm::snapshot::SaveKind;
use serde_json::Value;

fn ctl(words: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", "120", env!("CARGO_BIN_EXE_kata-ctl")]);
    command.args(words).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn version_when_asked_is_the_shims() {
    assert!(stdout(&ctl(&["version"])).contains(env!("CARGO_PKG_VERSION")));
    assert!(stdout(&ctl(&["--version"])).contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn kvm_check_when_run_agrees_with_the_exit_status() {
    let output = ctl(&["check", "--kvm-can-run-linux"]);

    let text = stdout(&output);
    assert_eq!(text.lines().count(), 1, "{text}");
    assert_eq!(
        output.status.success(),
        text == "KVM can run Linux guests\n",
        "{output:?}"
    );
}

#[test]
fn check_when_the_kernel_is_missing_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("configuration.toml");
    std::fs::write(
        &config,
        "[hypervisor.dragonball]\nkernel = \"/nonexistent/vmlinux\"\n",
    )
    .unwrap();

    let output = ctl(&["--config", config.to_str().unwrap(), "check"]);

    assert!(!output.status.success());
    let failed = stdout(&output)
        .lines()
        .any(|line| line.starts_with("FAIL") && line.contains("/nonexistent/vmlinux"));
    assert!(failed, "{output:?}");
}

#[test]
fn env_when_asked_for_json_is_json() {
    let output = ctl(&["env", "--json"]);

    let env: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(env["runtime"]["type"], "io.containerd.kata.v2");
    assert!(env["host"].is_object() && env["configuration"].is_object());
    assert!(stdout(&ctl(&["env"])).contains("  type: io.containerd.kata.v2"));
}

#[test]
fn snapshot_when_verified_is_undamaged_or_says_where_it_is_not() {
    let scratch = guest::Scratch::new();
    let folder = scratch.path().join("saved");
    let code = guest::Code::default().print("saved\n").spin();
    let vm = Vm::new(guest::config(&scratch, &code)).unwrap();
    vm.start().unwrap();
    guest::wait_for(&vm, "saved");
    vm.pause().unwrap();
    vm.save(&folder, &SaveKind::Full).unwrap();
    vm.stop().unwrap();
    let verify = |folder: &Path| ctl(&["snapshot", "verify", folder.to_str().unwrap()]);

    let output = verify(&folder);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(stdout(&output), format!("{}: undamaged\n", folder.display()));

    // The guest's code, which is somewhere in its memory.
    let memory = File::options().write(true).open(folder.join("memory")).unwrap();
    memory.write_all_at(&[0x90], guest::LOAD).unwrap();
    let output = verify(&folder);
    assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
    let text = stderr(&output);
    assert!(
        text.starts_with(&format!("kata-ctl: snapshot {}: ", folder.display())) && text.contains("0x100000"),
        "{text}"
    );

    let output = verify(scratch.path());
    let missing = scratch.path().join("state").display().to_string();
    assert!(
        !output.status.success() && stderr(&output).contains(&missing),
        "{output:?}"
    );
}

#[test]
fn command_when_unknown_fails_on_stderr() {
    let output = ctl(&["frobnicate"]);

    assert!(!output.status.success() && stderr(&output).contains("frobnicate"));
}
