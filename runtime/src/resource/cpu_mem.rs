//! How big a VM is: once, from the pod's limits, before it starts.

use oci_spec::runtime::{LinuxResources, Spec};

use crate::config::{ConfigFile, Origin};
use crate::cri;

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

    /// Limits as a CRI has them: microseconds of CPU time in each period, bytes of memory; 0 for none.
    pub fn of_limits(cpu_quota: i64, cpu_period: u64, memory: i64) -> Self {
        Self {
            vcpus: vcpus(Some(cpu_quota), Some(cpu_period)),
            memory_mib: mib(Some(memory)),
        }
    }

    fn of_resources(resources: &LinuxResources) -> Self {
        let cpu = resources.cpu().as_ref();
        Self {
            vcpus: vcpus(cpu.and_then(|cpu| cpu.quota()), cpu.and_then(|cpu| cpu.period())),
            memory_mib: mib(resources.memory().as_ref().and_then(|memory| memory.limit())),
        }
    }

    /// Puts the size into `file`: limit plus overhead; without a limit the configured default stays. The result has still
    /// to be validated. Returns the warnings.
    pub fn setup_config(&self, file: &mut ConfigFile) -> Vec<String> {
        let config = &mut file.config.hypervisor.dragonball;
        let mut warnings = Vec::new();
        if let Some(vcpus) = self.vcpus {
            let (wanted, most) = ((vcpus + config.overhead_vcpus).ceil(), config.vcpu_limit());
            if wanted > f64::from(most) {
                warnings.push(format!(
                    "the pod's limit asks for {wanted} vCPUs: {most} is the most (hypervisor.dragonball.default_maxvcpus = {})",
                    config.default_maxvcpus
                ));
            }
            config.default_vcpus = wanted.clamp(1.0, f64::from(most));
            file.origins
                .set_by(Origin::Limits, "hypervisor.dragonball.default_vcpus");
        }
        if let Some(memory) = self.memory_mib {
            config.default_memory = memory
                .saturating_add(config.overhead_memory)
                .checked_next_multiple_of(2)
                .unwrap_or(u64::MAX)
                .max(MIN_SIZED_MIB);
            file.origins
                .set_by(Origin::Limits, "hypervisor.dragonball.default_memory");
        }
        warnings
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

#[cfg(test)]
mod tests {
    use super::*;

    fn sized(json: &str) -> (f64, u64) {
        let (file, warnings) = sized_file(json, 8);
        assert_eq!(warnings, Vec::<String>::new());
        let config = file.config.hypervisor.dragonball;
        (config.default_vcpus, config.default_memory)
    }

    fn sized_file(json: &str, default_maxvcpus: u32) -> (ConfigFile, Vec<String>) {
        let spec: Spec = serde_json::from_str(json).unwrap();
        let mut file = ConfigFile::default();
        file.config.hypervisor.dragonball.default_maxvcpus = default_maxvcpus;
        let warnings = InitialSizeManager::new(&spec).setup_config(&mut file);
        (file, warnings)
    }

    #[test]
    fn vcpus_when_beyond_the_maximum_are_cut_and_told() {
        let json = r#"{"ociVersion":"1.0.2","linux":{"resources":{"cpu":{"quota":900000,"period":100000}}}}"#;
        let (file, warnings) = sized_file(json, 4);
        assert_eq!(file.config.hypervisor.dragonball.boot_vcpus(), 4);
        assert!(
            warnings[0].contains("10 vCPUs") && warnings[0].contains("default_maxvcpus = 4"),
            "{warnings:?}"
        );
        file.config.validate(&file.origins).unwrap();

        let (file, _) = sized_file(json, 0);
        let host = std::thread::available_parallelism().unwrap().get();
        assert_eq!(
            usize::from(file.config.hypervisor.dragonball.boot_vcpus()),
            host.min(10)
        );
    }

    #[test]
    fn size_when_no_vm_can_have_it_is_an_error_of_the_limits() {
        let json = r#"{"ociVersion":"1.0.2","linux":{"resources":{"memory":{"limit":2199023255552}}}}"#;
        let (file, _) = sized_file(json, 0);
        let error = file.config.validate(&file.origins).unwrap_err().to_string();
        assert!(
            error.starts_with("limits of the pod: hypervisor.dragonball.default_memory = "),
            "{error}"
        );
    }

    #[test]
    fn size_when_a_single_container_has_limits_follows_them() {
        let json = r#"{"ociVersion":"1.0.2","linux":{"resources":{"cpu":{"quota":150000,"period":100000},
            "memory":{"limit":1073741824}}}}"#;
        assert_eq!(sized(json), (2.0, 1056));
    }

    #[test]
    fn size_when_a_pod_is_annotated_ignores_its_pause_container() {
        let json = r#"{"ociVersion":"1.0.2","annotations":{"io.kubernetes.cri.sandbox-cpu-quota":"400000",
            "io.kubernetes.cri.sandbox-cpu-period":"100000","io.kubernetes.cri.sandbox-memory":"536870912"},
            "linux":{"resources":{"memory":{"limit":1}}}}"#;
        assert_eq!(sized(json), (5.0, 544));
    }

    #[test]
    fn size_when_unlimited_or_tiny_still_boots() {
        assert_eq!(sized(r#"{"ociVersion":"1.0.2"}"#), (1.0, 2048));
        let json =
            r#"{"ociVersion":"1.0.2","linux":{"resources":{"cpu":{"quota":-1},"memory":{"limit":-1}}}}"#;
        assert_eq!(sized(json), (1.0, 2048));
        let json = r#"{"ociVersion":"1.0.2","linux":{"resources":{"memory":{"limit":4194304}}}}"#;
        assert_eq!(sized(json), (1.0, MIN_SIZED_MIB));
    }
}
