//! Windows without KVM, for tests of devices.

// Of tests and fuzzing.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::{Memslot, Memslots, Windows};
use crate::memory::layout::MemoryLayout;
use crate::memory::{GuestMemory, allocate};

const MIB: u64 = 1 << 20;

/// Remembers the memslots it is given; can be told to fail.
#[derive(Debug, Default)]
pub struct FakeMemslots {
    /// Slots that are set, by number.
    pub set: Mutex<BTreeMap<u32, Memslot>>,
    /// Refuse everything.
    pub broken: AtomicBool,
}

impl Memslots for FakeMemslots {
    unsafe fn set(&self, memslot: Memslot) -> io::Result<()> {
        if self.broken.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let mut set = self.set.lock().unwrap();
        let existed = set.remove(&memslot.slot).is_some();
        assert_eq!(existed, memslot.size == 0, "{memslot:?}");
        if memslot.size > 0 {
            set.insert(memslot.slot, memslot);
        }
        Ok(())
    }
}

/// Windows of these sizes above 16 MiB of RAM, their memory, and their memslots.
pub fn windows(hotplug: u64, pmem: u64) -> (Windows, Arc<GuestMemory>, Arc<FakeMemslots>) {
    let layout = MemoryLayout::with_windows(16 * MIB, hotplug, pmem);
    let memory = Arc::new(allocate(&layout).unwrap());
    let fake = Arc::new(FakeMemslots::default());
    let memslots: Arc<dyn Memslots> = fake.clone();
    (Windows::new(layout, &memory, &memslots).unwrap(), memory, fake)
}

/// An unnamed file.
#[cfg(test)]
pub fn tempfile() -> std::fs::File {
    use std::os::fd::FromRawFd;
    // SAFETY: the name is a C string; the result is checked.
    let fd = unsafe { libc::memfd_create(c"window".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: `fd` was just opened and belongs to nobody else.
    unsafe { std::fs::File::from_raw_fd(fd) }
}
