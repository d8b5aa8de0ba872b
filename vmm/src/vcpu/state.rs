//! Everything KVM knows of a vCPU, taken out and put back in the order that works.

#![allow(unsafe_code)]

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, KvmNestedStateBuffer, VcpuFd};
use serde::{Deserialize, Serialize};

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// The paravirtual MSRs of KVM that are not all in KVM_GET_MSR_INDEX_LIST of older kernels
/// (Documentation/virt/kvm/x86/msr.rst).
const KVM_MSRS: std::ops::RangeInclusive<u32> = 0x4b56_4d00..=0x4b56_4d08;
/// Difference of frequencies that guests do not notice (NTP corrects twice as much).
const TSC_TOLERANCE_PPM: u64 = 250;
/// More than KVM ever lists; what a file may claim.
const MAX_MSRS: usize = 4096;
/// Bytes of `struct kvm_nested_state` before the data (arch/x86/include/uapi/asm/kvm.h).
const NESTED_HEADER: usize = 128;
/// MSRs in one KVM_GET_MSRS or KVM_SET_MSRS (MAX_IO_MSRS in arch/x86/kvm/x86.c).
const MSR_CHUNK: usize = 255;

/// A vCPU between two instructions.
#[derive(Serialize, Deserialize)]
pub struct VcpuState {
    /// vCPU index and APIC id.
    pub index: u8,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    /// Frequency of the time stamp counter.
    tsc_khz: u32,
    msrs: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
    /// Of a vCPU that may run virtual machines itself: what KVM_GET_NESTED_STATE gave.
    nested: Option<Vec<u8>>,
}

impl std::fmt::Debug for VcpuState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VcpuState")
            .field("index", &self.index)
            .field("rip", &self.regs.rip)
            .field("msrs", &self.msrs.len())
            .finish_non_exhaustive()
    }
}

/// A state cannot be read from or given to KVM.
#[derive(Debug, thiserror::Error)]
pub enum VcpuStateError {
    /// An ioctl failed.
    #[error("vCPU {index}: {ioctl}: {source}")]
    Kvm {
        /// vCPU index.
        index: u8,
        /// The ioctl.
        ioctl: &'static str,
        /// Cause.
        source: kvm_ioctls::Error,
    },
    /// An MSR this host does not take.
    #[error("vCPU {index}: this host does not accept {value:#x} in MSR {msr:#x}")]
    Msr {
        /// vCPU index.
        index: u8,
        /// MSR index.
        msr: u32,
        /// Saved value.
        value: u64,
    },
    /// The vCPU may run virtual machines itself, and this host's KVM cannot save or restore one that does.
    #[error(
        "vCPU {index}: nested virtualization is on, and this host's KVM has no KVM_CAP_NESTED_STATE (Linux 4.20, on AMD 5.8): \
         it can be neither saved nor restored here"
    )]
    NestedState {
        /// vCPU index.
        index: u8,
    },
    /// Bytes whose length is not that of a nested state.
    #[error("vCPU {index}: a nested state of {len} bytes")]
    InvalidNestedState {
        /// vCPU index.
        index: u8,
        /// Its length.
        len: usize,
    },
    /// More MSRs than exist.
    #[error("vCPU {index}: {count} MSRs in the saved state")]
    TooManyMsrs {
        /// vCPU index.
        index: u8,
        /// Their number.
        count: usize,
    },
}

fn kvm_error(index: u8, ioctl: &'static str) -> impl Fn(kvm_ioctls::Error) -> VcpuStateError {
    move |source| VcpuStateError::Kvm { index, ioctl, source }
}

/// What there is to save of a vCPU on this host.
#[derive(Debug)]
pub struct Inventory {
    msrs: Vec<u32>,
    /// `None`: the guest has no nested virtualization. Else whether KVM can tell the state of it.
    nested: Option<bool>,
}

impl Inventory {
    /// For vCPUs that may run virtual machines themselves or not.
    ///
    /// # Errors
    /// KVM_GET_MSR_INDEX_LIST failed.
    pub fn new(kvm: &Kvm, nested: bool) -> Result<Self, kvm_ioctls::Error> {
        let list = kvm.get_msr_index_list()?;
        let mut msrs: Vec<u32> = list.as_slice().iter().copied().chain(KVM_MSRS).collect();
        msrs.sort_unstable();
        msrs.dedup();
        Ok(Self {
            msrs,
            nested: nested.then(|| kvm.check_extension(Cap::NestedState)),
        })
    }
}

