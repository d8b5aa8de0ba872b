//! The host side: TAP devices (Linux Documentation/networking/tuntap.rst, drivers/net/tun.c).

#![allow(unsafe_code)]

use std::fmt::Debug;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::HEADER;
use super::config::TapConfig;
use crate::devices::virtio::config::OpenErrorKind;
use crate::interrupted;

const TUN: &str = "/dev/net/tun";

/// A TAP cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The host has no TUN/TAP driver.
    #[error("{TUN}: {0} (is the tun module loaded, and the device node there?)")]
    NoTun(io::Error),
    /// The process lacks a right.
    #[error(
        "{what}: permission denied (needs access to {TUN} and CAP_NET_ADMIN in the namespace of the TAP)"
    )]
    Permission {
        /// What was refused.
        what: String,
    },
    /// The network namespace cannot be entered.
    #[error("network namespace {path:?}: {source}")]
    Namespace {
        /// Its path.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Somebody else has it.
    #[error("tap {tap}: busy: another process (a virtual machine that still runs?) is attached to it")]
    Busy {
        /// Interface name.
        tap: String,
    },
    /// It exists, for one queue only.
    #[error(
        "tap {tap}: not multi-queue, but {pairs} queue pairs are asked for (create it with `multi_queue`, or ask for 1)"
    )]
    NotMultiQueue {
        /// Interface name.
        tap: String,
        /// Queue pairs asked for.
        pairs: usize,
    },
    /// The name belongs to another kind of interface.
    #[error("tap {tap}: the interface of this name is no TAP")]
    NotATap {
        /// Interface name.
        tap: String,
    },
    /// A descriptor handed over does not fit.
    #[error("tap {tap}: file descriptor {index}: {reason}")]
    Descriptor {
        /// Interface name of the configuration.
        tap: String,
        /// Position in the list.
        index: usize,
        /// What is wrong with it.
        reason: DescriptorFault,
    },
    /// Another number of descriptors than queue pairs.
    #[error("tap {tap}: {given} file descriptors for {wanted} queue pairs, need one for each")]
    DescriptorCount {
        /// Interface name of the configuration.
        tap: String,
        /// Descriptors given.
        given: usize,
        /// Queue pairs of the configuration.
        wanted: usize,
    },
    /// Anything else.
    #[error("tap {tap}: {what}: {source}")]
    Host {
        /// Interface name.
        tap: String,
        /// What was attempted.
        what: &'static str,
        /// Cause.
        source: io::Error,
    },
}

/// An open descriptor that is no queue of a TAP, or not of one that fits.
#[derive(Debug, thiserror::Error)]
pub enum DescriptorFault {
    /// It is something else.
    #[error("no TAP: {0}")]
    NoTap(io::Error),
    /// It was opened in another way than a guest needs.
    #[error(
        "TAP flags {flags:#x}, need {needed:#x} (IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE for more than one)"
    )]
    Flags {
        /// Flags of the TAP.
        flags: libc::c_int,
        /// Those a device needs.
        needed: libc::c_int,
    },
    /// It stays blocking.
    #[error("O_NONBLOCK: {0}")]
    NonBlocking(rustix::io::Errno),
    /// Programs would inherit it.
    #[error("FD_CLOEXEC: {0}")]
    CloseOnExec(rustix::io::Errno),
}

impl TapError {
    /// What can be done about it.
    pub(super) fn kind(&self) -> OpenErrorKind {
        match self {
            Self::NoTun(_) => OpenErrorKind::Missing,
            Self::Permission { .. } => OpenErrorKind::Permission,
            Self::Busy { .. } => OpenErrorKind::Busy,
            Self::NotMultiQueue { .. }
            | Self::NotATap { .. }
            | Self::Descriptor { .. }
            | Self::DescriptorCount { .. } => OpenErrorKind::Unfit,
            Self::Namespace { source, .. } | Self::Host { source, .. } => OpenErrorKind::of(source),
        }
    }
}

/// The host side of one queue pair: a file descriptor that gives and takes one frame, with its header, per call.
pub(super) trait Backend: AsRawFd + Debug + Send + Sync {
    /// What the guest can take, in `TUN_F_…` bits. Waits for the kernel's RTNL lock.
    fn set_offload(&self, offload: u32) -> io::Result<()>;

    /// What was set last; `None` before that.
    fn offload(&self) -> Option<u32>;

    /// Whether frames may arrive here. Waits for the kernel's RTNL lock, but only when something changes.
    fn set_enabled(&self, enabled: bool) -> io::Result<()>;

