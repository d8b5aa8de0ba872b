//! Locks of the guest's processes, taken on the host, so that they hold against the host's processes and other guests.
//!
//! - flock(2) locks belong to an open file, here as there: they are the handle's.
//! - fcntl(2) locks belong to an owner, a number of the guest's (its process, or an open file with F_OFD_*). Each owner has
//!   an open file of its own here for every inode it locks, and takes open file description locks with it.
//!
//! Every range costs the host's kernel memory, so they are counted. A process that must wait is not answered until it
//! has the lock (`worker`): virtio-fs cannot interrupt it, not even to kill it. As long as the guest itself holds the lock
//! that is the guest's affair; for what others hold there is a limit.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fuse_backend_rs::abi::fuse_abi::LK_FLOCK;
use fuse_backend_rs::api::filesystem::FileLock;
use serde::{Deserialize, Serialize};

use super::inodes::Inode;
use super::share::Share;
use super::sys::{self, errno};
use crate::descriptors::Ticket;

/// Most ranges locked in a share, about 200 bytes of the host's kernel each.
pub(super) const MAX_RANGES: usize = 8 << 10;
/// The last offset there is (OFFSET_MAX): to the end of the file, wherever that is.
const LAST: u64 = i64::MAX as u64;

/// How a range or a file is locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Kind {
    Shared,
    Exclusive,
}

impl Kind {
    /// `None` unlocks.
    fn of(lock: &FileLock) -> io::Result<Option<Self>> {
        match lock.lock_type.cast_signed() {
            libc::F_RDLCK => Ok(Some(Self::Shared)),
            libc::F_WRLCK => Ok(Some(Self::Exclusive)),
            libc::F_UNLCK => Ok(None),
            _ => Err(errno(libc::EINVAL)),
        }
    }

    fn fcntl(kind: Option<Self>) -> i32 {
        match kind {
            Some(Self::Shared) => libc::F_RDLCK,
            Some(Self::Exclusive) => libc::F_WRLCK,
            None => libc::F_UNLCK,
        }
    }

    pub(super) fn flock(kind: Option<Self>) -> i32 {
        match kind {
            Some(Self::Shared) => libc::LOCK_SH,
            Some(Self::Exclusive) => libc::LOCK_EX,
            None => libc::LOCK_UN,
        }
    }

    fn conflicts(self, other: Self) -> bool {
        self == Self::Exclusive || other == Self::Exclusive
    }
}

/// Who is in the way of a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Holder {
    /// The guest itself.
    Guest,
    /// The host, or another guest.
    Other,
}

/// Locked ranges of one owner: start, last byte, kind. They do not overlap, and neighbours of one kind are one.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Ranges(BTreeMap<u64, (u64, Kind)>);

impl Ranges {
    fn overlapping(&self, start: u64, last: u64) -> impl Iterator<Item = (u64, u64, Kind)> {
        let before = self.0.range(..start).next_back();
        let within = self.0.range(start..=last);
        let all = before.into_iter().chain(within);
        all.map(|(from, (to, kind))| (*from, *to, *kind))
            .filter(move |(_, to, _)| *to >= start)
    }

    /// Gives the range another kind, as fcntl(2) does.
    fn set(&mut self, mut start: u64, mut last: u64, kind: Option<Kind>) {
        let old: Vec<_> = self.overlapping(start, last).collect();
        for (from, to, kind) in old {
            self.0.remove(&from);
            if from < start {
                self.0.insert(from, (start - 1, kind));
            }
            if to > last {
                self.0.insert(last + 1, (to, kind));
            }
        }
        let Some(kind) = kind else { return };
        if let Some((from, (to, before))) = self.0.range(..start).next_back()
            && (to + 1, *before) == (start, kind)
        {
            start = *from;
        }
        if let Some((to, after)) = self.0.get(&(last + 1))
            && *after == kind
        {
            let to = *to;
            self.0.remove(&(last + 1));
            last = to;
        }
        self.0.insert(start, (last, kind));
    }
}

