//! Descriptors the guest makes us hold: each has a place in the process's budget, and few stay open although no file is,
//! because the next request is likely to need them.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::inodes::Inode;
use crate::descriptors::{Budget, Ticket};

/// Most descriptors that stay open for known files. A tree of any size is walked with a few directories at hand; more
/// than these are opened again when they are needed.
const KEPT: usize = 256;
/// How often a descriptor is passed over when one must be closed. Whole subtrees are reached through a directory.
const DIRECTORY_CHANCES: u8 = 4;
const FILE_CHANCES: u8 = 1;

/// An O_PATH descriptor of a file the guest knows. Closed when it is not kept any more and no request uses it.
#[derive(Debug)]
pub(super) struct PathFd {
    fd: OwnedFd,
    /// How often it is passed over after a use, and how often still.
    most: u8,
    chances: AtomicU8,
    _ticket: Ticket,
}

impl AsFd for PathFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[derive(Debug, Default)]
struct Kept {
    by_inode: HashMap<u64, Arc<PathFd>>,
    /// Inodes in the order in which their descriptors are looked at when one must be closed. May name some that are not
    /// kept any more.
    clock: VecDeque<u64>,
}

impl Kept {
    /// Takes out a descriptor that was not used lately.
    fn evict(&mut self) -> Option<Arc<PathFd>> {
        let rounds = usize::from(DIRECTORY_CHANCES) + 1;
        for _ in 0..rounds * self.clock.len() {
            let id = self.clock.pop_front()?;
            let Some(fd) = self.by_inode.get(&id) else {
                continue;
            };
            let chances = fd.chances.load(Ordering::Relaxed);
            if chances == 0 {
                return self.by_inode.remove(&id);
            }
            fd.chances.store(chances - 1, Ordering::Relaxed);
            self.clock.push_back(id);
        }
        None
    }
}

/// The descriptors that are kept, a clock of bounded size.
#[derive(Debug)]
pub(super) struct Descriptors {
    kept: Mutex<Kept>,
    limit: usize,
    budget: Arc<Budget>,
}

impl Descriptors {
    /// Keeps at most a quarter of what the guest may make us hold.
    pub(super) fn new(budget: Arc<Budget>) -> Self {
        Self {
            kept: Mutex::default(),
            limit: KEPT.min(budget.limit() / 4).max(1),
            budget,
        }
    }

    /// A place for one descriptor; one that is kept gives way.
    ///
    /// # Errors
    /// ENFILE when all are in use.
    pub(super) fn ticket(&self) -> io::Result<Ticket> {
        self.budget.take(1).or_else(|error| {
            let evicted = self.lock().evict();
            match evicted {
                Some(fd) => drop(fd),
                None => return Err(error),
            }
            self.budget.take(1)
        })
    }

    /// The kept descriptor of inode `id`.
    pub(super) fn get(&self, id: u64) -> Option<Arc<PathFd>> {
        let fd = self.lock().by_inode.get(&id).cloned()?;
        fd.chances.store(fd.most, Ordering::Relaxed);
        Some(fd)
    }

    /// `fd`, an O_PATH descriptor of `inode`, kept for the next request.
    ///
    /// # Errors
    /// ENFILE.
    pub(super) fn keep(&self, inode: &Inode, fd: OwnedFd) -> io::Result<Arc<PathFd>> {
        let most = match inode.is_directory() {
            true => DIRECTORY_CHANCES,
            false => FILE_CHANCES,
        };
        let fd = Arc::new(PathFd {
            fd,
            most,
            chances: AtomicU8::new(most),
            _ticket: self.ticket()?,
        });
        let mut evicted = None;
        let mut kept = self.lock();
        // Under the lock, so that nothing comes in behind `forget`.
        if !inode.is_gone() {
            if kept.by_inode.len() >= self.limit {
                evicted = kept.evict();
            }
            if kept.clock.len() > 2 * self.limit {
                let Kept { by_inode, clock } = &mut *kept;
                clock.retain(|id| by_inode.contains_key(id));
            }
            if kept.by_inode.insert(inode.id(), fd.clone()).is_none() {
                kept.clock.push_back(inode.id());
            }
        }
        drop(kept);
        // Closing a deleted file frees its blocks, which may take long: not under the lock.
        drop(evicted);
        Ok(fd)
    }

    /// Closes what is kept for an inode that is gone.
    pub(super) fn forget(&self, id: u64) {
        let fd = self.lock().by_inode.remove(&id);
        drop(fd);
    }

    /// Closes everything.
    pub(super) fn clear(&self) {
        let kept = std::mem::take(&mut *self.lock());
        drop(kept);
    }

    pub(super) fn len(&self) -> usize {
        self.lock().by_inode.len()
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
