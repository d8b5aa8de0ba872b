//! Windows: ranges above RAM that devices fill while the guest runs.
//!
//! All of a window is mapped in this process from the beginning (see [`allocate`](super::allocate)); a vCPU sees what is
//! plugged, because only that has a KVM memslot. Elsewhere its accesses leave the guest as MMIO that no device answers. In
//! the window of virtio-mem what is plugged is sealed but for the blocks that were opened ([`seal`](super::seal)).

#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::{GuestAddress, GuestMemory as _};

use super::GuestMemory;
use super::layout::{MemoryLayout, Region, RegionKind, WINDOW_ALIGN};
use super::seal::Seal;

/// Memslot of the registers of virtio-mmio slots; RAM has the ones before.
pub const REGISTER_SLOT: u32 = 0xf;
/// First memslot of the window of virtio-mem. A window of 1 TiB has 2¹³ units.
const HOTPLUG_SLOTS: u32 = 0x10;
/// First memslot of the window of virtio-pmem. KVM has 32,764 slots (KVM_USER_MEM_SLOTS on x86).
const PMEM_SLOTS: u32 = 0x4000;
/// Smallest unit KVM and mmap know.
const PAGE: u64 = 4096;

/// A piece of host memory to show to the vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memslot {
    /// Number of the slot.
    pub slot: u32,
    /// Guest physical address.
    pub guest: u64,
    /// Length in bytes; 0 takes the slot away.
    pub size: u64,
    /// Address in this process.
    pub host: u64,
    /// The guest can read it; its writes are MMIO.
    pub read_only: bool,
}

/// Sets memslots: KVM, or a fake in tests.
pub trait Memslots: Send + Sync {
    /// Sets `memslot`.
    ///
    /// # Safety
    /// The host range stays mapped as long as the slot is set, and slots do not overlap.
    ///
    /// # Errors
    /// What KVM said.
    unsafe fn set(&self, memslot: Memslot) -> io::Result<()>;
}

/// A window cannot be changed; it is as before.
#[derive(Debug, thiserror::Error)]
pub enum WindowError {
    /// The machine has no such window.
    #[error("memory: the machine has no {0:?} window: configure its size")]
    Missing(RegionKind),
    /// The range is not in the window, not aligned, or plugged already.
    #[error("memory: cannot plug {size:#x} bytes at {offset:#x} of the {kind:?} window")]
    Range {
        /// Which window.
        kind: RegionKind,
        /// Offset in the window.
        offset: u64,
        /// Length in bytes.
        size: u64,
    },
    /// No gap is large enough.
    #[error(
        "memory: no {size_mib} MiB are free in the {kind:?} window of {window_mib} MiB: configure a larger one"
    )]
    Full {
        /// Which window.
        kind: RegionKind,
        /// Wanted size.
        size_mib: u64,
        /// Size of the window.
        window_mib: u64,
    },
    /// The host refused.
    #[error("memory: {what} at {address:#x} of the guest: {source}")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// Guest physical address.
        address: u64,
        /// Cause.
        source: io::Error,
    },
}

/// What becomes of writes to a mapped file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// They reach the file.
    Shared,
    /// They stay in this process.
    Private,
}

/// Where in a window a file goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FilePlace {
    /// Where there is room.
    FirstGap,
    /// At this guest physical address, where a guest knows it.
    Address(u64),
}

/// The windows of a machine.
#[derive(Debug, Clone)]
pub struct Windows {
    layout: MemoryLayout,
    hotplug: Option<Arc<Window>>,
    pmem: Option<Arc<Window>>,
}

