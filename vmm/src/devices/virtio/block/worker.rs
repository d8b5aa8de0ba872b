//! The thread that serves the request queue: synchronous I/O straight from and to guest memory.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::request::{Target, execute};
use crate::devices::virtio::chain::Chain;
use crate::devices::virtio::served_queue::{Served, ServedQueue};
use crate::devices::virtio::state::QueuePosition;

/// Requests per interrupt at most, so that the first of many slow ones is not held back by the last.
const BATCH: usize = 8;

/// The running thread. [`BlockWorker::stop`] ends it.
#[derive(Debug)]
pub(super) struct BlockWorker {
    stop: Arc<EventFd>,
    thread: JoinHandle<QueuePosition>,
}

impl BlockWorker {
    pub(super) fn spawn(target: Arc<Target>, queue: ServedQueue, write_through: bool) -> io::Result<Self> {
        let stop = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let stopped = stop.clone();
        let thread = std::thread::Builder::new()
            .name(format!("blk-{}", target.id))
            .spawn(move || run(&target, queue, write_through, &stopped))?;
        Ok(Self { stop, thread })
    }

    /// Waits for the request in hand, if any, and ends the thread. Says where the queue stands.
    pub(super) fn stop(self) -> Option<QueuePosition> {
        if let Err(error) = self.stop.write(1) {
            tracing::error!(%error, "block: cannot wake the worker to stop it");
        }
        let position = self.thread.join();
        if position.is_err() {
            tracing::error!("block: the worker panicked");
        }
        position.ok()
    }
}

fn run(target: &Target, mut queue: ServedQueue, write_through: bool, stop: &EventFd) -> QueuePosition {
    let limit = queue.size();
    let mut wait = true;
    loop {
        match wait_for_kick(&queue, stop, wait) {
            Ok(true) => return queue.position(),
            Ok(false) => {}
            Err(error) => {
                tracing::error!(device = %target.id, %error, "block: poll failed, worker ends");
                return queue.position();
            }
        }
        queue.take_kick();
        let served = queue.serve(BATCH, |memory, chain| match Chain::parse(memory, chain, limit) {
            Ok(chain) => execute(target, memory, &chain, write_through),
            Err(error) => {
                tracing::debug!(device = %target.id, %error, "block: chain dropped");
                0
            }
        });
        wait = served == Served::Idle;
    }
}

/// Sleeps until a kick or a stop if `wait`, else only looks; true means stop.
fn wait_for_kick(queue: &ServedQueue, stop: &EventFd, wait: bool) -> io::Result<bool> {
    let readable = |fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let mut fds = [readable(stop.as_raw_fd()), readable(queue.kick().as_raw_fd())];
    let timeout = if wait { -1 } else { 0 };
    loop {
        // SAFETY: `fds` is an array of two, alive during the call.
        if unsafe { libc::poll(fds.as_mut_ptr(), 2, timeout) } >= 0 {
            return Ok(fds[0].revents != 0);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
