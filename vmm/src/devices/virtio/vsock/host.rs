//! The host side of a connection: a non-blocking file descriptor of any kind.
//!
//! Readiness is edge triggered: a descriptor is registered once for reading, the connection remembers that it may be
//! readable until a read says otherwise, and write readiness is asked for only while a write is blocked. A peer that
//! hung up therefore costs one wake-up, not a busy loop, and a connection without credit costs none.
//!
//! Writing to a pipe without readers raises SIGPIPE unless the process ignores it. Rust's runtime ignores it before
//! `main`; a host program that restores the default must not use [`attach`](super::VsockHandle::attach) with pipes.
//! Sockets are written with MSG_NOSIGNAL.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{FileType, OFlags};
use vm_memory::VolatileSlice;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Most pieces one system call takes.
const IOV_MAX: usize = 1024;

/// What a descriptor is, as far as reading and writing differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Half-close by shutdown(2), no SIGPIPE by MSG_NOSIGNAL.
    Socket,
    /// A pipe or FIFO: a read of 0 may mean "no writer yet".
    Pipe,
    /// Files, terminals, devices.
    Other,
}

/// Result of a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReadOutcome {
    /// Bytes read, at least one.
    Data(usize),
    /// Nothing now; an event will tell.
    Blocked,
    /// The writer is done. `hung_up`: it does not read any more either.
    End {
        /// Nobody is left on the other side.
        hung_up: bool,
    },
}

/// Result of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WriteOutcome {
    /// Bytes taken, at least one.
    Data(usize),
    /// Nothing now; an event will tell.
    Blocked,
    /// Nobody reads (EPIPE), or the device failed.
    Broken,
}

/// An open, non-blocking descriptor with its registration in the muxer's epoll.
#[derive(Debug)]
pub(super) struct HostFd {
    fd: OwnedFd,
    kind: Kind,
    /// False for what epoll refuses (regular files, /dev/null): always ready.
    pollable: bool,
    registered: bool,
    waits_for_output: bool,
}

