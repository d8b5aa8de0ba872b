//! Checks of the merged configuration: each error names origin, key, value and what is allowed.

use std::fs::File;
use std::path::Path;

use super::{BootAsset, ConfigError, HypervisorConfig, InternetworkingModel, Origins, TomlConfig};

/// Smallest guest memory, MiB (Kata's figure).
pub const MIN_MEMORY_MIB: u64 = 64;
/// Largest guest memory, MiB: 1 TiB (Kata's figure).
const MAX_MEMORY_MIB: u64 = 1 << 20;
/// Most vCPUs of a VM.
pub const MAX_VCPUS: u8 = 254;

/// Most queue pairs of a network interface.
pub const MAX_NETWORK_QUEUES: u32 = 8;

impl TomlConfig {
    /// Checks every value; files are looked at by [`HypervisorConfig::check_assets`].
    ///
    /// # Errors
    /// The first bad value, as [`ConfigError::Value`].
    pub fn validate(&self, origins: &Origins) -> Result<(), ConfigError> {
        self.hypervisor.dragonball.validate(origins)?;
        let agent = &self.agent.kata;
        for (key, port) in [("server_port", agent.server_port), ("log_port", agent.log_port)] {
            if port == 0 || port == u32::MAX {
                return Err(bad(
                    origins,
                    &format!("agent.kata.{key}"),
                    port,
                    "must be a vsock port, 1 to 4294967294",
                ));
            }
        }
        let runtime = &self.runtime;
        // Kata's rule: whoever asks for a model wants interfaces.
        if runtime.disable_new_netns && runtime.internetworking_model != InternetworkingModel::None {
            return Err(bad(
                origins,
                "runtime.disable_new_netns",
                true,
                "must be false unless internetworking_model is \"none\"",
            ));
        }
        Ok(())
    }
}

impl HypervisorConfig {
    fn validate(&self, origins: &Origins) -> Result<(), ConfigError> {
        let value = |key: &str, value: &dyn std::fmt::Display, allowed: &str| {
            bad(origins, &format!("hypervisor.dragonball.{key}"), value, allowed)
        };
        let vcpus_range = format!("must be 1 to {MAX_VCPUS}, or negative for all of the host's");
        // NaN fails the comparison as well.
        let in_range = self.default_vcpus < 0.0
            || (self.default_vcpus > 0.0 && self.default_vcpus <= f64::from(MAX_VCPUS));
        if !in_range {
            return Err(value("default_vcpus", &self.default_vcpus, &vcpus_range));
        }
        if self.default_maxvcpus > u32::from(MAX_VCPUS) {
            let allowed = format!("must be 0 (the host's) to {MAX_VCPUS}");
            return Err(value("default_maxvcpus", &self.default_maxvcpus, &allowed));
        }
        if self.default_maxvcpus > 0 && self.default_vcpus.ceil() > f64::from(self.default_maxvcpus) {
            let allowed = format!("must not exceed default_maxvcpus = {}", self.default_maxvcpus);
            return Err(value("default_vcpus", &self.default_vcpus, &allowed));
        }
        if self.default_memory < MIN_MEMORY_MIB || self.default_memory > MAX_MEMORY_MIB {
            let allowed = format!("must be {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB} MiB");
            return Err(value("default_memory", &self.default_memory, &allowed));
        }
        if !(0.0..=f64::from(MAX_VCPUS)).contains(&self.overhead_vcpus) {
            return Err(value("overhead_vcpus", &self.overhead_vcpus, "must be 0 or more"));
        }
        if self.hotplug_slots > 32 {
            return Err(value("hotplug_slots", &self.hotplug_slots, "must be 0 to 32"));
        }
        if !(1..=MAX_NETWORK_QUEUES).contains(&self.network_queues) {
            let allowed = format!("must be 1 to {MAX_NETWORK_QUEUES}");
            return Err(value("network_queues", &self.network_queues, &allowed));
        }
        if self.kernel_params.contains(['\n', '\0']) {
            return Err(value(
                "kernel_params",
                &format!("{:?}", self.kernel_params),
                "must be one line",
            ));
        }
        if self.disable_seccomp && self.seccomp_log_only {
            let allowed = "needs filters: disable_seccomp must be false";
            return Err(value("seccomp_log_only", &self.seccomp_log_only, allowed));
        }
        let set =
            |path: &Option<std::path::PathBuf>| path.as_ref().is_some_and(|p| !p.as_os_str().is_empty());
        if set(&self.image) && set(&self.initrd) {
            let image = self
                .image
                .as_deref()
                .unwrap_or(Path::new(""))
                .display()
                .to_string();
            return Err(value(
                "image",
                &format!("{image:?}"),
                "and initrd exclude each other, set one",
            ));
        }
        Ok(())
    }

    /// Opens kernel and image or initramfs, so that a missing file is named before a VM is built.
    ///
    /// # Errors
    /// [`ConfigError::Asset`] naming the file.
    pub fn check_assets(&self, origins: &Origins) -> Result<(), ConfigError> {
        check_file(origins, "hypervisor.dragonball.kernel", &self.kernel)?;
        match self.boot_asset() {
            BootAsset::Image(path) => check_file(origins, "hypervisor.dragonball.image", &path),
            BootAsset::Initrd(path) => check_file(origins, "hypervisor.dragonball.initrd", &path),
        }
    }
}

fn bad(origins: &Origins, key: &str, value: impl std::fmt::Display, allowed: &str) -> ConfigError {
    ConfigError::Value {
        origin: origins.of(key),
        key: key.to_owned(),
        value: value.to_string(),
        allowed: allowed.to_owned(),
    }
}

fn check_file(origins: &Origins, key: &str, path: &Path) -> Result<(), ConfigError> {
    let error = |source| ConfigError::Asset {
        origin: origins.of(key),
        key: key.to_owned(),
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(error)?;
    let metadata = file.metadata().map_err(error)?;
    if metadata.is_dir() {
        return Err(error(std::io::Error::from(std::io::ErrorKind::IsADirectory)));
    }
    Ok(())
}
