//! The leaves that say how many processors there are and which one this is.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const ECX_X2APIC: u32 = 1 << 21;
pub(super) const ECX_HYPERVISOR: u32 = 1 << 31;
pub(super) const EDX_HTT: u32 = 1 << 28;
const ECX_CMP_LEGACY: u32 = 1 << 1;

const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// Where a vCPU is in the package.
pub(super) struct Topology {
    apic_id: u32,
    cores: u32,
    /// Bits of the APIC id that number cores.
    shift: u32,
}

impl Topology {
    /// Of vCPU `index` in a machine of at most `max_vcpus`.
    pub(super) fn new(index: u8, max_vcpus: u8) -> Self {
        let cores = u32::from(max_vcpus.max(1));
        Self {
            apic_id: u32::from(index),
            cores,
            shift: cores.next_power_of_two().trailing_zeros(),
        }
    }

    /// Fills in what depends on the vCPU.
    pub(super) fn patch(&self, entry: &mut kvm_cpuid_entry2) {
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
    pub(super) fn levels(&self, function: u32) -> [kvm_cpuid_entry2; 3] {
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
