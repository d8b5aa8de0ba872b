//! What the guest knows: inodes it looked up. They cost memory, not descriptors: an inode is a place (a name in another
//! inode) and an identity, and is opened again by the one and checked against the other when it is needed
//! ([`Share::fd`](super::share::Share::fd)).

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use fuse_backend_rs::abi::fuse_abi::stat64;
use fuse_backend_rs::api::filesystem::ROOT_ID;

use super::mounts::Mount;
use super::sys::{Stat, errno};

/// Most inodes the guest may know, about 300 bytes each. A kernel needs over a kilobyte for one itself.
const MAX_INODES: usize = 1 << 20;
/// Numbers of files that are mounts of their own. No file system has numbers this high, and the guest's kernel knows no
/// mounts that are no directories, so these must differ from the numbers of the mount around them.
const FOREIGN: u64 = 1 << 63;

/// What makes two lookups find the same inode.
///
/// Nothing keeps the file from being deleted and its number from being given to another one, so the time of birth is
/// part of it where the file system has one ([`Found::births`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    /// The share it was reached through: one may be read-only.
    share: u64,
    device: u64,
    number: u64,
    mount: u64,
    birth: Option<(i64, u32)>,
}

impl Key {
    fn new(stat: &Stat, mount: &Mount, births: bool) -> Self {
        Self {
            share: mount.id,
            device: stat.attr.st_dev,
            number: stat.attr.st_ino,
            mount: stat.mount,
            birth: stat.birth.filter(|_| births),
        }
    }
}

/// Where an inode is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// It is the directory of its share.
    Share,
    /// Where it was found last.
    Name { parent: u64, name: CString },
    /// In a directory the guest does not know. It can be used as long as it is open.
    Unknown,
}

/// A file as it was found.
#[derive(Debug)]
pub(super) struct Found<'a> {
    pub(super) stat: &'a Stat,
    pub(super) mount: &'a Arc<Mount>,
    /// Whether the time of birth tells files apart. On overlayfs it changes when a file is copied up.
    pub(super) births: bool,
    /// A mount of its own, but no directory.
    pub(super) foreign: bool,
    pub(super) place: Place,
}

/// A file the guest knows.
#[derive(Debug)]
pub(super) struct Inode {
    id: u64,
    file_type: u32,
    key: Key,
    births: bool,
    foreign: bool,
    mount: Arc<Mount>,
    /// References the guest holds; FORGET takes them back.
    lookups: AtomicU64,
    gone: AtomicBool,
    place: Mutex<Place>,
}

impl Inode {
    fn new(id: u64, lookups: u64, found: Found<'_>) -> Self {
        Self {
            id,
            file_type: found.stat.attr.st_mode & libc::S_IFMT,
            key: Key::new(found.stat, found.mount, found.births),
            births: found.births,
            foreign: found.foreign,
            mount: found.mount.clone(),
            lookups: AtomicU64::new(lookups),
            gone: AtomicBool::new(false),
            place: Mutex::new(found.place),
        }
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// S_IFREG, S_IFDIR…; never changes.
    pub(super) fn file_type(&self) -> u32 {
        self.file_type
    }

    /// Whether it is a device node.
    pub(super) fn is_device(&self) -> bool {
        matches!(self.file_type, libc::S_IFBLK | libc::S_IFCHR)
    }

    pub(super) fn is_directory(&self) -> bool {
        self.file_type == libc::S_IFDIR
    }

    /// The share it is in.
    pub(super) fn mount(&self) -> &Arc<Mount> {
        &self.mount
    }

    /// The host's mount it is in.
    pub(super) fn host_mount(&self) -> u64 {
        self.key.mount
    }

    /// See [`Found::births`].
    pub(super) fn births(&self) -> bool {
        self.births
    }

    /// References the guest holds.
    pub(super) fn lookups(&self) -> u64 {
        self.lookups.load(Ordering::Relaxed)
    }

    /// The guest does not know it any more.
    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::SeqCst)
    }

    pub(super) fn place(&self) -> Place {
        self.lock_place().clone()
    }

    /// # Errors
    /// ESTALE when `stat` is of another file. Linux then looks the path up again.
    pub(super) fn check(&self, stat: &Stat) -> io::Result<()> {
        let same = Key::new(stat, &self.mount, self.births) == self.key
            && stat.attr.st_mode & libc::S_IFMT == self.file_type;
        same.then_some(()).ok_or_else(|| errno(libc::ESTALE))
    }

    /// What the guest is told of `attr`.
    pub(super) fn shown(&self, mut attr: stat64) -> stat64 {
        if self.foreign {
            // The same wherever it is mounted, as on the host.
            attr.st_ino = FOREIGN | (attr.st_dev.rotate_left(40) ^ attr.st_ino);
        }
        attr
    }

    /// # Errors
    /// EROFS when the guest may not change anything in the share.
    pub(super) fn check_writable(&self) -> io::Result<()> {
        match self.mount.read_only {
            true => Err(errno(libc::EROFS)),
            false => Ok(()),
        }
    }

    fn set_place(&self, place: Place) {
        let mut now = self.lock_place();
        if *now != place {
            *now = place;
        }
    }

    fn lock_place(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Default)]
