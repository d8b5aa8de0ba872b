//! Every knob of a VM, checked once by [`VmConfig::validate`].

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::devices::virtio::mem;

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
}

/// Processors of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
}

impl MemoryConfig {
    /// `size_mib` MiB, always; nothing can be plugged, and persistent memory can only be there from boot.
    pub fn fixed(size_mib: u64) -> Self {
        Self {
            size_mib,
            max_mib: size_mib,
            pmem_window_mib: 0,
        }
    }

    /// Bytes that can be plugged; a multiple of 4 MiB.
    pub fn hotpluggable_bytes(&self) -> u64 {
        (self.max_mib.saturating_sub(self.size_mib) << 20) / mem::GRANULARITY * mem::GRANULARITY
    }
}

/// Kernel, initramfs and command line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootConfig {
    /// ELF vmlinux (64-bit entry or PVH note) or bzImage.
    pub kernel: PathBuf,
    /// initramfs, any format the guest kernel understands.
    pub initramfs: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Folder of the cache of kernels taken out of bzImages.
    pub cache_dir: PathBuf,
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

/// The vsock device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockConfig {
    /// Guest context id, 3 or more.
    pub guest_cid: u32,
    /// Unix socket with the `CONNECT <port>` protocol for outside tools (`kata.hvsock`); guest-initiated connections
    /// to a port without an in-process listener go to `<path>_<port>`.
    pub uds_path: Option<PathBuf>,
}

/// A virtio device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum DeviceConfig {
    /// A disk.
    Block(BlockConfig),
    /// A shared directory.
    Fs(FsConfig),
    /// An entropy source.
    Rng(RngConfig),
    /// A balloon; at most one.
    Balloon(BalloonConfig),
    /// A file as persistent memory.
    Pmem(PmemConfig),
}

impl DeviceConfig {
    /// The device's id, unique in its VM.
    pub fn id(&self) -> &str {
        match self {
            Self::Block(c) => &c.id,
            Self::Fs(c) => &c.id,
            Self::Rng(c) => &c.id,
            Self::Balloon(c) => &c.id,
            Self::Pmem(c) => &c.id,
        }
    }
}

/// A disk backed by a raw image file or a block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockConfig {
    /// Device id; also the serial the guest reads (first 20 bytes).
    pub id: String,
    /// Raw image file or block device.
    pub path: PathBuf,
    /// Refuse writes, on the host, whatever the driver negotiated.
    pub read_only: bool,
}

/// A directory shared over virtio-fs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsConfig {
    /// Device id.
    pub id: String,
    /// Mount tag, at most 36 bytes.
    pub tag: String,
    /// Host directory that becomes the root of the share.
    pub shared_dir: PathBuf,
    /// What the guest may cache.
    pub cache: FsCache,
    /// Worker threads, 1..=64.
    pub threads: u8,
}

/// Cache policy of a share (virtiofsd's names).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FsCache {
    /// No caching in the guest; always coherent.
    Never,
    /// Cached with a short timeout, revalidated at open.
    #[default]
    Auto,
    /// Cached for long; the guest is the only writer.
    Always,
}

/// An entropy source fed from the host's `/dev/urandom`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngConfig {
    /// Device id.
    pub id: String,
}

/// A way for the guest to give memory back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonConfig {
    /// Device id.
    pub id: String,
    /// Let the guest take pages out of the balloon instead of killing processes.
    pub deflate_on_oom: bool,
    /// Let the guest report memory it does not use, which is freed at once (VIRTIO_BALLOON_F_REPORTING).
    pub reporting: bool,
    /// Seconds between two statistics of the guest; 0 is none.
    pub statistics_interval_s: u16,
}

/// A file as persistent memory, `/dev/pmemN` in the guest. Its pages in the host's page cache are the guest's memory, shared
/// by all VMs that have the file; a file system mounted with `-o dax` needs no page cache of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PmemConfig {
    /// Device id.
    pub id: String,
    /// A regular file or block device. Its size is rounded up to 2 MiB, with zeros that are not in the file. It must not
    /// become shorter while a VM has it.
    pub path: PathBuf,
    /// The guest's writes never reach the file: they stay in this VM, each in a page of its own, and are forgotten with
    /// it.
    pub read_only: bool,
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
    /// A reserved context id.
    #[error("vsock: guest CID {0} is reserved, need 3 or more")]
    GuestCid(u32),
    /// A bad mount tag.
    #[error("share {id:?}: tag {tag:?} must be 1 to 36 bytes")]
    FsTag {
        /// Device id.
        id: String,
        /// The tag.
        tag: String,
    },
    /// A bad number of threads.
    #[error("share {id:?}: {threads} threads, need 1 to 64")]
    FsThreads {
        /// Device id.
        id: String,
        /// Requested threads.
        threads: u8,
    },
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
        } = self.memory;
        if max_mib < size_mib || max_mib > MAX_MEMORY_MIB {
            return Err(ConfigError::MemoryMaximum { size_mib, max_mib });
        }
        if pmem_window_mib > MAX_MEMORY_MIB {
            return Err(ConfigError::PmemWindow(pmem_window_mib));
        }
        if let Some(vsock) = &self.vsock
            && vsock.guest_cid < 3
        {
            return Err(ConfigError::GuestCid(vsock.guest_cid));
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

impl DeviceConfig {
    /// Checks one device, at boot or before it is added to a running VM.
    ///
    /// # Errors
    /// The first [`ConfigError`] found.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let id = self.id();
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if id.is_empty() || id.len() > 64 || !id.chars().all(allowed) {
            return Err(ConfigError::DeviceId(id.to_owned()));
        }
        if let Self::Fs(fs) = self {
            if fs.tag.is_empty() || fs.tag.len() > 36 {
                return Err(ConfigError::FsTag {
                    id: fs.id.clone(),
                    tag: fs.tag.clone(),
                });
            }
            if fs.threads == 0 || fs.threads > 64 {
                return Err(ConfigError::FsThreads {
                    id: fs.id.clone(),
                    threads: fs.threads,
                });
            }
        }
        Ok(())
    }
}
