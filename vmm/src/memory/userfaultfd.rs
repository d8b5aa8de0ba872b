//! userfaultfd(2), as far as guest memory needs it: missing pages brought in, and writes noted.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

/// linux/userfaultfd.h
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;
const UFFD_API: u64 = 0xaa;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
const UFFDIO_REGISTER_MODE_WP: u64 = 2;
const UFFDIO_COPY_MODE_WP: u64 = 2;
const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1;
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;

/// What a descriptor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Watch {
    /// Who touches a page that is not there waits until it is brought in.
    Missing,
    /// A write to a protected page takes its protection away, and nobody waits (Linux 6.7).
    Writes,
    /// Both.
    MissingAndWrites,
}

impl Watch {
    fn features(self) -> u64 {
        match self {
            Self::Missing => 0,
            // PAGEMAP_SCAN takes no anonymous memory without WP_UNPOPULATED (fs/proc/task_mmu.c, PAGE_IS_WPALLOWED).
            Self::Writes | Self::MissingAndWrites => {
                UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_ASYNC
            }
        }
    }

    /// With asynchronous protection any kind of memory can be registered, provided that this is the only mode
    /// (linux/userfaultfd_k.h, `vma_can_userfault`).
    fn mode(self) -> u64 {
        match self {
            Self::Missing => UFFDIO_REGISTER_MODE_MISSING,
            Self::Writes => UFFDIO_REGISTER_MODE_WP,
            Self::MissingAndWrites => UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP,
        }
    }
}

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
struct UffdioZeropage {
    range: UffdioRange,
    mode: u64,
    zeropage: i64,
}

/// A descriptor. Its registrations end when it is closed.
#[derive(Debug)]
pub struct Userfaultfd {
    fd: File,
    watch: Watch,
    /// Whether pages are write-protected when they are brought in. Held while one is.
    protect: Mutex<bool>,
}

impl Userfaultfd {
    /// A descriptor for `watch`, without registrations. One that watches missing pages takes the kernel's own faults as well
    /// (KVM's, and those of system calls into guest memory), and protects the pages it brings in if it watches writes.
    ///
    /// # Errors
    /// The kernel refuses it to this process (sysctl `vm.unprivileged_userfaultfd`, access to /dev/userfaultfd), or is too
    /// old: `Unsupported`.
    pub fn open(watch: Watch) -> io::Result<Self> {
        let fd = match watch {
            // Nobody ever handles a fault of this one, so it needs no privilege.
            Watch::Writes => new(UFFD_USER_MODE_ONLY)?,
            Watch::Missing | Watch::MissingAndWrites => new(0)?,
        };
        let mut api = UffdioApi {
            api: UFFD_API,
            features: watch.features(),
            ioctls: 0,
        };
        // SAFETY: `api` is the structure the request takes.
        if unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) } == 0 {
            return Ok(Self {
                fd: fd.into(),
                watch,
                protect: Mutex::new(watch == Watch::MissingAndWrites),
            });
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            // What an unknown feature is answered with.
            Some(libc::EINVAL) if watch != Watch::Missing => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "userfaultfd has no asynchronous write protection (UFFD_FEATURE_WP_ASYNC, Linux 6.7)",
            )),
            _ => Err(error),
        }
    }

    /// Registers the mapping of `len` bytes at `address`.
    ///
    /// # Errors
    /// What the kernel said: `EBUSY` when another descriptor has it.
    pub fn register(&self, address: u64, len: u64) -> io::Result<()> {
        let mut register = UffdioRegister {
            range: UffdioRange { start: address, len },
            mode: self.watch.mode(),
            ioctls: 0,
        };
        // SAFETY: `register` is the structure the request takes. Registering changes no content.
        unsafe { self.ioctl(UFFDIO_REGISTER, &raw mut register) }
    }

    /// Copies `len` bytes from `from` to the missing pages at `to`, and wakes who waits for them.
    ///
    /// # Safety
    /// Both ranges are mappings of ours, the one at `to` registered for missing pages; nobody holds a reference into it.
    ///
    /// # Errors
    /// `EEXIST` when one of the pages is there.
    pub unsafe fn copy(&self, to: u64, from: u64, len: u64) -> io::Result<()> {
        let protect = self.protect.lock().unwrap_or_else(PoisonError::into_inner);
        let mut copy = UffdioCopy {
            dst: to,
            src: from,
            len,
            mode: if *protect { UFFDIO_COPY_MODE_WP } else { 0 },
            copy: 0,
        };
        // SAFETY: `copy` is the structure the request takes; the caller answers for the ranges.
        unsafe { self.ioctl(UFFDIO_COPY, &raw mut copy) }
    }

    /// Makes the `len` missing bytes at `address` zeros, and wakes who waits for them.
    ///
    /// # Errors
    /// `EEXIST` when one of the pages is there.
    pub fn zero(&self, address: u64, len: u64) -> io::Result<()> {
        let mut zero = UffdioZeropage {
            range: UffdioRange { start: address, len },
            mode: 0,
            zeropage: 0,
        };
        // SAFETY: `zero` is the structure the request takes. Only missing pages of a registered mapping get content.
        unsafe { self.ioctl(UFFDIO_ZEROPAGE, &raw mut zero) }
    }

    /// Pages brought in from now on are not protected: they count as written.
    pub fn stop_protecting(&self) {
        *self.protect.lock().unwrap_or_else(PoisonError::into_inner) = false;
    }

    /// Lets threads try again that wait for the `len` bytes at `address`.
    pub fn wake(&self, address: u64, len: u64) {
        let mut range = UffdioRange { start: address, len };
        // SAFETY: `range` is the structure the request takes.
        if let Err(error) = unsafe { self.ioctl(UFFDIO_WAKE, &raw mut range) } {
            guest_log!(ERROR, %error, address, "userfaultfd: cannot wake who waits for a page");
        }
    }

    /// Where the kernel's messages are read from.
    pub fn messages(&self) -> &File {
        &self.fd
    }

    /// # Safety
    /// `argument` is what `request` takes, and the request may be made on the ranges in it.
    unsafe fn ioctl<T>(&self, request: libc::c_ulong, argument: *mut T) -> io::Result<()> {
        // SAFETY: the caller's promise.
        match unsafe { libc::ioctl(self.fd.as_raw_fd(), request, argument) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn new(flags: libc::c_int) -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | flags;
    let device = File::options().read(true).write(true).open("/dev/userfaultfd");
    let fd = match device {
        // SAFETY: the request takes flags and returns a descriptor.
        Ok(device) => unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) },
        // SAFETY: the system call takes flags and returns a descriptor.
        Err(_) => unsafe { libc::syscall(libc::SYS_userfaultfd, flags) as RawFd },
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor just made, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