/// Takes the state of a vCPU that is not in KVM_RUN and, like all others, will not be until all are saved.
///
/// The MP state comes first: reading it makes KVM process INIT and SIPI, which changes everything else, and ends an inner
/// guest. Events come last, when nothing can raise one any more.
///
/// # Errors
/// [`VcpuStateError::Kvm`], [`VcpuStateError::NestedState`].
pub fn save(vcpu: &VcpuFd, index: u8, inventory: &Inventory) -> Result<VcpuState, VcpuStateError> {
    if inventory.nested == Some(false) {
        return Err(VcpuStateError::NestedState { index });
    }
    let error = |ioctl| kvm_error(index, ioctl);
    Ok(VcpuState {
        index,
        mp_state: vcpu.get_mp_state().map_err(error("KVM_GET_MP_STATE"))?,
        regs: vcpu.get_regs().map_err(error("KVM_GET_REGS"))?,
        sregs: vcpu.get_sregs().map_err(error("KVM_GET_SREGS"))?,
        xsave: vcpu.get_xsave().map_err(error("KVM_GET_XSAVE"))?,
        xcrs: vcpu.get_xcrs().map_err(error("KVM_GET_XCRS"))?,
        debug_regs: vcpu.get_debug_regs().map_err(error("KVM_GET_DEBUGREGS"))?,
        lapic: vcpu.get_lapic().map_err(error("KVM_GET_LAPIC"))?,
        tsc_khz: vcpu.get_tsc_khz().map_err(error("KVM_GET_TSC_KHZ"))?,
        msrs: get_msrs(vcpu, index, &inventory.msrs)?,
        nested: match inventory.nested {
            Some(true) => Some(get_nested_state(vcpu, index)?),
            _ => None,
        },
        events: vcpu.get_vcpu_events().map_err(error("KVM_GET_VCPU_EVENTS"))?,
    })
}

fn get_nested_state(vcpu: &VcpuFd, index: u8) -> Result<Vec<u8>, VcpuStateError> {
    let mut state = KvmNestedStateBuffer::empty();
    vcpu.nested_state(&mut state)
        .map_err(kvm_error(index, "KVM_GET_NESTED_STATE"))?;
    let len = (state.size as usize).clamp(NESTED_HEADER, size_of_val(&state));
    // SAFETY: the buffer is at least `len` bytes long, has no padding and began as zeroes, so that every byte is initialized.
    let bytes = unsafe { std::slice::from_raw_parts((&raw const state).cast::<u8>(), len) };
    Ok(bytes.to_vec())
}

/// The state of `bytes`, which come from a file; KVM looks at what is in it. `None` when its length is not what it says.
fn nested_state(bytes: &[u8]) -> Option<KvmNestedStateBuffer> {
    let mut state = KvmNestedStateBuffer::empty();
    if bytes.len() < NESTED_HEADER || bytes.len() > size_of_val(&state) {
        return None;
    }
    // SAFETY: the buffer is at least as long as `bytes`, and any bytes are a value of it.
    unsafe {
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), (&raw mut state).cast::<u8>(), bytes.len());
    }
    (state.size as usize == bytes.len()).then_some(state)
}

/// Values of those of `wanted` that this vCPU has: KVM lists MSRs of features the guest's CPUID may lack.
fn get_msrs(vcpu: &VcpuFd, index: u8, wanted: &[u32]) -> Result<Vec<(u32, u64)>, VcpuStateError> {
    let error = kvm_error(index, "KVM_GET_MSRS");
    let mut values = Vec::with_capacity(wanted.len());
    let mut rest = wanted;
    while !rest.is_empty() {
        let entries: Vec<kvm_msr_entry> = rest
            .iter()
            .take(MSR_CHUNK)
            .map(|index| kvm_msr_entry {
                index: *index,
                ..Default::default()
            })
            .collect();
        let asked = entries.len();
        let mut msrs =
            Msrs::from_entries(&entries).map_err(|_| error(kvm_ioctls::Error::new(libc::E2BIG)))?;
        let got = vcpu.get_msrs(&mut msrs).map_err(&error)?;
        values.extend(
            msrs.as_slice()
                .iter()
                .take(got)
                .map(|entry| (entry.index, entry.data)),
        );
        // KVM stops at the first it cannot read, which is skipped.
        let done = if got < asked { got + 1 } else { got };
        rest = rest.get(done..).unwrap_or_default();
    }
    Ok(values)
}

