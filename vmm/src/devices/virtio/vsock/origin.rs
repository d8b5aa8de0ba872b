//! Who opened a connection, and who waits to hear of it.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::SyncSender;

use super::connection::{Direction, PortPair};
use super::error::{ConnectPhase, VsockError};
use crate::descriptors::Ticket;

/// How far the muxer got with a connection; read by the caller that waits for it, also when no muxer runs.
#[derive(Debug, Clone, Default)]
pub(super) struct Progress(Arc<AtomicU8>);

impl Progress {
    /// The furthest phase so far.
    pub(super) fn phase(&self) -> ConnectPhase {
        ConnectPhase::from_u8(self.0.load(Ordering::Relaxed))
    }

    fn note(&self, phase: ConnectPhase) {
        self.0.store(phase.as_u8(), Ordering::Relaxed);
    }
}

/// A caller of [`VsockHandle::connect`](super::VsockHandle::connect).
#[derive(Debug)]
pub(super) struct Caller {
    /// The caller's end of the socket pair, until the guest accepts.
    pub(super) stream: Option<UnixStream>,
    /// Takes exactly one answer; its buffer of one makes sending never block.
    pub(super) reply: SyncSender<Result<UnixStream, VsockError>>,
    pub(super) progress: Progress,
}

/// Who opened a connection.
#[derive(Debug)]
pub(super) enum Origin {
    /// The guest.
    Guest {
        /// What the connection costs the process.
        _descriptors: Ticket,
    },
    /// A client of the Unix socket.
    Client,
    /// A thread of this process.
    Caller(Caller),
    /// A descriptor handed over for good.
    Attached {
        direction: Direction,
        progress: Progress,
    },
}

impl Origin {
    /// Which way bytes flow.
    pub(super) fn direction(&self) -> Direction {
        match self {
            Self::Attached { direction, .. } => *direction,
            Self::Guest { .. } | Self::Client | Self::Caller(_) => Direction::Both,
        }
    }

    /// Whether the guest opened it.
    pub(super) fn is_guest(&self) -> bool {
        matches!(self, Self::Guest { .. })
    }

    /// Whether the host side outlives its readers.
    pub(super) fn is_attached(&self) -> bool {
        matches!(self, Self::Attached { .. })
    }

    /// Whether a refused REQUEST is sent again. Clients of the Unix socket learn of the refusal at once, as Firecracker's
    /// and Kata's do, and decide themselves.
    pub(super) fn retries(&self) -> bool {
        matches!(self, Self::Caller(_) | Self::Attached { .. })
    }

    fn progress(&self) -> Option<&Progress> {
        match self {
            Self::Caller(caller) => Some(&caller.progress),
            Self::Attached { progress, .. } => Some(progress),
            Self::Guest { .. } | Self::Client => None,
        }
    }

    pub(super) fn note_requested(&self) {
        // A refusal says more than the silence after the next attempt.
        if let Some(progress) = self.progress()
            && progress.phase() == ConnectPhase::DriverDown
        {
            progress.note(ConnectPhase::NoAnswer);
        }
    }

    pub(super) fn note_refused(&self) {
        if let Some(progress) = self.progress() {
            progress.note(ConnectPhase::Refused);
        }
    }

    pub(super) fn note_driver_down(&self) {
        if let Some(progress) = self.progress() {
            progress.note(ConnectPhase::DriverDown);
        }
    }

    /// The guest accepted.
    pub(super) fn established(&mut self) {
        if let Self::Caller(caller) = self
            && let Some(stream) = caller.stream.take()
        {
            // A caller that has given up meanwhile drops the stream, which closes the connection.
            let _ = caller.reply.try_send(Ok(stream));
        }
    }

    /// The host side failed.
    pub(super) fn fail(&mut self, pair: Option<PortPair>, source: io::Error) {
        let port = pair.map_or(0, |pair| pair.peer);
        match self {
            Self::Caller(caller) => {
                let _ = caller.reply.try_send(Err(VsockError::Connect { port, source }));
            }
            _ => guest_log!(WARN, port, %source, "vsock: cannot use the host descriptor"),
        }
    }

    /// The deadline passed without a connection. A caller notices by itself.
    pub(super) fn gave_up(&self, pair: Option<PortPair>) {
        if let (Self::Attached { progress, .. }, Some(pair)) = (self, pair) {
            let phase = progress.phase();
            guest_log!(WARN, port = pair.peer, host_port = pair.local, %phase, "vsock: attached descriptor not connected in time");
        }
    }
}
