//! `configuration.toml`: one typed set of structs, Kata's key names and defaults.
//!
//! [`load`] finds the file, merges its drop-ins, warns about every key that has no effect and checks the values; what
//! it returns is used as it is. Annotations of a pod change a copy ([`annotations`]).

pub mod annotations;
mod inert;
mod load;
mod validate;
mod words;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use load::{ConfigFile, Origin, Origins, load, load_with, read};
pub use validate::{MAX_NETWORK_QUEUES, MAX_VCPUS, MIN_MEMORY_MIB};
pub use words::{
    AgentName, CpuTemplate, HypervisorName, InternetworkingModel, RootfsType, RuntimeName, SharedFs,
    UnknownWord, VirtioFsCache,
};

/// A configuration that cannot be used; each message names file, key, value and what is allowed.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The named file does not exist.
    #[error("configuration {path}: no such file")]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// A file that cannot be read.
    #[error("configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What reading it said.
        source: std::io::Error,
    },
    /// Not TOML, or a value of the wrong type.
    #[error("{origin}, line {line}: {message}")]
    Parse {
        /// The file.
        origin: String,
        /// Line of the mistake, from 1.
        line: usize,
        /// What the parser said, in one line.
        message: String,
    },
    /// A value out of range.
    #[error("{origin}: {key} = {value}: {allowed}")]
    Value {
        /// File or annotation that set it.
        origin: String,
        /// Full key.
        key: String,
        /// The value.
        value: String,
        /// What is allowed.
        allowed: String,
    },
    /// A file the configuration names does not exist or cannot be opened.
    #[error("{origin}: {key} = {path:?}: {source}")]
    Asset {
        /// File or annotation that set it.
        origin: String,
        /// Full key.
        key: String,
        /// The path.
        path: PathBuf,
        /// What opening it said.
        source: std::io::Error,
    },
}

impl From<ConfigError> for crate::error::Error {
    fn from(error: ConfigError) -> Self {
        use crate::error::ErrorKind;
        let kind = match &error {
            ConfigError::Missing { .. } => ErrorKind::NotFound,
            ConfigError::Read { source, .. } | ConfigError::Asset { source, .. } => match source.kind() {
                std::io::ErrorKind::NotFound => ErrorKind::NotFound,
                std::io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
                _ => ErrorKind::InvalidArgument,
            },
            ConfigError::Parse { .. } | ConfigError::Value { .. } => ErrorKind::InvalidArgument,
        };
        Self::new(kind, error.to_string())
    }
}

/// The whole file.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct TomlConfig {
    /// `[hypervisor.dragonball]`; sections of other hypervisors are accepted and reported.
    pub hypervisor: Hypervisors,
    /// `[agent.kata]`
    pub agent: Agents,
    /// `[runtime]`
    pub runtime: RuntimeConfig,
}

/// `[hypervisor]`
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct Hypervisors {
    /// `[hypervisor.dragonball]`
    pub dragonball: HypervisorConfig,
}

/// `[agent]`
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct Agents {
    /// `[agent.kata]`
    pub kata: AgentConfig,
}

/// `[hypervisor.dragonball]`
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct HypervisorConfig {
    /// Guest kernel: ELF vmlinux or bzImage.
    pub kernel: PathBuf,
    /// Guest root filesystem as a disk image; the default when neither is set, never together with `initrd`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<PathBuf>,
    /// Guest root filesystem as an initramfs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Filesystem of `image`.
    pub rootfs_type: RootfsType,
    /// Appended to the guest's kernel command line.
    pub kernel_params: String,
    /// Regular names of the hypervisor annotations a pod may set; `.*` allows all.
    pub enable_annotations: Vec<String>,
    /// vCPUs at boot; negative means all of the host's; fractions round up.
    pub default_vcpus: f64,
    /// Most vCPUs of a VM, whatever the pod's limits ask for; 0 means as many as the host has.
    pub default_maxvcpus: u32,
    /// MiB of guest memory; taken from the host only when touched.
    pub default_memory: u64,
    /// CPUs added to a pod's limit for the guest's own needs.
    pub overhead_vcpus: f64,
    /// MiB added to a pod's limit for the guest's own needs.
    pub overhead_memory: u64,
    /// How container files reach the guest.
    pub shared_fs: SharedFs,
    /// Guest caching of shared files.
    pub virtio_fs_cache: VirtioFsCache,
    /// `--thread-pool-size=N` is used; anything else is reported.
    pub virtio_fs_extra_args: Vec<String>,
    /// Makes the CPUs of several hosts look alike to guests.
    pub cpu_template: CpuTemplate,
    /// Lets the guest be a hypervisor itself (VT-x, AMD-V).
    pub enable_nested_virtualization: bool,
    /// No system call filters on the VMM's threads.
    pub disable_seccomp: bool,
    /// The filters only log what they would stop.
    pub seccomp_log_only: bool,
    /// The VMM's threads keep the capabilities of the shim.
    pub keep_capabilities: bool,
    /// Empty virtio-mmio slots for devices added to a running VM.
    pub hotplug_slots: u8,
    /// Folder in the guest's image with hooks for every container, in `prestart`, `poststart`, `poststop`; empty for none.
    pub guest_hook_path: String,
    /// Queue pairs of each network interface.
    pub network_queues: u32,
    /// Bits a second that each network interface may receive; 0 for no limit.
    pub rx_rate_limiter_max_rate: u64,
    /// Bits a second that each network interface may send; 0 for no limit.
    pub tx_rate_limiter_max_rate: u64,
    /// Verbose guest kernel and agent, console forwarded to the log.
    pub enable_debug: bool,
    /// `[hypervisor.dragonball.factory]`
    pub factory: FactoryConfig,
}

