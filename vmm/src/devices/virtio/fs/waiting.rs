//! Requests whose answer is put off: processes of the guest that wait for a lock (SETLKW).
//!
//! Such a request keeps its place in the queue and no thread. It is served again from its head when the guest gives a
//! lock up, and every now and then, because the host's processes do not tell. It outlives the threads and is saved.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::server::Patience;
use super::worker::{Pool, lock};
use crate::devices::virtio::queue::chain::Chain;

/// Most requests that wait; what comes then is answered ENOLCK.
pub(super) const MAX_WAITING: usize = 128;
/// How long to wait for a lock that the guest does not have itself. Nothing can end a process of the guest sooner.
const LIMIT: Duration = Duration::from_secs(60);
/// How often locks are tried again that the host may have given up, in milliseconds.
const TRY_AGAIN: i32 = 50;

/// How long descriptors stay open that no request uses, in milliseconds: they keep the host's mounts and deleted files
/// alive.
const IDLE: i32 = 5000;

/// A request that waits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Waiting {
    pub(super) queue: usize,
    pub(super) head: u16,
    since: Instant,
}

impl Waiting {
    pub(super) fn new(queue: usize, head: u16) -> Self {
        Self {
            queue,
            head,
            since: Instant::now(),
        }
    }
}

impl Pool {
    /// How long a thread may sleep, for epoll_wait(2).
    pub(super) fn timeout(&self) -> i32 {
        if !lock(&self.service.waiting).is_empty() {
            TRY_AGAIN
        } else if self.service.share.descriptors.len() > 0 {
            IDLE
        } else {
            -1
        }
    }

    /// A thread has slept so long.
    pub(super) fn on_timeout(&self) {
        if lock(&self.service.waiting).is_empty() {
            self.service.share.descriptors.clear();
        } else {
            self.try_again();
        }
    }

    /// What a request that comes now may wait for.
    pub(super) fn patience(&self) -> Patience {
        match lock(&self.service.waiting).len() < MAX_WAITING {
            true => Patience::Endless,
            false => Patience::None,
        }
    }

    /// Puts the answer of the request at `head` of `queue` off.
    pub(super) fn put_off(&self, queue: usize, head: u16) {
        lock(&self.service.waiting).push(Waiting::new(queue, head));
    }

    /// Tries what waits again.
    pub(super) fn try_again(&self) {
        // Another thread is at it.
        let Ok(mut waiting) = self.service.waiting.try_lock() else {
            return;
        };
        waiting.retain(|request| {
            let stopping = self.stopping.load(Ordering::SeqCst);
            stopping || self.try_one(request)
        });
    }

    /// Whether it waits on.
    fn try_one(&self, request: &Waiting) -> bool {
        let Some(queue) = self.queues.get(request.queue) else {
            return false;
        };
        let patience = match request.since.elapsed() < LIMIT {
            true => Patience::Endless,
            false => Patience::Guest,
        };
        let mut chain = Chain::default();
        let parsed = lock(queue).parse_head(request.head, &mut chain);
        let Some((_, written)) = self.handle(parsed.map(|()| chain), patience) else {
            return true;
        };
        let mut queue = lock(queue);
        queue.complete(request.head, written);
        queue.notify();
        false
    }
}
