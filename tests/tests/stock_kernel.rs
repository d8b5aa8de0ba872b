//! Debian's own kernels as guests, with their modules in the guest image.
//!
//! `E2E_STOCK_CONFIGS` names a folder with one runtime configuration per kernel: `6.12.toml` and `6.1.toml`.

use tests::case::skipped_under_runc;
use tests::{Case, Settings};

fn boots(version: &str) {
    if skipped_under_runc("a stock guest kernel needs a guest") {
        return;
    }
    let settings = Settings::from_env();
    let config = settings.stock_configs.join(format!("{version}.toml"));
    assert!(config.exists(), "no configuration {}", config.display());
    let case = Case::begin_with(
        &format!("stock-{version}"),
        Settings {
            config: Some(config),
            ..settings
        },
    );
    let container = case.container();
    let script = "uname -r; mount | grep -c ' / '; read -r line; echo $line; exit 7";
    let input = tests::command::Input::Bytes(b"through stdin\n".to_vec());
    let done = container
        .run(&["sh", "-c", script])
        .flag("--rm")
        .output_with(input)
        .expect_code(7);
    let out = done.out();
    let release = out.lines().next().unwrap_or_default();
    assert!(
        release.starts_with(&format!("{version}.")) && release.contains("cloud"),
        "{}",
        done.describe()
    );
    assert_eq!(out.lines().last(), Some("through stdin"), "{}", done.describe());
}

#[test]
fn debian_6_12_cloud_kernel_when_configured_runs_a_container() {
    boots("6.12");
}

#[test]
fn debian_6_1_cloud_kernel_when_configured_runs_a_container() {
    boots("6.1");
}
