//! Counters of VM exits.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// Exits of one vCPU, as it counts them.
#[derive(Debug, Default)]
pub struct VcpuCounters {
    /// Port reads.
    pub pio_in: AtomicU64,
    /// Port writes.
    pub pio_out: AtomicU64,
    /// Memory-mapped reads.
    pub mmio_read: AtomicU64,
    /// Memory-mapped writes.
    pub mmio_write: AtomicU64,
    /// Kicks and other signals.
    pub interrupted: AtomicU64,
}

/// Exits of one vCPU so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuMetrics {
    /// Port reads.
    pub pio_in: u64,
    /// Port writes.
    pub pio_out: u64,
    /// Memory-mapped reads.
    pub mmio_read: u64,
    /// Memory-mapped writes.
    pub mmio_write: u64,
    /// Kicks and other signals.
    pub interrupted: u64,
}

impl VcpuCounters {
    /// Adds one to `counter`.
    pub fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// The values now.
    pub fn snapshot(&self) -> VcpuMetrics {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        VcpuMetrics {
            pio_in: get(&self.pio_in),
            pio_out: get(&self.pio_out),
            mmio_read: get(&self.mmio_read),
            mmio_write: get(&self.mmio_write),
            interrupted: get(&self.interrupted),
        }
    }
}
