//! What can go wrong with a machine, one enum per operation.

use std::fmt;
use std::io;
use std::time::Duration;

use crate::acpi::tables::AcpiError;
use crate::boot::BootError;
use crate::bus::BusError;
use crate::config::ConfigError;
use crate::devices::virtio::config::OpenError;
use crate::devices::virtio::vsock::VsockError;
use crate::io_loop::IoLoopError;
pub use crate::kvm::{IoctlError, KvmError};
use crate::lifecycle::VmState;
use crate::memory::MemoryError;
use crate::memory::window::WindowError;
use crate::vcpu::cpuid::CpuidError;
use crate::vcpu::create::VcpuError;
use crate::vcpu::regs::RegsError;
use crate::vm::registry::{ConnectError, ResumeError};

/// A machine cannot be built. Nothing of it is left behind.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The configuration contradicts itself.
    #[error("configuration: {0}")]
    Config(#[from] ConfigError),
    /// KVM cannot be used.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A KVM request failed.
    #[error(transparent)]
    Ioctl(#[from] IoctlError),
    /// More vCPUs than the host allows.
    #[error("vcpus: {requested} requested, this host's KVM allows {supported}")]
    TooManyVcpus {
        /// Maximum of the configuration.
        requested: u8,
        /// KVM_CAP_MAX_VCPUS.
        supported: usize,
    },
    /// More devices than slots.
    #[error(
        "devices: {requested} virtio-mmio slots requested (devices and hotplug slots), at most {max} exist"
    )]
    TooManySlots {
        /// Devices and hotplug slots together.
        requested: usize,
        /// The limit.
        max: u8,
    },
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel, initramfs or command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Memory windows end where this host's processors cannot address them.
    #[error(
        "memory: RAM and windows end at {end:#x}, this host's processors have {bits} address bits: lower max_mib or \
         pmem_window_mib"
    )]
    AddressSpace {
        /// First guest physical address after everything.
        end: u64,
        /// Width of guest physical addresses.
        bits: u32,
    },
    /// Memory windows.
    #[error(transparent)]
    Window(#[from] WindowError),
    /// ACPI tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// CPUID.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// vCPU registers.
    #[error(transparent)]
    Regs(#[from] RegsError),
    /// Two devices at one address.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A device.
    #[error("device {id}: {source}")]
    Device {
        /// Device id.
        id: String,
        /// What is wrong with it.
        source: DeviceFault,
    },
    /// The I/O loop.
    #[error(transparent)]
    Loop(#[from] IoLoopError),
    /// An eventfd, signal handler or thread.
    #[error("{what}: {source}")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// Cause.
        source: io::Error,
    },
}

/// What is wrong with a device of a machine that is to be built.
#[derive(Debug, thiserror::Error)]
pub enum DeviceFault {
    /// It cannot be opened, or has no place in guest memory.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The vsock device.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// KVM does not take it.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// A saved machine has it, its configuration has not.
    #[error("the configuration has none")]
    NotConfigured,
    /// A saved machine has it among those that are opened.
    #[error("comes with the memory")]
    OfMemory,
}

/// A state change is not possible.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The machine is in another state.
    #[error("cannot {operation} a machine that is {state}")]
    State {
        /// What was asked.
        operation: &'static str,
        /// The state it is in.
        state: VmState,
    },
    /// The generic event device cannot interrupt the guest.
    #[error("interrupt of the generic event device: {0}")]
    Interrupt(#[from] io::Error),
    /// A device of a restored machine cannot go on.
    #[error("cannot resume the machine: {0}")]
    Device(#[from] ResumeError),
    /// The machine has no vsock device.
    #[error("the machine has no vsock device")]
    NoVsock,
    /// A vsock operation failed.
    #[error(transparent)]
    Vsock(#[from] VsockError),
}

/// The machine has not reached the size asked for. It is usable at the size it has.
#[derive(Debug, thiserror::Error)]
pub enum ResizeVcpuError {
    /// The machine is not running.
    #[error("cannot resize a machine that is {0}")]
    State(VmState),
    /// More or fewer than the machine can have.
    #[error("vCPUs: {requested} requested, the machine can have 1 to {max}")]
    Vcpus {
        /// Requested.
        requested: u8,
        /// Maximum of the configuration.
        max: u8,
    },
    /// The host cannot make a vCPU.
    #[error("vCPU {index}: {source}")]
    Host {
        /// vCPU index.
        index: u8,
        /// Cause.
        source: StartVcpuError,
    },
    /// The guest cannot be told.
    #[error("vCPUs: {requested} requested, interrupt of the generic event device: {source}")]
    Interrupt {
        /// Requested.
        requested: u8,
        /// Cause.
        source: io::Error,
    },
    /// The guest refused or is silent.
    #[error(
        "vCPUs: {requested} requested, the guest has {reached} after {} ms: {}",
        waited.as_millis(), Listed(refusals)
    )]
    Guest {
        /// Requested.
        requested: u8,
        /// What the guest has now.
        reached: u8,
        /// Time waited.
        waited: Duration,
        /// What became of each vCPU that did not come or go.
        refusals: Vec<VcpuRefusal>,
    },
}

/// The host cannot make a vCPU, or not its thread.
#[derive(Debug, thiserror::Error)]
pub enum StartVcpuError {
    /// The machine ends.
    #[error("the machine ends")]
    Ending,
    /// KVM does not make it.
    #[error(transparent)]
    Create(#[from] VcpuError),
    /// KVM does not let one that was used before wait for INIT.
    #[error(transparent)]
    WaitForInit(#[from] RegsError),
    /// The host refuses the thread.
    #[error("thread: {0}")]
    Thread(#[from] io::Error),
}

/// What a guest did with a request to take or to give back a vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VcpuRefusal {
    /// It answered.
    #[error("vCPU {index}: _OST status {status:#x}")]
    Refused {
        /// vCPU index.
        index: u8,
        /// ACPI 6.5, 6.3.5: what its kernel says.
        status: u8,
    },
    /// It did not.
    #[error("vCPU {index}: no answer")]
    Silent {
        /// vCPU index.
        index: u8,
    },
}

/// Errors in one line.
struct Listed<'e, E>(&'e [E]);

impl<E: fmt::Display> fmt::Display for Listed<'_, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { ", " };
            write!(f, "{separator}{error}")?;
        }
        Ok(())
    }
}