impl Default for HypervisorConfig {
    fn default() -> Self {
        Self {
            kernel: "/usr/share/kata-containers/vmlinux".into(),
            image: None,
            initrd: None,
            rootfs_type: RootfsType::Erofs,
            kernel_params: String::new(),
            enable_annotations: ["kernel_params", "default_vcpus", "default_memory"]
                .map(String::from)
                .into(),
            default_vcpus: 1.0,
            default_maxvcpus: 0,
            default_memory: 2048,
            overhead_vcpus: 0.2,
            overhead_memory: 32,
            shared_fs: SharedFs::InlineVirtioFs,
            virtio_fs_cache: VirtioFsCache::Auto,
            virtio_fs_extra_args: vec!["--thread-pool-size=1".into()],
            cpu_template: CpuTemplate::None,
            enable_nested_virtualization: false,
            disable_seccomp: false,
            seccomp_log_only: false,
            keep_capabilities: false,
            hotplug_slots: 8,
            guest_hook_path: String::new(),
            network_queues: 1,
            rx_rate_limiter_max_rate: 0,
            tx_rate_limiter_max_rate: 0,
            enable_debug: false,
            factory: FactoryConfig::default(),
        }
    }
}

/// Where the guest's root filesystem comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BootAsset {
    /// An initramfs.
    Initrd(PathBuf),
    /// A disk image.
    Image(PathBuf),
}

/// The image used when neither `image` nor `initrd` is set.
const DEFAULT_IMAGE: &str = "/usr/share/kata-containers/kata-agent.erofs";

impl HypervisorConfig {
    /// Image or initramfs; validation has made sure that not both are set.
    pub fn boot_asset(&self) -> BootAsset {
        match (&self.image, &self.initrd) {
            (Some(image), _) if !image.as_os_str().is_empty() => BootAsset::Image(image.clone()),
            (_, Some(initrd)) if !initrd.as_os_str().is_empty() => BootAsset::Initrd(initrd.clone()),
            _ => BootAsset::Image(DEFAULT_IMAGE.into()),
        }
    }

    /// vCPUs at boot, at least 1.
    pub fn boot_vcpus(&self) -> u8 {
        let wanted = if self.default_vcpus < 0.0 {
            f64::from(host_cpus())
        } else {
            self.default_vcpus.ceil()
        };
        // `as` saturates; the clamp bounds it to what fits.
        wanted.clamp(1.0, f64::from(MAX_VCPUS)) as u8
    }

    /// vCPUs the VM can grow to, at least [`Self::boot_vcpus`].
    pub fn max_vcpus(&self) -> u8 {
        self.vcpu_limit().max(self.boot_vcpus())
    }

    /// Most vCPUs that limits of a pod can ask for, 1 to [`MAX_VCPUS`].
    pub fn vcpu_limit(&self) -> u8 {
        let limit = match self.default_maxvcpus {
            0 => host_cpus(),
            limit => limit,
        };
        u8::try_from(limit).unwrap_or(MAX_VCPUS).clamp(1, MAX_VCPUS)
    }