/// The locks of one owner on one inode.
#[derive(Debug)]
struct Held {
    file: File,
    ranges: Ranges,
    /// The handle the last one was asked for through; with it the locks go.
    handle: u64,
    /// The guest's process.
    pid: u32,
    _ticket: Ticket,
}

#[derive(Debug, Default)]
struct Table {
    /// By inode and owner.
    held: BTreeMap<(u64, u64), Held>,
    ranges: usize,
    /// Owners that wait, and for whom.
    waiting: HashMap<u64, Vec<u64>>,
}

impl Table {
    /// Locks of `inode` by others than `owner` that are in the way.
    fn conflicts(&self, inode: u64, owner: u64, wanted: &Wanted) -> Vec<(u64, FileLock)> {
        let Some(kind) = wanted.kind else {
            return Vec::new();
        };
        let held = self.held.range((inode, 0)..=(inode, u64::MAX));
        let others = held.filter(|((_, other), _)| *other != owner);
        others
            .filter_map(|((_, other), held)| {
                let mut ranges = held.ranges.overlapping(wanted.start, wanted.last);
                let (start, end, kind) = ranges.find(|(.., other)| kind.conflicts(*other))?;
                let lock_type = Kind::fcntl(Some(kind)).cast_unsigned();
                let pid = held.pid;
                Some((
                    *other,
                    FileLock {
                        start,
                        end,
                        lock_type,
                        pid,
                    },
                ))
            })
            .collect()
    }

    /// Whether one of `owners` waits, over however many others, for `owner`.
    fn leads_to(&self, owners: &[u64], owner: u64) -> bool {
        let (mut todo, mut seen) = (owners.to_vec(), HashSet::new());
        while let Some(next) = todo.pop() {
            if next == owner {
                return true;
            }
            if seen.insert(next) {
                todo.extend(self.waiting.get(&next).into_iter().flatten());
            }
        }
        false
    }

    fn remove(&mut self, keys: &[(u64, u64)]) -> Vec<Held> {
        let gone: Vec<Held> = keys.iter().filter_map(|key| self.held.remove(key)).collect();
        self.ranges -= gone.iter().map(|held| held.ranges.0.len()).sum::<usize>();
        gone
    }
}

/// A range and what it shall be.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    start: u64,
    last: u64,
    kind: Option<Kind>,
}

impl Wanted {
    fn new(lock: &FileLock) -> io::Result<Self> {
        let last = lock.end.min(LAST);
        if lock.start > last {
            return Err(errno(libc::EINVAL));
        }
        Ok(Self {
            start: lock.start,
            last,
            kind: Kind::of(lock)?,
        })
    }

    fn call(&self, file: &File, command: i32) -> io::Result<libc::flock64> {
        let len = match self.last {
            LAST => 0,
            last => last - self.start + 1,
        };
        let (start, len) = (self.start.cast_signed(), len.cast_signed());
        sys::ofd_lock(file.as_fd(), command, Kind::fcntl(self.kind), start, len)
    }
}

/// The fcntl locks of one owner on one inode, saved.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct LockState {
    inode: u64,
    owner: u64,
    handle: u64,
    pid: u32,
    ranges: Ranges,
}

/// All fcntl locks of the guest.
#[derive(Debug, Default)]
pub(super) struct Locks {
    table: Mutex<Table>,
    /// The guest gave a lock up, so one that waits may get it.
    released: AtomicBool,
}

impl Locks {
    /// Whether the guest gave locks up since this was asked last.
    pub(super) fn take_released(&self) -> bool {
        self.released.load(Ordering::Relaxed) && self.released.swap(false, Ordering::SeqCst)
    }

    pub(super) fn clear(&self) {
        let all = std::mem::take(&mut *self.lock());
        drop(all);
    }

    /// `owner` closed `inode`: its locks are gone, as fcntl(2) says.
    pub(super) fn close(&self, inode: u64, owner: u64) {
        let gone = self.lock().remove(&[(inode, owner)]);
        self.gone(&gone);
    }