impl VcpuState {
    /// Gives the state to a fresh vCPU whose CPUID is already set; `passed` is the time in ns since it was saved, by which
    /// the time stamp counter goes on.
    ///
    /// Segment and control registers before the local APIC (its base is one of them); the local APIC before MSRs (x2APIC
    /// mode, TSC deadline); the deadline after the counter it is compared with; events when nothing else raises one. The nested
    /// state is last, as in the kernel's own tests (vcpu_load_state in tools/testing/selftests/kvm): it needs EFER and the MSRs
    /// of the virtualization, and enters the inner guest.
    ///
    /// # Errors
    /// [`VcpuStateError`]; the vCPU is of no use then.
    pub fn restore(&self, vcpu: &VcpuFd, passed: u64) -> Result<(), VcpuStateError> {
        let index = self.index;
        let error = |ioctl| kvm_error(index, ioctl);
        vcpu.set_mp_state(self.mp_state)
            .map_err(error("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&self.regs).map_err(error("KVM_SET_REGS"))?;
        vcpu.set_sregs(&self.sregs).map_err(error("KVM_SET_SREGS"))?;
        // SAFETY: the guest's CPUID has no feature whose state is beyond the 4 KiB of kvm_xsave: such features need
        // arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM), which is never called, and KVM hides them without it.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(error("KVM_SET_XSAVE"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(error("KVM_SET_XCRS"))?;
        vcpu.set_debug_regs(&self.debug_regs)
            .map_err(error("KVM_SET_DEBUGREGS"))?;
        vcpu.set_lapic(&self.lapic).map_err(error("KVM_SET_LAPIC"))?;
        self.restore_tsc_frequency(vcpu)?;
        self.restore_msrs(vcpu, passed)?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(error("KVM_SET_VCPU_EVENTS"))?;
        match &self.nested {
            None => Ok(()),
            Some(bytes) => {
                let state = nested_state(bytes).ok_or(VcpuStateError::InvalidNestedState {
                    index,
                    len: bytes.len(),
                })?;
                vcpu.set_nested_state(&state)
                    .map_err(error("KVM_SET_NESTED_STATE"))
            }
        }
    }

    /// Asks KVM to scale the counter when this host's runs at another frequency.
    fn restore_tsc_frequency(&self, vcpu: &VcpuFd) -> Result<(), VcpuStateError> {
        let error = |ioctl| kvm_error(self.index, ioctl);
        let here = vcpu.get_tsc_khz().map_err(error("KVM_GET_TSC_KHZ"))?;
        let tolerance = u64::from(here) * TSC_TOLERANCE_PPM / 1_000_000;
        if u64::from(here.abs_diff(self.tsc_khz)) <= tolerance {
            return Ok(());
        }
        vcpu.set_tsc_khz(self.tsc_khz).map_err(error("KVM_SET_TSC_KHZ"))
    }

    fn restore_msrs(&self, vcpu: &VcpuFd, passed: u64) -> Result<(), VcpuStateError> {
        let index = self.index;
        if self.msrs.len() > MAX_MSRS {
            return Err(VcpuStateError::TooManyMsrs {
                index,
                count: self.msrs.len(),
            });
        }
        let error = kvm_error(index, "KVM_SET_MSRS");
        let ticks = u128::from(passed) * u128::from(self.tsc_khz) / 1_000_000;
        let late = |(msr, _): &(u32, u64)| *msr == MSR_TSC_DEADLINE;
        let (late, mut order): (Vec<_>, Vec<_>) = self.msrs.iter().copied().partition(late);
        order.extend(late);
        for (_, value) in order.iter_mut().filter(|(msr, _)| *msr == MSR_TSC) {
            *value = value.wrapping_add(ticks as u64);
        }
        for chunk in order.chunks(MSR_CHUNK) {
            let entries: Vec<kvm_msr_entry> = chunk
                .iter()
                .map(|(index, data)| kvm_msr_entry {
                    index: *index,
                    data: *data,
                    ..Default::default()
                })
                .collect();
            let msrs =
                Msrs::from_entries(&entries).map_err(|_| error(kvm_ioctls::Error::new(libc::E2BIG)))?;
            let mut written = vcpu.set_msrs(&msrs).map_err(&error)?;
            // An MSR KVM refuses although it is at its reset value is one it only lets the guest read.
            while let Some((msr, value)) = chunk.get(written) {
                if *value != 0 && !read_back(vcpu, *msr, *value) {
                    return Err(VcpuStateError::Msr {
                        index,
                        msr: *msr,
                        value: *value,
                    });
                }
                written += 1;
                let rest = entries.get(written..).unwrap_or_default();
                if rest.is_empty() {
                    break;
                }
                let msrs =
                    Msrs::from_entries(rest).map_err(|_| error(kvm_ioctls::Error::new(libc::E2BIG)))?;
                written += vcpu.set_msrs(&msrs).map_err(&error)?;
            }
        }
        Ok(())
    }
}

/// Whether the MSR already has the value.
fn read_back(vcpu: &VcpuFd, msr: u32, value: u64) -> bool {
    let entry = kvm_msr_entry {
        index: msr,
        ..Default::default()
    };
    let Ok(mut msrs) = Msrs::from_entries(&[entry]) else {
        return false;
    };
    let read = vcpu.get_msrs(&mut msrs);
    matches!(read, Ok(1)) && msrs.as_slice().first().is_some_and(|entry| entry.data == value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nested(size: u32, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        bytes[4..8].copy_from_slice(&size.to_le_bytes());
        bytes
    }

    #[test]
    fn nested_state_when_its_length_is_not_what_it_says_is_none() {
        assert!(nested_state(&nested(128, 128)).is_some());
        assert!(nested_state(&nested(4224, 4224)).is_some());
        for (size, len) in [(128, 127), (128, 129), (8321, 8321), (0, 128), (u32::MAX, 4224)] {
            assert!(nested_state(&nested(size, len)).is_none(), "{size} {len}");
        }
        assert!(nested_state(&[]).is_none());
    }
}
