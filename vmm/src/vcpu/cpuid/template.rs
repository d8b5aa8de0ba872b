//! CPU templates: named masks over CPUID and MSRs that make the CPUs of several hosts look alike, so that a saved machine can
//! move between them.
//!
//! The levels are those of the x86-64 psABI. Besides a level's own features the guest sees what an operating system needs, and
//! the bits by which the host offers mitigations; bits that say a CPU does not need one are hidden, since another host of
//! the same family may. What a level promises is required of the host, so that all hosts with a template show the same.
//! What it merely allows is shown where it is, and a host without it refuses the restore.

use std::fmt;

use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};

use super::model::{CpuModel, RESTRICTIONS};
use super::{CpuidError, Register, find};

/// Names of the masks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum CpuTemplate {
    /// All the host's KVM supports. A saved machine needs a host with the same CPU, down to the stepping, or a better one.
    #[default]
    #[serde(rename = "none")]
    None,
    /// SSE4.2 and POPCNT: every server since 2009. No XSAVE.
    #[serde(rename = "x86-64-v2")]
    V2,
    /// AVX2, BMI, FMA, MOVBE: Intel since Haswell, AMD since Excavator.
    #[serde(rename = "x86-64-v3")]
    V3,
    /// AVX-512 F, BW, CD, DQ, VL: Intel Xeon since Skylake, AMD since Zen 4.
    #[serde(rename = "x86-64-v4")]
    V4,
}

impl CpuTemplate {
    /// All of them, as they are called.
    pub const NAMES: [(&str, Self); 4] = [
        ("none", Self::None),
        ("x86-64-v2", Self::V2),
        ("x86-64-v3", Self::V3),
        ("x86-64-v4", Self::V4),
    ];

    /// The one called `name`.
    pub fn by_name(name: &str) -> Option<Self> {
        let found = Self::NAMES.iter().find(|(known, _)| *known == name);
        found.map(|(_, template)| *template)
    }

    /// Its place in the columns of a [`Row`]; `None` for the template that changes nothing.
    fn column(self) -> Option<usize> {
        match self {
            Self::None => None,
            Self::V2 => Some(0),
            Self::V3 => Some(1),
            Self::V4 => Some(2),
        }
    }
}

impl fmt::Display for CpuTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::NAMES.iter().find(|(_, template)| template == self);
        f.write_str(name.map_or("none", |(name, _)| *name))
    }
}

/// A register of feature bits: what v2, v3 and v4 show, and what they require.
struct Row {
    function: u32,
    index: u32,
    register: Register,
    keep: [u32; 3],
    need: [u32; 3],
}

const fn row(function: u32, index: u32, register: Register, keep: [u32; 3], need: [u32; 3]) -> Row {
    Row {
        function,
        index,
        register,
        keep,
        need,
    }
}

/// The bits numbered `numbers`.
const fn bits(numbers: &[u32]) -> u32 {
    let (mut mask, mut at) = (0, 0);
    while at < numbers.len() {
        mask |= 1 << numbers[at];
        at += 1;
    }
    mask
}

