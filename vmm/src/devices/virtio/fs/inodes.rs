//! What the guest holds: inodes it looked up and files it opened, each a descriptor of ours.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use fuse_backend_rs::api::filesystem::ROOT_ID;

use super::sys::{Stat, errno};

/// How many descriptors the guest may make us hold. The rest of the process needs some too.
#[derive(Debug)]
pub(super) struct FdBudget {
    used: AtomicUsize,
    limit: usize,
}

impl FdBudget {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            used: AtomicUsize::new(0),
            limit,
        })
    }

    /// A place for one descriptor.
    ///
    /// # Errors
    /// ENFILE when there is none.
    pub(super) fn take(self: &Arc<Self>) -> io::Result<FdTicket> {
        let ticket = FdTicket(self.clone());
        if self.used.fetch_add(1, Ordering::Relaxed) < self.limit {
            return Ok(ticket);
        }
        Err(errno(libc::ENFILE))
    }
}

/// One descriptor's place in the budget, given back when dropped.
#[derive(Debug)]
pub(super) struct FdTicket(Arc<FdBudget>);

impl Drop for FdTicket {
    fn drop(&mut self) {
        self.0.used.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What makes two lookups find the same inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    device: u64,
    number: u64,
    mount: u64,
}

/// A file the guest knows.
#[derive(Debug)]
pub(super) struct Inode {
    fd: OwnedFd,
    file_type: u32,
    key: Key,
    _ticket: FdTicket,
}

impl Inode {
    /// The O_PATH descriptor.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// S_IFREG, S_IFDIR…; never changes.
    pub(super) fn file_type(&self) -> u32 {
        self.file_type
    }
}

#[derive(Debug)]
struct Known {
    inode: Arc<Inode>,
    /// References the guest holds; FORGET takes them back.
    lookups: u64,
}

#[derive(Debug, Default)]
struct Tables {
    by_id: HashMap<u64, Known>,
    by_key: HashMap<Key, u64>,
    last_id: u64,
}

/// All inodes the guest knows. Ids are never used twice, so a stale one finds nothing.
#[derive(Debug)]
pub(super) struct Inodes {
    tables: RwLock<Tables>,
    budget: Arc<FdBudget>,
}

impl Inodes {
    /// `root` becomes inode [`ROOT_ID`], which cannot be forgotten.
    pub(super) fn new(root: OwnedFd, stat: &Stat, budget: Arc<FdBudget>) -> io::Result<Self> {
        let inodes = Self {
            tables: RwLock::default(),
            budget,
        };
        inodes.write().last_id = ROOT_ID - 1;
        inodes.remember(root, stat)?;
        Ok(inodes)
    }

    /// # Errors
    /// ENOENT when the guest holds no reference to `id`.
    pub(super) fn get(&self, id: u64) -> io::Result<Arc<Inode>> {
        let tables = self.read();
        let known = tables.by_id.get(&id).ok_or_else(|| errno(libc::ENOENT))?;
        Ok(known.inode.clone())
    }

    /// The id of the file behind the O_PATH descriptor `fd`, with one reference more.
    pub(super) fn remember(&self, fd: OwnedFd, stat: &Stat) -> io::Result<u64> {
        let key = Key {
            device: stat.attr.st_dev,
            number: stat.attr.st_ino,
            mount: stat.mount,
        };
        let mut tables = self.write();
        let tables = &mut *tables;
        if let Some(&id) = tables.by_key.get(&key)
            && let Some(known) = tables.by_id.get_mut(&id)
        {
            // Our descriptor keeps the file alive, so its number cannot have been given to another one.
            known.lookups = known.lookups.saturating_add(1);
            return Ok(id);
        }
        let inode = Arc::new(Inode {
            fd,
            file_type: stat.attr.st_mode & libc::S_IFMT,
            key,
            _ticket: self.budget.take()?,
        });
        tables.last_id += 1;
        let id = tables.last_id;
        tables.by_id.insert(id, Known { inode, lookups: 1 });
        tables.by_key.insert(key, id);
        Ok(id)
    }

    /// Takes `count` references to `id` back.
    pub(super) fn forget(&self, id: u64, count: u64) {
        // Closing a deleted file frees its blocks, which may take long: not under the lock.
        drop(self.release(id, count));
    }

    fn release(&self, id: u64, count: u64) -> Option<Known> {
        if id == ROOT_ID {
            return None;
        }
        let mut tables = self.write();
        let known = tables.by_id.get_mut(&id)?;
        known.lookups = known.lookups.saturating_sub(count);
        if known.lookups > 0 {
            return None;
        }
        let gone = tables.by_id.remove(&id)?;
        tables.by_key.remove(&gone.inode.key);
        Some(gone)
    }

    /// Forgets everything but the root.
    pub(super) fn clear(&self) {
        let mut tables = self.write();
        tables.by_id.retain(|&id, _| id == ROOT_ID);
        tables.by_key.retain(|_, id| *id == ROOT_ID);
    }

    fn read(&self) -> RwLockReadGuard<'_, Tables> {
        self.tables.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Tables> {
        self.tables.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A file or directory the guest opened.
#[derive(Debug)]
pub(super) struct Handle {
    inode: u64,
    file: File,
    /// Held while the position of `file` matters: reading a directory, seeking.
    pub(super) position: Mutex<()>,
    _ticket: FdTicket,
}

impl Handle {
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// All open files of the guest.
#[derive(Debug)]
pub(super) struct Handles {
    open: RwLock<HashMap<u64, Arc<Handle>>>,
    last_id: AtomicU64,
    budget: Arc<FdBudget>,
}

impl Handles {
    pub(super) fn new(budget: Arc<FdBudget>) -> Self {
        Self {
            open: RwLock::default(),
            last_id: AtomicU64::new(0),
            budget,
        }
    }

    pub(super) fn add(&self, inode: u64, file: File) -> io::Result<u64> {
        let handle = Arc::new(Handle {
            inode,
            file,
            position: Mutex::new(()),
            _ticket: self.budget.take()?,
        });
        let id = self.last_id.fetch_add(1, Ordering::Relaxed) + 1;
        self.write().insert(id, handle);
        Ok(id)
    }

    /// # Errors
    /// EBADF when `id` is not open, or is a handle of another inode.
    pub(super) fn get(&self, id: u64, inode: u64) -> io::Result<Arc<Handle>> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        let handle = open.get(&id).filter(|handle| handle.inode == inode);
        handle.cloned().ok_or_else(|| errno(libc::EBADF))
    }

    pub(super) fn remove(&self, id: u64, inode: u64) -> io::Result<()> {
        // Closing the file, the last thing to happen to it, must not hold the lock: it can write back.
        let handle = self.get(id, inode)?;
        self.write().remove(&id);
        drop(handle);
        Ok(())
    }

    pub(super) fn clear(&self) {
        let all = std::mem::take(&mut *self.write());
        drop(all);
    }

    fn write(&self) -> RwLockWriteGuard<'_, HashMap<u64, Arc<Handle>>> {
        self.open.write().unwrap_or_else(PoisonError::into_inner)
    }
}
