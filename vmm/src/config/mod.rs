//! Every knob of a VM, checked once by [`VmConfig::validate`].

mod device;

use serde::{Deserialize, Serialize};

pub use crate::boot::BootConfig;
pub use crate::confinement::{Confinement, Seccomp};
pub use crate::devices::virtio::balloon::config::BalloonConfig;
pub use crate::devices::virtio::block::config::{BlockConfig, BlockEngine, MAX_BLOCK_QUEUES};
pub use crate::devices::virtio::config::{KnobError, Knobs};
pub use crate::devices::virtio::fs::config::{
    FsCache, FsConfig, FsRoot, MAX_FS_QUEUE_SIZE, SharedDir, check_share_name,
};
use crate::devices::virtio::mem;
pub use crate::devices::virtio::net::config::{MAX_QUEUE_PAIRS, NetConfig, TapConfig};
pub use crate::devices::virtio::pmem::config::PmemConfig;
pub use crate::devices::virtio::rng::config::RngConfig;
pub use crate::devices::virtio::vsock::config::VsockConfig;
pub use crate::rate_limiter::{BucketConfigError, RateLimiterConfig, TokenBucketConfig};
pub use crate::vcpu::cpuid::{CpuConfig, CpuTemplate};
pub use device::DeviceConfig;

/// Smallest guest memory, in MiB.
pub const MIN_MEMORY_MIB: u64 = 64;
/// Largest guest memory, in MiB: 1 TiB.
pub const MAX_MEMORY_MIB: u64 = 1 << 20;
/// Most vCPUs of one VM: x2APIC ids in the MADT start at 0 and stay below 255.
pub const MAX_VCPUS: u8 = 254;

/// A virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmConfig {
    /// Name used in logs, thread names and errors.
    pub id: String,
    /// Processors.
    pub vcpus: VcpuConfig,
    /// What the processors can.
    #[serde(default)]
    pub cpu: CpuConfig,
    /// RAM.
    pub memory: MemoryConfig,
    /// What to boot.
    pub boot: BootConfig,
    /// Where the guest's console goes.
    pub console: ConsoleConfig,
    /// The vsock device; `None` leaves it out.
    pub vsock: Option<VsockConfig>,
    /// Devices present at boot, in guest order (the first block device is `vda`).
    pub devices: Vec<DeviceConfig>,
    /// Empty virtio-mmio slots kept for `add_device`.
    pub hotplug_slots: u8,
    /// What the machine's threads give up. Not saved: a file must not decide it.
    #[serde(skip)]
    pub confinement: Confinement,
}

/// Processors of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuConfig {
    /// vCPUs running at boot, 1..=`max`.
    pub boot: u8,
    /// vCPUs declared to the guest, at most [`MAX_VCPUS`].
    pub max: u8,
}

/// RAM of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryConfig {
    /// Size at boot in MiB, at least [`MIN_MEMORY_MIB`].
    pub size_mib: u64,
    /// Most the guest can be given while it runs ([`Vm::resize_memory`](crate::Vm::resize_memory)), in MiB, at least
    /// `size_mib`. The difference is a virtio-mem device's, in steps of 4 MiB; it costs the host nothing until it is used
    /// and the guest 1.6 % of what is plugged. No difference, no device.
    pub max_mib: u64,
    /// Room for virtio-pmem devices in guest physical space, in MiB, at most [`MAX_MEMORY_MIB`]. Each takes the size of
    /// its file rounded up to 128 MiB. Room for the devices present at boot is made in any case.
    pub pmem_window_mib: u64,
    /// Keeps a log of the pages written since the last full save, by which a difference against that save is found without
    /// reading all memory ([`SaveKind::Difference`](crate::vm::snapshot::SaveKind::Difference)). From the first full save on
    /// the first write to each page after a full save costs a fault on the host, and splits the huge page it is in. Needs
    /// Linux 6.7 on the host; without it all is compared.
    pub track_writes: bool,
}

impl MemoryConfig {
    /// `size_mib` MiB, always; nothing can be plugged, and persistent memory can only be there from boot.
    pub fn fixed(size_mib: u64) -> Self {
        Self {
            size_mib,
            max_mib: size_mib,
            pmem_window_mib: 0,
            track_writes: false,
        }
    }

