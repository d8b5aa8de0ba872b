//! The threads of a share: every one serves every queue.
//!
//! A queue is locked to take a chain and to return it, not while the request runs. A thread that takes a chain and sees
//! more of them wakes another thread by ringing the queue's doorbell itself; one request at a time therefore costs one
//! wake-up, many run in parallel.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::DescriptorChain;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::message::MAX_DESCRIPTORS;
use super::server::Patience;
use super::share::Share;
use super::waiting::Waiting;
use super::{jail, server};
use crate::confinement::{Confinement, Role, Thread};
use crate::devices::virtio::queue::chain::{Chain, ChainError};
use crate::devices::virtio::queue::served_queue::ServedQueue;
use crate::devices::virtio::state::QueuePosition;
use crate::interrupted;
use crate::memory::GuestMemory;
use crate::rate_limiter::RateLimiter;

/// Epoll data of the stop event and of the rate limiter's timer; queues are their index.
const STOP: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;
/// FORGET and INTERRUPT: they give something back, so they are not limited.
const HIPRIO: usize = 0;

/// What outlives the threads, from one activation to the next.
pub(super) struct Service {
    pub(super) share: Arc<Share>,
    pub(super) limiter: Mutex<RateLimiter>,
    pub(super) requests: AtomicU64,
    pub(super) malformed: AtomicU64,
    /// Requests whose answer is put off.
    pub(super) waiting: Mutex<Vec<Waiting>>,
}

impl Service {
    pub(super) fn new(share: Share, limiter: RateLimiter) -> Self {
        Self {
            share: Arc::new(share),
            limiter: Mutex::new(limiter),
            requests: AtomicU64::new(0),
            malformed: AtomicU64::new(0),
            waiting: Mutex::default(),
        }
    }
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Service")
            .field("share", &self.share)
            .finish_non_exhaustive()
    }
}

/// What the threads work on.
pub(super) struct Pool {
    id: String,
    pub(super) service: Arc<Service>,
    /// The threads shall end after the request in hand.
    pub(super) stopping: AtomicBool,
    pub(super) queues: Vec<Mutex<ServedQueue>>,
    memory: Arc<GuestMemory>,
    epoll: Epoll,
}

/// The running threads. [`FsWorkers::stop`] ends them.
#[derive(Debug)]
pub(super) struct FsWorkers {
    stop: Arc<EventFd>,
    threads: Vec<Thread<()>>,
    pool: Arc<Pool>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl FsWorkers {
    /// Starts `count` threads.
    pub(super) fn spawn(
        (id, confinement): (&str, Confinement),
        count: u8,
        service: Arc<Service>,
        queues: Vec<ServedQueue>,
        memory: Arc<GuestMemory>,
    ) -> io::Result<Self> {
        let stop = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let epoll = Epoll::new()?;
        // Level-triggered and never read: every thread sees it.
        epoll.ctl(
            ControlOperation::Add,
            stop.as_raw_fd(),
            EpollEvent::new(EventSet::IN, STOP),
        )?;
        let timer = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, TIMER);
        epoll.ctl(ControlOperation::Add, lock(&service.limiter).as_raw_fd(), timer)?;
        for (index, queue) in queues.iter().enumerate() {
            // What the guest asked for before, e.g. while the machine was saved, comes without a kick.
            queue.kick_self();
            // Edge-triggered: each ring of the doorbell wakes one thread.
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, index as u64);
            epoll.ctl(ControlOperation::Add, queue.kick().as_raw_fd(), event)?;
        }
        let pool = Arc::new(Pool {
            id: id.to_owned(),
            service,
            stopping: AtomicBool::new(false),
            queues: queues.into_iter().map(Mutex::new).collect(),
            memory,
            epoll,
        });
        let (sender, others) = channel();
        // The first goes to jail and starts the others there: they inherit namespace, directory and umask.
        let jail = {
            let pool = pool.clone();
            move || {
                jail::enter(pool.service.share.proc_fds().as_fd())?;
                for number in 1..count {
                    let (name, pool) = (format!("fs-{}-{number}", pool.id), pool.clone());
                    let other = confinement.spawn(Role::Fs, &name, move || pool.run())?;
                    // The receiver waits for the first thread.
                    let _ = sender.send(other);
                }
                Ok(())
            }
        };
        let work = {
            let pool = pool.clone();
            move || pool.run()
        };
        let first = confinement.spawn_after(jail, Role::Fs, &format!("fs-{id}-0"), work);
        let mut workers = Self {
            stop,
            threads: others.try_iter().collect(),
            pool,
        };
        match first {
            Ok(first) => {
                workers.threads.push(first);
                Ok(workers)
            }
            Err(error) => {
                workers.stop();
                Err(error)
            }
        }
    }

    /// Waits for the requests in hand and ends the threads. Says where the queues stand.
    pub(super) fn stop(self) -> Vec<QueuePosition> {
        self.pool.stopping.store(true, Ordering::SeqCst);
        if let Err(error) = self.stop.write(1) {
            guest_log!(ERROR, %error, "fs: cannot wake the workers to stop them");
        }
        for thread in self.threads {
            if thread.join().is_none() {
                guest_log!(ERROR, "fs: a worker panicked");
            }
        }
        self.pool
            .queues
            .iter()
            .map(|queue| lock(queue).position())
            .collect()
    }
}