/// SSE3, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, POPCNT.
const V2_1_ECX: u32 = bits(&[0, 9, 13, 19, 20, 23]);
/// FMA, MOVBE, XSAVE, AVX, F16C.
const V3_1_ECX: u32 = V2_1_ECX | bits(&[12, 22, 26, 28, 29]);
/// x2APIC, TSC deadline timer, the hypervisor bit: KVM's own. AES and PCLMULQDQ, which kernels look for at each boot.
const OS_1_ECX: u32 = bits(&[1, 21, 24, 25, 31]);
/// OSXSAVE follows CR4. RDRAND.
const OS_V3_1_ECX: u32 = OS_1_ECX | bits(&[27, 30]);
/// PCID.
const OS_V4_1_ECX: u32 = OS_V3_1_ECX | bits(&[17]);
/// FPU, TSC, MSR, PAE, CMPXCHG8B, APIC, CMOV, MMX, FXSR, SSE, SSE2.
const NEED_1_EDX: u32 = bits(&[0, 4, 5, 6, 8, 9, 15, 23, 24, 25, 26]);
/// Those, and VME, DE, PSE, MCE, SEP, MTRR, PGE, MCA, PAT, PSE-36, CLFSH, HTT.
const KEEP_1_EDX: u32 = NEED_1_EDX | bits(&[1, 2, 3, 7, 11, 12, 13, 14, 16, 17, 19, 28]);
/// BMI1, AVX2, BMI2.
const V3_7_EBX: u32 = bits(&[3, 5, 8]);
/// AVX-512 F, DQ, CD, BW, VL.
const V4_7_EBX: u32 = V3_7_EBX | bits(&[16, 17, 28, 30, 31]);
/// FSGSBASE, SMEP, ERMS.
const OS_V3_7_EBX: u32 = bits(&[0, 7, 9]);
/// INVPCID, RDSEED, ADX, SMAP, CLFLUSHOPT, CLWB.
const OS_V4_7_EBX: u32 = OS_V3_7_EBX | bits(&[10, 18, 19, 20, 23, 24]);
/// UMIP, which KVM emulates.
const KEEP_7_ECX: u32 = bits(&[2]);
/// MD_CLEAR, IBRS and IBPB, STIBP, L1D_FLUSH, ARCH_CAPABILITIES, SSBD.
const KEEP_7_EDX: u32 = bits(&[10, 26, 27, 28, 29, 31]);
/// PSFD, IPRED_CTRL, RRSBA_CTRL, DDPD_U, BHI_CTRL.
const KEEP_7_2_EDX: u32 = bits(&[0, 1, 2, 3, 4]);
/// LAHF.
const V2_EXT_ECX: u32 = bits(&[0]);
/// LZCNT.
const V3_EXT_ECX: u32 = V2_EXT_ECX | bits(&[5]);
/// CmpLegacy, PREFETCHW, topology extensions.
const OS_EXT_ECX: u32 = bits(&[1, 8, 22]);
/// SYSCALL, NX, long mode.
const NEED_EXT_EDX: u32 = bits(&[11, 20, 29]);
/// Those, what AMD repeats of leaf 1, 1 GiB pages, RDTSCP.
const KEEP_EXT_EDX: u32 = NEED_EXT_EDX
    | bits(&[
        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 16, 17, 23, 24, 26, 27,
    ]);
/// IBPB, IBRS, STIBP, STIBP always on, IBRS preferred, SSBD, VIRT_SSBD, PSFD, IBPB_RET.
const KEEP_EXT8_EBX: u32 = bits(&[12, 14, 15, 17, 18, 24, 25, 28, 30]);
/// LFENCE serializes, null selectors clear the base, SBPB, IBPB flushes branch types.
const KEEP_EXT21_EAX: u32 = bits(&[2, 6, 27, 28]);
/// Invariant TSC.
const KEEP_EXT7_EDX: u32 = bits(&[8]);
/// Always running APIC timer.
const KEEP_6_EAX: u32 = bits(&[2]);
/// XCR0: x87 and SSE; AVX; opmask and ZMM.
const XCR0: [u32; 3] = [0, 0b111, 0b1110_0111];
/// XSAVEOPT, XSAVEC, XGETBV with ecx 1.
const XSAVE_FORMS: [u32; 3] = [0, 0b111, 0b111];

const NONE: [u32; 3] = [0; 3];

const ROWS: [Row; 21] = [
    row(
        1,
        0,
        Register::Ecx,
        [
            V2_1_ECX | OS_1_ECX,
            V3_1_ECX | OS_V3_1_ECX,
            V3_1_ECX | OS_V4_1_ECX,
        ],
        [V2_1_ECX, V3_1_ECX, V3_1_ECX],
    ),
    row(1, 0, Register::Edx, [KEEP_1_EDX; 3], [NEED_1_EDX; 3]),
    row(6, 0, Register::Eax, [KEEP_6_EAX; 3], NONE),
    row(
        7,
        0,
        Register::Ebx,
        [0, V3_7_EBX | OS_V3_7_EBX, V4_7_EBX | OS_V4_7_EBX],
        [0, V3_7_EBX, V4_7_EBX],
    ),
    row(7, 0, Register::Ecx, [KEEP_7_ECX; 3], NONE),
    row(7, 0, Register::Edx, [KEEP_7_EDX; 3], NONE),
    row(7, 1, Register::Eax, NONE, NONE),
    row(7, 1, Register::Ebx, NONE, NONE),
    row(7, 1, Register::Ecx, NONE, NONE),
    row(7, 1, Register::Edx, NONE, NONE),
    row(7, 2, Register::Edx, [KEEP_7_2_EDX; 3], NONE),
    row(0xd, 0, Register::Eax, XCR0, XCR0),
    row(0xd, 0, Register::Edx, NONE, NONE),
    row(0xd, 1, Register::Eax, XSAVE_FORMS, NONE),
    row(0xd, 1, Register::Ecx, NONE, NONE),
    row(0xd, 1, Register::Edx, NONE, NONE),
    row(
        0x8000_0001,
        0,
        Register::Ecx,
        [
            V2_EXT_ECX | OS_EXT_ECX,
            V3_EXT_ECX | OS_EXT_ECX,
            V3_EXT_ECX | OS_EXT_ECX,
        ],
        [V2_EXT_ECX, V3_EXT_ECX, V3_EXT_ECX],
    ),
    row(
        0x8000_0001,
        0,
        Register::Edx,
        [KEEP_EXT_EDX; 3],
        [NEED_EXT_EDX; 3],
    ),
    row(0x8000_0007, 0, Register::Edx, [KEEP_EXT7_EDX; 3], NONE),
    row(0x8000_0008, 0, Register::Ebx, [KEEP_EXT8_EBX; 3], NONE),
    row(0x8000_0021, 0, Register::Eax, [KEEP_EXT21_EAX; 3], NONE),
];