    /// The last descriptor of `handle` is closed in the guest: so are locks that belong to it (F_OFD_SETLK).
    pub(super) fn close_handle(&self, inode: u64, handle: u64) {
        let mut table = self.lock();
        let of_inode = table.held.range((inode, 0)..=(inode, u64::MAX));
        let keys: Vec<_> = of_inode
            .filter(|(_, held)| held.handle == handle)
            .map(|(key, _)| *key)
            .collect();
        let gone = table.remove(&keys);
        drop(table);
        self.gone(&gone);
    }

    fn gone(&self, gone: &[Held]) {
        if !gone.is_empty() {
            self.set_released();
        }
    }

    pub(super) fn set_released(&self) {
        self.released.store(true, Ordering::SeqCst);
    }

    pub(super) fn save(&self) -> Vec<LockState> {
        let table = self.lock();
        let states = table.held.iter().map(|((inode, owner), held)| LockState {
            inode: *inode,
            owner: *owner,
            handle: held.handle,
            pid: held.pid,
            ranges: held.ranges.clone(),
        });
        states.collect()
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Share {
    /// SETLK: takes, changes or gives up a lock.
    ///
    /// # Errors
    /// EAGAIN when somebody else has it; ENOLCK when there are too many.
    pub(super) fn set_lock(
        &self,
        node: u64,
        handle: u64,
        owner: u64,
        lock: &FileLock,
        flags: u32,
    ) -> io::Result<()> {
        let open = self.handles.get(handle, node)?;
        if flags & LK_FLOCK != 0 {
            let kind = Kind::of(lock)?;
            let had = open.flock();
            let result = open.set_flock(kind);
            // Even a failed change gives the old lock up.
            if had.is_some() && (kind != Some(Kind::Exclusive) || result.is_err()) {
                self.locks.set_released();
            }
            return result;
        }
        let wanted = Wanted::new(lock)?;
        let inode = self.inodes.get(node)?;
        let mut table = self.locks.lock();
        table.waiting.remove(&owner);
        let Table { held, ranges, .. } = &mut *table;
        let full = *ranges >= MAX_RANGES;
        let held = match (held.get_mut(&(node, owner)), wanted.kind) {
            (_, Some(_)) if full => return Err(errno(libc::ENOLCK)),
            (Some(held), _) => held,
            // Nothing is locked.
            (None, None) => return Ok(()),
            (None, Some(_)) => {
                let fresh = self.open_for_locks(&inode, handle)?;
                held.entry((node, owner)).or_insert(fresh)
            }
        };
        let result = wanted.call(&held.file, libc::F_OFD_SETLK);
        if result.is_ok() {
            let before = held.ranges.0.len();
            held.ranges.set(wanted.start, wanted.last, wanted.kind);
            (held.handle, held.pid) = match wanted.kind {
                Some(_) => (handle, lock.pid),
                None => (held.handle, held.pid),
            };
            *ranges = *ranges - before + held.ranges.0.len();
        }
        if held.ranges.0.is_empty() {
            table.held.remove(&(node, owner));
        }
        drop(table);
        // Also a lock that became a shared one lets others in.
        if result.is_ok() && wanted.kind != Some(Kind::Exclusive) {
            self.locks.set_released();
        }
        result.map(drop)
    }

    /// A lock was refused with EAGAIN, and the guest's process waits for it: for whom?
    ///
    /// # Errors
    /// EDEADLK when they wait for it in turn.
    pub(super) fn wait_for_lock(
        &self,
        node: u64,
        handle: u64,
        owner: u64,
        lock: &FileLock,
        flags: u32,
    ) -> io::Result<Holder> {
        if flags & LK_FLOCK != 0 {
            let kind = Kind::of(lock)?;
            let conflicts = |other: Kind| kind.is_some_and(|kind| kind.conflicts(other));
            let holds = self
                .handles
                .others_of_inode(node, handle)
                .iter()
                .any(|other| other.flock().is_some_and(conflicts));
            return Ok(if holds { Holder::Guest } else { Holder::Other });
        }
        let mut table = self.locks.lock();
        let holders: Vec<u64> = table
            .conflicts(node, owner, &Wanted::new(lock)?)
            .iter()
            .map(|(holder, _)| *holder)
            .collect();
        if table.leads_to(&holders, owner) {
            return Err(errno(libc::EDEADLK));
        }
        if holders.is_empty() {
            return Ok(Holder::Other);
        }
        table.waiting.insert(owner, holders);
        Ok(Holder::Guest)
    }

    /// `owner` does not wait any longer.
    pub(super) fn stop_waiting(&self, owner: u64) {
        self.locks.lock().waiting.remove(&owner);
    }

    /// GETLK: a lock that is in the way of `lock`, of type F_UNLCK if there is none.
    ///
    /// # Errors
    /// As for [`Self::set_lock`].
    pub(super) fn test_lock(
        &self,
        node: u64,
        handle: u64,
        owner: u64,
        lock: &FileLock,
    ) -> io::Result<FileLock> {
        let open = self.handles.get(handle, node)?;
        let wanted = Wanted::new(lock)?;
        let table = self.locks.lock();
        if let Some((_, found)) = table.conflicts(node, owner, &wanted).first() {
            return Ok(*found);
        }
        let own = table.held.get(&(node, owner)).map(|held| &held.file);
        let found = wanted.call(own.unwrap_or(open.file()), libc::F_OFD_GETLK)?;
        let start = found.l_start.cast_unsigned();
        Ok(FileLock {
            start,
            end: match found.l_len.cast_unsigned() {
                0 => LAST,
                len => start.saturating_add(len - 1),
            },
            lock_type: i32::from(found.l_type).cast_unsigned(),
            // The holder is no process of the guest.
            pid: 0,
        })
    }

    /// Takes the locks of an earlier process again.
    ///
    /// # Errors
    /// EAGAIN when somebody else has them now.
    pub(super) fn restore_locks(&self, state: LockState) -> io::Result<()> {
        for (start, (end, kind)) in &state.ranges.0 {
            let lock = FileLock {
                start: *start,
                end: *end,
                lock_type: Kind::fcntl(Some(*kind)).cast_unsigned(),
                pid: state.pid,
            };
            self.set_lock(state.inode, state.handle, state.owner, &lock, 0)?;
        }
        Ok(())
    }

    /// An open file that takes locks; for writing too where that is possible, because only then it takes exclusive ones.
    fn open_for_locks(&self, inode: &Arc<Inode>, handle: u64) -> io::Result<Held> {
        let ticket = self.descriptors.ticket()?;
        if inode.file_type() != libc::S_IFREG {
            return Err(errno(libc::EBADF));
        }
        let writable = match inode.check_writable() {
            Ok(()) => self.reopen(inode, libc::O_RDWR | libc::O_NONBLOCK),
            Err(error) => Err(error),
        };
        let file = writable.or_else(|_| self.reopen(inode, libc::O_RDONLY | libc::O_NONBLOCK))?;
        Ok(Held {
            file,
            ranges: Ranges::default(),
            handle,
            pid: 0,
            _ticket: ticket,
        })
    }
}

#[cfg(test)]
mod properties {
    use proptest::prelude::*;

    use super::{Kind, Ranges};

    proptest! {
        /// Byte by byte it is the same.
        #[test]
        fn ranges_are_what_was_set_last(
            changes in prop::collection::vec((0u64..40, 0u64..40, 0u8..3), 0..60)
        ) {
            let (mut ranges, mut bytes) = (Ranges::default(), [None; 80]);
            for (start, len, kind) in changes {
                let kind = [None, Some(Kind::Shared), Some(Kind::Exclusive)][usize::from(kind)];
                ranges.set(start, start + len, kind);
                bytes[start as usize..=(start + len) as usize].fill(kind);
                let mut found = [None; 80];
                let mut last: Option<(u64, Kind)> = None;
                for (from, (to, kind)) in &ranges.0 {
                    prop_assert!(last.is_none_or(|(end, before)| end + 1 < *from || before != *kind));
                    found[*from as usize..=*to as usize].fill(Some(*kind));
                    last = Some((*to, *kind));
                }
                prop_assert_eq!(found, bytes);
            }
        }
    }
}
