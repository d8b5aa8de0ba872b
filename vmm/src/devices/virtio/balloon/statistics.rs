//! Memory statistics of the guest (5.5.6.3).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// `struct virtio_balloon_stat`: le16 tag, le64 value, packed.
const STAT_BYTES: usize = 10;
/// Most bytes looked at; Linux 6.12 sends 16 statistics.
pub(super) const MAX_BYTES: usize = 64 * STAT_BYTES;
/// Names of the tags; the last six are Linux' (include/uapi/linux/virtio_balloon.h), not yet in virtio 1.2.
const NAMES: [&str; 16] = [
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free_memory",
    "total_memory",
    "available_memory",
    "disk_caches",
    "hugetlb_allocations",
    "hugetlb_failures",
    "oom_kills",
    "allocation_stalls",
    "async_scans",
    "direct_scans",
    "async_reclaims",
    "direct_reclaims",
];

/// What the guest said about its memory. The guest may lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BalloonStatistics {
    /// Values by name: `free_memory`, `total_memory`, `available_memory`, `disk_caches`, `swap_in` and `swap_out` in bytes,
    /// the rest counts events since the guest booted.
    pub values: BTreeMap<&'static str, u64>,
    /// How old the values are.
    pub age: Duration,
}

/// Values and when they came.
#[derive(Debug, Clone)]
pub(super) struct Snapshot {
    values: BTreeMap<&'static str, u64>,
    taken: Instant,
}

impl Snapshot {
    /// Reads a buffer of the driver; unknown tags are skipped.
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let mut values = BTreeMap::new();
        for stat in bytes.as_chunks::<STAT_BYTES>().0 {
            let [t0, t1, value @ ..] = *stat;
            let tag = usize::from(u16::from_le_bytes([t0, t1]));
            if let Some(name) = NAMES.get(tag) {
                values.insert(*name, u64::from_le_bytes(value));
            }
        }
        Self {
            values,
            taken: Instant::now(),
        }
    }

    /// For the caller.
    pub(super) fn report(&self) -> BalloonStatistics {
        BalloonStatistics {
            values: self.values.clone(),
            age: self.taken.elapsed(),
        }
    }
}
