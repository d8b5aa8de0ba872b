//! Guest memory brought in page by page through userfaultfd(2), by a thread of our own.
//!
//! Against a private mapping of the file ([`super::image::map_private`]) this costs a copy and a switch of threads for
//! each fault, and gains that the source may be slow or remote without a vCPU holding locks of the memory subsystem, and
//! that the pages are anonymous: nothing of the guest stays tied to the file once it was read.
//!
//! A page that cannot be brought in ends the machine: there is nothing right to give the guest. Whoever still waits then, a
//! device or a vCPU that could not be interrupted, gets zeros, so that the machine can be taken apart.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::GuestMemory;
use super::image::{self, Place};
use super::layout::{MemoryLayout, RegionKind};
use super::userfaultfd::{Userfaultfd, Watch};
use crate::confinement::{Confinement, Role, Thread};
use crate::lifecycle::{Failure, errno_of};

/// linux/userfaultfd.h
const EVENT_PAGEFAULT: u8 = 0x12;
const MESSAGE_BYTES: usize = 32;

const PAGE: usize = 4096;
/// Bytes brought in at a fault, aligned: neighbours are likely to be next, and a fault costs far more than copying them.
const CHUNK: usize = 64 << 10;

/// How long threads that wait for a page have to leave by themselves after a failure.
const GRACE_MS: i32 = 500;
/// Between attempts to ask the kernel for faults when it refuses.
const PAUSE: Duration = Duration::from_millis(10);

/// The running thread; dropping it ends the thread and makes what was never touched read as zeros.
#[derive(Debug)]
pub struct Pager {
    uffd: Arc<Userfaultfd>,
    stop: Arc<EventFd>,
    thread: Option<Thread<()>>,
}

impl Pager {
    /// Brings RAM and the window of virtio-mem in from `file` when they are touched. `memory` was allocated and not touched.
    /// `failed` is told, once, why that does not work any more.
    ///
    /// # Errors
    /// [`Userfaultfd::open`], or the kernel refuses the registration.
    pub fn start(
        memory: &Arc<GuestMemory>,
        layout: &MemoryLayout,
        file: &File,
        (watch, confinement): (Watch, Confinement),
        failed: impl FnOnce(Failure) + Send + 'static,
    ) -> io::Result<Self> {
        let uffd = Arc::new(Userfaultfd::open(watch)?);
        let source = Source::map(file, image::file_size(layout))?;
        let places: Vec<Place> = image::places(memory, layout)?
            .into_iter()
            .filter(|place| place.kind != RegionKind::Pmem)
            .collect();
        for place in &places {
            uffd.register(place.host as u64, place.len as u64)?;
        }
        let stop = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let worker = Worker {
            uffd: uffd.clone(),
            source,
            regions: places
                .iter()
                .map(|p| (p.host as u64, p.len as u64, p.offset))
                .collect(),
            stop: stop.clone(),
            failed: Some(Box::new(failed)),
            _memory: memory.clone(),
        };
        let thread = confinement.spawn(Role::Pager, "vmm-pager", move || worker.run())?;
        Ok(Self {
            uffd,
            stop,
            thread: Some(thread),
        })
    }

    /// The descriptor, for a write log of the same memory: the kernel allows one for each mapping.
    pub fn userfaultfd(&self) -> &Arc<Userfaultfd> {
        &self.uffd
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        if let Err(error) = self.stop.write(1) {
            tracing::error!(%error, "pager: cannot wake the thread to stop it");
        }
        if self.thread.take().is_some_and(|thread| thread.join().is_none()) {
            tracing::error!("pager: the thread panicked");
        }
    }
}

/// The file, mapped read-only: copies are taken from its pages.
#[derive(Debug)]
struct Source {
    address: usize,
    len: usize,
}

impl Source {
    fn map(file: &File, size: u64) -> io::Result<Self> {
        let len = usize::try_from(size).map_err(io::Error::other)?;
        // SAFETY: a new mapping at an address the kernel chooses.
        let address = unsafe {
            libc::mmap64(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            address: address as usize,
            len,
        })
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `map`; nothing refers to it any more.
        unsafe { libc::munmap(self.address as *mut libc::c_void, self.len) };
    }
}

struct Worker {
    uffd: Arc<Userfaultfd>,
    source: Source,
    /// Host address, length and file offset of each region.
    regions: Vec<(u64, u64, u64)>,
    stop: Arc<EventFd>,
    /// `None` once it was called: from then on there are only zeros.
    failed: Option<Box<dyn FnOnce(Failure) + Send>>,
    /// Keeps the mappings while faults are served.
    _memory: Arc<GuestMemory>,
}

impl Worker {
    fn run(mut self) {
        loop {
            match poll(&[self.stop.as_raw_fd(), self.uffd.messages().as_raw_fd()], -1) {
                Ok(ready) if ready.first() == Some(&true) => return,
                Ok(_) => {}
                Err(error) => self.fail(Failure::PageFaults {
                    source: errno_of(&error),
                }),
            }
            let mut message = [0; MESSAGE_BYTES];
            match self.uffd.messages().read(&mut message) {
                Ok(MESSAGE_BYTES) => self.serve(&message),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => self.fail(Failure::PageFaults {
                    source: errno_of(&error),
                }),
            }
        }
    }

