//! CPUID: what KVM supports on this host, less what a machine is not to have ([`CpuModel`]), with topology and identity filled
//! in per vCPU.
//!
//! The machine is one package of cores without SMT, APIC id = vCPU index, so the topology leaves are the same on Intel
//! and AMD apart from where each vendor's kernel code looks for them.

mod compatible;
mod model;
mod template;
mod topology;

use std::fmt;
use std::sync::OnceLock;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

pub use compatible::CpuMismatch;
pub use model::{CpuConfig, CpuModel, MSR_ARCH_CAPABILITIES, takes_care};
pub use template::CpuTemplate;
use topology::Topology;

/// Leaf 1, ecx.
const ECX_TSC_DEADLINE: u32 = 1 << 24;

/// CPUID cannot be read or has no place for us.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpuidError {
    /// KVM_GET_SUPPORTED_CPUID failed.
    #[error("CPUID: KVM_GET_SUPPORTED_CPUID: {}", std::io::Error::from_raw_os_error(*.0))]
    Supported(i32),
    /// The host lacks what a template promises the guest.
    #[error(
        "CPU template {template}: this host has no {missing:#x} of CPUID {function:#x}.{index} {register}: choose a lower template"
    )]
    Template {
        /// The template.
        template: CpuTemplate,
        /// Leaf.
        function: u32,
        /// Subleaf.
        index: u32,
        /// Register of the leaf.
        register: Register,
        /// Bits of it.
        missing: u32,
    },
    /// A feature MSR cannot be read.
    #[error("MSR {msr:#x}: KVM_GET_MSRS: {}", std::io::Error::from_raw_os_error(*errno))]
    Msr {
        /// Its index.
        msr: u32,
        /// Cause.
        errno: i32,
    },
    /// Too many leaves.
    #[error("CPUID: {0} entries are more than KVM takes")]
    TooMany(usize),
}

/// A register of a CPUID leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

impl Register {
    fn of(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Self::Eax => entry.eax,
            Self::Ebx => entry.ebx,
            Self::Ecx => entry.ecx,
            Self::Edx => entry.edx,
        }
    }

    fn of_mut(self, entry: &mut kvm_cpuid_entry2) -> &mut u32 {
        match self {
            Self::Eax => &mut entry.eax,
            Self::Ebx => &mut entry.ebx,
            Self::Ecx => &mut entry.ecx,
            Self::Edx => &mut entry.edx,
        }
    }
}

impl fmt::Display for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eax => "eax",
            Self::Ebx => "ebx",
            Self::Ecx => "ecx",
            Self::Edx => "edx",
        })
    }
}

fn find(list: &[kvm_cpuid_entry2], function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
    list.iter()
        .find(|entry| entry.function == function && entry.index == index)
}

/// Width of guest physical addresses in bits (leaf 0x8000_0008); 36 where it is not said.
pub fn physical_address_bits(supported: &[kvm_cpuid_entry2]) -> u32 {
    let leaf = supported.iter().find(|entry| entry.function == 0x8000_0008);
    leaf.map(|entry| entry.eax & 0xff)
        .filter(|bits| (32..=52).contains(bits))
        .unwrap_or(36)
}

/// What the host supports. Constant while the host runs and slow to ask for (0.3 ms), so asked once per process.
///
/// # Errors
/// [`CpuidError::Supported`].
pub fn supported(kvm: &Kvm) -> Result<Vec<kvm_cpuid_entry2>, CpuidError> {
    static SUPPORTED: OnceLock<Vec<kvm_cpuid_entry2>> = OnceLock::new();
    if let Some(entries) = SUPPORTED.get() {
        return Ok(entries.clone());
    }
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|e| CpuidError::Supported(e.errno()))?;
    let mut entries = cpuid.as_slice().to_vec();
    if kvm.check_extension(Cap::TscDeadlineTimer) {
        // Emulated by KVM's local APIC, reported by a capability instead of the leaf.
        for entry in entries.iter_mut().filter(|e| e.function == 1) {
            entry.ecx |= ECX_TSC_DEADLINE;
        }
    }
    Ok(SUPPORTED.get_or_init(|| entries).clone())
}

