//! How big a VM is: once, from the pod's limits, before it starts.

use oci_spec::runtime::{LinuxResources, Spec};

use crate::config::HypervisorConfig;
use crate::cri;
use crate::error::{Error, Result};

/// Least memory of a VM sized by limits, MiB: kernel and agent must boot. The host gives it page by page.
const MIN_SIZED_MIB: u64 = 256;

/// Sizes the VM before it starts.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct InitialSizeManager {
    vcpus: Option<f64>,
    memory_mib: Option<u64>,
}

impl InitialSizeManager {
    /// Reads the limits: those of the pod as CRI annotates them, or those of the one container.
    pub fn new(spec: &Spec) -> Self {
        let pod = spec.annotations().as_ref().and_then(cri::pod_limits);
        if let Some(pod) = pod {
            return Self {
                vcpus: vcpus(pod.cpu_quota, pod.cpu_period),
                memory_mib: mib(pod.memory),
            };
        }
        spec.linux()
            .as_ref()
            .and_then(|linux| linux.resources().as_ref())
            .map_or_else(Self::default, Self::of_resources)
    }

    fn of_resources(resources: &LinuxResources) -> Self {
        let cpu = resources.cpu().as_ref();
        Self {
            vcpus: vcpus(cpu.and_then(|cpu| cpu.quota()), cpu.and_then(|cpu| cpu.period())),
            memory_mib: mib(resources.memory().as_ref().and_then(|memory| memory.limit())),
        }
    }

    /// Puts the size into `config`: limit plus overhead; without a limit the configured default stays.
    pub fn setup_config(&self, config: &mut HypervisorConfig) {
        if let Some(vcpus) = self.vcpus {
            config.default_vcpus = (vcpus + config.overhead_vcpus)
                .ceil()
                .clamp(1.0, f64::from(crate::config::MAX_VCPUS));
        }
        if let Some(memory) = self.memory_mib {
            config.default_memory = memory
                .saturating_add(config.overhead_memory)
                .next_multiple_of(2)
                .max(MIN_SIZED_MIB);
        }
    }
}

fn vcpus(quota: Option<i64>, period: Option<u64>) -> Option<f64> {
    let quota = quota.filter(|quota| *quota > 0)?;
    let period = period.filter(|period| *period > 0).unwrap_or(100_000);
    // Microseconds of a scheduler period: exact in a f64.
    Some(quota as f64 / period as f64)
}

fn mib(bytes: Option<i64>) -> Option<u64> {
    // Runtimes write "no limit" as -1, 0 or a number near 2^63.
    let bytes = bytes.filter(|bytes| *bytes > 0 && *bytes < 1 << 50)?;
    u64::try_from(bytes).ok().map(|bytes| bytes.div_ceil(1 << 20))
}

/// vCPUs over a pod's life. Resizing belongs to a later release.
#[derive(Debug)]
pub struct CpuResource {
    current: u32,
}

impl CpuResource {
    /// Starts with what the VM boots with.
    pub fn new(config: &HypervisorConfig) -> Self {
        Self {
            current: u32::from(config.boot_vcpus()),
        }
    }

    /// Follows a change of a container's limits.
    ///
    /// # Errors
    /// `Unimplemented`.
    pub fn update_cpu_resources(&self) -> Result<()> {
        Err(Error::unsupported("CpuResource::update_cpu_resources"))
    }

    /// vCPUs now.
    pub fn current_vcpu(&self) -> u32 {
        self.current
    }
}

/// Memory over a pod's life. Resizing belongs to a later release.
#[derive(Debug)]
pub struct MemResource {
    current_mib: u64,
}

impl MemResource {
    /// Starts with what the VM boots with.
    pub fn new(config: &HypervisorConfig) -> Self {
        Self {
            current_mib: config.default_memory,
        }
    }

    /// Follows a change of a container's limits.
    ///
    /// # Errors
    /// `Unimplemented`.
    pub fn update_mem_resources(&self) -> Result<()> {
        Err(Error::unsupported("MemResource::update_mem_resources"))
    }

    /// MiB now.
    pub fn get_current_mb(&self) -> u64 {
        self.current_mib
    }
}

/// Swap of the guest. Belongs to a later release.
#[derive(Debug, Default)]
pub struct SwapResource;

impl SwapResource {
    /// Adds swap as big as the memory asks for.
    ///
    /// # Errors
    /// `Unimplemented`.
    pub fn update(&self) -> Result<()> {
        Err(Error::unsupported("SwapResource::update"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sized(json: &str) -> (f64, u64) {
        let spec: Spec = serde_json::from_str(json).unwrap();
        let mut config = HypervisorConfig::default();
        InitialSizeManager::new(&spec).setup_config(&mut config);
        (config.default_vcpus, config.default_memory)
    }

    #[test]
    fn limits_of_a_single_container_size_the_vm() {
        let json = r#"{"ociVersion":"1.0.2","linux":{"resources":{"cpu":{"quota":150000,"period":100000},
            "memory":{"limit":1073741824}}}}"#;
        assert_eq!(sized(json), (2.0, 1056));
    }

    #[test]
    fn annotations_of_a_pod_win_over_its_pause_container() {
        let json = r#"{"ociVersion":"1.0.2","annotations":{"io.kubernetes.cri.sandbox-cpu-quota":"400000",
            "io.kubernetes.cri.sandbox-cpu-period":"100000","io.kubernetes.cri.sandbox-memory":"536870912"},
            "linux":{"resources":{"memory":{"limit":1}}}}"#;
        assert_eq!(sized(json), (5.0, 544));
    }

    #[test]
    fn no_limits_keep_the_default_and_small_ones_boot() {
        assert_eq!(sized(r#"{"ociVersion":"1.0.2"}"#), (1.0, 2048));
        let json =
            r#"{"ociVersion":"1.0.2","linux":{"resources":{"cpu":{"quota":-1},"memory":{"limit":-1}}}}"#;
        assert_eq!(sized(json), (1.0, 2048));
        let json = r#"{"ociVersion":"1.0.2","linux":{"resources":{"memory":{"limit":4194304}}}}"#;
        assert_eq!(sized(json), (1.0, MIN_SIZED_MIB));
    }
}
