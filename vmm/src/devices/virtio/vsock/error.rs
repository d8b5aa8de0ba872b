//! Errors of the host's calls into the vsock device.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// How far a connection to the guest got before its time was over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectPhase {
    /// The guest's vsock driver has not started the device.
    DriverDown,
    /// The guest was asked and has not answered.
    NoAnswer,
    /// The guest answered that nobody listens, at every attempt.
    Refused,
}

impl ConnectPhase {
    pub(super) fn from_u8(value: u8) -> Self {
        match value {
            0 => Self::DriverDown,
            1 => Self::NoAnswer,
            _ => Self::Refused,
        }
    }

    pub(super) fn as_u8(self) -> u8 {
        match self {
            Self::DriverDown => 0,
            Self::NoAnswer => 1,
            Self::Refused => 2,
        }
    }
}

impl fmt::Display for ConnectPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DriverDown => "the guest's vsock driver is not up",
            Self::NoAnswer => "the guest does not answer",
            Self::Refused => "nobody listens in the guest",
        })
    }
}

/// What a call on the vsock device failed with.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The device could not get an epoll, eventfd or timerfd.
    #[error("vsock: cannot create {what}: {source}")]
    Create {
        /// What was to be created.
        what: &'static str,
        /// Cause.
        source: io::Error,
    },
    /// The `kata.hvsock` socket could not be bound.
    #[error("vsock: cannot bind {path}: {source}", path = path.display())]
    Bind {
        /// Path of the socket.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// No connection within the time the caller gave.
    #[error("vsock port {port}: no connection after {elapsed:.1?}: {phase}")]
    ConnectTimeout {
        /// Guest port.
        port: u32,
        /// How far it got.
        phase: ConnectPhase,
        /// Time since the call.
        elapsed: Duration,
    },
    /// The muxer could not open the connection on the host side.
    #[error("vsock port {port}: {source}")]
    Connect {
        /// Guest port.
        port: u32,
        /// Cause.
        source: io::Error,
    },
    /// The table of connections is full.
    #[error("vsock port {port}: all {limit} connections are in use")]
    TooManyConnections {
        /// Guest port.
        port: u32,
        /// The limit.
        limit: usize,
    },
    /// Somebody in this process listens on the port already.
    #[error("vsock port {0}: already listened on")]
    PortInUse(u32),
    /// No connection came in time.
    #[error("vsock port {port}: no connection from the guest after {elapsed:.1?}")]
    AcceptTimeout {
        /// Host port.
        port: u32,
        /// Time since the call.
        elapsed: Duration,
    },
    /// Waiting for a connection failed.
    #[error("vsock port {port}: cannot accept: {source}")]
    Accept {
        /// Host port.
        port: u32,
        /// Cause.
        source: io::Error,
    },
    /// The descriptor cannot be attached.
    #[error("vsock port {port}: cannot attach the descriptor: {source}")]
    Attach {
        /// Guest port.
        port: u32,
        /// Cause.
        source: io::Error,
    },
    /// The descriptor is not open for what the direction needs.
    #[error("vsock port {port}: descriptor is not open for {need}")]
    AttachDirection {
        /// Guest port.
        port: u32,
        /// "reading" or "writing".
        need: &'static str,
    },
    /// No attached descriptor has this host port, or its connection has ended.
    #[error("vsock host port {0}: nothing attached")]
    NotAttached(u32),
    /// The device is gone.
    #[error("vsock: the VM has been stopped")]
    Stopped,
}
