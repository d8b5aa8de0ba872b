//! What the guest holds: inodes it looked up and files it opened, each a descriptor of ours.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use fuse_backend_rs::api::filesystem::ROOT_ID;

use super::mounts::Mount;
use super::sys::{Stat, errno};
use crate::descriptors::{Budget, Ticket};

/// What makes two lookups find the same inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    /// The share it was reached through: one may be read-only.
    share: u64,
    device: u64,
    number: u64,
    mount: u64,
}

impl Key {
    fn new(stat: &Stat, mount: &Mount) -> Self {
        Self {
            share: mount.id,
            device: stat.attr.st_dev,
            number: stat.attr.st_ino,
            mount: stat.mount,
        }
    }
}

/// A file the guest knows.
#[derive(Debug)]
pub(super) struct Inode {
    fd: OwnedFd,
    file_type: u32,
    key: Key,
    mount: Arc<Mount>,
    _ticket: Ticket,
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

    /// Whether it is a device node.
    pub(super) fn is_device(&self) -> bool {
        matches!(self.file_type, libc::S_IFBLK | libc::S_IFCHR)
    }

    /// The share it is in.
    pub(super) fn mount(&self) -> &Arc<Mount> {
        &self.mount
    }

    /// # Errors
    /// EROFS when the guest may not change anything in the share.
    pub(super) fn check_writable(&self) -> io::Result<()> {
        match self.mount.read_only {
            true => Err(errno(libc::EROFS)),
            false => Ok(()),
        }
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
    budget: Arc<Budget>,
}

impl Inodes {
    /// No inodes. [`ROOT_ID`] is only for [`Self::insert`].
    pub(super) fn new(budget: Arc<Budget>) -> Self {
        let inodes = Self {
            tables: RwLock::default(),
            budget,
        };
        inodes.write().last_id = ROOT_ID;
        inodes
    }

    /// # Errors
    /// ENOENT when the guest holds no reference to `id`; EROFS for a root of our own, of which nothing but what a
    /// directory must answer can be asked.
    pub(super) fn get(&self, id: u64) -> io::Result<Arc<Inode>> {
        match self.read().by_id.get(&id) {
            Some(known) => Ok(known.inode.clone()),
            None if id == ROOT_ID => Err(errno(libc::EROFS)),
            None => Err(errno(libc::ENOENT)),
        }
    }

    /// The id of the file behind the O_PATH descriptor `fd`, with one reference more.
    pub(super) fn remember(&self, fd: OwnedFd, stat: &Stat, mount: &Arc<Mount>) -> io::Result<u64> {
        let key = Key::new(stat, mount);
        let mut tables = self.write();
        let tables = &mut *tables;
        // Under the lock, so that nothing comes in behind `remove_mount`.
        if mount.is_closed() {
            return Err(errno(libc::ENOENT));
        }
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
            mount: mount.clone(),
            _ticket: self.budget.take(1)?,
        });
        tables.last_id += 1;
        let id = tables.last_id;
        tables.by_id.insert(id, Known { inode, lookups: 1 });
        tables.by_key.insert(key, id);
        Ok(id)
    }

    /// Makes `id` the file behind `fd`, with `lookups` references: the root, or an inode of an earlier process.
    ///
    /// # Errors
    /// EEXIST when the id or the file is known already, ENFILE.
    pub(super) fn insert(
        &self,
        id: u64,
        lookups: u64,
        fd: OwnedFd,
        stat: &Stat,
        mount: &Arc<Mount>,
    ) -> io::Result<()> {
        let key = Key::new(stat, mount);
        let mut tables = self.write();
        if tables.by_id.contains_key(&id) || tables.by_key.contains_key(&key) {
            return Err(errno(libc::EEXIST));
        }
        let inode = Arc::new(Inode {
            fd,
            file_type: stat.attr.st_mode & libc::S_IFMT,
            key,
            mount: mount.clone(),
            _ticket: self.budget.take(1)?,
        });
        tables.last_id = tables.last_id.max(id);
        tables.by_id.insert(id, Known { inode, lookups });
        tables.by_key.insert(key, id);
        Ok(())
    }

    /// Forgets every inode of a closed share, whatever references the guest has.
    pub(super) fn remove_mount(&self, mount: &Mount) {
        let mut gone = Vec::new();
        let mut tables = self.write();
        let Tables { by_id, by_key, .. } = &mut *tables;
        by_key.retain(|key, _| key.share != mount.id);
        by_id.retain(|_, known| {
            let keep = known.inode.mount.id != mount.id;
            if !keep {
                gone.push(known.inode.clone());
            }
            keep
        });
        drop(tables);
        drop(gone);
    }

    /// Every inode but the root with its id and references, and the last id given out.
    pub(super) fn all(&self) -> (Vec<(u64, u64, Arc<Inode>)>, u64) {
        let tables = self.read();
        let known = tables.by_id.iter().filter(|(id, _)| **id != ROOT_ID);
        let all = known.map(|(id, known)| (*id, known.lookups, known.inode.clone()));
        (all.collect(), tables.last_id)
    }

    /// Takes ids up to `id` as given out.
    pub(super) fn set_last_id(&self, id: u64) {
        let mut tables = self.write();
        tables.last_id = tables.last_id.max(id);
    }

    pub(super) fn len(&self) -> usize {
        self.read().by_id.len()
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
    mount: Arc<Mount>,
    /// Held while the position of `file` matters: reading a directory, seeking.
    pub(super) position: Mutex<()>,
    _ticket: Ticket,
}

