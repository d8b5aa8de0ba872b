//! containerd's configuration with its CRI plugin: handlers for runc and for the runtime that is tested, one pair per network.

use std::path::Path;

use super::cni::Network;
use crate::image::PAUSE;
use crate::settings::{RUNC, Settings};

/// A containerd that the CRI tests run against, by where it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Series {
    /// Debian 12's own.
    V1_6,
    /// Debian 13's.
    V1_7,
    /// Debian sid's.
    V2_1,
}

impl Series {
    /// Every one, oldest first.
    pub const ALL: [Self; 3] = [Self::V1_6, Self::V1_7, Self::V2_1];

    /// As its packages name it.
    pub fn number(self) -> &'static str {
        match self {
            Self::V1_6 => "1.6",
            Self::V1_7 => "1.7",
            Self::V2_1 => "2.1",
        }
    }
}

/// What makes a containerd one with CRI.
#[derive(Clone, Debug)]
pub struct Cri {
    /// Whose configuration format it has.
    pub series: Series,
    /// The networks a pod may ask for.
    pub networks: Vec<Network>,
    /// Folder of the CNI plugins.
    pub plugins: std::path::PathBuf,
}

/// The handler's name for a runtime and a network, and whether pods are sandboxes of the shim's own (Sandbox API), whose containers'
/// stdio is streamed.
pub fn handler(vm: bool, network: &str, sandbox_api: bool) -> String {
    let runtime = match (vm, sandbox_api) {
        (false, _) => "runc",
        (true, false) => "kata",
        (true, true) => "kata-sandbox",
    };
    format!("{runtime}-{network}")
}

impl Cri {
    /// The version of the configuration format.
    pub fn config_version(&self) -> u32 {
        match self.series {
            Series::V1_6 | Series::V1_7 => 2,
            Series::V2_1 => 3,
        }
    }

    /// The sections of the CRI plugin. `dir` is the private folder.
    pub fn sections(&self, dir: &Path, settings: &Settings, snapshotter: &str) -> String {
        let mut text = String::new();
        let runtime = self.plugin("runtime");
        if self.series == Series::V2_1 {
            text.push_str(&format!(
                "[plugins.\"io.containerd.cri.v1.images\"]\nsnapshotter = \"{snapshotter}\"\n\
                 [plugins.\"io.containerd.cri.v1.images\".pinned_images]\nsandbox = \"{PAUSE}\"\n\
                 [plugins.\"io.containerd.grpc.v1.cri\"]\nstream_server_address = \"127.0.0.1\"\nstream_server_port = \"0\"\n\
                 [plugins.\"{runtime}\"]\n"
            ));
        } else {
            text.push_str(&format!(
                "[plugins.\"{runtime}\"]\nsandbox_image = \"{PAUSE}\"\n\
                 stream_server_address = \"127.0.0.1\"\nstream_server_port = \"0\"\n"
            ));
        }
        // Root without CAP_SYS_RESOURCE, as in a container, may not lower it.
        text.push_str("restrict_oom_score_adj = true\n");
        // What 2.x does without being asked.
        text.push_str("enable_unprivileged_ports = true\nenable_unprivileged_icmp = true\n");
        let plugins = self.plugins.display();
        let plugins = match self.series {
            Series::V1_6 | Series::V1_7 => format!("bin_dir = \"{plugins}\""),
            Series::V2_1 => format!("bin_dirs = [\"{plugins}\"]"),
        };
        text.push_str(&format!(
            "[plugins.\"{runtime}\".cni]\n{plugins}\nconf_dir = \"{}\"\n\
             [plugins.\"{runtime}\".containerd]\ndefault_runtime_name = \"{}\"\n",
            dir.join("cni/bridge").display(),
            handler(false, "bridge", false),
        ));
        if self.series != Series::V2_1 {
            text.push_str(&format!("snapshotter = \"{snapshotter}\"\n"));
        }
        for network in &self.networks {
            text.push_str(&self.handlers(network, dir, settings));
        }
        text
    }

    fn plugin(&self, part: &str) -> String {
        match self.series {
            Series::V1_6 | Series::V1_7 => "io.containerd.grpc.v1.cri".to_owned(),
            Series::V2_1 => format!("io.containerd.cri.v1.{part}"),
        }
    }

    /// The handlers of one network.
    fn handlers(&self, network: &Network, dir: &Path, settings: &Settings) -> String {
        let mut text = self.handler(RUNC, &handler(false, network.name, false), network, dir);
        if !settings.is_vm_runtime() {
            return text;
        }
        let sandboxers: &[bool] = match self.series {
            Series::V2_1 => &[false, true],
            Series::V1_6 | Series::V1_7 => &[false],
        };
        for &sandbox_api in sandboxers {
            let name = handler(true, network.name, sandbox_api);
            text.push_str(&self.handler(&settings.runtime, &name, network, dir));
            text.push_str("pod_annotations = [\"io.katacontainers.*\"]\n");
            if sandbox_api {
                // Streams over the shim's socket instead of FIFOs: only a sandbox with an address has them.
                text.push_str("sandboxer = \"shim\"\nio_type = \"streaming\"\n");
            }
            if let Some(config) = &settings.config {
                let runtime = self.plugin("runtime");
                text.push_str(&format!(
                    "[plugins.\"{runtime}\".containerd.runtimes.{name}.options]\nConfigPath = \"{}\"\n",
                    config.display()
                ));
            }
        }
        text
    }

    fn handler(&self, kind: &str, name: &str, network: &Network, dir: &Path) -> String {
        format!(
            "[plugins.\"{}\".containerd.runtimes.{name}]\nruntime_type = \"{kind}\"\ncni_conf_dir = \"{}\"\ncni_max_conf_num = {}\n",
            self.plugin("runtime"),
            dir.join("cni").join(network.name).display(),
            network.files.len(),
        )
    }
}
