//! Making vCPUs: the ones of the boot and the ones added later are made the same way.

use std::sync::Arc;

use kvm_bindings::{KVM_MP_STATE_UNINITIALIZED, kvm_mp_state};
use kvm_ioctls::{VcpuFd, VmFd};

use crate::bus::Bus;
use crate::confinement::Confinement;
use crate::kvm::{IoctlError, ioctl_error};
use crate::lifecycle::Lifecycle;
use crate::vcpu::cpuid::{self, CpuModel, CpuidError};
use crate::vcpu::metrics::VcpuCounters;
use crate::vcpu::regs::{self, RegsError};
use crate::vcpu::run::Vcpu;

/// A vCPU cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// A KVM request failed.
    #[error(transparent)]
    Ioctl(#[from] IoctlError),
    /// CPUID.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// Registers.
    #[error(transparent)]
    Regs(#[from] RegsError),
}

/// What all vCPUs of a machine have in common.
#[derive(Debug)]
pub struct VcpuContext {
    /// What they can.
    pub model: CpuModel,
    /// vCPUs that can exist.
    pub max: u8,
    /// Port I/O.
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// The machine's state.
    pub lifecycle: Arc<Lifecycle>,
    /// What their threads give up.
    pub confinement: Confinement,
}

/// KVM's side of vCPU `index`, as after a reset.
///
/// # Errors
/// [`VcpuError`]; KVM keeps the vCPU it may have created until the VM ends.
pub fn create(vm: &VmFd, model: &CpuModel, index: u8, max: u8) -> Result<VcpuFd, VcpuError> {
    let vcpu = vm
        .create_vcpu(u64::from(index))
        .map_err(ioctl_error("KVM_CREATE_VCPU"))?;
    let cpuid = cpuid::for_vcpu(&model.cpuid, index, max)?;
    vcpu.set_cpuid2(&cpuid).map_err(ioctl_error("KVM_SET_CPUID2"))?;
    regs::set_msrs(&vcpu, index)?;
    if let Some(value) = model.arch_capabilities {
        regs::set_arch_capabilities(&vcpu, index, value)?;
    }
    Ok(vcpu)
}

/// Makes a vCPU that ran before wait for INIT and SIPI, as one that never ran.
///
/// # Errors
/// [`RegsError::Kvm`].
pub fn wait_for_init(vcpu: &VcpuFd, index: u8) -> Result<(), RegsError> {
    let state = kvm_mp_state {
        mp_state: KVM_MP_STATE_UNINITIALIZED,
    };
    vcpu.set_mp_state(state).map_err(|source| RegsError::Kvm {
        index,
        ioctl: "KVM_SET_MP_STATE",
        source,
    })
}

impl VcpuContext {
    /// Connects KVM's side to the buses; the result is ready for its thread.
    pub fn connect(&self, index: u8, fd: VcpuFd) -> Vcpu {
        Vcpu {
            index,
            fd,
            pio: self.pio.clone(),
            mmio: self.mmio.clone(),
            lifecycle: self.lifecycle.clone(),
            counters: Arc::new(VcpuCounters::default()),
            confinement: self.confinement,
            unfinished: false,
        }
    }
}