    /// Bytes that can be plugged; a multiple of 4 MiB.
    pub fn hotpluggable_bytes(&self) -> u64 {
        (self.max_mib.saturating_sub(self.size_mib) << 20) / mem::GRANULARITY * mem::GRANULARITY
    }
}

/// Where the guest's console goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConsoleConfig {
    /// No console device.
    Off,
    /// virtio-console, `hvc0` in the guest: output kept in a bounded ring. Cheap.
    #[default]
    Hvc,
    /// COM1, `ttyS0` in the guest: output kept in the same ring. One VM exit per byte, works from the first instruction.
    Serial,
}

/// A configuration that cannot become a VM.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// No processor, or more at boot than the maximum.
    #[error("vcpus: {boot} at boot, {max} at most: need 1 <= boot <= max <= {MAX_VCPUS}")]
    Vcpus {
        /// Requested at boot.
        boot: u8,
        /// Requested maximum.
        max: u8,
    },
    /// A template cannot make the host's support for nested virtualization look like another's.
    #[error("cpu: nested is true with template {0}: need template none")]
    NestedTemplate(CpuTemplate),
    /// Memory below the minimum.
    #[error("memory: {0} MiB is below the minimum of {MIN_MEMORY_MIB} MiB")]
    Memory(u64),
    /// Memory above the maximum.
    #[error("memory: {0} MiB is above the maximum of {MAX_MEMORY_MIB} MiB")]
    MemoryTooLarge(u64),
    /// A maximum that makes no sense.
    #[error("memory: max_mib is {max_mib}, need {size_mib} (size_mib) to {MAX_MEMORY_MIB}")]
    MemoryMaximum {
        /// Size at boot.
        size_mib: u64,
        /// Requested maximum.
        max_mib: u64,
    },
    /// A window that does not fit in guest physical space.
    #[error("memory: pmem_window_mib is {0}, at most {MAX_MEMORY_MIB} are possible")]
    PmemWindow(u64),
    /// More than one balloon.
    #[error("device {0:?} is a second balloon; a machine has one")]
    SecondBalloon(String),
    /// Two devices share an id.
    #[error("device id {0:?} is used twice")]
    DuplicateDevice(String),
    /// A device id that is empty or too long.
    #[error("device id {0:?} must be 1 to 64 characters of [A-Za-z0-9._-]")]
    DeviceId(String),
    /// A knob of a device.
    #[error(transparent)]
    Device(#[from] KnobError),
}

impl VmConfig {
    /// Checks everything that can be checked without touching the host.
    ///
    /// # Errors
    /// The first [`ConfigError`] found.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let VcpuConfig { boot, max } = self.vcpus;
        if boot == 0 || boot > max || max > MAX_VCPUS {
            return Err(ConfigError::Vcpus { boot, max });
        }
        if self.cpu.nested && self.cpu.template != CpuTemplate::None {
            return Err(ConfigError::NestedTemplate(self.cpu.template));
        }
        if self.memory.size_mib < MIN_MEMORY_MIB {
            return Err(ConfigError::Memory(self.memory.size_mib));
        }
        if self.memory.size_mib > MAX_MEMORY_MIB {
            return Err(ConfigError::MemoryTooLarge(self.memory.size_mib));
        }
        let MemoryConfig {
            size_mib,
            max_mib,
            pmem_window_mib,
            track_writes: _,
        } = self.memory;
        if max_mib < size_mib || max_mib > MAX_MEMORY_MIB {
            return Err(ConfigError::MemoryMaximum { size_mib, max_mib });
        }
        if pmem_window_mib > MAX_MEMORY_MIB {
            return Err(ConfigError::PmemWindow(pmem_window_mib));
        }
        if let Some(vsock) = &self.vsock {
            vsock.validate()?;
        }
        for (index, device) in self.devices.iter().enumerate() {
            device.validate()?;
            if self.devices[..index].iter().any(|d| d.id() == device.id()) {
                return Err(ConfigError::DuplicateDevice(device.id().to_owned()));
            }
            if device.id() == mem::DEVICE_ID && self.memory.hotpluggable_bytes() > 0 {
                return Err(ConfigError::DuplicateDevice(device.id().to_owned()));
            }
            let balloon = |device: &DeviceConfig| matches!(device, DeviceConfig::Balloon(_));
            if balloon(device) && self.devices[..index].iter().any(balloon) {
                return Err(ConfigError::SecondBalloon(device.id().to_owned()));
            }
        }
        Ok(())
    }
}
