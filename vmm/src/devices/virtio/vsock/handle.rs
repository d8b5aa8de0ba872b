//! The host's side of the device: connect, listen, attach, from any thread.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use super::attach::{self, AttachOptions, Attachment};
use super::error::VsockError;
use super::listener::VsockListener;
use super::metrics::VsockMetrics;
use super::origin::Progress;
use super::shared::{Command, Shared};

/// Longest time anything waits: a timeout beyond it means "no timeout".
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// A handle to the vsock device; clones refer to the same device. Works from before the guest's driver is up until the
/// VM is gone, from any thread but the I/O loop's own.
#[derive(Debug, Clone)]
pub struct VsockHandle {
    shared: Arc<Shared>,
}

impl VsockHandle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Connects to `port` in the guest and blocks until the guest accepts. As long as the driver is not up or nobody
    /// listens the muxer tries again, so the call may be made before the guest has booted. The stream is in blocking mode.
    ///
    /// # Errors
    /// [`VsockError::ConnectTimeout`] after `timeout`, with what was missing; [`VsockError::TooManyConnections`],
    /// [`VsockError::Connect`], or [`VsockError::Stopped`] when the VM goes away.
    pub fn connect(&self, port: u32, timeout: Duration) -> Result<UnixStream, VsockError> {
        let start = Instant::now();
        let timeout = timeout.min(FOREVER);
        let local = self.shared.take_port();
        let progress = Progress::default();
        let (reply, answer) = sync_channel(1);
        let sent = self.shared.send(Command::Connect {
            local,
            port,
            deadline: start + timeout,
            reply,
            progress: progress.clone(),
        });
        if let Err(error) = sent {
            self.shared.free_port(local);
            return Err(error);
        }
        match answer.recv_timeout(timeout) {
            Ok(result) => result,
            Err(RecvTimeoutError::Disconnected) if self.shared.is_stopped() => Err(VsockError::Stopped),
            Err(RecvTimeoutError::Disconnected) if start.elapsed() < timeout => Err(VsockError::Connect {
                port,
                source: io::ErrorKind::ConnectionReset.into(),
            }),
            Err(_) => Err(VsockError::ConnectTimeout {
                port,
                phase: progress.phase(),
                elapsed: start.elapsed(),
            }),
        }
    }

    /// Listens for connections of the guest to host port `port`. Goes before a Unix socket `<path>_<port>`.
    ///
    /// # Errors
    /// [`VsockError::PortInUse`], [`VsockError::Create`] without an eventfd, [`VsockError::Stopped`].
    pub fn listen(&self, port: u32) -> Result<VsockListener, VsockError> {
        VsockListener::bind(&self.shared, port)
    }

    /// Connects `fd` (pipe, FIFO, socket, terminal, file) to `port` in the guest and moves its bytes. Returns at once
    /// with the connection's host port, by which the guest can tell what it is for; the connection is retried like
    /// [`Self::connect`]'s for `options.timeout`, after which `fd` is closed.
    ///
    /// - The open file description becomes non-blocking, also for others who share it.
    /// - `ToGuest`: the end of `fd` (a FIFO: its last writer left; before the first writer it waits) ends the guest's
    ///   stream after the last byte.
    /// - `FromGuest`: the end of the guest's stream closes `fd` after the last byte. Without readers (EPIPE) the guest is
    ///   still drained and its bytes dropped, so that the writer in the guest neither blocks nor dies. With a reader that
    ///   does not read, the guest's writer waits; nothing else does.
    /// - A regular file is always taken as ready: a slow disk slows the device down.
    ///
    /// # Errors
    /// [`VsockError::AttachDirection`] if `fd` is not open for the direction, [`VsockError::Attach`] if fcntl or fstat fail,
    /// [`VsockError::Stopped`].
    pub fn attach(&self, fd: OwnedFd, port: u32, options: AttachOptions) -> Result<u32, VsockError> {
        let host = attach::prepare(fd, port, options.direction)?;
        let local = self.shared.take_port();
        self.shared.add_attached(local, Arc::new(Attachment::default()));
        let sent = self.shared.send(Command::Attach {
            host,
            local,
            port,
            direction: options.direction,
            deadline: Instant::now() + options.timeout.min(FOREVER),
        });
        if let Err(error) = sent {
            self.shared.end_attached(local);
            self.shared.free_port(local);
            return Err(error);
        }
        Ok(local)
    }

    /// Ends an attached descriptor's stream, e.g. for CloseIO. A descriptor that is read ends toward the guest after
    /// everything that is in it now; one that is only written is closed.
    ///
    /// # Errors
    /// [`VsockError::NotAttached`] if `host_port` is not (or no longer) attached, [`VsockError::Stopped`].
    pub fn close_attached(&self, host_port: u32) -> Result<(), VsockError> {
        if self.shared.is_stopped() {
            return Err(VsockError::Stopped);
        }
        self.shared
            .attached(host_port)
            .ok_or(VsockError::NotAttached(host_port))?;
        self.shared.send(Command::CloseAttached { local: host_port })
    }

    /// Waits until an attached descriptor is closed: the guest has ended the stream and its last byte has been written,
    /// or the connection has failed. False if that takes longer than `timeout`; true also for a port that is not
    /// attached.
    pub fn wait_attached(&self, host_port: u32, timeout: Duration) -> bool {
        self.shared
            .attached(host_port)
            .is_none_or(|attachment| attachment.wait(timeout))
    }

    /// The device's counters.
    pub fn metrics(&self) -> VsockMetrics {
        self.shared.counters.snapshot()
    }
}
