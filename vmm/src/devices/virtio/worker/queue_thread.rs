//! A worker with a thread of its own, for queues whose requests block: memory given back to the host, changes of KVM's
//! memslots, data forced to a disk.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::confinement::{Confinement, Role, Thread};
use crate::interrupted;

/// Between looks at a thread that is to end, and may begin to wait first.
const LOOK: Duration = Duration::from_micros(100);

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
    thread: Thread<W>,
}

impl<W: ThreadWorker> QueueThread<W> {
    /// Starts the thread, confined to `role`; `name` has at most 15 bytes.
    ///
    /// # Errors
    /// No eventfd or thread could be made, or the thread not confined.
    pub fn spawn(confinement: Confinement, role: Role, name: &str, mut worker: W) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let stopped = stop.try_clone()?;
        let thread = confinement.spawn(role, name, move || {
            run(&mut worker, &stopped);
            worker
        })?;
        Ok(Self { stop, thread })
    }

    /// As [`stop`](Self::stop), for a worker that waits in `aside`: does not wait for that, and gives what it leaves behind.
    ///
    /// # Errors
    /// What a worker that waits leaves behind. Its thread ends later.
    pub fn stop_unless<L>(self, device: &str, aside: &Aside<L>) -> Result<Option<W>, L> {
        self.signal(device);
        let joined = aside.end(self.thread)?;
        if joined.is_none() {
            guest_log!(ERROR, device, "virtio: the worker panicked");
        }
        Ok(joined)
    }

    fn signal(&self, device: &str) {
        if let Err(error) = self.stop.write(1) {
            // Counts 2⁶⁴ stops at least before it blocks.
            guest_log!(ERROR, device, %error, "virtio: cannot stop a worker's thread");
        }
    }

    /// Ends the thread after the work in hand and gives the worker back; `None` if it panicked. `device` is the id used
    /// in logs.
    pub fn stop(self, device: &str) -> Option<W> {
        self.signal(device);
        let worker = self.thread.join();
        if worker.is_none() {
            guest_log!(ERROR, device, "virtio: the worker panicked");
        }
        worker
    }
}

/// Lets a worker's thread wait for something that may take long and concerns no guest memory (data forced to a disk), without
/// holding up who stops the worker. `L` is what a stopped worker leaves behind.
#[derive(Debug)]
pub struct Aside<L>(Mutex<Phase<L>>);

#[derive(Debug)]
enum Phase<L> {
    /// The thread works.
    Here,
    /// It waits. If it is stopped now, this is what it leaves behind.
    Away(L),
    /// It was stopped while it waited: it must not touch the queue any more.
    Left,
}

impl<L> Default for Aside<L> {
    fn default() -> Self {
        Self(Mutex::new(Phase::Here))
    }
}

impl<L> Aside<L> {
    fn lock(&self) -> MutexGuard<'_, Phase<L>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does `work` on this thread; `left` is how the queue stands until it is done. `None`: the worker was stopped meanwhile,
    /// and the thread has to end without touching the queue.
    pub fn wait<T>(&self, left: L, work: impl FnOnce() -> T) -> Option<T> {
        *self.lock() = Phase::Away(left);
        let result = work();
        let mut phase = self.lock();
        if matches!(*phase, Phase::Left) {
            return None;
        }
        *phase = Phase::Here;
        Some(result)
    }

    /// Waits until `thread`, which was told to stop, has ended, and gives what it returned; `None` if it panicked.
    ///
    /// # Errors
    /// It waits, so it is left to itself: what it leaves behind.
    pub fn end<T>(&self, thread: Thread<T>) -> Result<Option<T>, L> {
        loop {
            if let Some(left) = self.stop() {
                return Err(left);
            }
            if thread.is_finished() {
                return Ok(thread.join());
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Stops a worker that waits: what it leaves behind. `None`: it does not wait now.
    fn stop(&self) -> Option<L> {
        let mut phase = self.lock();
        match std::mem::replace(&mut *phase, Phase::Left) {
            Phase::Away(left) => Some(left),
            here => {
                *phase = here;
                None
            }
        }
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
        let polled = interrupted::again_libc(|| {
            // SAFETY: `fds` is an array of that many entries.
            let count = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
            count as isize
        });
        if let Err(error) = polled {
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

#[cfg(test)]
mod tests {
    use std::sync::{Arc, mpsc};

    use super::*;

    #[test]
    fn aside_when_stopped_while_it_waits_says_what_is_left_and_the_thread_learns_of_it() {
        let aside = Arc::new(Aside::default());
        assert_eq!(aside.wait(1, || 7), Some(7));
        assert_eq!(
            aside.end(
                Confinement::default()
                    .spawn(Role::Pmem, "test-aside", || 5)
                    .unwrap()
            ),
            Ok(Some(5))
        );
        let (end, ends) = mpsc::channel::<()>();
        let waiting = aside.clone();
        let (ended, has_ended) = mpsc::channel();
        let thread = Confinement::default().spawn(Role::Pmem, "test-aside", move || {
            // Not at once: who stops it sees it work first.
            std::thread::sleep(10 * LOOK);
            let result = waiting.wait(2, || ends.recv().unwrap());
            ended.send(result).unwrap();
        });
        let thread = thread.unwrap();
        assert_eq!(aside.end(thread), Err(2));
        end.send(()).unwrap();
        assert_eq!(has_ended.recv().unwrap(), None);
    }
}
