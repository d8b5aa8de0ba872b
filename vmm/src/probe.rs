//! Whether this host's KVM can run Linux.
//!
//! There are KVMs without hardware virtualization behind them: they run tiny guests, but interpret guest kernel code and
//! lack instructions every Linux uses, so a boot dies after seconds with a confusing error. A guest of a few instructions
//! tells them apart in milliseconds: it executes CMPXCHG16B in long mode and reports whether that worked. Where the
//! hardware's own KVM module is loaded, which refuses to load without VT-x or AMD-V, even that is not needed.

use std::path::Path;

use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use crate::boot::EntryPoint;
use crate::kvm::{self, IoctlError, KvmError};
use crate::memory::layout::MemoryLayout;
use crate::memory::{self, GuestMemory, MemoryError};
use crate::vcpu::cpuid::{self, CpuidError};
use crate::vcpu::regs::{self, RegsError};

/// Guest memory of the probe.
const MEMORY: u64 = 1 << 20;
const CODE: u64 = 0x1_0000;
const PORT: u16 = 0x10;
const SUCCESS: u8 = b'L';
/// Exits tolerated before giving up: one is expected.
const MAX_EXITS: u32 = 8;

/// mov edi, 0x18000; xor eax, eax; xor edx, edx; xor ecx, ecx; mov ebx, 'L'; cmpxchg16b [rdi]; mov al, [rdi];
/// out PORT, al; hlt
#[rustfmt::skip]
const GUEST: [u8; 26] = [
    0xbf, 0x00, 0x80, 0x01, 0x00,
    0x31, 0xc0, 0x31, 0xd2, 0x31, 0xc9,
    0xbb, SUCCESS, 0x00, 0x00, 0x00,
    0x48, 0x0f, 0xc7, 0x0f,
    0x8a, 0x07,
    0xe6, PORT as u8,
    0xf4, 0x90,
];

/// Linux guests do not run here.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// KVM cannot be used at all.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A KVM request failed.
    #[error("KVM probe: {0}")]
    Ioctl(#[from] IoctlError),
    /// Memory of the probe guest.
    #[error("KVM probe: {0}")]
    Memory(#[from] MemoryError),
    /// A KVM request failed.
    #[error("KVM probe: {0}")]
    Cpuid(#[from] CpuidError),
    /// A KVM request failed.
    #[error("KVM probe: {0}")]
    Regs(#[from] RegsError),
    /// KVM works, but not for Linux.
    #[error(
        "/dev/kvm cannot run Linux: it does not execute CMPXCHG16B ({0}); it seems to be a software backend without \
         hardware virtualization (VT-x, AMD-V)"
    )]
    Incapable(ProbeFailure),
}

/// What a probe guest did instead of what the hardware does.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProbeFailure {
    /// It reported another result.
    #[error("wrong result {0:?}")]
    Result(Vec<u8>),
    /// It ended otherwise.
    #[error("{0}")]
    Exit(String),
    /// KVM_RUN failed.
    #[error(transparent)]
    Run(#[from] kvm_ioctls::Error),
    /// Signals kept it from running.
    #[error("interrupted too often")]
    Interrupted,
}

/// KVM modules that run guests on hardware virtualization.
const HARDWARE_MODULES: [&str; 2] = ["/sys/module/kvm_intel", "/sys/module/kvm_amd"];

/// Tells whether Linux guests can run. Costs an open with a hardware KVM, otherwise a probe guest: some milliseconds,
/// and nothing is left behind.
///
/// # Errors
/// [`ProbeError::Kvm`] when KVM is missing or forbidden, [`ProbeError::Incapable`] when it cannot run Linux.
pub fn linux_capable() -> Result<(), ProbeError> {
    let kvm = kvm::open()?;
    if HARDWARE_MODULES.iter().any(|module| Path::new(module).exists()) {
        return Ok(());
    }
    run_guest(&kvm)
}

fn run_guest(kvm: &Kvm) -> Result<(), ProbeError> {
    let vm = kvm::create_vm(kvm)?;
    let layout = MemoryLayout::ram(MEMORY);
    let memory = memory::allocate(&layout)?;
    let write = memory.write_slice(&GUEST, GuestAddress(CODE));
    write.map_err(|_| MemoryError::Unmapped(CODE))?;
    memory::set_memory(&vm, &memory, &layout)?;
    let mut vcpu = vm.create_vcpu(0).map_err(kvm::ioctl_error("KVM_CREATE_VCPU"))?;
    let cpuid = cpuid::for_vcpu(&cpuid::supported(kvm)?, 0, 1)?;
    vcpu.set_cpuid2(&cpuid)
        .map_err(kvm::ioctl_error("KVM_SET_CPUID2"))?;
    regs::set_boot_state(&vcpu, &memory, EntryPoint::Linux64(CODE))?;
    let result = run(&mut vcpu);
    // The VM must be gone before its memory.
    drop((vcpu, vm));
    drop::<GuestMemory>(memory);
    result
}

fn run(vcpu: &mut VcpuFd) -> Result<(), ProbeError> {
    let incapable = |failure| Err(ProbeError::Incapable(failure));
    for _ in 0..MAX_EXITS {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(PORT, &[SUCCESS])) => return Ok(()),
            Ok(VcpuExit::IoOut(PORT, data)) => return incapable(ProbeFailure::Result(data.to_vec())),
            Ok(VcpuExit::Intr) => {}
            Ok(exit) => return incapable(ProbeFailure::Exit(format!("{exit:?}"))),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => return incapable(error.into()),
        }
    }
    incapable(ProbeFailure::Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hardware virtualization as the CPU reports it; the probe guest must agree wherever KVM can be used.
    #[test]
    fn probe_guest_when_the_cpu_virtualizes_agrees() {
        let Ok(kvm) = kvm::open() else { return };
        let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let hardware = flags
            .split_whitespace()
            .any(|flag| flag == "vmx" || flag == "svm");
        match (run_guest(&kvm), hardware) {
            (Ok(()), true) => {}
            (Err(error @ ProbeError::Incapable(_)), false) => {
                assert!(
                    error.to_string().starts_with("/dev/kvm cannot run Linux"),
                    "{error}"
                );
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(linux_capable().is_ok(), hardware);
    }
}
