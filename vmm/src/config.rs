//! Every knob of a VM, checked once by [`VmConfig::validate`].

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Smallest guest memory, in MiB.
pub const MIN_MEMORY_MIB: u64 = 64;
/// Largest guest memory, in MiB: 1 TiB.
pub const MAX_MEMORY_MIB: u64 = 1 << 20;
/// Most vCPUs of one VM: x2APIC ids in the MADT start at 0 and stay below 255.
pub const MAX_VCPUS: u8 = 254;

/// Largest request queue of a share, in entries.
pub const MAX_FS_QUEUE_SIZE: u16 = 1024;
/// Smallest: the driver keeps four for headers.
const MIN_FS_QUEUE_SIZE: u16 = 16;

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
    /// Size in MiB, at least [`MIN_MEMORY_MIB`].
    pub size_mib: u64,
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
}

impl DeviceConfig {
    /// The device's id, unique in its VM.
    pub fn id(&self) -> &str {
        match self {
            Self::Block(c) => &c.id,
            Self::Fs(c) => &c.id,
            Self::Rng(c) => &c.id,
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
    /// What the guest finds at the mount point.
    pub root: FsRoot,
    /// What the guest may cache.
    pub cache: FsCache,
    /// Whether the guest's kernel may keep written data and write it back later. The guest must then be the only writer:
    /// sizes and times of files it has written to are not read from the host any more. Not with [`FsCache::Never`].
    pub writeback: bool,
    /// Extended attributes; without them the guest's calls fail with EOPNOTSUPP.
    pub xattr: bool,
    /// Worker threads, 1..=64.
    pub threads: u8,
    /// Entries of the request queue: a power of two, 16..=[`MAX_FS_QUEUE_SIZE`]. Linux' largest requests need 260.
    pub queue_size: u16,
    /// Limits on requests (FORGET and INTERRUPT do not count) and on the bytes in them and in their answers.
    pub rate_limiter: RateLimiterConfig,
}

impl FsConfig {
    /// A share with what suits most: cached with a short timeout, extended attributes, one thread, no limits.
    pub fn new(id: impl Into<String>, tag: impl Into<String>, root: FsRoot) -> Self {
        Self {
            id: id.into(),
            tag: tag.into(),
            root,
            cache: FsCache::Auto,
            writeback: false,
            xattr: true,
            threads: 1,
            queue_size: MAX_FS_QUEUE_SIZE,
            rate_limiter: RateLimiterConfig::default(),
        }
    }
}

/// What the guest finds at the mount point of a share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FsRoot {
    /// A host directory.
    Directory(SharedDir),
    /// A read-only directory with these in it, by name; more come and go with `Vm::fs_mount` and `Vm::fs_unmount`.
    Shares(BTreeMap<String, SharedDir>),
}

/// A host directory to be shared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedDir {
    /// The directory.
    pub path: PathBuf,
    /// Refuse changes, on the host, however the guest mounts it.
    pub read_only: bool,
}

impl SharedDir {
    /// The guest may change what is in `path`.
    pub fn writable(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            read_only: false,
        }
    }

    /// The guest may only look at what is in `path`.
    pub fn read_only(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            read_only: true,
        }
    }
}

/// Checks the name of a directory in the root of a share (device `id`): one path component of at most 255 bytes.
///
/// # Errors
/// [`ConfigError::FsName`].
pub fn check_share_name(id: &str, name: &str) -> Result<(), ConfigError> {
    let bad =
        name.is_empty() || name.len() > 255 || name == "." || name == ".." || name.contains(['/', '\0']);
    match bad {
        true => Err(ConfigError::FsName {
            id: id.to_owned(),
            name: name.to_owned(),
        }),
        false => Ok(()),
    }
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

/// Limits on what a device may move; without a bucket there is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RateLimiterConfig {
    /// Tokens are bytes.
    pub bandwidth: Option<TokenBucketConfig>,
    /// Tokens are operations: block requests, network frames.
    pub ops: Option<TokenBucketConfig>,
}

/// A token bucket: full at first, refilled at a constant rate of `size` tokens in `refill_time_ms`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenBucketConfig {
    /// Most tokens it holds, 1 or more.
    pub size: u64,
    /// Tokens given once on top of that, spent first and never refilled.
    #[serde(default)]
    pub one_time_burst: u64,
    /// Time in ms from empty to full, 1 or more.
    pub refill_time_ms: u64,
}

impl RateLimiterConfig {
    /// Checks the limiter of device `id`.
    ///
    /// # Errors
    /// [`ConfigError::TokenBucket`] for a bucket that could never hold or never gain a token.
    pub fn validate(&self, id: &str) -> Result<(), ConfigError> {
        for (name, bucket) in [("bandwidth", self.bandwidth), ("ops", self.ops)] {
            if let Some(TokenBucketConfig {
                size, refill_time_ms, ..
            }) = bucket
                && (size == 0 || refill_time_ms == 0)
            {
                return Err(ConfigError::TokenBucket {
                    id: id.to_owned(),
                    bucket: name,
                    size,
                    refill_time_ms,
                });
            }
        }
        Ok(())
    }
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
    /// A rate limiter that would let nothing through.
    #[error(
        "device {id:?}: rate limiter: {bucket}: size {size}, refill_time_ms {refill_time_ms}: both must be 1 or more \
         (leave the bucket out for no limit)"
    )]
    TokenBucket {
        /// Device id.
        id: String,
        /// `bandwidth` or `ops`.
        bucket: &'static str,
        /// Configured size.
        size: u64,
        /// Configured refill time.
        refill_time_ms: u64,
    },
    /// A queue of a size that does not exist.
    #[error(
        "share {id:?}: queue of {size} entries, need a power of two from {MIN_FS_QUEUE_SIZE} to {MAX_FS_QUEUE_SIZE}"
    )]
    FsQueueSize {
        /// Device id.
        id: String,
        /// Requested entries.
        size: u16,
    },
    /// Write-back without a cache.
    #[error("share {0:?}: write-back needs a cache: choose \"auto\" or \"always\", or turn it off")]
    FsWriteback(String),
    /// A bad name for a directory in a share.
    #[error("share {id:?}: name {name:?} must be 1 to 255 bytes without '/', and not '.' or '..'")]
    FsName {
        /// Device id.
        id: String,
        /// The name.
        name: String,
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
            fs.validate()?;
        }
        Ok(())
    }
}

impl FsConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        let id = || self.id.clone();
        if self.tag.is_empty() || self.tag.len() > 36 {
            return Err(ConfigError::FsTag {
                id: id(),
                tag: self.tag.clone(),
            });
        }
        if self.threads == 0 || self.threads > 64 {
            return Err(ConfigError::FsThreads {
                id: id(),
                threads: self.threads,
            });
        }
        let sizes = MIN_FS_QUEUE_SIZE..=MAX_FS_QUEUE_SIZE;
        if !sizes.contains(&self.queue_size) || !self.queue_size.is_power_of_two() {
            return Err(ConfigError::FsQueueSize {
                id: id(),
                size: self.queue_size,
            });
        }
        if self.writeback && self.cache == FsCache::Never {
            return Err(ConfigError::FsWriteback(id()));
        }
        if let FsRoot::Shares(shares) = &self.root {
            shares
                .keys()
                .try_for_each(|name| check_share_name(&self.id, name))?;
        }
        self.rate_limiter.validate(&self.id)
    }
}