impl Windows {
    /// The windows of `layout`, all empty. `memory` was allocated for this layout, and has the content it is to begin with.
    ///
    /// # Errors
    /// The window of virtio-mem cannot be sealed, or `memory` is another's.
    pub fn new(
        layout: MemoryLayout,
        memory: &Arc<GuestMemory>,
        memslots: &Arc<dyn Memslots>,
    ) -> io::Result<Self> {
        let window = |kind, first_slot| -> io::Result<_> {
            let Some(region) = layout.window(kind) else {
                return Ok(None);
            };
            let host = memory.get_host_address(GuestAddress(region.start));
            let host = host.map_err(|e| io::Error::other(e.to_string()))? as usize;
            let len = usize::try_from(region.size).map_err(io::Error::other)?;
            let seal = match kind {
                RegionKind::Hotplug => Some(Seal::new(memory, host, len)?),
                RegionKind::Ram | RegionKind::Pmem => None,
            };
            Ok(Some(Arc::new(Window {
                region,
                first_slot,
                host,
                seal,
                _memory: memory.clone(),
                memslots: memslots.clone(),
                plugged: Mutex::default(),
                closed: AtomicBool::new(false),
            })))
        };
        Ok(Self {
            hotplug: window(RegionKind::Hotplug, HOTPLUG_SLOTS)?,
            pmem: window(RegionKind::Pmem, PMEM_SLOTS)?,
            layout,
        })
    }

    /// Where everything is.
    pub fn layout(&self) -> &MemoryLayout {
        &self.layout
    }

    /// The window of virtio-mem.
    ///
    /// # Errors
    /// [`WindowError::Missing`].
    pub fn hotplug(&self) -> Result<&Arc<Window>, WindowError> {
        self.hotplug
            .as_ref()
            .ok_or(WindowError::Missing(RegionKind::Hotplug))
    }

    /// The window of virtio-pmem.
    ///
    /// # Errors
    /// [`WindowError::Missing`].
    pub fn pmem(&self) -> Result<&Arc<Window>, WindowError> {
        self.pmem.as_ref().ok_or(WindowError::Missing(RegionKind::Pmem))
    }

    /// Whether all of the `len` bytes at `address` are RAM the guest has: from boot, or in open blocks of the hotplug window.
    pub fn is_ram(&self, address: u64, len: u64) -> bool {
        match self.layout.kind(address, len) {
            Some(RegionKind::Ram) => true,
            Some(RegionKind::Hotplug) => self.hotplug.as_ref().is_some_and(|w| w.is_open(address, len)),
            Some(RegionKind::Pmem) | None => false,
        }
    }

    /// Bytes of RAM the guest has now: from boot and plugged.
    pub fn ram_bytes(&self) -> u64 {
        let ram = |region: &&Region| region.kind == RegionKind::Ram;
        let boot: u64 = self.layout.regions().iter().filter(ram).map(|r| r.size).sum();
        let seal = self.hotplug.as_ref().and_then(|window| window.seal.as_ref());
        boot + seal.map_or(0, Seal::open_bytes)
    }

    /// The vCPUs are gone: memslots are no longer taken away one by one, they go with the VM.
    pub fn close(&self) {
        for window in [&self.hotplug, &self.pmem].into_iter().flatten() {
            window.closed.store(true, Ordering::Release);
        }
    }
}

/// One window.
pub struct Window {
    region: Region,
    first_slot: u32,
    /// Where it is mapped in this process.
    host: usize,
    /// What may be used of it; `None`: all. Before the memory it is about.
    seal: Option<Seal>,
    /// Keeps the mapping.
    _memory: Arc<GuestMemory>,
    memslots: Arc<dyn Memslots>,
    /// Offset to length.
    plugged: Mutex<BTreeMap<u64, u64>>,
    closed: AtomicBool,
}

impl std::fmt::Debug for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Window")
            .field("region", &self.region)
            .field("plugged", &self.plugged)
            .finish_non_exhaustive()
    }
}

impl Window {
    /// Guest physical address and size.
    pub fn region(&self) -> Region {
        self.region
    }

    /// What the vCPUs see, in ascending order: offset and length in bytes.
    pub fn plugged(&self) -> Vec<(u64, u64)> {
        self.lock()
            .iter()
            .map(|(offset, size)| (*offset, *size))
            .collect()
    }

    /// Whether something is plugged that starts at `offset`.
    pub fn is_plugged(&self, offset: u64) -> bool {
        self.lock().contains_key(&offset)
    }

