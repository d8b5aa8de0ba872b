//! What an interface counts.

use crate::devices::virtio::counter::counters;

counters! {
    /// Counters of an interface; "rx" is what the guest receives. Bytes are those of the frames, without the virtio header.
    pub(super) struct Counters {
        rx_frames: "rx_frames",
        rx_bytes: "rx_bytes",
        /// Frames too large for the guest's buffers, or cut short by a suspend while they waited for buffers.
        rx_dropped: "rx_dropped",
        /// Buffers the device could not use, and failed reads.
        rx_errors: "rx_errors",
        /// Times the guest had no buffer for a frame.
        rx_starved: "rx_starved",
        rx_throttled: "rx_throttled",
        tx_frames: "tx_frames",
        tx_bytes: "tx_bytes",
        /// Chains that are no frame.
        tx_malformed: "tx_malformed",
        /// Frames the TAP refused, e.g. because it is down.
        tx_errors: "tx_errors",
        /// Times the TAP was full.
        tx_blocked: "tx_blocked",
        tx_throttled: "tx_throttled",
        control_commands: "control_commands",
        control_errors: "control_errors",
        /// Times a command had to wait for the limit of changes of the TAP.
        control_throttled: "control_throttled",
    }
}
