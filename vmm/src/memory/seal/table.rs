//! All sealed areas of the process, as the handler of a signal can look at them: no allocation, and a lock that spins.
//!
//! The lock is held for a few system calls at most, and never by a thread that faults.

#![allow(unsafe_code)]

use std::io;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

use super::Area;

/// Areas at once: one per machine, and machines of tests.
const MAX_AREAS: usize = 512;

static AREAS: [AtomicPtr<Area>; MAX_AREAS] = [const { AtomicPtr::new(ptr::null_mut()) }; MAX_AREAS];
/// Entries before this have been used.
static USED: AtomicUsize = AtomicUsize::new(0);
static LOCKED: AtomicBool = AtomicBool::new(false);

/// The table stays as it is while this exists.
#[derive(Debug)]
pub(super) struct Locked(());

impl Drop for Locked {
    fn drop(&mut self) {
        LOCKED.store(false, Ordering::Release);
    }
}

/// Waits for whoever has the lock.
pub(super) fn lock() -> Locked {
    while LOCKED
        .compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed)
        .is_err()
    {
        std::hint::spin_loop();
    }
    Locked(())
}

/// Adds `area`, which stays where it is until it is removed.
///
/// # Errors
/// The table is full.
pub(super) fn insert(area: &Area) -> io::Result<()> {
    let _lock = lock();
    let free = AREAS
        .iter()
        .enumerate()
        .find(|(_, entry)| entry.load(Ordering::Relaxed).is_null());
    let (index, entry) = free.ok_or(io::ErrorKind::QuotaExceeded)?;
    entry.store(ptr::from_ref(area).cast_mut(), Ordering::Relaxed);
    USED.fetch_max(index + 1, Ordering::Relaxed);
    Ok(())
}

/// Takes `area` out; the caller has the lock.
pub(super) fn remove(area: &Area) {
    for entry in &AREAS {
        if ptr::eq(entry.load(Ordering::Relaxed), area) {
            entry.store(ptr::null_mut(), Ordering::Relaxed);
        }
    }
}

/// Calls `look` for each area; the caller has the lock.
pub(super) fn each(mut look: impl FnMut(&Area)) {
    let used = AREAS.iter().take(USED.load(Ordering::Relaxed));
    for area in used.map(|entry| entry.load(Ordering::Relaxed)) {
        // SAFETY: an entry is null, or an area in a box of a `Seal` that takes it out, under the lock, before it is freed.
        if let Some(area) = unsafe { area.as_ref() } {
            look(area);
        }
    }
}
