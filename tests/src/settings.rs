//! Environment variables that steer the suite.
//!
//! | variable | meaning | default |
//! |---|---|---|
//! | `E2E_RUNTIME` | runtime type given to containerd | `io.containerd.kata.v2` |
//! | `E2E_CONTAINERD` | folder holding `containerd` and `ctr` | `/usr/bin` |
//! | `E2E_SHIM_DIR` | folder put in front of containerd's `PATH` | `/usr/local/bin` |
//! | `E2E_CONFIG` | configuration file given with `--runtime-config-path` | none: the runtime's own search |
//! | `E2E_SNAPSHOTTER` | containerd snapshotter | `overlayfs` where it works, else `native` |
//! | `E2E_BUSYBOX` | statically linked busybox put in the image | `/usr/bin/busybox`, `/bin/busybox` |
//! | `E2E_TIMEOUT` | limit of one `ctr` call, in seconds | 300 |
//! | `E2E_TEST_TIMEOUT` | limit of one test, in seconds | 1200 |
//! | `E2E_LINUX_GUESTS` | `0` where KVM cannot run Linux: only tests that fail before a boot apply | 1 |
//! | `E2E_CNI` | folder of the CNI plugins | `/usr/lib/cni` |
//! | `E2E_CONTAINERD_1_7`, `E2E_CONTAINERD_2_1` | folders of the newer containerds' programs | `/opt/containerd-1.7/usr/bin`, … |
//! | `STRESS_PODS`, `STRESS_EXECS` | how many pods at once and commands in sequence the stress tests run | 4, 60 |
//! | `E2E_GUEST_CONFIGS` | folder of configurations for other guests: `6.12.toml`, `6.1.toml`, `initramfs.toml` | `/usr/share/kata-containers/guests` |

use std::env;
use std::path::PathBuf;
use std::time::Duration;

use crate::cri::config::Cri;

/// Runtime type of Debian's runc, which the suite itself is checked against.
pub const RUNC: &str = "io.containerd.runc.v2";

/// How this run of the suite was asked to behave.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Runtime type, such as `io.containerd.kata.v2`.
    pub runtime: String,
    /// Folder holding `containerd` and `ctr`.
    pub containerd: PathBuf,
    /// Folder holding the shim.
    pub shim_dir: PathBuf,
    /// Runtime configuration file; `None` leaves the search to the runtime.
    pub config: Option<PathBuf>,
    /// Snapshotter; `None` picks one that works.
    pub snapshotter: Option<String>,
    /// Candidates for the static busybox, best first.
    pub busybox: Vec<PathBuf>,
    /// Limit of one `ctr` call.
    pub call_limit: Duration,
    /// Limit of one test.
    pub test_limit: Duration,
    /// Folder with one configuration per guest of the `guests` binary.
    pub guest_configs: PathBuf,
    /// Whether KVM can run Linux here.
    pub linux_guests: bool,
    /// CRI's plugin with networks for its pods; `None` leaves it out.
    pub cri: Option<Cri>,
    /// Folder of the CNI plugins.
    pub cni: PathBuf,
    /// Shell commands run in a mount namespace of its own before containerd starts in it; `$DIR` is the
    /// private folder.
    pub host_change: Option<String>,
    /// Extra environment of containerd, inherited by the shim.
    pub environment: Vec<(String, String)>,
}

impl Settings {
    /// Reads the settings from the environment.
    pub fn from_env() -> Self {
        let text = |name: &str, default: &str| env::var(name).unwrap_or_else(|_| default.to_owned());
        let seconds = |name: &str, default: u64| {
            Duration::from_secs(
                env::var(name)
                    .ok()
                    .and_then(|v| v.parse().ok())
                    .unwrap_or(default),
            )
        };
        Self {
            runtime: text("E2E_RUNTIME", "io.containerd.kata.v2"),
            containerd: text("E2E_CONTAINERD", "/usr/bin").into(),
            shim_dir: text("E2E_SHIM_DIR", "/usr/local/bin").into(),
            config: env::var_os("E2E_CONFIG").map(PathBuf::from),
            snapshotter: env::var("E2E_SNAPSHOTTER").ok(),
            busybox: match env::var_os("E2E_BUSYBOX") {
                Some(path) => vec![path.into()],
                None => vec!["/usr/bin/busybox".into(), "/bin/busybox".into()],
            },
            call_limit: seconds("E2E_TIMEOUT", 300),
            test_limit: seconds("E2E_TEST_TIMEOUT", 1200),
            guest_configs: text("E2E_GUEST_CONFIGS", "/usr/share/kata-containers/guests").into(),
            linux_guests: text("E2E_LINUX_GUESTS", "1") != "0",
            cri: None,
            cni: text("E2E_CNI", "/usr/lib/cni").into(),
            host_change: None,
            environment: Vec::new(),
        }
    }

    /// The folder of the programs of a containerd newer than Debian 12's, such as `1.7`.
    pub fn newer_containerd(version: &str) -> PathBuf {
        let variable = format!("E2E_CONTAINERD_{}", version.replace('.', "_"));
        let default = || format!("/opt/containerd-{version}/usr/bin").into();
        env::var_os(&variable).map_or_else(default, PathBuf::from)
    }

    /// Whether containers run in virtual machines, as opposed to Debian's runc.
    pub fn is_vm_runtime(&self) -> bool {
        self.runtime != RUNC
    }

    /// The shim's file name, as containerd derives it from the runtime type.
    pub fn shim_name(&self) -> String {
        let mut parts = self.runtime.rsplit('.');
        let version = parts.next().unwrap_or_default();
        let name = parts.next().unwrap_or_default();
        format!("containerd-shim-{name}-{version}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shim_name_when_runtime_type_is_given_follows_containerd() {
        let mut settings = Settings::from_env();
        settings.runtime = "io.containerd.kata.v2".into();
        assert_eq!(settings.shim_name(), "containerd-shim-kata-v2");
        assert!(settings.is_vm_runtime());
        settings.runtime = RUNC.into();
        assert_eq!(settings.shim_name(), "containerd-shim-runc-v2");
        assert!(!settings.is_vm_runtime());
    }
}