    /// What was set last.
    fn enabled(&self) -> bool;
}

/// One queue of a TAP.
#[derive(Debug)]
pub(super) struct Tap {
    fd: OwnedFd,
    enabled: AtomicBool,
    offload: AtomicU32,
}

/// Of no `TUN_F_…` bits: nothing was set yet.
const NO_OFFLOAD: u32 = u32::MAX;

#[cfg(test)]
impl Tap {
    /// The open descriptor, to be handed over.
    pub(super) fn into_fd(self) -> OwnedFd {
        self.fd
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Backend for Tap {
    fn set_offload(&self, offload: u32) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        check(unsafe {
            libc::ioctl(
                self.fd.as_raw_fd(),
                libc::TUNSETOFFLOAD,
                libc::c_ulong::from(offload),
            )
        })?;
        self.offload.store(offload, Ordering::Relaxed);
        Ok(())
    }

    fn offload(&self) -> Option<u32> {
        Some(self.offload.load(Ordering::Relaxed)).filter(|offload| *offload != NO_OFFLOAD)
    }

    fn enabled(&self) -> bool {
        self.enabled.load(Ordering::Relaxed)
    }

    fn set_enabled(&self, enabled: bool) -> io::Result<()> {
        // The kernel refuses to attach or detach a queue twice.
        if self.enabled.load(Ordering::Relaxed) == enabled {
            return Ok(());
        }
        let flag = if enabled {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        };
        let mut request = request("", flag);
        // SAFETY: `request` is an ifreq that outlives the call.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETQUEUE, &raw mut request) })?;
        self.enabled.store(enabled, Ordering::Relaxed);
        Ok(())
    }
}

/// Opens `pairs` queues of a TAP, making it if there is none of this name. The calling thread's namespace is not changed.
pub(super) fn open(config: &TapConfig, pairs: usize) -> Result<Vec<Tap>, TapError> {
    let Some(path) = &config.netns else {
        return open_here(&config.name, pairs);
    };
    let namespace = File::open(path).map_err(|source| TapError::Namespace {
        path: path.clone(),
        source,
    })?;
    // A thread that is not used for anything else: nobody runs in the wrong namespace, whatever fails.
    let in_namespace = || {
        enter(&namespace, path)?;
        open_here(&config.name, pairs)
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("vmm-netns".to_owned())
            .spawn_scoped(scope, in_namespace)
            .map_err(|e| host_error(&config.name, "thread for the namespace", e))?;
        thread.join().unwrap_or_else(|_| {
            let source = io::Error::other("the thread panicked");
            Err(host_error(&config.name, "thread for the namespace", source))
        })
    })
}

fn enter(namespace: &File, path: &Path) -> Result<(), TapError> {
    // SAFETY: setns takes a descriptor and a number.
    check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) }).map_err(|source| {
        match source.raw_os_error() {
            Some(libc::EPERM) => TapError::Permission {
                what: format!("network namespace {path:?}"),
            },
            _ => TapError::Namespace {
                path: path.to_owned(),
                source,
            },
        }
    })
}

fn open_here(name: &str, pairs: usize) -> Result<Vec<Tap>, TapError> {
    let wanted = if pairs > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    let first = match attach(name, wanted)? {
        Ok(first) => first,
        // The number of queues of an existing TAP must be announced as it was made; one queue can be had of either.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            match (attach(name, wanted ^ libc::IFF_MULTI_QUEUE)?, wanted) {
                (Ok(first), 0) => first,
                (Err(e), _) if e.raw_os_error() == Some(libc::EINVAL) => {
                    return Err(TapError::NotATap { tap: name.to_owned() });
                }
                (Err(e), 0) => return Err(attach_error(name, e)),
                _ => {
                    return Err(TapError::NotMultiQueue {
                        tap: name.to_owned(),
                        pairs,
                    });
                }
            }
        }
        Err(error) => return Err(attach_error(name, error)),
    };
    let mut taps = vec![first];
    while taps.len() < pairs {
        taps.push(attach(name, wanted)?.map_err(|e| attach_error(name, e))?);
    }
    taps.into_iter().map(|fd| prepare(name, fd)).collect()
}

/// TUNSETIFF; its error is for the caller to interpret.
fn attach(name: &str, more_flags: libc::c_int) -> Result<io::Result<OwnedFd>, TapError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(TUN);
    let file = file.map_err(|error| match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => TapError::Permission { what: TUN.to_owned() },
        _ => TapError::NoTun(error),
    })?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | more_flags;
    let mut request = request(name, flags);
    // SAFETY: `request` is an ifreq that outlives the call.
    let result = check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) });
    Ok(result.map(|()| file.into()))
}

