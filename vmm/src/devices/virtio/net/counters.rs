//! What an interface counts.

use std::sync::atomic::{AtomicU64, Ordering};

/// One counter; written by the I/O loop, read by anyone.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counters of an interface; "rx" is what the guest receives. Bytes are those of the frames, without the virtio header.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) rx_frames: Counter,
    pub(super) rx_bytes: Counter,
    /// Frames too large for the guest's buffers, or cut short by a suspend while they waited for buffers.
    pub(super) rx_dropped: Counter,
    /// Buffers the device could not use, and failed reads.
    pub(super) rx_errors: Counter,
    /// Times the guest had no buffer for a frame.
    pub(super) rx_starved: Counter,
    pub(super) rx_throttled: Counter,
    pub(super) tx_frames: Counter,
    pub(super) tx_bytes: Counter,
    /// Chains that are no frame.
    pub(super) tx_malformed: Counter,
    /// Frames the TAP refused, e.g. because it is down.
    pub(super) tx_errors: Counter,
    /// Times the TAP was full.
    pub(super) tx_blocked: Counter,
    pub(super) tx_throttled: Counter,
    pub(super) control_commands: Counter,
    pub(super) control_errors: Counter,
    /// Times a command had to wait for the limit of changes of the TAP.
    pub(super) control_throttled: Counter,
}

impl Counters {
    /// All of them, by name.
    pub(super) fn snapshot(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("rx_frames", self.rx_frames.get()),
            ("rx_bytes", self.rx_bytes.get()),
            ("rx_dropped", self.rx_dropped.get()),
            ("rx_errors", self.rx_errors.get()),
            ("rx_starved", self.rx_starved.get()),
            ("rx_throttled", self.rx_throttled.get()),
            ("tx_frames", self.tx_frames.get()),
            ("tx_bytes", self.tx_bytes.get()),
            ("tx_malformed", self.tx_malformed.get()),
            ("tx_errors", self.tx_errors.get()),
            ("tx_blocked", self.tx_blocked.get()),
            ("tx_throttled", self.tx_throttled.get()),
            ("control_commands", self.control_commands.get()),
            ("control_errors", self.control_errors.get()),
            ("control_throttled", self.control_throttled.get()),
        ]
    }
}
