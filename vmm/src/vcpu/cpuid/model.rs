//! The CPU a machine has: the host's, less what its configuration takes away.

use kvm_bindings::{Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

use super::compatible::{self, CpuMismatch};
use super::{CpuTemplate, CpuidError, supported};

/// IA32_ARCH_CAPABILITIES: what the CPU is not vulnerable to (Intel SDM 4, table 2-2).
pub const MSR_ARCH_CAPABILITIES: u32 = 0x10a;
/// Its bits that ask for more care instead: RSBA and RRSBA, by which return predictions may come from elsewhere when the
/// return stack is empty.
pub(super) const RESTRICTIONS: u64 = 1 << 2 | 1 << 19;

/// Whether a guest that sees `seen` of [`MSR_ARCH_CAPABILITIES`] has the mitigations it needs where that is `real`: most bits say
/// what the CPU is not vulnerable to; some say that it needs more care.
pub fn takes_care(seen: u64, real: u64) -> bool {
    seen & !real & !RESTRICTIONS == 0 && real & !seen & RESTRICTIONS == 0
}

/// Leaf 1, ecx: VT-x.
const VMX: u32 = 1 << 5;
/// Leaf 0x80000001, ecx: AMD-V.
const SVM: u32 = 1 << 2;
/// What AMD-V can.
const SVM_LEAF: u32 = 0x8000_000a;

/// What a machine's processors can, of what the host's can.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CpuConfig {
    /// The guest may run virtual machines itself (VT-x, AMD-V), as far as the host's KVM lets it (parameter `nested` of
    /// kvm_intel and kvm_amd). Off, because KVM's code for it has been a way out of guests more than once.
    pub nested: bool,
    /// Features and identity the guest sees.
    pub template: CpuTemplate,
}

/// What all vCPUs of a machine are, before each one's topology.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CpuModel {
    /// CPUID.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// [`MSR_ARCH_CAPABILITIES`]; `None` where the host has none.
    pub arch_capabilities: Option<u64>,
}

impl CpuModel {
    /// All the host supports.
    ///
    /// # Errors
    /// [`CpuidError::Supported`], [`CpuidError::Msr`].
    pub fn of_host(kvm: &Kvm) -> Result<Self, CpuidError> {
        Ok(Self {
            cpuid: supported(kvm)?,
            arch_capabilities: arch_capabilities(kvm)?,
        })
    }

    /// What `config` leaves of what the host supports.
    ///
    /// # Errors
    /// As [`of_host`](Self::of_host), and [`CpuidError::Template`].
    pub fn new(kvm: &Kvm, config: CpuConfig) -> Result<Self, CpuidError> {
        let mut model = Self::of_host(kvm)?;
        if !config.nested {
            model.hide_virtualization();
        }
        config.template.apply(&mut model)?;
        Ok(model)
    }

    fn hide_virtualization(&mut self) {
        self.cpuid.retain(|entry| entry.function != SVM_LEAF);
        for entry in &mut self.cpuid {
            match entry.function {
                1 => entry.ecx &= !VMX,
                0x8000_0001 => entry.ecx &= !SVM,
                _ => {}
            }
        }
    }

    /// Whether a guest that was shown this, by `template`, can go on where `here` is what the host supports.
    ///
    /// # Errors
    /// The first difference that matters.
    pub fn check_compatible(&self, template: CpuTemplate, here: &Self) -> Result<(), CpuMismatch> {
        compatible::check(self, template, here)
    }
}

/// The host's value, as KVM passes it on.
fn arch_capabilities(kvm: &Kvm) -> Result<Option<u64>, CpuidError> {
    let error = |errno| CpuidError::Msr {
        msr: MSR_ARCH_CAPABILITIES,
        errno,
    };
    let entry = kvm_msr_entry {
        index: MSR_ARCH_CAPABILITIES,
        ..Default::default()
    };
    let mut msrs = Msrs::from_entries(&[entry]).map_err(|_| error(libc::E2BIG))?;
    match kvm.get_msrs(&mut msrs) {
        Ok(1) => Ok(msrs.as_slice().first().map(|entry| entry.data)),
        // KVM does not know it, or has no feature MSRs (Linux before 4.17).
        Ok(_) => Ok(None),
        Err(error) if matches!(error.errno(), libc::EINVAL | libc::ENOTTY | libc::EPERM) => Ok(None),
        Err(e) => Err(error(e.errno())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_care_when_an_immunity_is_hidden_holds_and_when_a_warning_is_does_not() {
        let (immune, warned) = (1, RESTRICTIONS);
        assert!(takes_care(0, immune) && takes_care(immune, immune) && takes_care(warned, 0));
        assert!(!takes_care(immune, 0) && !takes_care(0, warned) && !takes_care(immune, warned));
    }

    fn leaf(function: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            ecx,
            ..Default::default()
        }
    }

    #[test]
    fn hide_virtualization_when_both_vendors_bits_are_there_leaves_none_and_nothing_else_goes() {
        let mut model = CpuModel {
            cpuid: vec![
                leaf(1, u32::MAX),
                leaf(7, 0x1234),
                leaf(0x8000_0001, u32::MAX),
                leaf(SVM_LEAF, 1),
            ],
            arch_capabilities: None,
        };
        model.hide_virtualization();
        let left: Vec<_> = model.cpuid.iter().map(|e| (e.function, e.ecx)).collect();
        assert_eq!(left, [(1, !(1 << 5)), (7, 0x1234), (0x8000_0001, !(1 << 2))]);
    }

    #[test]
    fn new_when_nested_is_off_or_on_masks_what_the_host_has() {
        let Ok(kvm) = crate::kvm::open() else { return };
        let virtualization = |model: &CpuModel| {
            let bits = |entry: &kvm_cpuid_entry2| match entry.function {
                1 => entry.ecx & VMX,
                0x8000_0001 => entry.ecx & SVM,
                _ => 0,
            };
            model.cpuid.iter().any(|entry| bits(entry) != 0)
        };
        let off = CpuModel::new(&kvm, CpuConfig::default()).unwrap();
        assert!(!virtualization(&off));
        let nested = CpuConfig {
            nested: true,
            ..CpuConfig::default()
        };
        let on = CpuModel::new(&kvm, nested).unwrap();
        let host = CpuModel::of_host(&kvm).unwrap();
        assert_eq!(virtualization(&on), virtualization(&host));
        assert_eq!(off.check_compatible(CpuTemplate::None, &host), Ok(()));
        assert_eq!(on.check_compatible(CpuTemplate::None, &host), Ok(()));
    }
}
