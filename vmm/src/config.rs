//! Every knob of a VM, checked once by [`VmConfig::validate`].

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::devices::virtio::mem;

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
pub enum DeviceConfig {
    /// A disk.
    Block(BlockConfig),
    /// A shared directory.
    Fs(FsConfig),
    /// An entropy source.
    Rng(RngConfig),
    /// A network interface.
    Net(NetConfig),
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
            Self::Net(c) => &c.id,
            Self::Balloon(c) => &c.id,
            Self::Pmem(c) => &c.id,
        }
    }
}

/// A disk backed by a raw image file or a block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockConfig {
    /// Device id.
    pub id: String,
    /// Raw image file or block device.
    pub path: PathBuf,
    /// Refuse writes, on the host, whatever the driver negotiated.
    #[serde(default)]
    pub read_only: bool,
    /// How the host does the I/O.
    #[serde(default)]
    pub engine: BlockEngine,
    /// Request queues, 1..=[`MAX_BLOCK_QUEUES`]; a guest uses at most one per vCPU.
    #[serde(default = "one_queue")]
    pub queues: u8,
    /// Descriptors per queue: a power of two, 16..=1024. Two less is the most data segments of a request.
    #[serde(default = "default_queue_size")]
    pub queue_size: u16,
    /// Go around the host's page cache (O_DIRECT).
    #[serde(default)]
    pub direct: bool,
    /// What the guest reads as the disk's serial, 1 to 20 printable ASCII characters; `None`: the start of `id`.
    #[serde(default)]
    pub serial: Option<String>,
    /// Limits on the requests and bytes of all queues together; `None`: none.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiterConfig>,
}

/// Most queues of a disk.
pub const MAX_BLOCK_QUEUES: u8 = 16;

fn one_queue() -> u8 {
    1
}

fn default_queue_size() -> u16 {
    256
}

impl BlockConfig {
    /// A writable disk with one queue of 256 entries, through the host's page cache, without limits.
    pub fn new(id: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self {
            id: id.into(),
            path: path.into(),
            read_only: false,
            engine: BlockEngine::default(),
            queues: one_queue(),
            queue_size: default_queue_size(),
            direct: false,
            serial: None,
            rate_limiter: None,
        }
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let Self {
            queues, queue_size, ..
        } = *self;
        let id = || self.id.clone();
        if queues == 0 || queues > MAX_BLOCK_QUEUES {
            return Err(ConfigError::BlockQueues { id: id(), queues });
        }
        if !queue_size.is_power_of_two() || !(16..=1024).contains(&queue_size) {
            return Err(ConfigError::BlockQueueSize {
                id: id(),
                size: queue_size,
            });
        }
        if let Some(serial) = &self.serial
            && (serial.is_empty()
                || serial.len() > 20
                || !serial.bytes().all(|b| b.is_ascii_graphic() || b == b' '))
        {
            return Err(ConfigError::BlockSerial {
                id: id(),
                serial: serial.clone(),
            });
        }
        match &self.rate_limiter {
            Some(limiter) => limiter.validate(&self.id),
            None => Ok(()),
        }
    }
}

/// How the host does a disk's I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BlockEngine {
    /// io_uring where the kernel has it, else synchronous; for an image on tmpfs or ramfs, which io_uring can only serve by
    /// a thread of its own, synchronous.
    #[default]
    Auto,
    /// io_uring on the I/O loop: many requests at once, in any order. An error on a host without it.
    #[serde(rename = "io_uring")]
    IoUring,
    /// Blocking system calls, one at a time, on one thread per queue.
    Sync,
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

/// A network interface over a TAP.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// Device id.
    pub id: String,
    /// The host side.
    pub tap: TapConfig,
    /// Hardware address of the guest's interface; `None`: a locally administered one made from the device id, the TAP's
    /// name and its namespace, the same each time.
    pub mac: Option<[u8; 6]>,
    /// MTU the guest is told, 68 or more bytes; `None`: it takes 1500. The TAP's own MTU is its owner's affair.
    pub mtu: Option<u16>,
    /// Pairs of receive and transmit queues, 1..=[`MAX_QUEUE_PAIRS`].
    pub queue_pairs: u8,
    /// Entries of each receive and transmit queue: a power of two, 32..=1024. (Linux stops transmitting while a frame of
    /// 19 descriptors would not fit.)
    pub queue_size: u16,
    /// Limit on what the guest receives; excess waits in the TAP, which drops when its own queue is full.
    #[serde(default)]
    pub rx_rate_limiter: RateLimiterConfig,
    /// Limit on what the guest sends; excess waits in the ring.
    #[serde(default)]
    pub tx_rate_limiter: RateLimiterConfig,
}