impl Handle {
    /// The id of its inode.
    pub(super) fn inode(&self) -> u64 {
        self.inode
    }

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
    budget: Arc<Budget>,
}

impl Handles {
    pub(super) fn new(budget: Arc<Budget>) -> Self {
        Self {
            open: RwLock::default(),
            last_id: AtomicU64::new(0),
            budget,
        }
    }

    /// # Errors
    /// ENFILE; ESTALE when the share has been unmounted.
    pub(super) fn add(&self, inode: u64, mount: &Arc<Mount>, file: File) -> io::Result<u64> {
        let id = self.last_id.fetch_add(1, Ordering::Relaxed) + 1;
        self.insert(id, inode, mount, file)?;
        Ok(id)
    }

    /// A handle with an id that was given out before.
    ///
    /// # Errors
    /// As [`Self::add`], and EEXIST.
    pub(super) fn insert(&self, id: u64, inode: u64, mount: &Arc<Mount>, file: File) -> io::Result<()> {
        let handle = Arc::new(Handle {
            inode,
            file,
            mount: mount.clone(),
            position: Mutex::new(()),
            _ticket: self.budget.take(1)?,
        });
        let mut open = self.write();
        // Under the lock, so that nothing comes in behind `close_mount`.
        if mount.is_closed() {
            return Err(errno(libc::ESTALE));
        }
        if open.contains_key(&id) {
            return Err(errno(libc::EEXIST));
        }
        open.insert(id, handle);
        Ok(())
    }

    /// Closes the share if nothing of it is open, otherwise says how much is.
    pub(super) fn close_mount(&self, mount: &Mount) -> Result<(), usize> {
        let open = self.write();
        match open.values().filter(|handle| handle.mount.id == mount.id).count() {
            0 => {
                mount.close();
                Ok(())
            }
            count => Err(count),
        }
    }

    /// Every handle with its id, and the last id given out.
    pub(super) fn all(&self) -> (Vec<(u64, Arc<Handle>)>, u64) {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        let all = open.iter().map(|(id, handle)| (*id, handle.clone())).collect();
        (all, self.last_id.load(Ordering::Relaxed))
    }

    /// Takes ids up to `id` as given out.
    pub(super) fn set_last_id(&self, id: u64) {
        self.last_id.fetch_max(id, Ordering::Relaxed);
    }

    pub(super) fn len(&self) -> usize {
        self.open.read().unwrap_or_else(PoisonError::into_inner).len()
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
