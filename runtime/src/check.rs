//! Whether this host and configuration can run sandboxes: what `kata-ctl check` tells.

use std::path::Path;

use dragonball::probe::{self, ProbeError};
pub use dragonball::vm::snapshot::RestoreError;
use dragonball::vm::snapshot::verify;

use crate::handler::load_config;
use crate::types::RuntimeOptions;

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What, e.g. `/dev/kvm` or `kernel and image`.
    pub what: String,
    /// Detail, or why it cannot be used; one line.
    pub result: Result<String, String>,
}

impl Finding {
    fn new<T: std::fmt::Display, E: std::fmt::Display>(what: &str, result: Result<T, E>) -> Self {
        let result = result
            .map(|detail| detail.to_string())
            .map_err(|error| error.to_string());
        Self {
            what: what.to_owned(),
            result,
        }
    }
}

/// Checks that KVM is there and that its virtualization can run a Linux kernel, which a software backend may not.
pub fn host() -> Vec<Finding> {
    let linux = match probe::linux_capable() {
        Ok(()) => Ok("a probe guest ran"),
        // It took the guest to find out: KVM as such works.
        Err(error @ ProbeError::Incapable(_)) => Err(error),
        Err(error) => return vec![Finding::new::<&str, _>("/dev/kvm", Err(error))],
    };
    vec![
        Finding::new::<_, &str>("/dev/kvm", Ok("usable")),
        Finding::new("Linux guests", linux),
    ]
}

/// Checks the configuration that a create request with `options` would use, and the files it names.
pub fn configuration(options: &RuntimeOptions) -> Vec<Finding> {
    let file = match load_config(options) {
        Ok(file) => file,
        Err(error) => return vec![Finding::new::<&str, _>("configuration", Err(error))],
    };
    let hypervisor = &file.config.hypervisor.dragonball;
    let summary = format!(
        "{} vCPU (up to {}), {} MiB, kernel {}",
        hypervisor.boot_vcpus(),
        hypervisor.max_vcpus(),
        hypervisor.default_memory,
        hypervisor.kernel.display()
    );
    let mut findings = vec![Finding::new::<_, &str>("configuration", Ok(summary))];
    let warnings = file.warnings.iter();
    findings.extend(warnings.map(|warning| Finding::new::<_, &str>("configuration warning", Ok(warning))));
    let confinement = hypervisor.confinement();
    findings.push(Finding::new::<_, &str>(
        "confinement of the VMM's threads",
        Ok(confinement),
    ));
    findings.push(Finding::new(
        "kernel and image",
        hypervisor.check_assets(&file.origins).map(|()| "present"),
    ));
    findings
}

/// Checks a saved machine in `folder` (and the full save below it, if it is a difference) against the checksums taken when it
/// was written: all of its memory file is read. A clone that maps the file or brings pages in one by one looks at none of them.
///
/// # Errors
/// What is damaged or missing, by file and offset.
pub fn snapshot(folder: &Path) -> Result<(), RestoreError> {
    verify(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(body: &str) -> RuntimeOptions {
        RuntimeOptions {
            config_body: body.as_bytes().to_vec(),
            ..Default::default()
        }
    }

    #[test]
    fn configuration_when_checked_names_what_is_missing_and_unused() {
        let body = "[hypervisor.dragonball]\nkernel = \"/nonexistent/vmlinux\"\nno_such_key = 1\n";

        let findings = configuration(&options(body));

        let of = |what: &str| {
            findings
                .iter()
                .find(|finding| finding.what == what)
                .unwrap()
                .result
                .clone()
        };
        assert!(of("configuration").unwrap().starts_with("1 vCPU"));
        assert!(of("configuration warning").unwrap().contains("no_such_key"));
        assert_eq!(
            of("confinement of the VMM's threads").unwrap(),
            "seccomp enforced, capabilities given up"
        );
        assert!(
            of("kernel and image")
                .unwrap_err()
                .contains("/nonexistent/vmlinux")
        );
    }

    #[test]
    fn configuration_when_bad_is_one_finding() {
        let findings = configuration(&options("[hypervisor.dragonball]\ndefault_memory = 1\n"));
        assert_eq!(findings.len(), 1);
        assert!(
            findings[0]
                .result
                .clone()
                .unwrap_err()
                .contains("default_memory = 1")
        );
    }
}
