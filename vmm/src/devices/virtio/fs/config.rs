//! The knobs of a share.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Fs;
use crate::devices::virtio::config::{Complete, KnobError, Knobs, OpenError, Opened};
use crate::rate_limiter::RateLimiterConfig;

/// Largest request queue of a share, in entries.
pub const MAX_FS_QUEUE_SIZE: u16 = 1024;
/// Smallest: the driver keeps four for headers.
const MIN_FS_QUEUE_SIZE: u16 = 16;
/// Most worker threads.
const MAX_THREADS: u8 = 64;

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

impl Knobs for FsConfig {
    fn id(&self) -> &str {
        &self.id
    }

    fn validate(&self) -> Result<(), KnobError> {
        let error = |knob, value: &dyn std::fmt::Debug, need: String| {
            Err(KnobError::new(&self.id, knob, value, need))
        };
        if self.tag.is_empty() || self.tag.len() > 36 {
            return error("tag", &self.tag, "1 to 36 bytes".to_owned());
        }
        if self.threads == 0 || self.threads > MAX_THREADS {
            return error("threads", &self.threads, format!("1 to {MAX_THREADS}"));
        }
        let sizes = MIN_FS_QUEUE_SIZE..=MAX_FS_QUEUE_SIZE;
        if !sizes.contains(&self.queue_size) || !self.queue_size.is_power_of_two() {
            let need = format!("a power of two from {MIN_FS_QUEUE_SIZE} to {MAX_FS_QUEUE_SIZE}");
            return error("queue_size", &self.queue_size, need);
        }
        if self.writeback && self.cache == FsCache::Never {
            let need = "false, or a cache (\"auto\" or \"always\")".to_owned();
            return error("writeback", &self.writeback, need);
        }
        if let FsRoot::Shares(shares) = &self.root {
            shares
                .keys()
                .try_for_each(|name| check_share_name(&self.id, name))?;
        }
        KnobError::check_limiter(&self.id, "rate_limiter", &self.rate_limiter)
    }

    fn open(&self) -> Result<Box<dyn Opened>, OpenError> {
        Ok(Complete::opened(Fs::new(self)?))
    }
}

/// Checks the name of a directory in the root of a share (device `id`): one path component of at most 255 bytes.
///
/// # Errors
/// [`KnobError`].
pub fn check_share_name(id: &str, name: &str) -> Result<(), KnobError> {
    let bad =
        name.is_empty() || name.len() > 255 || name == "." || name == ".." || name.contains(['/', '\0']);
    match bad {
        true => Err(KnobError::new(
            id,
            "name of a directory",
            &name,
            "1 to 255 bytes without '/', not '.' or '..'",
        )),
        false => Ok(()),
    }
}
