//! Why memory does not get its new size.

/// The guest's memory was not resized, or not all the way; the machine goes on and can be resized again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResizeMemoryError {
    /// The machine is not running.
    #[error("memory: cannot be resized while the machine is {0}")]
    State(crate::lifecycle::VmState),
    /// Less than the machine booted with.
    #[error(
        "memory: {requested} bytes requested, but the {minimum} bytes of boot-time memory cannot be unplugged: \
         use the balloon below that"
    )]
    BelowMinimum {
        /// Requested bytes.
        requested: u64,
        /// Boot-time memory in bytes.
        minimum: u64,
    },
    /// More than configured.
    #[error("memory: {requested} bytes requested, but {maximum} bytes are the configured maximum (max_mib)")]
    AboveMaximum {
        /// Requested bytes.
        requested: u64,
        /// Maximum in bytes.
        maximum: u64,
    },
    /// The guest has no driver for virtio-mem, or it has not started yet.
    #[error("memory: the guest's virtio-mem driver is not running (CONFIG_VIRTIO_MEM, Linux 5.16 or later)")]
    NoDriver,
    /// The guest did not get there in time, e.g. because memory to be unplugged is in use, or it has no memory for the
    /// page structures of new memory. What it reached is the target now.
    #[error("memory: {target} bytes requested, the guest stopped at {reached} bytes after {timeout_ms} ms")]
    Timeout {
        /// Requested bytes, rounded.
        target: u64,
        /// Bytes the guest has now.
        reached: u64,
        /// How long was waited, in milliseconds.
        timeout_ms: u128,
    },
    /// The machine or the device ended meanwhile.
    #[error("memory: the machine ended while it was resized")]
    Ended,
}
