//! Other guests than the usual kernel with its disk image: Debian's own kernels, with their modules in an initramfs, and the
//! usual kernel with one.
//!
//! `E2E_GUEST_CONFIGS` names a folder with one runtime configuration per guest.

use tests::case::skipped_under_runc;
use tests::{Case, Settings};

/// Runs a container in the guest of `<name>.toml`; returns what it printed: `uname -r`, then the kernel command line.
fn boots(name: &str) -> Option<String> {
    if skipped_under_runc("another guest needs a guest") {
        return None;
    }
    let settings = Settings::from_env();
    let config = settings.guest_configs.join(format!("{name}.toml"));
    assert!(config.exists(), "no configuration {}", config.display());
    let case = Case::begin_with(
        &format!("guest-{name}"),
        Settings {
            config: Some(config),
            ..settings
        },
    );
    let container = case.container();
    let script = "uname -r; cat /proc/cmdline; read -r line; echo $line; exit 7";
    let input = tests::command::Input::Bytes(b"through stdin\n".to_vec());
    let done = container
        .run(&["sh", "-c", script])
        .flag("--rm")
        .output_with(input)
        .expect_code(7);
    let out = done.out();
    assert_eq!(out.lines().last(), Some("through stdin"), "{}", done.describe());
    Some(out)
}

fn debian_boots(version: &str) {
    if let Some(out) = boots(version) {
        let release = out.lines().next().unwrap_or_default();
        assert!(
            release.starts_with(&format!("{version}.")) && release.contains("cloud"),
            "{out}"
        );
    }
}

#[test]
fn debian_6_12_cloud_kernel_when_configured_runs_a_container() {
    debian_boots("6.12");
}

#[test]
fn debian_6_1_cloud_kernel_when_configured_runs_a_container() {
    debian_boots("6.1");
}

#[test]
fn initramfs_when_configured_is_the_root_and_runs_a_container() {
    if let Some(out) = boots("initramfs") {
        assert!(!out.contains(" root="), "{out}");
    }
}
