//! CPUID: what KVM supports on this host, with topology and identity filled in per vCPU.
//!
//! The machine is one package of cores without SMT, APIC id = vCPU index, so the topology leaves are the same on Intel
//! and AMD apart from where each vendor's kernel code looks for them.

use std::sync::OnceLock;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
const ECX_CMP_LEGACY: u32 = 1 << 1;

const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// CPUID cannot be read or has no place for us.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpuidError {
    /// KVM_GET_SUPPORTED_CPUID failed.
    #[error("CPUID: KVM_GET_SUPPORTED_CPUID: {}", std::io::Error::from_raw_os_error(*.0))]
    Supported(i32),
    /// Too many leaves.
    #[error("CPUID: {0} entries are more than KVM takes")]
    TooMany(usize),
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

/// Whether a guest that was shown `saved` can go on where `here` is what the host supports.
///
/// # Errors
/// The first difference that matters: another vendor or model, or a feature the host lacks.
pub fn check_compatible(saved: &[kvm_cpuid_entry2], here: &[kvm_cpuid_entry2]) -> Result<(), String> {
    let find = |list: &[kvm_cpuid_entry2], function, index| {
        list.iter()
            .find(|e| e.function == function && e.index == index)
            .copied()
    };
    let identity = |list: &[kvm_cpuid_entry2]| {
        let (vendor, model) = (
            find(list, 0, 0).unwrap_or_default(),
            find(list, 1, 0).unwrap_or_default(),
        );
        let name: Vec<u8> = [vendor.ebx, vendor.edx, vendor.ecx]
            .iter()
            .flat_map(|r| r.to_le_bytes())
            .collect();
        // Family and model without the stepping.
        (String::from_utf8_lossy(&name).into_owned(), model.eax & !0xf)
    };
    let (then, now) = (identity(saved), identity(here));
    if then != now {
        return Err(format!(
            "saved on a {} CPU with signature {:#x}, this is a {} CPU with signature {:#x}",
            then.0, then.1, now.0, now.1
        ));
    }
    for (function, index) in [
        (1, 0),
        (7, 0),
        (7, 1),
        (7, 2),
        (0xd, 1),
        (0x8000_0001, 0),
        (0x8000_0007, 0),
        (0x8000_0008, 0),
    ] {
        let Some(then) = find(saved, function, index) else {
            continue;
        };
        let now = find(here, function, index).unwrap_or_default();
        // In leaf 1 and 0x80000008 the other registers are numbers, in leaf 7.0 eax is.
        let bits = match (function, index) {
            (1, _) | (0x8000_0001, _) => [(then.ecx, now.ecx, "ecx"), (then.edx, now.edx, "edx"), (0, 0, "")],
            (7, 0) => [
                (then.ebx, now.ebx, "ebx"),
                (then.ecx, now.ecx, "ecx"),
                (then.edx, now.edx, "edx"),
            ],
            (0x8000_0007, _) => [(then.edx, now.edx, "edx"), (0, 0, ""), (0, 0, "")],
            (0x8000_0008, _) => [(then.ebx, now.ebx, "ebx"), (0, 0, ""), (0, 0, "")],
            _ => [(then.eax, now.eax, "eax"), (then.edx, now.edx, "edx"), (0, 0, "")],
        };
        for (then, now, register) in bits {
            let missing = then & !now;
            if missing != 0 {
                return Err(format!(
                    "this host's CPU lacks features of the one it was saved on: CPUID {function:#x}.{index} {register} bits {missing:#x}"
                ));
            }
        }
    }
    Ok(())
}

struct Topology {
    apic_id: u32,
    cores: u32,
    /// Bits of the APIC id that number cores.
    shift: u32,
}

impl Topology {
    fn new(index: u8, max_vcpus: u8) -> Self {
        let cores = u32::from(max_vcpus.max(1));
        Self {
            apic_id: u32::from(index),
            cores,
            shift: cores.next_power_of_two().trailing_zeros(),
        }
    }

    fn patch(&self, entry: &mut kvm_cpuid_entry2) {
        let slots = 1u32 << self.shift;
        match entry.function {
            1 => {
                entry.ebx = (self.apic_id << 24) | (slots.min(255) << 16) | (entry.ebx & 0xffff);
                entry.ecx |= ECX_HYPERVISOR | ECX_X2APIC;
                set(&mut entry.edx, EDX_HTT, self.cores > 1);
            }
            // Deterministic cache parameters: private caches except the last level, shared by all cores.
            4 if entry.eax & 0x1f != 0 => {
                let shared = if (entry.eax >> 5) & 7 >= 3 { slots - 1 } else { 0 };
                entry.eax = (entry.eax & 0x3fff) | (shared << 14) | ((slots - 1).min(63) << 26);
            }
            0x8000_0001 => entry.ecx &= if self.cores > 1 { !0 } else { !ECX_CMP_LEGACY },
            0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | (self.shift << 12) | (self.cores - 1),
            0x8000_001d if entry.eax & 0x1f != 0 => {
                let shared = if (entry.eax >> 5) & 7 >= 3 { slots - 1 } else { 0 };
                entry.eax = (entry.eax & 0x3fff) | (shared << 14);
            }
            0x8000_001e => {
                entry.eax = self.apic_id;
                // One thread per core, one node.
                entry.ebx = self.apic_id & 0xff;
                entry.ecx = 0;
            }
            _ => {}
        }
    }

    /// The extended topology leaves (Intel SDM, CPUID 0BH and 1FH).
    fn levels(&self, function: u32) -> [kvm_cpuid_entry2; 3] {
        let level = |index: u32, kind: u32, shift: u32, count: u32| kvm_cpuid_entry2 {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: count,
            ecx: index | (kind << 8),
            edx: self.apic_id,
            ..Default::default()
        };
        [
            level(0, LEVEL_SMT, 0, 1),
            level(1, LEVEL_CORE, self.shift, self.cores),
            level(2, 0, 0, 0),
        ]
    }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = if on { *register | bit } else { *register & !bit };
}

#[cfg(test)]
mod tests {
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
    fn check_compatible_when_vendor_or_features_differ_says_how() {
        let mut saved = vec![leaf(0, 0, 1), leaf(1, 0, 0x0061_0f01)];
        saved[0].ebx = u32::from_le_bytes(*b"Genu");
        saved[1].ecx = 0b101;
        let mut here = saved.clone();
        here[1].ecx = 0b111;
        here[1].eax += 1;
        assert_eq!(check_compatible(&saved, &here), Ok(()));
        assert!(check_compatible(&here, &saved).unwrap_err().contains("bits 0x2"));
        here[0].ebx = u32::from_le_bytes(*b"Auth");
        assert!(check_compatible(&saved, &here).unwrap_err().contains("Genu"));
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
