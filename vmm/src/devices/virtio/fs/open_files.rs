//! Files and directories the guest opened, each a descriptor of ours.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::directory::Listing;
use super::locks::Kind;
use super::mounts::Mount;
use super::sys::{self, errno};
use crate::descriptors::Ticket;

/// A file or directory the guest opened.
#[derive(Debug)]
pub(super) struct Handle {
    inode: u64,
    file: File,
    mount: Arc<Mount>,
    /// Held while the position of `file` matters: reading a directory, seeking.
    pub(super) listing: Mutex<Listing>,
    /// How the guest has locked it with flock(2).
    flock: Mutex<Option<Kind>>,
    _ticket: Ticket,
}

impl Handle {
    /// `file` is open for reading and writing as the guest asked, `ticket` its place in the budget.
    pub(super) fn new(inode: u64, mount: &Arc<Mount>, file: File, ticket: Ticket) -> Self {
        Self {
            inode,
            file,
            mount: mount.clone(),
            listing: Mutex::default(),
            flock: Mutex::default(),
            _ticket: ticket,
        }
    }

    /// The id of its inode.
    pub(super) fn inode(&self) -> u64 {
        self.inode
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// How the guest has locked it with flock(2).
    pub(super) fn flock(&self) -> Option<Kind> {
        *self.lock_flock()
    }

    /// Locks it as flock(2) does, without waiting.
    ///
    /// # Errors
    /// EAGAIN when another open file has the lock. The one this has had is gone then, too.
    pub(super) fn set_flock(&self, kind: Option<Kind>) -> io::Result<()> {
        let mut now = self.lock_flock();
        let result = sys::flock(self.file.as_fd(), Kind::flock(kind));
        *now = kind.filter(|_| result.is_ok());
        result
    }

    fn lock_flock(&self) -> MutexGuard<'_, Option<Kind>> {
        self.flock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Handle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[derive(Debug, Default)]
struct Open {
    by_id: HashMap<u64, Arc<Handle>>,
    /// Inode and handle: which files are open.
    by_inode: BTreeSet<(u64, u64)>,
}

/// All open files of the guest.
#[derive(Debug, Default)]
pub(super) struct Handles {
    open: RwLock<Open>,
    last_id: AtomicU64,
}

impl Handles {
    /// # Errors
    /// ESTALE when the share has been unmounted.
    pub(super) fn add(&self, handle: Handle) -> io::Result<u64> {
        let id = self.last_id.fetch_add(1, Ordering::Relaxed) + 1;
        self.insert(id, handle)?;
        Ok(id)
    }

    /// A handle with an id that was given out before.
    ///
    /// # Errors
    /// As [`Self::add`], and EEXIST.
    pub(super) fn insert(&self, id: u64, handle: Handle) -> io::Result<()> {
        let mut open = self.write();
        // Under the lock, so that nothing comes in behind `close_mount`.
        if handle.mount.is_closed() {
            return Err(errno(libc::ESTALE));
        }
        if open.by_id.contains_key(&id) {
            return Err(errno(libc::EEXIST));
        }
        open.by_inode.insert((handle.inode, id));
        open.by_id.insert(id, Arc::new(handle));
        Ok(())
    }

    /// Closes the share if nothing of it is open, otherwise says how much is.
    pub(super) fn close_mount(&self, mount: &Mount) -> Result<(), usize> {
        let open = self.write();
        match open
            .by_id
            .values()
            .filter(|handle| handle.mount.id == mount.id)
            .count()
        {
            0 => {
                mount.close();
                Ok(())
            }
            count => Err(count),
        }
    }

    /// Every handle with its id, and the last id given out.
    pub(super) fn all(&self) -> (Vec<(u64, Arc<Handle>)>, u64) {
        let open = self.read();
        let all = open
            .by_id
            .iter()
            .map(|(id, handle)| (*id, handle.clone()))
            .collect();
        (all, self.last_id.load(Ordering::Relaxed))
    }

    /// Takes ids up to `id` as given out.
    pub(super) fn set_last_id(&self, id: u64) {
        self.last_id.fetch_max(id, Ordering::Relaxed);
    }

    pub(super) fn len(&self) -> usize {
        self.read().by_id.len()
    }

    /// # Errors
    /// EBADF when `id` is not open, or is a handle of another inode.
    pub(super) fn get(&self, id: u64, inode: u64) -> io::Result<Arc<Handle>> {
        let open = self.read();
        let handle = open.by_id.get(&id).filter(|handle| handle.inode == inode);
        handle.cloned().ok_or_else(|| errno(libc::EBADF))
    }

    /// Any handle of `inode`.
    pub(super) fn of_inode(&self, inode: u64) -> Option<Arc<Handle>> {
        let open = self.read();
        let (_, id) = open.by_inode.range((inode, 0)..=(inode, u64::MAX)).next()?;
        open.by_id.get(id).cloned()
    }

    /// Every handle of `inode` but `id`.
    pub(super) fn others_of_inode(&self, inode: u64, id: u64) -> Vec<Arc<Handle>> {
        let open = self.read();
        let all = open.by_inode.range((inode, 0)..=(inode, u64::MAX));
        all.filter(|(_, other)| *other != id)
            .filter_map(|(_, id)| open.by_id.get(id).cloned())
            .collect()
    }

    pub(super) fn remove(&self, id: u64, inode: u64) -> io::Result<()> {
        // Closing the file, the last thing to happen to it, must not hold the lock: it can write back.
        let handle = self.get(id, inode)?;
        let mut open = self.write();
        open.by_id.remove(&id);
        open.by_inode.remove(&(inode, id));
        drop(open);
        drop(handle);
        Ok(())
    }

    pub(super) fn clear(&self) {
        let all = std::mem::take(&mut *self.write());
        drop(all);
    }

    fn read(&self) -> RwLockReadGuard<'_, Open> {
        self.open.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Open> {
        self.open.write().unwrap_or_else(PoisonError::into_inner)
    }
}