    /// Lets `len` bytes at `offset`, sealed blocks of the window of virtio-mem, be used by devices, and by vCPUs if they are
    /// plugged.
    ///
    /// # Errors
    /// [`WindowError::Missing`] for another window, or [`WindowError::Host`].
    pub fn open(&self, offset: u64, len: u64) -> Result<(), WindowError> {
        let opened = self.seal()?.open(offset, len);
        opened.map_err(|source| self.host_error("opening memory", offset, source))
    }

    /// Seals `len` bytes at `offset`, open blocks, and frees their memory.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn close(&self, offset: u64, len: u64) -> Result<(), WindowError> {
        let closed = self.seal()?.close(offset, len);
        closed.map_err(|source| self.host_error("sealing memory", offset, source))
    }

    /// Pages devices used of sealed blocks, each for a moment.
    pub fn strays(&self) -> u64 {
        self.seal.as_ref().map_or(0, Seal::strays)
    }

    fn seal(&self) -> Result<&Seal, WindowError> {
        self.seal.as_ref().ok_or(WindowError::Missing(self.region.kind))
    }

    fn is_open(&self, address: u64, len: u64) -> bool {
        let offset = address.checked_sub(self.region.start);
        let open = |offset| self.seal.as_ref().is_some_and(|seal| seal.is_open(offset, len));
        offset.is_some_and(open)
    }

    /// Shows `size` bytes at `offset` to the vCPUs. `offset` is a multiple of [`WINDOW_ALIGN`], `size` of a page.
    ///
    /// # Errors
    /// [`WindowError::Range`] or [`WindowError::Host`].
    pub fn plug(&self, offset: u64, size: u64) -> Result<(), WindowError> {
        let mut plugged = self.lock();
        self.check(&plugged, offset, size)?;
        self.set_slot(offset, size)?;
        plugged.insert(offset, size);
        Ok(())
    }

    /// Hides what was plugged at `offset` from the vCPUs again.
    ///
    /// # Errors
    /// [`WindowError::Range`] when nothing was, or [`WindowError::Host`].
    pub fn unplug(&self, offset: u64) -> Result<(), WindowError> {
        let mut plugged = self.lock();
        if !plugged.contains_key(&offset) {
            return Err(self.range_error(offset, 0));
        }
        self.set_slot(offset, 0)?;
        plugged.remove(&offset);
        Ok(())
    }

    /// Puts the first `file_size` bytes of `file` into `size` bytes at `place` and plugs them; zeros follow up to `size`. The
    /// file must not shrink while it is mapped: accesses behind its end would kill the process (SIGBUS).
    ///
    /// # Errors
    /// [`WindowError::Full`], [`WindowError::Range`] when the place is taken or not in the window, or [`WindowError::Host`].
    pub fn map_file(
        self: &Arc<Self>,
        file: &File,
        (file_size, size): (u64, u64),
        place: FilePlace,
        sharing: Sharing,
    ) -> Result<FileMapping, WindowError> {
        let mut plugged = self.lock();
        let offset = match place {
            FilePlace::FirstGap => self.gap(&plugged, size).ok_or(WindowError::Full {
                kind: self.region.kind,
                size_mib: size.div_ceil(1 << 20),
                window_mib: self.region.size >> 20,
            })?,
            FilePlace::Address(start) => {
                let offset = start.checked_sub(self.region.start);
                offset.ok_or_else(|| self.range_error(start, size))?
            }
        };
        self.check(&plugged, offset, size)?;
        if file_size > size {
            return Err(self.range_error(offset, file_size));
        }
        let flags = match sharing {
            Sharing::Shared => libc::MAP_SHARED,
            Sharing::Private => libc::MAP_PRIVATE | libc::MAP_NORESERVE,
        };
        self.map(offset, file_size, flags, Some(file))
            .map_err(|source| self.host_error("mmap of a file", offset, source))?;
        if let Err(error) = self.set_slot(offset, size) {
            self.empty(offset, size);
            return Err(error);
        }
        plugged.insert(offset, size);
        Ok(FileMapping {
            window: self.clone(),
            offset,
            size,
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, u64>> {
        self.plugged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, plugged: &BTreeMap<u64, u64>, offset: u64, size: u64) -> Result<(), WindowError> {
        let end = offset.checked_add(size).filter(|end| *end <= self.region.size);
        let aligned =
            offset.is_multiple_of(WINDOW_ALIGN) && size > 0 && size.is_multiple_of(PAGE) && end.is_some();
        let free = end.is_some_and(|end| {
            let before = plugged.range(..end).next_back();
            before.is_none_or(|(other, size)| other + size <= offset)
        });
        if aligned && free {
            Ok(())
        } else {
            Err(self.range_error(offset, size))
        }
    }

    /// The lowest aligned offset with `size` free bytes.
    fn gap(&self, plugged: &BTreeMap<u64, u64>, size: u64) -> Option<u64> {
        let mut candidate = 0u64;
        for (offset, used) in plugged {
            if candidate.checked_add(size)? <= *offset {
                break;
            }
            candidate = (offset + used).next_multiple_of(WINDOW_ALIGN);
        }
        (candidate.checked_add(size)? <= self.region.size).then_some(candidate)
    }

    fn set_slot(&self, offset: u64, size: u64) -> Result<(), WindowError> {
        if size == 0 && self.closed.load(Ordering::Acquire) {
            return Ok(());
        }
        // Every plugged piece starts in a unit of its own; there are at most 2¹³ units (1 TiB).
        let unit = u32::try_from(offset / WINDOW_ALIGN).map_err(|_| self.range_error(offset, size))?;
        let memslot = Memslot {
            slot: self.first_slot + unit,
            guest: self.region.start + offset,
            size,
            host: self.host as u64 + offset,
            read_only: false,
        };
        // SAFETY: `check` and `contains_key` keep the range inside the window, which is mapped as long as `memory` lives,
        // and apart from all other slots. The memslots go with the VM, before its memory (see `vm::machine::Remains`).
        unsafe { self.memslots.set(memslot) }
            .map_err(|source| self.host_error("KVM_SET_USER_MEMORY_REGION", offset, source))
    }

    /// Maps over `len` bytes at `offset`, which the caller has reserved by `check` under the lock.
    fn map(&self, offset: u64, len: u64, flags: i32, file: Option<&File>) -> io::Result<()> {
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let at = self.host + usize::try_from(offset).map_err(invalid)?;
        let len = usize::try_from(len).map_err(invalid)?;
        let fd = file.map_or(-1, AsRawFd::as_raw_fd);
        // SAFETY: the range is inside the window's own mapping, where nothing but guest data lives; replacing it is what
        // a window is for. vm-memory unmaps the whole range in the end, whatever is mapped in it.
        let result = unsafe {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap64(at as *mut _, len, prot, flags | libc::MAP_FIXED, fd, 0)
        };
        if result == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        super::keep_out_of_dumps(result as usize, len);
        Ok(())
    }

    /// Makes a range as it was in the beginning.
    fn empty(&self, offset: u64, size: u64) {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        if let Err(error) = self.map(offset, size, flags, None) {
            // The file stays mapped where no vCPU sees it, until the machine ends.
            guest_log!(ERROR, offset, size, %error, "memory: cannot empty a part of a window");
        }
    }

    fn range_error(&self, offset: u64, size: u64) -> WindowError {
        WindowError::Range {
            kind: self.region.kind,
            offset,
            size,
        }
    }

    fn host_error(&self, what: &'static str, offset: u64, source: io::Error) -> WindowError {
        WindowError::Host {
            what,
            address: self.region.start + offset,
            source,
        }
    }
}

/// A file in a window; unplugged and unmapped when dropped.
#[derive(Debug)]
pub struct FileMapping {
    window: Arc<Window>,
    offset: u64,
    size: u64,
}

impl FileMapping {
    /// Guest physical address.
    pub fn start(&self) -> u64 {
        self.window.region.start + self.offset
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
}

impl Drop for FileMapping {
    fn drop(&mut self) {
        match self.window.unplug(self.offset) {
            Ok(()) => self.window.empty(self.offset, self.size),
            // The range stays taken: the vCPUs can still see the file there.
            Err(error) => guest_log!(ERROR, %error, "memory: cannot unplug a file"),
        }
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub mod fake;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