/// The CPUID of vCPU `index` in a machine of at most `max_vcpus`.
///
/// # Errors
/// [`CpuidError::TooMany`].
pub fn for_vcpu(supported: &[kvm_cpuid_entry2], index: u8, max_vcpus: u8) -> Result<CpuId, CpuidError> {
    let topology = Topology::new(index, max_vcpus);
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .iter()
        // Replaced below, or (0x80000026) a second opinion on the same topology.
        .filter(|e| !matches!(e.function, 0xb | 0x1f | 0x8000_0026))
        .copied()
        .collect();
    for entry in &mut entries {
        topology.patch(entry);
    }
    let max_basic = entries.iter().find(|e| e.function == 0).map_or(0, |e| e.eax);
    for function in [0xb, 0x1f].into_iter().filter(|f| *f <= max_basic) {
        entries.extend(topology.levels(function));
    }
    CpuId::from_entries(&entries).map_err(|_| CpuidError::TooMany(entries.len()))
}

#[cfg(test)]
mod tests {
    use super::topology::{ECX_HYPERVISOR, EDX_HTT};
    use super::*;

    fn leaf(function: u32, index: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ..Default::default()
        }
    }

    fn get(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid
            .as_slice()
            .iter()
            .find(|e| e.function == function && e.index == index)
            .unwrap()
    }

    #[test]
    fn physical_address_bits_when_not_said_or_absurd_are_36() {
        assert_eq!(physical_address_bits(&[]), 36);
        for (eax, bits) in [(0x3030, 48), (0x39_27, 39), (0, 36), (0xff, 36)] {
            let mut entry = leaf(0x8000_0008, 0, 0);
            entry.eax = eax;
            assert_eq!(physical_address_bits(&[entry]), bits);
        }
    }

    #[test]
    fn for_vcpu_when_three_cores_gives_ids_and_widths_that_agree() {
        let supported = [
            leaf(0, 0, 0x1f),
            leaf(1, 0, 0),
            leaf(0xb, 7, 9),
            leaf(0x8000_0008, 0, 0),
        ];
        let cpuid = for_vcpu(&supported, 2, 3).unwrap();
        let one = get(&cpuid, 1, 0);
        assert_eq!(one.ebx, 2 << 24 | 4 << 16);
        assert_eq!(one.ecx & ECX_HYPERVISOR, ECX_HYPERVISOR);
        assert_eq!(one.edx & EDX_HTT, EDX_HTT);
        for function in [0xb, 0x1f] {
            assert_eq!(get(&cpuid, function, 0).ebx, 1);
            let core = get(&cpuid, function, 1);
            assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (2, 3, 0x201, 2));
        }
        assert_eq!(get(&cpuid, 0x8000_0008, 0).ecx, 2 << 12 | 2);
        assert!(!cpuid.as_slice().iter().any(|e| e.function == 0xb && e.index == 7));
    }

    #[test]
    fn for_vcpu_when_single_core_has_no_topology_bits() {
        let cpuid = for_vcpu(&[leaf(0, 0, 1), leaf(1, 0, 0)], 0, 1).unwrap();
        assert_eq!(get(&cpuid, 1, 0).ebx, 1 << 16);
        assert_eq!(get(&cpuid, 1, 0).edx & EDX_HTT, 0);
        assert_eq!(cpuid.as_slice().len(), 2);
    }

    #[test]
    fn for_vcpu_when_the_most_cores_does_not_overflow() {
        let supported = [leaf(1, 0, 0), leaf(4, 3, 3 << 5 | 3), leaf(0x8000_0008, 0, 0)];
        let cpuid = for_vcpu(&supported, 253, 254).unwrap();
        assert_eq!(get(&cpuid, 1, 0).ebx, 253 << 24 | 255 << 16);
        assert_eq!(get(&cpuid, 4, 3).eax >> 14 & 0xfff, 255);
        assert_eq!(get(&cpuid, 0x8000_0008, 0).ecx, 8 << 12 | 253);
    }
}