/// Most queue pairs of a network interface.
pub const MAX_QUEUE_PAIRS: u8 = 8;

/// A TAP: an existing one is attached to and stays when the machine ends (if it is persistent); otherwise one is made,
/// which is gone with the machine. It is set up, given addresses and a bridge by whoever owns it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TapConfig {
    /// Interface name, 1 to 15 bytes.
    pub name: String,
    /// Network namespace it is in, e.g. `/run/netns/pod`; `None`: the caller's.
    #[serde(default)]
    pub netns: Option<PathBuf>,
}

impl NetConfig {
    /// An interface called `id` over the TAP `tap` of the caller's namespace: one queue pair of 256 entries, no limits.
    pub fn new(id: &str, tap: &str) -> Self {
        Self {
            id: id.to_owned(),
            tap: TapConfig {
                name: tap.to_owned(),
                netns: None,
            },
            mac: None,
            mtu: None,
            queue_pairs: 1,
            queue_size: 256,
            rx_rate_limiter: RateLimiterConfig::default(),
            tx_rate_limiter: RateLimiterConfig::default(),
        }
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let invalid = |reason: String| {
            Err(ConfigError::Net {
                id: self.id.clone(),
                reason,
            })
        };
        let name = &self.tap.name;
        // What the kernel's dev_valid_name refuses, and %, which it takes for a pattern.
        let bad = |c: char| !c.is_ascii_graphic() || matches!(c, '/' | ':' | '%');
        if name.is_empty() || name.len() > 15 || name.contains(bad) || name == "." || name == ".." {
            return invalid(format!(
                "{name:?} is no interface name (1 to 15 characters, no / : %)"
            ));
        }
        if let Some(mac) = self.mac
            && (mac[0] & 1 != 0 || mac == [0; 6])
        {
            return invalid(format!("mac {mac:02x?} is not the address of one interface"));
        }
        if let Some(mtu) = self.mtu
            && mtu < 68
        {
            return invalid(format!("mtu {mtu}: need 68 or more"));
        }
        if self.queue_pairs == 0 || self.queue_pairs > MAX_QUEUE_PAIRS {
            return invalid(format!(
                "{} queue pairs: need 1 to {MAX_QUEUE_PAIRS}",
                self.queue_pairs
            ));
        }
        if !self.queue_size.is_power_of_two() || !(32..=1024).contains(&self.queue_size) {
            return invalid(format!(
                "queue size {}: need a power of two from 32 to 1024",
                self.queue_size
            ));
        }
        self.rx_rate_limiter.validate(&self.id)?;
        self.tx_rate_limiter.validate(&self.id)
    }
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
    /// A bad number of queues.
    #[error("disk {id:?}: {queues} queues, need 1 to {MAX_BLOCK_QUEUES}")]
    BlockQueues {
        /// Device id.
        id: String,
        /// Requested queues.
        queues: u8,
    },
    /// A bad queue size.
    #[error("disk {id:?}: queues of {size} entries, need a power of two from 16 to 1024")]
    BlockQueueSize {
        /// Device id.
        id: String,
        /// Requested size.
        size: u16,
    },
    /// A bad serial.
    #[error("disk {id:?}: serial {serial:?} must be 1 to 20 printable ASCII characters")]
    BlockSerial {
        /// Device id.
        id: String,
        /// The serial.
        serial: String,
    },
    /// A bad mount tag.
    #[error("share {id:?}: tag {tag:?} must be 1 to 36 bytes")]
    FsTag {
        /// Device id.
        id: String,
        /// The tag.
        tag: String,
    },
    /// A network interface that cannot be.
    #[error("network {id:?}: {reason}")]
    Net {
        /// Device id.
        id: String,
        /// What is wrong.
        reason: String,
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
        if let Self::Block(block) = self {
            block.validate()?;
        }
        if let Self::Net(net) = self {
            net.validate()?;
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