impl HostFd {
    /// Takes `fd` and makes its open file description non-blocking.
    ///
    /// # Errors
    /// fstat or fcntl failed.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let kind = match FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) {
            FileType::Socket => Kind::Socket,
            FileType::Fifo => Kind::Pipe,
            _ => Kind::Other,
        };
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        if !flags.contains(OFlags::NONBLOCK) {
            rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        }
        Ok(Self {
            fd,
            kind,
            pollable: true,
            registered: false,
            waits_for_output: false,
        })
    }

    /// Registers for read readiness (and hang-ups). Returns false if the descriptor cannot be polled and is to be
    /// taken as always ready.
    ///
    /// # Errors
    /// epoll refused for another reason than the kind of file.
    pub(super) fn register(&mut self, epoll: &Epoll, token: u64, read: bool) -> io::Result<bool> {
        match epoll.ctl(ControlOperation::Add, self.fd.as_raw_fd(), EpollEvent::new(interest(read, false), token)) {
            Ok(()) => self.registered = true,
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => self.pollable = false,
            Err(error) => return Err(error),
        }
        Ok(self.pollable)
    }

    /// Asks for, or no longer asks for, an event when writing becomes possible. The kernel reports an edge at once if
    /// it already is.
    ///
    /// # Errors
    /// epoll_ctl failed.
    pub(super) fn wait_for_output(&mut self, epoll: &Epoll, token: u64, read: bool, wait: bool) -> io::Result<()> {
        if !self.registered || self.waits_for_output == wait {
            return Ok(());
        }
        self.waits_for_output = wait;
        epoll.ctl(ControlOperation::Modify, self.fd.as_raw_fd(), EpollEvent::new(interest(read, wait), token))
    }

    /// Leaves epoll. Closing is not enough: the description may be shared with a duplicate somewhere else.
    pub(super) fn unregister(&mut self, epoll: &Epoll) {
        if self.registered {
            self.registered = false;
            if let Err(error) =
                epoll.ctl(ControlOperation::Delete, self.fd.as_raw_fd(), EpollEvent::default())
            {
                tracing::warn!(%error, "vsock: cannot remove a descriptor from epoll");
            }
        }
    }

    /// Reads into guest memory.
    pub(super) fn read(&self, parts: &[VolatileSlice<'_>]) -> ReadOutcome {
        loop {
            let mut iov = iovecs(parts);
            // SAFETY: each entry is guest memory that stays mapped for the borrow of `parts`; the guest may change it
            // meanwhile, which the kernel does not mind, and no reference to it exists.
            let count = unsafe { libc::readv(self.fd.as_raw_fd(), iov.as_mut_ptr(), iov_count(&iov)) };
            if let Ok(count) = usize::try_from(count) {
                return if count > 0 { ReadOutcome::Data(count) } else { self.end() };
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EAGAIN) => return ReadOutcome::Blocked,
                // A socket whose peer closed with unread data, and a terminal whose other side closed.
                Some(libc::ECONNRESET | libc::EIO) => return ReadOutcome::End { hung_up: true },
                _ => {
                    tracing::warn!(%error, "vsock: reading the host side failed, treated as its end");
                    return ReadOutcome::End { hung_up: true };
                }
            }
        }
    }

    /// What a read of 0 bytes means.
    fn end(&self) -> ReadOutcome {
        if !self.pollable {
            return ReadOutcome::End { hung_up: false };
        }
        let hung_up = self.hung_up();
        // A FIFO reads as empty before its first writer opens it, but reports a hang-up only after the last one left.
        if self.kind == Kind::Pipe && !hung_up {
            return ReadOutcome::Blocked;
        }
        ReadOutcome::End { hung_up }
    }

    fn hung_up(&self) -> bool {
        let mut poll = [PollFd::from_borrowed_fd(self.fd.as_fd(), PollFlags::IN)];
        match rustix::event::poll(&mut poll, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Ok(_) => poll.iter().any(|p| p.revents().intersects(PollFlags::HUP | PollFlags::NVAL)),
            Err(error) => {
                tracing::warn!(%error, "vsock: poll of the host side failed, treated as hung up");
                true
            }
        }
    }

    /// Writes from guest memory.
    pub(super) fn write(&self, parts: &[VolatileSlice<'_>]) -> WriteOutcome {
        self.write_iov(&mut iovecs(parts))
    }

    /// Writes two buffers, one after the other.
    pub(super) fn write_buffers(&self, first: &[u8], second: &[u8]) -> WriteOutcome {
        let mut iov = [first, second].map(|bytes| libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        });
        self.write_iov(&mut iov)
    }

    fn write_iov(&self, iov: &mut [libc::iovec]) -> WriteOutcome {
        loop {
            let count = if self.kind == Kind::Socket {
                // SAFETY: msghdr is plain data for which all zeroes means "absent".
                let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
                message.msg_iov = iov.as_mut_ptr();
                message.msg_iovlen = iov.len();
                // SAFETY: the callers' buffers, guest memory or slices, outlive the call; the kernel only reads them.
                unsafe { libc::sendmsg(self.fd.as_raw_fd(), &message, libc::MSG_NOSIGNAL) }
            } else {
                // SAFETY: as above.
                unsafe { libc::writev(self.fd.as_raw_fd(), iov.as_ptr(), iov_count(iov)) }
            };
            match usize::try_from(count) {
                Ok(0) => return WriteOutcome::Broken,
                Ok(count) => return WriteOutcome::Data(count),
                Err(_) => {}
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                // Without readiness events a blocked write would never be tried again.
                Some(libc::EAGAIN) if self.pollable => return WriteOutcome::Blocked,
                Some(libc::EPIPE | libc::ECONNRESET) => return WriteOutcome::Broken,
                _ => {
                    tracing::warn!(%error, "vsock: writing the host side failed");
                    return WriteOutcome::Broken;
                }
            }
        }
    }

    /// Tells the host that no more data will come. True if the descriptor can still be read afterwards; false if
    /// there is no such thing as a half-close for it.
    pub(super) fn finish_writing(&self) -> bool {
        self.shutdown(rustix::net::Shutdown::Write)
    }

    /// Tells the host that what it writes will not be read. A no-op on anything but sockets.
    pub(super) fn finish_reading(&self) {
        self.shutdown(rustix::net::Shutdown::Read);
    }

    fn shutdown(&self, how: rustix::net::Shutdown) -> bool {
        if self.kind != Kind::Socket {
            return false;
        }
        if let Err(error) = rustix::net::shutdown(&self.fd, how) {
            // ENOTCONN: the peer is gone already.
            tracing::debug!(%error, "vsock: shutdown of the host side");
        }
        true
    }
}

impl AsFd for HostFd {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn interest(read: bool, write: bool) -> EventSet {
    let mut events = EventSet::EDGE_TRIGGERED;
    if read {
        events |= EventSet::IN | EventSet::READ_HANG_UP;
    }
    if write {
        events |= EventSet::OUT;
    }
    events
}

fn iovecs(parts: &[VolatileSlice<'_>]) -> Vec<libc::iovec> {
    parts
        .iter()
        .take(IOV_MAX)
        .map(|part| libc::iovec {
            iov_base: part.ptr_guard_mut().as_ptr().cast(),
            iov_len: part.len(),
        })
        .collect()
}

fn iov_count(iov: &[libc::iovec]) -> libc::c_int {
    // At most IOV_MAX entries.
    libc::c_int::try_from(iov.len()).unwrap_or(libc::c_int::MAX)
}
