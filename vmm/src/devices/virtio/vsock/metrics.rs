//! Counters of the device.

use serde::Serialize;

use crate::devices::virtio::counter::Counter;

/// A reading of the counters. `rx` is toward the guest and `tx` from the guest, as the queues are named.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct VsockMetrics {
    /// Packets given to the guest.
    pub rx_packets: u64,
    /// Payload bytes given to the guest.
    pub rx_bytes: u64,
    /// Packets taken from the guest.
    pub tx_packets: u64,
    /// Payload bytes taken from the guest.
    pub tx_bytes: u64,
    /// Connections established since the start, both directions.
    pub connections: u64,
    /// Connections in the table now, in any state.
    pub open_connections: u64,
    /// Connections refused because the table was full or nobody listened.
    pub refused: u64,
    /// Requests sent to the guest again after it had refused one.
    pub retries: u64,
    /// Chains and packets from the guest that were malformed or not for us.
    pub malformed: u64,
    /// Payload bytes from the guest dropped because nobody on the host reads them any more.
    pub dropped_bytes: u64,
    /// Times the device had something for the guest and no buffer to put it in.
    pub rx_stalls: u64,
    /// Times the guest was told that all its connections are gone, after a restore.
    pub transport_resets: u64,
}

/// The live counters.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) rx_packets: Counter,
    pub(super) rx_bytes: Counter,
    pub(super) tx_packets: Counter,
    pub(super) tx_bytes: Counter,
    pub(super) connections: Counter,
    pub(super) open_connections: Counter,
    pub(super) refused: Counter,
    pub(super) retries: Counter,
    pub(super) malformed: Counter,
    pub(super) dropped_bytes: Counter,
    pub(super) rx_stalls: Counter,
    pub(super) transport_resets: Counter,
}

impl Counters {
    /// Reads them all.
    pub(super) fn snapshot(&self) -> VsockMetrics {
        VsockMetrics {
            rx_packets: self.rx_packets.get(),
            rx_bytes: self.rx_bytes.get(),
            tx_packets: self.tx_packets.get(),
            tx_bytes: self.tx_bytes.get(),
            connections: self.connections.get(),
            open_connections: self.open_connections.get(),
            refused: self.refused.get(),
            retries: self.retries.get(),
            malformed: self.malformed.get(),
            dropped_bytes: self.dropped_bytes.get(),
            rx_stalls: self.rx_stalls.get(),
            transport_resets: self.transport_resets.get(),
        }
    }
}
