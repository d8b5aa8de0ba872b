//! Descriptors the muxer serves by itself: a container's stdio without a copy through the runtime.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use super::connection::Direction;
use super::error::VsockError;
use super::host::HostFd;
use super::shared::lock;

/// How a descriptor is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttachOptions {
    /// Which way bytes flow.
    pub direction: Direction,
    /// How long the guest may take to accept the connection; then the descriptor is closed.
    pub timeout: Duration,
}

/// Tells when an attached descriptor has been closed.
#[derive(Debug, Default)]
pub(super) struct Attachment {
    ended: Mutex<bool>,
    changed: Condvar,
}

impl Attachment {
    /// The descriptor is closed.
    pub(super) fn end(&self) {
        *lock(&self.ended) = true;
        self.changed.notify_all();
    }

    /// Waits for that; false after `timeout`.
    pub(super) fn wait(&self, timeout: Duration) -> bool {
        let deadline = Instant::now().checked_add(timeout);
        let mut ended = lock(&self.ended);
        while !*ended {
            // A deadline beyond the clock's range is none.
            let left = deadline.map_or(Duration::MAX, |deadline| {
                deadline.saturating_duration_since(Instant::now())
            });
            if left.is_zero() {
                return false;
            }
            ended = match self
                .changed
                .wait_timeout(ended, left.min(Duration::from_secs(3600)))
            {
                Ok((guard, _)) => guard,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        true
    }
}

/// Checks that `fd` is open for `direction` and prepares it for the muxer.
///
/// # Errors
/// [`VsockError::AttachDirection`] or [`VsockError::Attach`].
pub(super) fn prepare(fd: OwnedFd, port: u32, direction: Direction) -> Result<HostFd, VsockError> {
    let failed = |source| VsockError::Attach { port, source };
    let flags = rustix::fs::fcntl_getfl(&fd)
        .map_err(io::Error::from)
        .map_err(failed)?;
    let mode = flags & OFlags::ACCMODE;
    if direction.reads_host() && mode == OFlags::WRONLY {
        return Err(VsockError::AttachDirection {
            port,
            need: "reading",
        });
    }
    if direction.writes_host() && mode == OFlags::RDONLY {
        return Err(VsockError::AttachDirection {
            port,
            need: "writing",
        });
    }
    HostFd::new(fd).map_err(failed)
}
