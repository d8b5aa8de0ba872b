//! Whether a guest can go on where another host's CPU is under it.

use kvm_bindings::kvm_cpuid_entry2;

use super::model::{CpuModel, takes_care};
use super::{CpuTemplate, Register, find};

/// Registers of feature bits, each of which a guest may use once it has seen it. The last is KVM's own leaf
/// (Documentation/virt/kvm/x86/cpuid.rst).
const FEATURES: [(u32, u32, Register); 17] = [
    (1, 0, Register::Ecx),
    (1, 0, Register::Edx),
    (7, 0, Register::Ebx),
    (7, 0, Register::Ecx),
    (7, 0, Register::Edx),
    (7, 1, Register::Eax),
    (7, 1, Register::Edx),
    (7, 2, Register::Edx),
    (0xd, 0, Register::Eax),
    (0xd, 1, Register::Eax),
    (0x8000_0001, 0, Register::Ecx),
    (0x8000_0001, 0, Register::Edx),
    (0x8000_0007, 0, Register::Edx),
    (0x8000_0008, 0, Register::Ebx),
    (0x8000_000a, 0, Register::Edx),
    (0x8000_0021, 0, Register::Eax),
    (0x4000_0001, 0, Register::Eax),
];
/// Leaf 1, ecx: OSXSAVE follows the guest's CR4, x2APIC and the hypervisor bit are always there.
const NOT_THE_HOSTS: u32 = 1 << 21 | 1 << 27 | 1 << 31;
/// Leaf 1, edx: HTT says how many processors there are.
const HTT: u32 = 1 << 28;
/// Leaf 0x80000001, ecx: CmpLegacy says how many processors there are.
const CMP_LEGACY: u32 = 1 << 1;
/// Bits of leaf 1, eax, that number the stepping.
const STEPPING: u32 = 0xf;

/// This host's CPU is not like the one a machine was saved on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpuMismatch {
    /// Another vendor, family or model.
    #[error(
        "saved on a {saved_vendor} CPU with signature {saved:#x}, this is a {vendor} CPU with signature {here:#x}"
    )]
    Model {
        /// Vendor when it was saved.
        saved_vendor: String,
        /// Leaf 1, eax, when it was saved.
        saved: u32,
        /// Vendor of this host's CPU.
        vendor: String,
        /// Its leaf 1, eax.
        here: u32,
    },
    /// Another stepping: the guest works around the errata of the one it started on.
    #[error(
        "saved on stepping {saved} of the CPU, this is stepping {here}: choose a CPU template before the machine is built to \
         move it between steppings"
    )]
    Stepping {
        /// When it was saved.
        saved: u32,
        /// Here.
        here: u32,
    },
    /// Features the guest may use and this host lacks.
    #[error(
        "this host's CPU lacks features of the one the machine was saved on: CPUID {function:#x}.{index} {register} bits \
         {missing:#x}"
    )]
    Features {
        /// Leaf.
        function: u32,
        /// Subleaf.
        index: u32,
        /// Register of the leaf.
        register: Register,
        /// Bits of it.
        missing: u32,
    },
    /// The guest relies on this CPU not being vulnerable to something that it is vulnerable to.
    #[error(
        "IA32_ARCH_CAPABILITIES: saved as {saved:#x}, this host has {here:#x}: the guest would go on without mitigations it \
         needs here"
    )]
    ArchCapabilities {
        /// When it was saved.
        saved: u64,
        /// Here.
        here: u64,
    },
}

/// Whether a guest that was shown `saved`, by `template`, can go on where `here` is what the host supports.
///
/// # Errors
/// The first difference that matters.
pub(super) fn check(saved: &CpuModel, template: CpuTemplate, here: &CpuModel) -> Result<(), CpuMismatch> {
    let (then, now) = (signature(&saved.cpuid), signature(&here.cpuid));
    if then.0 != now.0 || (then.1 ^ now.1) & !STEPPING != 0 {
        return Err(CpuMismatch::Model {
            saved_vendor: then.0,
            saved: then.1,
            vendor: now.0,
            here: now.1,
        });
    }
    if template == CpuTemplate::None && then.1 != now.1 {
        return Err(CpuMismatch::Stepping {
            saved: then.1 & STEPPING,
            here: now.1 & STEPPING,
        });
    }
    for (function, index, register) in FEATURES {
        let bits = |list| find(list, function, index).map_or(0, |entry| register.of(entry));
        let ignored = match (function, register) {
            (1, Register::Ecx) => NOT_THE_HOSTS,
            (1, Register::Edx) => HTT,
            (0x8000_0001, Register::Ecx) => CMP_LEGACY,
            _ => 0,
        };
        let missing = bits(&saved.cpuid) & !bits(&here.cpuid) & !ignored;
        if missing != 0 {
            return Err(CpuMismatch::Features {
                function,
                index,
                register,
                missing,
            });
        }
    }
    let (then, now) = (
        saved.arch_capabilities.unwrap_or(0),
        here.arch_capabilities.unwrap_or(0),
    );
    if !takes_care(then, now) {
        return Err(CpuMismatch::ArchCapabilities {
            saved: then,
            here: now,
        });
    }
    Ok(())
}