/// Leaves of what differs between hosts and no level has: MWAIT, PMU, resource control, SGX, processor trace, key locker, last
/// branch records, AMX, history reset, AVX10; AMD's sampling, memory encryption and PMU.
const HIDDEN: [u32; 17] = [
    5,
    0xa,
    0xf,
    0x10,
    0x12,
    0x14,
    0x19,
    0x1c,
    0x1d,
    0x1e,
    0x20,
    0x23,
    0x24,
    0x8000_001b,
    0x8000_001f,
    0x8000_0020,
    0x8000_0022,
];
/// Bits of leaf 1, eax, that number the stepping.
const STEPPING: u32 = 0xf;
/// Legacy region and header of the XSAVE area.
const XSAVE_MIN: u32 = 576;

impl CpuTemplate {
    /// Masks `model`.
    ///
    /// # Errors
    /// [`CpuidError::Template`] when the host lacks what the template promises.
    pub(super) fn apply(self, model: &mut CpuModel) -> Result<(), CpuidError> {
        let Some(column) = self.column() else {
            return Ok(());
        };
        let cpuid = &mut model.cpuid;
        for Row {
            function,
            index,
            register,
            keep,
            need,
        } in ROWS
        {
            let there = find(cpuid, function, index).map_or(0, |entry| register.of(entry));
            let missing = need[column] & !there;
            if missing != 0 {
                return Err(CpuidError::Template {
                    template: self,
                    function,
                    index,
                    register,
                    missing,
                });
            }
            let same = |entry: &&mut kvm_cpuid_entry2| entry.function == function && entry.index == index;
            for entry in cpuid.iter_mut().filter(same) {
                *register.of_mut(entry) &= keep[column];
            }
        }
        let components = XCR0[column];
        cpuid.retain(|entry| match entry.function {
            0xd if components == 0 => false,
            0xd => {
                entry.index < 2
                    || 1u32
                        .checked_shl(entry.index)
                        .is_some_and(|bit| components & bit != 0)
            }
            function => !HIDDEN.contains(&function),
        });
        let end = |entry: &kvm_cpuid_entry2| entry.ebx.saturating_add(entry.eax);
        let areas = cpuid
            .iter()
            .filter(|entry| entry.function == 0xd && entry.index >= 2);
        let size = areas.map(end).fold(XSAVE_MIN, u32::max);
        for entry in cpuid.iter_mut() {
            match (entry.function, entry.index) {
                (1, _) => entry.eax &= !STEPPING,
                // Bytes for all components; ebx follows XCR0.
                (0xd, 0) => entry.ecx = size,
                _ => {}
            }
        }
        // A guest that believes in no immunity has every mitigation.
        model.arch_capabilities = model.arch_capabilities.map(|bits| bits & RESTRICTIONS);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host that has everything, or everything but one bit.
    fn host() -> CpuModel {
        let leaf = |function, index, value| kvm_cpuid_entry2 {
            function,
            index,
            eax: value,
            ebx: value,
            ecx: value,
            edx: value,
            ..Default::default()
        };
        let mut cpuid: Vec<_> = [
            (1, 0),
            (6, 0),
            (7, 0),
            (7, 1),
            (7, 2),
            (0xd, 0),
            (0xd, 1),
            (0x8000_0001, 0),
        ]
        .into_iter()
        .chain([(0x8000_0007, 0), (0x8000_0008, 0), (0x8000_0021, 0)])
        .map(|(function, index)| leaf(function, index, u32::MAX))
        .collect();
        cpuid.extend(HIDDEN.map(|function| leaf(function, 0, 7)));
        // AVX, opmask, ZMM, and AMX's tiles, each with offset and size.
        for (index, offset, size) in [
            (2, 576, 256),
            (5, 1088, 64),
            (6, 1152, 512),
            (7, 1664, 1024),
            (18, 2816, 8192),
        ] {
            let mut entry = leaf(0xd, index, 0);
            (entry.eax, entry.ebx) = (size, offset);
            cpuid.push(entry);
        }
        CpuModel {
            cpuid,
            arch_capabilities: Some(u64::MAX),
        }
    }

    fn applied(template: CpuTemplate) -> CpuModel {
        let mut model = host();
        template.apply(&mut model).unwrap();
        model
    }

    #[test]
    fn apply_when_the_host_has_everything_shows_the_level_and_no_more() {
        for (template, avx2, avx512, xcr0, size) in [
            (CpuTemplate::V2, false, false, None, 0),
            (CpuTemplate::V3, true, false, Some(0b111), 832),
            (CpuTemplate::V4, true, true, Some(0b1110_0111), 2688),
        ] {
            let model = applied(template);
            let seven = find(&model.cpuid, 7, 0).unwrap();
            assert_eq!(
                (seven.ebx & 1 << 5 != 0, seven.ebx & 1 << 16 != 0),
                (avx2, avx512)
            );
            let xsave = find(&model.cpuid, 0xd, 0);
            assert_eq!(xsave.map(|entry| entry.eax), xcr0, "{template}");
            assert!(
                xsave.is_none_or(|entry| entry.ecx == size),
                "{template}: {xsave:?}"
            );
            assert!(find(&model.cpuid, 0xd, 18).is_none());
            assert!(model.cpuid.iter().all(|entry| !HIDDEN.contains(&entry.function)));
            let one = find(&model.cpuid, 1, 0).unwrap();
            // No stepping, no VT-x.
            assert_eq!((one.eax & STEPPING, one.ecx & 1 << 5), (0, 0));
            assert_eq!(model.arch_capabilities, Some(RESTRICTIONS));
        }
    }

    #[test]
    fn apply_when_hosts_differ_beyond_the_level_makes_them_alike() {
        let mut other = host();
        for entry in &mut other.cpuid {
            match (entry.function, entry.index) {
                // Another stepping, no AVX-512, no VNNI, no AMX.
                (1, 0) => entry.eax -= 3,
                (7, 0) => (entry.ebx, entry.ecx) = (entry.ebx & 0xffff, KEEP_7_ECX),
                (7, 1) => entry.eax = 0,
                (0xd, 0) => entry.eax = 0b111,
                _ => {}
            }
        }
        other
            .cpuid
            .retain(|entry| entry.function != 0xd || entry.index < 5);
        other.arch_capabilities = Some(RESTRICTIONS | 1);
        CpuTemplate::V3.apply(&mut other).unwrap();
        let v3 = applied(CpuTemplate::V3);
        assert_eq!(format!("{other:?}"), format!("{v3:?}"));
        assert_eq!(v3.check_compatible(CpuTemplate::V3, &host()), Ok(()));
    }

    #[test]
    fn apply_when_the_host_lacks_what_is_promised_says_what() {
        let mut model = host();
        model
            .cpuid
            .iter_mut()
            .filter(|e| e.function == 7)
            .for_each(|e| e.ebx &= !(1 << 5));
        let error = CpuTemplate::V3.apply(&mut model).unwrap_err();
        assert_eq!(
            error.to_string(),
            "CPU template x86-64-v3: this host has no 0x20 of CPUID 0x7.0 ebx: choose a lower template"
        );
        CpuTemplate::V2.apply(&mut model).unwrap();
    }

    #[test]
    fn names_when_read_back_are_the_same_template() {
        for (name, template) in CpuTemplate::NAMES {
            assert_eq!(CpuTemplate::by_name(name), Some(template));
            assert_eq!(template.to_string(), name);
        }
        assert_eq!(CpuTemplate::by_name("x86-64-v5"), None);
        assert_eq!(CpuTemplate::default(), CpuTemplate::None);
    }

    #[test]
    fn rows_when_they_require_something_show_it() {
        for row in ROWS {
            for column in 0..3 {
                assert_eq!(
                    row.need[column] & !row.keep[column],
                    0,
                    "{:#x} {}",
                    row.function,
                    row.register
                );
            }
        }
    }
}