    fn serve(&mut self, message: &[u8; MESSAGE_BYTES]) {
        // struct uffd_msg: the event, then for a page fault its flags at 8 and its address at 16.
        let event = message[0];
        let address = message[16..24].try_into().map_or(0, u64::from_le_bytes);
        let found = self
            .regions
            .iter()
            .find(|(start, len, _)| address.wrapping_sub(*start) < *len);
        let (EVENT_PAGEFAULT, Some((start, len, offset))) = (event, found.copied()) else {
            return;
        };
        let page = (address - start) / PAGE as u64 * PAGE as u64;
        if self.failed.is_some() {
            let at = (address - start) / CHUNK as u64 * CHUNK as u64;
            let size = (CHUNK as u64).min(len - at);
            if self.copy(start + at, offset + at, size).is_ok() {
                return;
            }
            // Some of the neighbours are there already, or cannot be read: this page only.
            match self.copy(start + page, offset + page, PAGE as u64) {
                Ok(()) => return,
                Err(error) => match error.raw_os_error() {
                    // Somebody else brought it in, or mappings are being changed: whoever waits tries again.
                    Some(libc::EEXIST | libc::EAGAIN) => return self.uffd.wake(start + page, PAGE as u64),
                    _ => self.fail(Failure::Page {
                        offset: offset + page,
                        source: errno_of(&error),
                    }),
                },
            }
        }
        if self.uffd.zero(start + page, PAGE as u64).is_err() {
            self.uffd.wake(start + page, PAGE as u64);
        }
    }

    /// Reports the failure. vCPUs are told to leave the guest, and have a moment to do so: none is to see the zeros.
    fn fail(&mut self, failure: Failure) {
        let Some(failed) = self.failed.take() else {
            // Not a fault for each turn of the loop.
            return std::thread::sleep(PAUSE);
        };
        tracing::error!(%failure, "pager");
        failed(failure);
        // Ends early when the machine is taken apart; the loop looks at that again.
        let _ = poll(&[self.stop.as_raw_fd()], GRACE_MS);
    }

    fn copy(&self, to: u64, from: u64, len: u64) -> io::Result<()> {
        // SAFETY: source and destination are mappings of ours, this one registered; nothing in this process holds a
        // reference into guest memory.
        unsafe { self.uffd.copy(to, self.source.address as u64 + from, len) }
    }
}

/// Waits at most `timeout` ms (-1: for ever) until one of `fds` is readable; says of each whether it is.
fn poll(fds: &[RawFd], timeout: i32) -> io::Result<Vec<bool>> {
    let mut polled: Vec<_> = fds
        .iter()
        .map(|fd| libc::pollfd {
            fd: *fd,
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    // SAFETY: the array has as many elements as said, and lives during the call.
    let count = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, timeout) };
    if count < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    Ok(polled.iter().map(|fd| fd.revents != 0).collect())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::tempfile::TempFile;

    use super::*;
    use crate::memory::allocate;
    use crate::memory::image::Pages;

    #[test]
    fn memory_when_touched_has_the_files_content_and_zeros_elsewhere() {
        let layout = MemoryLayout::ram(64 << 20);
        let memory = allocate(&layout).unwrap();
        for page in 0..100u64 {
            memory
                .write_obj(page + 1, GuestAddress(0x10_0000 + page * 4096))
                .unwrap();
        }
        let file = TempFile::new().unwrap();
        image::write(&memory, &layout, None, Pages::All, file.as_file()).unwrap();
        let clone = Arc::new(allocate(&layout).unwrap());
        let pager = Pager::start(
            &clone,
            &layout,
            file.as_file(),
            (Watch::Missing, Confinement::default()),
            |_| unreachable!(),
        )
        .unwrap();
        // From several threads at once, and a system call.
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for page in (0..100u64).rev() {
                        let value: u64 = clone.read_obj(GuestAddress(0x10_0000 + page * 4096)).unwrap();
                        assert_eq!(value, page + 1);
                    }
                });
            }
        });
        let zero: u64 = clone.read_obj(GuestAddress(0x300_0000)).unwrap();
        assert_eq!(zero, 0);
        clone.write_obj(7u64, GuestAddress(0x200_0000)).unwrap();
        drop(pager);
        let value: u64 = clone.read_obj(GuestAddress(0x200_0000)).unwrap();
        assert_eq!(value, 7);
    }

    #[test]
    fn memory_when_the_source_fails_is_reported_once_and_nobody_waits() {
        let layout = MemoryLayout::ram(64 << 20);
        let memory = allocate(&layout).unwrap();
        memory.write_obj(5u64, GuestAddress(0)).unwrap();
        memory.write_obj(6u64, GuestAddress(0x200_0000)).unwrap();
        let file = TempFile::new().unwrap();
        image::write(&memory, &layout, None, Pages::All, file.as_file()).unwrap();
        let clone = Arc::new(allocate(&layout).unwrap());
        let (tell, told) = mpsc::channel();
        let failed = move |reason| tell.send(reason).unwrap();
        let pager = Pager::start(
            &clone,
            &layout,
            file.as_file(),
            (Watch::Missing, Confinement::default()),
            failed,
        )
        .unwrap();
        let read = |address| -> u64 { clone.read_obj(GuestAddress(address)).unwrap() };
        assert_eq!(read(0), 5);
        // What is behind the end of a mapped file cannot be read.
        file.as_file().set_len(4096).unwrap();
        let waiting = std::thread::spawn({
            let clone = clone.clone();
            move || -> [u64; 2] {
                [0x200_0000, 0x300_0000].map(|address| clone.read_obj(GuestAddress(address)).unwrap())
            }
        });
        let failure = told.recv_timeout(Duration::from_secs(60)).unwrap();
        assert!(
            matches!(
                failure,
                Failure::Page {
                    offset: 0x200_0000,
                    ..
                }
            ),
            "{failure}"
        );
        assert_eq!(waiting.join().unwrap(), [0, 0]);
        drop(pager);
        // The sender went with the only call.
        assert_eq!(told.recv(), Err(mpsc::RecvError));
    }
}
