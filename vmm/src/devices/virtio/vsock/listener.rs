//! In-process listeners for connections the guest opens.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EFD_SEMAPHORE, EventFd};

use super::error::VsockError;
use super::shared::{Shared, lock};

/// Connections a listener keeps until somebody accepts them; further ones are refused.
pub(super) const BACKLOG: usize = 128;

/// Connections that wait to be accepted.
#[derive(Debug)]
pub(super) struct Backlog {
    streams: Mutex<VecDeque<UnixStream>>,
    /// Counts `streams`: readable while there are any.
    ready: EventFd,
}

impl Backlog {
    fn new() -> io::Result<Self> {
        Ok(Self {
            streams: Mutex::default(),
            ready: EventFd::new(EFD_SEMAPHORE | EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// Adds a connection; false when there are too many.
    pub(super) fn push(&self, stream: UnixStream) -> bool {
        let mut streams = lock(&self.streams);
        if streams.len() >= BACKLOG || self.ready.write(1).is_err() {
            return false;
        }
        streams.push_back(stream);
        true
    }

    fn pop(&self) -> Option<UnixStream> {
        let mut streams = lock(&self.streams);
        let stream = streams.pop_front()?;
        // Cannot fail: the count is the length, changed under the same lock.
        let _ = self.ready.read();
        Some(stream)
    }
}

/// A host port that the guest can connect to. Dropping it frees the port and closes connections nobody accepted;
/// accepted ones go on.
#[derive(Debug)]
pub struct VsockListener {
    port: u32,
    backlog: Arc<Backlog>,
    shared: Arc<Shared>,
}

impl VsockListener {
    pub(super) fn bind(shared: &Arc<Shared>, port: u32) -> Result<Self, VsockError> {
        let backlog = Backlog::new().map_err(|source| VsockError::Create {
            what: "the eventfd of a listener",
            source,
        })?;
        let backlog = Arc::new(backlog);
        shared.add_listener(port, backlog.clone())?;
        Ok(Self {
            port,
            backlog,
            shared: shared.clone(),
        })
    }

    /// The host port.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Takes a connection of the guest, a blocking stream.
    ///
    /// # Errors
    /// [`VsockError::AcceptTimeout`] when none came within `timeout`.
    pub fn accept_timeout(&self, timeout: Duration) -> Result<UnixStream, VsockError> {
        let start = Instant::now();
        loop {
            if let Some(stream) = self.backlog.pop() {
                return Ok(stream);
            }
            let left = timeout.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Err(VsockError::AcceptTimeout {
                    port: self.port,
                    elapsed: start.elapsed(),
                });
            }
            self.wait(left)?;
        }
    }

    fn wait(&self, timeout: Duration) -> Result<(), VsockError> {
        let timeout = Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(timeout.subsec_nanos()),
        };
        let mut poll = [PollFd::from_borrowed_fd(self.as_fd(), PollFlags::IN)];
        match rustix::event::poll(&mut poll, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(VsockError::Accept {
                port: self.port,
                source: errno.into(),
            }),
        }
    }
}

impl AsRawFd for VsockListener {
    /// Readable while connections wait; only for polling.
    fn as_raw_fd(&self) -> RawFd {
        self.backlog.ready.as_raw_fd()
    }
}

impl AsFd for VsockListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd lives in the backlog, which `self` keeps alive for the borrow.
        unsafe { BorrowedFd::borrow_raw(self.as_raw_fd()) }
    }
}

impl Drop for VsockListener {
    fn drop(&mut self) {
        self.shared.remove_listener(self.port);
    }
}
