//! Initial state of the boot processor. The others wait for INIT and SIPI from the guest, in KVM's local APIC.

use kvm_bindings::{Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::boot::EntryPoint;
use crate::memory::{GuestMemory, layout};
use crate::vcpu::cpuid::{MSR_ARCH_CAPABILITIES, takes_care};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS always reads 1.
const RFLAGS_RESERVED: u64 = 2;
const PAGE_PRESENT_WRITABLE: u64 = 3;
const PAGE_LARGE: u64 = 1 << 7;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, everything write-back.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// Selectors of the boot GDT, as the 64-bit Linux boot protocol names them.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

/// A vCPU or its boot structures cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum RegsError {
    /// KVM refused registers.
    #[error("vCPU {index}: {ioctl}: {source}")]
    Kvm {
        /// vCPU index.
        index: u8,
        /// The ioctl.
        ioctl: &'static str,
        /// Cause.
        source: kvm_ioctls::Error,
    },
    /// Guest memory refused a write.
    #[error("boot structures at {address:#x}: {source}")]
    Memory {
        /// Guest physical address.
        address: u64,
        /// Cause.
        source: GuestMemoryError,
    },
}

/// Sets the MSRs every vCPU starts with; KVM's reset values do for the rest.
///
/// # Errors
/// [`RegsError::Kvm`].
pub fn set_msrs(vcpu: &VcpuFd, index: u8) -> Result<(), RegsError> {
    let entries = [
        msr(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        msr(MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
    ];
    write_msrs(vcpu, index, &entries)
}

/// Gives the vCPU another [`MSR_ARCH_CAPABILITIES`] than the host's, which KVM starts it with; its CPUID must be set.
///
/// Some hosts' KVM knows the host's value, but its vCPUs have no such register to write (kvm-pvm on AMD: it reads as 0). A guest
/// there has more mitigations than it needs, which is no reason not to run it.
///
/// # Errors
/// [`RegsError::Kvm`].
pub fn set_arch_capabilities(vcpu: &VcpuFd, index: u8, value: u64) -> Result<(), RegsError> {
    let wanted = [msr(MSR_ARCH_CAPABILITIES, value)];
    let fail = |source| RegsError::Kvm {
        index,
        ioctl: "KVM_GET_MSRS",
        source,
    };
    let mut msrs = Msrs::from_entries(&wanted).map_err(|_| fail(kvm_ioctls::Error::new(libc::E2BIG)))?;
    let read = vcpu.get_msrs(&mut msrs).map_err(fail)?;
    if read == 1 && msrs.as_slice() == wanted {
        return Ok(());
    }
    let seen = msrs.as_slice().first().map_or(0, |entry| entry.data);
    match write_msrs(vcpu, index, &wanted) {
        Err(error) if read == 1 && takes_care(seen, value) => {
            tracing::debug!(index, seen, value, %error, "vCPU: IA32_ARCH_CAPABILITIES stays as it is");
            Ok(())
        }
        result => result,
    }
}

fn msr(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

fn write_msrs(vcpu: &VcpuFd, index: u8, entries: &[kvm_msr_entry]) -> Result<(), RegsError> {
    let fail = |source| RegsError::Kvm {
        index,
        ioctl: "KVM_SET_MSRS",
        source,
    };
    let msrs = Msrs::from_entries(entries).map_err(|_| fail(kvm_ioctls::Error::new(libc::E2BIG)))?;
    let written = vcpu.set_msrs(&msrs).map_err(fail)?;
    if written != entries.len() {
        // KVM stops at the first MSR it does not know.
        return Err(fail(kvm_ioctls::Error::new(libc::EIO)));
    }
    Ok(())
}

/// Puts the boot processor at the kernel's entry point.
///
/// # Errors
/// [`RegsError`].
pub fn set_boot_state(vcpu: &VcpuFd, memory: &GuestMemory, entry: EntryPoint) -> Result<(), RegsError> {
    let fail = |ioctl| {
        move |source| RegsError::Kvm {
            index: 0,
            ioctl,
            source,
        }
    };
    let long_mode = matches!(entry, EntryPoint::Linux64(_));
    let mut sregs = vcpu.get_sregs().map_err(fail("KVM_GET_SREGS"))?;
    let code = code_segment(long_mode);
    let data = data_segment();
    let task = task_segment();
    write_gdt(memory, &[code, data, task])?;
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = TASK + 7;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task;
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
    if long_mode {
        write_page_tables(memory)?;
        sregs.cr0 |= CR0_PG;
        sregs.cr3 = layout::PAGE_TABLES;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LME | EFER_LMA;
    }
    vcpu.set_sregs(&sregs).map_err(fail("KVM_SET_SREGS"))?;
    let mut regs = kvm_regs {
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    };
    match entry {
        EntryPoint::Linux64(address) => {
            regs.rip = address;
            regs.rsi = layout::ZERO_PAGE;
        }
        EntryPoint::Pvh(address) => {
            regs.rip = u64::from(address);
            regs.rbx = layout::PVH_START_INFO;
        }
    }
    vcpu.set_regs(&regs).map_err(fail("KVM_SET_REGS"))?;
    // Reset values of the x87 and SSE control words (Intel SDM 3A, table 10-1).
    let fpu = kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    };
    vcpu.set_fpu(&fpu).map_err(fail("KVM_SET_FPU"))
}

fn code_segment(long_mode: bool) -> kvm_segment {
    // Execute/read, accessed.
    let type_ = 0xb;
    kvm_segment {
        type_,
        selector: CODE,
        l: u8::from(long_mode),
        db: u8::from(!long_mode),
        ..flat_segment()
    }
}

fn data_segment() -> kvm_segment {
    // Read/write, accessed.
    kvm_segment {
        type_: 0x3,
        selector: DATA,
        db: 1,
        ..flat_segment()
    }
}

fn task_segment() -> kvm_segment {
    // Busy 32/64-bit task state segment: VMX refuses to enter a guest without one.
    kvm_segment {
        type_: 0xb,
        selector: TASK,
        s: 0,
        g: 0,
        limit: 0x67,
        ..flat_segment()
    }
}

fn flat_segment() -> kvm_segment {
    kvm_segment {
        limit: 0xffff_ffff,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

/// A GDT entry in memory (Intel SDM 3A, figure 3-8).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let flags = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7
        | u64::from(segment.avl) << 12
        | u64::from(segment.l) << 13
        | u64::from(segment.db) << 14
        | u64::from(segment.g) << 15;
    (segment.base & 0xff00_0000) << 32
        | (segment.base & 0x00ff_ffff) << 16
        | (limit & 0x0000_ffff)
        | (limit & 0x000f_0000) << 32
        | flags << 40
}

fn write_gdt(memory: &GuestMemory, segments: &[kvm_segment]) -> Result<(), RegsError> {
    for segment in segments {
        write(
            memory,
            layout::GDT + u64::from(segment.selector),
            descriptor(segment),
        )?;
    }
    Ok(())
}

/// Identity-maps the first GiB with 2 MiB pages: more than the kernel touches before it makes its own tables.
fn write_page_tables(memory: &GuestMemory) -> Result<(), RegsError> {
    let (pml4, pdpt, pd) = (
        layout::PAGE_TABLES,
        layout::PAGE_TABLES + 0x1000,
        layout::PAGE_TABLES + 0x2000,
    );
    write(memory, pml4, pdpt | PAGE_PRESENT_WRITABLE)?;
    write(memory, pdpt, pd | PAGE_PRESENT_WRITABLE)?;
    let mut entries = Vec::with_capacity(0x1000);
    for index in 0..512u64 {
        entries.extend_from_slice(&(index << 21 | PAGE_PRESENT_WRITABLE | PAGE_LARGE).to_le_bytes());
    }
    memory
        .write_slice(&entries, GuestAddress(pd))
        .map_err(|source| RegsError::Memory { address: pd, source })
}

fn write(memory: &GuestMemory, address: u64, value: u64) -> Result<(), RegsError> {
    memory
        .write_obj(value, GuestAddress(address))
        .map_err(|source| RegsError::Memory { address, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptor_when_encoded_matches_the_well_known_values() {
        assert_eq!(descriptor(&code_segment(true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&code_segment(false)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&data_segment()), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&task_segment()), 0x0000_8b00_0000_0067);
    }
}