/// A device cannot be added or removed. The machine is as before.
#[derive(Debug, thiserror::Error)]
pub enum HotplugError {
    /// The configuration contradicts itself.
    #[error("configuration: {0}")]
    Config(#[from] ConfigError),
    /// The machine is stopped.
    #[error("device {id}: the machine is {state}")]
    State {
        /// Device id.
        id: String,
        /// The state it is in.
        state: VmState,
    },
    /// The id is taken.
    #[error("device {0}: a device with this id exists")]
    Exists(String),
    /// There is no such device.
    #[error("device {0}: no such device")]
    NotFound(String),
    /// All slots are taken.
    #[error("device {id}: all {slots} virtio-mmio slots are taken")]
    NoFreeSlot {
        /// Device id.
        id: String,
        /// Number of slots.
        slots: usize,
    },
    /// The guest still uses it.
    #[error("device {0}: the guest's driver is still bound to it")]
    InUse(String),
    /// The device itself; [`OpenError::kind`] says what can be done about it.
    #[error("device {id}: {source}")]
    Device {
        /// Device id.
        id: String,
        /// What is wrong with it.
        source: OpenError,
    },
    /// KVM or the host refused.
    #[error("device {id}: {what}: {source}")]
    Host {
        /// Device id.
        id: String,
        /// What was attempted.
        what: &'static str,
        /// Cause.
        source: io::Error,
    },
}

/// An operation on one device of a machine was not carried out; nothing changed.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The machine is stopped.
    #[error("device {id}: the machine is {state}")]
    State {
        /// Device id.
        id: String,
        /// The state it is in.
        state: VmState,
    },
    /// There is no such device.
    #[error("device {0}: no such device")]
    NotFound(String),
    /// There is a device of that name, but it cannot do this.
    #[error("device {id} is not a {wanted}")]
    Kind {
        /// Device id.
        id: String,
        /// What the operation needs, e.g. `disk`.
        wanted: &'static str,
    },
    /// The device refused; the message names it.
    #[error(transparent)]
    Refused(Box<dyn std::error::Error + Send + Sync>),
}