struct Tables {
    by_id: HashMap<u64, Arc<Inode>>,
    by_key: HashMap<Key, u64>,
    last_id: u64,
}

impl Tables {
    fn known(&self, key: &Key) -> Option<&Arc<Inode>> {
        self.by_id.get(self.by_key.get(key)?)
    }

    fn insert(&mut self, inode: &Arc<Inode>) -> io::Result<()> {
        if self.by_id.len() >= MAX_INODES {
            return Err(errno(libc::ENFILE));
        }
        self.last_id = self.last_id.max(inode.id);
        self.by_id.insert(inode.id, inode.clone());
        self.by_key.insert(inode.key, inode.id);
        Ok(())
    }

    fn remove(&mut self, id: u64) -> Option<Arc<Inode>> {
        let inode = self.by_id.remove(&id)?;
        // A deleted file has no key any more; its number may be another one's.
        if self.by_key.get(&inode.key) == Some(&id) {
            self.by_key.remove(&inode.key);
        }
        inode.gone.store(true, Ordering::SeqCst);
        Some(inode)
    }
}

/// All inodes the guest knows. Ids are never used twice, so a stale one finds nothing.
#[derive(Debug)]
pub(super) struct Inodes(RwLock<Tables>);

impl Inodes {
    /// No inodes. [`ROOT_ID`] is only for [`Self::insert`].
    pub(super) fn new() -> Self {
        Self(RwLock::new(Tables {
            last_id: ROOT_ID,
            ..Tables::default()
        }))
    }

    /// # Errors
    /// ENOENT when the guest holds no reference to `id`; EROFS for a root of our own, of which nothing but what a
    /// directory must answer can be asked.
    pub(super) fn get(&self, id: u64) -> io::Result<Arc<Inode>> {
        match self.read().by_id.get(&id) {
            Some(inode) => Ok(inode.clone()),
            None if id == ROOT_ID => Err(errno(libc::EROFS)),
            None => Err(errno(libc::ENOENT)),
        }
    }

    /// The inode of the file that `find` describes if it is known, with one reference more and its new place.
    pub(super) fn refer(&self, found: &Found<'_>) -> io::Result<Option<Arc<Inode>>> {
        let key = Key::new(found.stat, found.mount, found.births);
        let tables = self.read();
        Self::refer_in(&tables, &key, found)
    }

