//! A worker with a thread of its own, for queues whose requests block: memory given back to the host, changes of KVM's
//! memslots, data forced to a disk.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// What runs on a [`QueueThread`].
pub trait ThreadWorker: Send + 'static {
    /// The descriptors to wait for, e.g. the kicks of the queues. They belong to the worker and stay the same.
    fn watched(&self) -> Vec<RawFd>;

    /// Descriptor `index` of [`watched`](Self::watched) is readable. Called once for each in the beginning, readable or
    /// not, because a queue taken over from a suspended or restored device may have requests nobody will kick for. Does a
    /// bounded piece of work, and makes the descriptor readable again if there is more.
    fn ready(&mut self, index: usize);
}

/// A thread with a worker, from activation to suspend.
#[derive(Debug)]
pub struct QueueThread<W> {
    stop: EventFd,
    thread: JoinHandle<W>,
}

impl<W: ThreadWorker> QueueThread<W> {
    /// Starts the thread; `name` has at most 15 bytes.
    ///
    /// # Errors
    /// No eventfd or thread could be made.
    pub fn spawn(name: &str, mut worker: W) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let stopped = stop.try_clone()?;
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            run(&mut worker, &stopped);
            worker
        })?;
        Ok(Self { stop, thread })
    }

    /// Ends the thread after the work in hand and gives the worker back; `None` if it panicked. `device` is the id used
    /// in logs.
    pub fn stop(self, device: &str) -> Option<W> {
        if let Err(error) = self.stop.write(1) {
            // Counts 2⁶⁴ stops at least before it blocks.
            guest_log!(ERROR, device, %error, "virtio: cannot stop a worker's thread");
        }
        let worker = self.thread.join().ok();
        if worker.is_none() {
            guest_log!(ERROR, device, "virtio: the worker panicked");
        }
        worker
    }
}

fn run(worker: &mut impl ThreadWorker, stop: &EventFd) {
    let watched = worker.watched();
    for index in 0..watched.len() {
        worker.ready(index);
    }
    let mut fds: Vec<libc::pollfd> = watched
        .into_iter()
        .chain([stop.as_raw_fd()])
        .map(|fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    loop {
        // SAFETY: `fds` is an array of that many entries.
        let count = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
        if count < 0 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            guest_log!(ERROR, %error, "virtio: poll failed, a worker ends");
            return;
        }
        let Some((stop, queues)) = fds.split_last() else {
            return;
        };
        if stop.revents != 0 {
            return;
        }
        for (index, fd) in queues.iter().enumerate() {
            if fd.revents != 0 {
                worker.ready(index);
            }
        }
    }
}