    /// What the VMM's threads give up, for people.
    pub fn confinement(&self) -> String {
        let seccomp = match (self.disable_seccomp, self.seccomp_log_only) {
            (true, _) => "seccomp off",
            (false, true) => "seccomp logs only",
            (false, false) => "seccomp enforced",
        };
        let capabilities = match self.keep_capabilities {
            true => "capabilities kept",
            false => "capabilities given up",
        };
        format!("{seccomp}, {capabilities}")
    }

    /// Worker threads of the share, from `virtio_fs_extra_args`.
    pub fn virtio_fs_threads(&self) -> u8 {
        self.virtio_fs_extra_args
            .iter()
            .filter_map(|arg| arg.strip_prefix("--thread-pool-size="))
            .filter_map(|threads| threads.parse().ok())
            .next_back()
            .unwrap_or(1)
            .clamp(1, 64)
    }
}

fn host_cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX))
}

/// `[hypervisor.dragonball.factory]`: accepted so that Kata files load; templates are reported as not provided.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default)]
pub struct FactoryConfig {
    /// Start VMs from a template.
    pub enable_template: bool,
}

/// `[agent.kata]`
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct AgentConfig {
    /// Verbose agent.
    pub enable_debug: bool,
    /// A shell on vsock port 1026, for `kata-ctl exec`.
    pub debug_console_enabled: bool,
    /// Milliseconds the guest has from VM start to a working agent; [`AgentConfig::boot_timeout`] sets a floor.
    pub reconnect_timeout_ms: u64,
    /// Seconds a CreateContainer may take in the guest.
    pub create_container_timeout: u64,
    /// Milliseconds a health check may take.
    pub health_check_request_timeout_ms: u64,
    /// vsock port of the agent.
    pub server_port: u32,
    /// vsock port of the agent's log stream.
    pub log_port: u32,
    /// Kernel modules to load, with parameters: `"name param=value"`.
    pub kernel_modules: Vec<String>,
    /// Bytes of the pipes between agent and container; 0 keeps the kernel's default.
    pub container_pipe_size: u32,
    /// `[agent.kata.mem_agent]`: accepted, reported when enabled.
    pub mem_agent: BTreeMap<String, toml::Value>,
}

impl Default for AgentConfig {
    fn default() -> Self {
        Self {
            enable_debug: false,
            debug_console_enabled: false,
            reconnect_timeout_ms: 3000,
            create_container_timeout: 30,
            health_check_request_timeout_ms: 90_000,
            server_port: 1024,
            log_port: 1025,
            kernel_modules: Vec::new(),
            container_pipe_size: 0,
            mem_agent: BTreeMap::new(),
        }
    }
}

/// `[runtime]`
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct RuntimeConfig {
    /// What runs containers.
    pub name: RuntimeName,
    /// The VMM.
    pub hypervisor_name: HypervisorName,
    /// The guest's agent.
    pub agent_name: AgentName,
    /// Verbose log of the shim, the guest's console in it.
    pub enable_debug: bool,
    /// Do not apply the container's seccomp profile in the guest.
    pub disable_guest_seccomp: bool,
    /// Put the whole shim, VM included, into the pod's cgroup.
    pub sandbox_cgroup_only: bool,
    /// Size the VM once, from the pod's limits.
    pub static_sandbox_resource_mgmt: bool,
    /// Do not end a VM whose agent has stopped answering.
    pub keep_abnormal: bool,
    /// vsock port the agent takes container streams on.
    pub passfd_listener_port: u32,
    /// What connects the pod's network with the guest.
    pub internetworking_model: InternetworkingModel,
    /// Leave the pod's network namespace alone: the guest has its loopback.
    pub disable_new_netns: bool,
}

impl Default for RuntimeConfig {
    fn default() -> Self {
        Self {
            name: RuntimeName::VirtContainer,
            hypervisor_name: HypervisorName::Dragonball,
            agent_name: AgentName::Kata,
            enable_debug: false,
            disable_guest_seccomp: true,
            sandbox_cgroup_only: true,
            static_sandbox_resource_mgmt: true,
            keep_abnormal: false,
            passfd_listener_port: 1027,
            internetworking_model: InternetworkingModel::TcFilter,
            disable_new_netns: false,
        }
    }
}

impl AgentConfig {
    /// Time from VM start to a working agent. The floor is generous because it costs nothing: a guest that dies is
    /// noticed at once, and ten guests booting on two emulated processors need a minute and more.
    pub fn boot_timeout(&self) -> std::time::Duration {
        std::time::Duration::from_millis(self.reconnect_timeout_ms.max(120_000))
    }
}
