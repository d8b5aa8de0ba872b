//! What the handles, the listeners and the muxer share.

use std::collections::{HashMap, HashSet};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::attach::Attachment;
use super::connection::Direction;
use super::error::VsockError;
use super::host::HostFd;
use super::listener::Backlog;
use super::metrics::Counters;
use super::origin::Progress;

/// Host ports of connections the host opens are taken from here, as Firecracker's are: 2^30 and up, below 2^31.
const FIRST_PORT: u32 = 1 << 30;
const LAST_PORT: u32 = (1 << 31) - 1;

/// Locks `mutex`. The data under the device's locks is valid between any two statements, so a panic elsewhere does not
/// spoil it.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A request to the muxer.
#[derive(Debug)]
pub(super) enum Command {
    /// Open a connection and answer on `reply`.
    Connect {
        local: u32,
        port: u32,
        deadline: Instant,
        reply: SyncSender<Result<UnixStream, VsockError>>,
        progress: Progress,
    },
    /// Open a connection for a descriptor.
    Attach {
        host: HostFd,
        local: u32,
        port: u32,
        direction: Direction,
        deadline: Instant,
    },
    /// End the stream of an attached descriptor.
    CloseAttached { local: u32 },
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Shared {
    /// `None` once the device is gone.
    commands: Mutex<Option<Vec<Command>>>,
    /// Wakes the muxer.
    wake: EventFd,
    listeners: Mutex<HashMap<u32, Arc<Backlog>>>,
    ports: Mutex<Ports>,
    attached: Mutex<HashMap<u32, Arc<Attachment>>>,
    pub(super) counters: Counters,
}

/// Host ports in use by connections the host opened.
#[derive(Debug)]
struct Ports {
    next: u32,
    used: HashSet<u32>,
}

impl Shared {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self {
            commands: Mutex::new(Some(Vec::new())),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            listeners: Mutex::default(),
            ports: Mutex::new(Ports {
                next: FIRST_PORT,
                used: HashSet::new(),
            }),
            attached: Mutex::default(),
            counters: Counters::default(),
        })
    }

    pub(super) fn wake_fd(&self) -> &EventFd {
        &self.wake
    }

    /// Makes the muxer run again.
    pub(super) fn wake(&self) {
        // Fails only when the count of wake-ups reaches 2^64.
        let _ = self.wake.write(1);
    }

    /// Queues a command; fails when the device is gone.
    pub(super) fn send(&self, command: Command) -> Result<(), VsockError> {
        lock(&self.commands)
            .as_mut()
            .ok_or(VsockError::Stopped)?
            .push(command);
        self.wake();
        Ok(())
    }

    /// The queued commands, in order.
    pub(super) fn take_commands(&self) -> Vec<Command> {
        lock(&self.commands)
            .as_mut()
            .map(std::mem::take)
            .unwrap_or_default()
    }

    /// The device is gone: drops what is queued, which answers those who wait.
    pub(super) fn stop(&self) {
        let commands = lock(&self.commands).take();
        drop(commands);
        let attached = std::mem::take(&mut *lock(&self.attached));
        for attachment in attached.into_values() {
            attachment.end();
        }
    }

    pub(super) fn is_stopped(&self) -> bool {
        lock(&self.commands).is_none()
    }

    pub(super) fn add_listener(&self, port: u32, backlog: Arc<Backlog>) -> Result<(), VsockError> {
        if self.is_stopped() {
            return Err(VsockError::Stopped);
        }
        match lock(&self.listeners).entry(port) {
            std::collections::hash_map::Entry::Occupied(_) => Err(VsockError::PortInUse(port)),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(backlog);
                Ok(())
            }
        }
    }

    pub(super) fn remove_listener(&self, port: u32) {
        lock(&self.listeners).remove(&port);
    }

    pub(super) fn listener(&self, port: u32) -> Option<Arc<Backlog>> {
        lock(&self.listeners).get(&port).cloned()
    }

    /// A host port nobody uses.
    pub(super) fn take_port(&self) -> u32 {
        let mut ports = lock(&self.ports);
        // Ends: at most a few thousand of 2^30 ports are in use.
        loop {
            let port = ports.next;
            ports.next = if port == LAST_PORT { FIRST_PORT } else { port + 1 };
            if ports.used.insert(port) {
                return port;
            }
        }
    }

    /// The port [`Self::take_port`] looks at next.
    pub(super) fn next_port(&self) -> u32 {
        lock(&self.ports).next
    }

    /// Goes on after the ports of an earlier process; false if `port` is not one of ours.
    pub(super) fn set_next_port(&self, port: u32) -> bool {
        let valid = (FIRST_PORT..=LAST_PORT).contains(&port);
        if valid {
            lock(&self.ports).next = port;
        }
        valid
    }

    pub(super) fn free_port(&self, port: u32) {
        lock(&self.ports).used.remove(&port);
    }

    pub(super) fn add_attached(&self, port: u32, attachment: Arc<Attachment>) {
        lock(&self.attached).insert(port, attachment);
    }

    pub(super) fn attached(&self, port: u32) -> Option<Arc<Attachment>> {
        lock(&self.attached).get(&port).cloned()
    }

    /// The attached descriptor of host port `port` is closed.
    pub(super) fn end_attached(&self, port: u32) {
        let attachment = lock(&self.attached).remove(&port);
        if let Some(attachment) = attachment {
            attachment.end();
        }
    }
}