impl Pool {
    fn run(&self) {
        let mut events = [EpollEvent::default()];
        loop {
            match interrupted::again(|| self.epoll.wait(self.timeout(), &mut events)) {
                Ok(0) => self.on_timeout(),
                Ok(_) if events[0].data() == STOP => return,
                Ok(_) if events[0].data() == TIMER => self.on_timer(),
                Ok(_) => self.serve(usize::try_from(events[0].data()).unwrap_or(usize::MAX)),
                Err(error) => {
                    guest_log!(ERROR, device = %self.id, %error, "fs: epoll failed, worker ends");
                    return;
                }
            }
        }
    }

    /// The rate limiter lets requests through again.
    fn on_timer(&self) {
        lock(&self.service.limiter).on_timer();
        for queue in self.queues.iter().skip(HIPRIO + 1) {
            lock(queue).kick_self();
        }
    }

    /// Whether a request of queue `index` may be taken now; if not, the timer wakes somebody.
    fn may_take(&self, index: usize) -> bool {
        index == HIPRIO || lock(&self.service.limiter).may_start()
    }

    /// Serves a queue until it is empty.
    fn serve(&self, index: usize) {
        let Some(queue) = self.queues.get(index) else {
            return;
        };
        while !self.stopping.load(Ordering::SeqCst)
            && let Some(chain) = self.take(index, queue)
        {
            let head = chain.head_index();
            let chain = Chain::parse(&self.memory, chain, MAX_DESCRIPTORS);
            match self.handle(chain, self.patience()) {
                Some((read, written)) => {
                    if index != HIPRIO {
                        lock(&self.service.limiter).charge(read + u64::from(written), 1);
                    }
                    let mut queue = lock(queue);
                    queue.complete(head, written);
                    queue.notify();
                }
                None => self.put_off(index, head),
            }
            if self.service.share.locks.take_released() {
                self.try_again();
            }
        }
    }

    /// The next chain. Kicks stay enabled all the time, so that the next request finds a thread while this one runs.
    fn take(&self, index: usize, queue: &Mutex<ServedQueue>) -> Option<DescriptorChain<&GuestMemory>> {
        let mut queue = lock(queue);
        queue.take_kick();
        if !self.may_take(index) {
            return None;
        }
        loop {
            if let Some(chain) = queue.pop(&self.memory) {
                if queue.enable_kicks() {
                    queue.kick_self();
                }
                return Some(chain);
            }
            if !queue.enable_kicks() {
                return None;
            }
        }
    }

    /// One FUSE request; returns its bytes and those of its answer, or `None` if it has to wait.
    pub(super) fn handle(&self, chain: Result<Chain, ChainError>, patience: Patience) -> Option<(u64, u32)> {
        self.service.requests.fetch_add(1, Ordering::Relaxed);
        let malformed = || self.service.malformed.fetch_add(1, Ordering::Relaxed);
        let chain = match chain {
            Ok(chain) => chain,
            Err(error) => {
                guest_log!(DEBUG, device = %self.id, %error, "fs: chain dropped");
                malformed();
                return Some((0, 0));
            }
        };
        let served = server::serve(&self.service.share, &self.memory, &chain, patience);
        if let Some(error) = served.error {
            guest_log!(DEBUG, device = %self.id, %error, "fs: malformed request");
            malformed();
        }
        (!served.waits).then(|| (chain.readable.len(), served.written))
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