/// Vendor, and family, model and stepping.
fn signature(cpuid: &[kvm_cpuid_entry2]) -> (String, u32) {
    let vendor = find(cpuid, 0, 0).copied().unwrap_or_default();
    let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
    let signature = find(cpuid, 1, 0).map_or(0, |entry| entry.eax);
    (
        String::from_utf8_lossy(name.as_flattened()).into_owned(),
        signature,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> CpuModel {
        let leaf = |function, eax, ebx, ecx| kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            ..Default::default()
        };
        CpuModel {
            cpuid: vec![
                leaf(0, 0x16, u32::from_le_bytes(*b"Genu"), 0),
                leaf(1, 0x5_0654, 0, 0b101),
                leaf(7, 0, 0x20, 0),
            ],
            arch_capabilities: Some(0b1001),
        }
    }

    #[test]
    fn check_when_the_host_is_the_same_or_can_more_is_fine() {
        let saved = model();
        assert_eq!(check(&saved, CpuTemplate::None, &model()), Ok(()));
        let mut better = model();
        better.cpuid[1].ecx |= 0b10;
        better.arch_capabilities = Some(0b1_0000_1001);
        assert_eq!(check(&saved, CpuTemplate::None, &better), Ok(()));
        // A guest does not miss what only says how many processors it has.
        let mut saved = model();
        saved.cpuid[1].ecx |= NOT_THE_HOSTS;
        saved.cpuid[1].edx |= HTT;
        assert_eq!(check(&saved, CpuTemplate::None, &model()), Ok(()));
    }

    #[test]
    fn check_when_vendor_model_or_features_differ_says_how() {
        let saved = model();
        let against = |change: fn(&mut CpuModel)| {
            let mut here = model();
            change(&mut here);
            check(&saved, CpuTemplate::None, &here).unwrap_err()
        };
        let vendor = against(|here| here.cpuid[0].ebx = u32::from_le_bytes(*b"Auth"));
        assert!(
            matches!(&vendor, CpuMismatch::Model { saved_vendor, .. } if saved_vendor.starts_with("Genu")),
            "{vendor}"
        );
        assert!(matches!(
            against(|here| here.cpuid[1].eax = 0x6_06a4),
            CpuMismatch::Model {
                saved: 0x5_0654,
                here: 0x6_06a4,
                ..
            }
        ));
        assert_eq!(
            against(|here| here.cpuid[2].ebx = 0),
            CpuMismatch::Features {
                function: 7,
                index: 0,
                register: Register::Ebx,
                missing: 0x20
            }
        );
    }

    #[test]
    fn check_when_the_stepping_differs_is_refused_without_a_template() {
        let (saved, mut here) = (model(), model());
        here.cpuid[1].eax += 3;
        assert_eq!(
            check(&saved, CpuTemplate::None, &here),
            Err(CpuMismatch::Stepping { saved: 4, here: 7 })
        );
        assert_eq!(check(&saved, CpuTemplate::V3, &here), Ok(()));
    }

    #[test]
    fn check_when_the_host_is_vulnerable_to_more_is_refused() {
        let saved = model();
        // RDCL_NO is gone; RSBA is new; the MSR is gone.
        for capabilities in [Some(0b1000), Some(0b1101), None] {
            let mut here = model();
            here.arch_capabilities = capabilities;
            let error = check(&saved, CpuTemplate::None, &here).unwrap_err();
            assert!(matches!(error, CpuMismatch::ArchCapabilities { .. }), "{error}");
        }
    }
}