    fn refer_in(tables: &Tables, key: &Key, found: &Found<'_>) -> io::Result<Option<Arc<Inode>>> {
        // Under the lock, so that nothing comes in behind `remove_mount`.
        if found.mount.is_closed() {
            return Err(errno(libc::ENOENT));
        }
        let file_type = found.stat.attr.st_mode & libc::S_IFMT;
        let Some(inode) = tables.known(key).filter(|inode| inode.file_type == file_type) else {
            return Ok(None);
        };
        // `release` looks again under the write lock before it removes an inode without references.
        let add = |lookups: u64| Some(lookups.saturating_add(1));
        let _ = inode
            .lookups
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, add);
        if inode.place() != Place::Share {
            inode.set_place(found.place.clone());
        }
        Ok(Some(inode.clone()))
    }

    /// The inode of the file that was found, with one reference more.
    ///
    /// # Errors
    /// ENFILE when the guest knows too many; ENOENT when the share has been unmounted.
    pub(super) fn remember(&self, found: Found<'_>) -> io::Result<Arc<Inode>> {
        if let Some(inode) = self.refer(&found)? {
            return Ok(inode);
        }
        let key = Key::new(found.stat, found.mount, found.births);
        let mut tables = self.write();
        if let Some(inode) = Self::refer_in(&tables, &key, &found)? {
            return Ok(inode);
        }
        let inode = Arc::new(Inode::new(tables.last_id + 1, 1, found));
        tables.insert(&inode)?;
        Ok(inode)
    }

    /// Makes `id` the file that was found, with `lookups` references: the root, or an inode of an earlier process.
    ///
    /// # Errors
    /// EEXIST when the id or the file is known already, ENFILE.
    pub(super) fn insert(&self, id: u64, lookups: u64, found: Found<'_>) -> io::Result<Arc<Inode>> {
        let inode = Arc::new(Inode::new(id, lookups, found));
        let mut tables = self.write();
        if tables.by_id.contains_key(&id) || tables.by_key.contains_key(&inode.key) {
            return Err(errno(libc::EEXIST));
        }
        tables.insert(&inode)?;
        Ok(inode)
    }

    /// The file `stat`, in the mount of `parent`, is now called `name` there.
    pub(super) fn moved(&self, stat: &Stat, parent: &Inode, name: &CStr) {
        let key = Key::new(stat, &parent.mount, parent.births);
        if let Some(inode) = self.read().known(&key) {
            inode.set_place(Place::Name {
                parent: parent.id,
                name: name.to_owned(),
            });
        }
    }

    /// The last name of the file `stat`, in the mount of `parent`, was deleted. What the guest still holds of it stays,
    /// but its number can come back as another file's.
    pub(super) fn deleted(&self, stat: &Stat, parent: &Inode) {
        let is_last = stat.attr.st_mode & libc::S_IFMT == libc::S_IFDIR || stat.attr.st_nlink <= 1;
        let key = Key::new(stat, &parent.mount, parent.births);
        if is_last && self.read().by_key.contains_key(&key) {
            self.write().by_key.remove(&key);
        }
    }

    /// Forgets every inode of a closed share, whatever references the guest has, and returns their ids.
    pub(super) fn remove_mount(&self, mount: &Mount) -> Vec<u64> {
        let mut tables = self.write();
        let of_mount = tables.by_id.values().filter(|inode| inode.mount.id == mount.id);
        let gone: Vec<u64> = of_mount.map(|inode| inode.id).collect();
        for id in &gone {
            tables.remove(*id);
        }
        gone
    }

    /// Every inode but the root, and the last id given out.
    pub(super) fn all(&self) -> (Vec<Arc<Inode>>, u64) {
        let tables = self.read();
        let known = tables.by_id.values().filter(|inode| inode.id != ROOT_ID);
        (known.cloned().collect(), tables.last_id)
    }

    /// One inode of each of the host's mounts, directories where there are some.
    pub(super) fn host_mounts(&self) -> Vec<Arc<Inode>> {
        let mut mounts: HashMap<u64, Arc<Inode>> = HashMap::new();
        for inode in self.read().by_id.values() {
            let known = mounts.entry(inode.key.mount).or_insert_with(|| inode.clone());
            if inode.is_directory() && !known.is_directory() {
                *known = inode.clone();
            }
        }
        mounts.into_values().collect()
    }

    /// Takes ids up to `id` as given out.
    pub(super) fn set_last_id(&self, id: u64) {
        let mut tables = self.write();
        tables.last_id = tables.last_id.max(id);
    }

    pub(super) fn len(&self) -> usize {
        self.read().by_id.len()
    }

    /// Takes `count` references to `id` back; whether those were the last.
    pub(super) fn forget(&self, id: u64, count: u64) -> bool {
        if id == ROOT_ID {
            return false;
        }
        let take = |lookups: u64| Some(lookups.saturating_sub(count));
        let left = self.read().by_id.get(&id).map(|inode| {
            let _ = inode
                .lookups
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, take);
            inode.lookups()
        });
        if left != Some(0) {
            return false;
        }
        let mut tables = self.write();
        // A lookup may have come between.
        let unused = tables.by_id.get(&id).is_some_and(|inode| inode.lookups() == 0);
        let gone = unused.then(|| tables.remove(id)).flatten();
        drop(tables);
        gone.is_some()
    }

    /// Forgets everything but the root.
    pub(super) fn clear(&self) {
        let mut tables = self.write();
        let all: Vec<u64> = tables.by_id.keys().copied().filter(|id| *id != ROOT_ID).collect();
        for id in all {
            tables.remove(id);
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, Tables> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Tables> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}