fn attach_error(name: &str, error: io::Error) -> TapError {
    match error.raw_os_error() {
        Some(libc::EBUSY) => TapError::Busy { tap: name.to_owned() },
        Some(libc::EPERM | libc::EACCES) => TapError::Permission {
            what: format!("tap {name}"),
        },
        _ => host_error(name, "TUNSETIFF", error),
    }
}

/// Takes over open queues of a TAP, e.g. from a process with more rights. All must be TAPs with virtio headers.
pub(super) fn adopt(config: &TapConfig, fds: Vec<OwnedFd>, pairs: usize) -> Result<Vec<Tap>, TapError> {
    let tap = &config.name;
    if fds.len() != pairs {
        return Err(TapError::DescriptorCount {
            tap: tap.clone(),
            given: fds.len(),
            wanted: pairs,
        });
    }
    let adopt_one = |(index, fd): (usize, OwnedFd)| {
        let refuse = |reason| TapError::Descriptor {
            tap: tap.clone(),
            index,
            reason,
        };
        let mut request = request("", 0);
        // SAFETY: `request` is an ifreq that outlives the call.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &raw mut request) })
            .map_err(|e| refuse(DescriptorFault::NoTap(e)))?;
        // SAFETY: TUNGETIFF filled the flags.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        let mut needed = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if pairs > 1 {
            needed |= libc::IFF_MULTI_QUEUE;
        }
        if flags & needed != needed {
            return Err(refuse(DescriptorFault::Flags { flags, needed }));
        }
        rustix::io::ioctl_fionbio(&fd, true).map_err(|e| refuse(DescriptorFault::NonBlocking(e)))?;
        // It may have come from a process that let it through an exec; it goes no further.
        rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)
            .map_err(|e| refuse(DescriptorFault::CloseOnExec(e)))?;
        prepare(tap, fd)
    };
    fds.into_iter().enumerate().map(adopt_one).collect()
}

/// What every queue needs, however it was opened.
fn prepare(name: &str, fd: OwnedFd) -> Result<Tap, TapError> {
    let header = HEADER as libc::c_int;
    // SAFETY: TUNSETVNETHDRSZ reads an int that outlives the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) })
        .map_err(|e| host_error(name, "TUNSETVNETHDRSZ", e))?;
    let tap = Tap {
        fd,
        enabled: AtomicBool::new(true),
        offload: AtomicU32::new(NO_OFFLOAD),
    };
    // Another guest may have used it before.
    tap.set_offload(0)
        .map_err(|e| host_error(name, "TUNSETOFFLOAD", e))?;
    Ok(tap)
}

fn host_error(tap: &str, what: &'static str, source: io::Error) -> TapError {
    TapError::Host {
        tap: tap.to_owned(),
        what,
        source,
    }
}

fn request(name: &str, flags: libc::c_int) -> libc::ifreq {
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays 0.
    for (to, from) in request.ifr_name.iter_mut().take(15).zip(name.bytes()) {
        *to = from.cast_signed();
    }
    // All TUN flags fit 16 bits.
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    request
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Reads one frame into `segments`, at most [`MAX_SEGMENTS`](super::MAX_SEGMENTS) of them.
///
/// # Safety
/// Each segment is memory that may be written for the time of the call.
pub(super) unsafe fn read_frame(backend: &dyn Backend, segments: &[libc::iovec]) -> io::Result<usize> {
    interrupted::again_libc(|| {
        // SAFETY: the caller vouches for the segments; their number fits.
        unsafe {
            libc::readv(
                backend.as_raw_fd(),
                segments.as_ptr(),
                segments.len() as libc::c_int,
            )
        }
    })
}

/// Writes one frame from `segments`, at most [`MAX_SEGMENTS`](super::MAX_SEGMENTS) of them.
///
/// # Safety
/// Each segment is memory that may be read for the time of the call.
pub(super) unsafe fn write_frame(backend: &dyn Backend, segments: &[libc::iovec]) -> io::Result<usize> {
    interrupted::again_libc(|| {
        // SAFETY: the caller vouches for the segments; their number fits.
        unsafe {
            libc::writev(
                backend.as_raw_fd(),
                segments.as_ptr(),
                segments.len() as libc::c_int,
            )
        }
    })
}
