//! The host side of a connection: a non-blocking file descriptor of any kind.
//!
//! Readiness is edge triggered: a descriptor is registered once for reading, the connection remembers that it may be
//! readable until a read says otherwise, and write readiness is asked for only while a write is blocked. A peer that
//! hung up therefore costs one wake-up, not a busy loop, and a connection without credit costs none.
//!
//! Writing to a pipe without readers raises SIGPIPE unless the process ignores it. Rust's runtime ignores it before
//! `main`; a host program that restores the default must not use [`attach`](super::VsockHandle::attach) with pipes.
//! Sockets are written with MSG_NOSIGNAL.

#![allow(unsafe_code)]

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
    warned: bool,
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
            warned: false,
        })
    }

    /// Registers for read readiness (and hang-ups). Returns false if the descriptor cannot be polled and is to be
    /// taken as always ready.
    ///
    /// # Errors
    /// epoll refused for another reason than the kind of file.
    pub(super) fn register(&mut self, epoll: &Epoll, token: u64, read: bool) -> io::Result<bool> {
        match epoll.ctl(
            ControlOperation::Add,
            self.fd.as_raw_fd(),
            EpollEvent::new(interest(read, false), token),
        ) {
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
    pub(super) fn wait_for_output(
        &mut self,
        epoll: &Epoll,
        token: u64,
        read: bool,
        wait: bool,
    ) -> io::Result<()> {
        if !self.registered || self.waits_for_output == wait {
            return Ok(());
        }
        self.waits_for_output = wait;
        epoll.ctl(
            ControlOperation::Modify,
            self.fd.as_raw_fd(),
            EpollEvent::new(interest(read, wait), token),
        )
    }

    /// Leaves epoll. Closing is not enough: the description may be shared with a duplicate somewhere else.
    pub(super) fn unregister(&mut self, epoll: &Epoll) {
        if self.registered {
            self.registered = false;
            if let Err(error) = epoll.ctl(
                ControlOperation::Delete,
                self.fd.as_raw_fd(),
                EpollEvent::default(),
            ) {
                guest_log!(WARN, %error, "vsock: cannot remove a descriptor from epoll");
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
            match usize::try_from(count) {
                Ok(0) => match self.end() {
                    Some(outcome) => return outcome,
                    None => continue,
                },
                Ok(count) => return ReadOutcome::Data(count),
                Err(_) => {}
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EAGAIN) => return ReadOutcome::Blocked,
                // A socket whose peer closed with unread data, and a terminal whose other side closed.
                Some(libc::ECONNRESET | libc::EIO) => return ReadOutcome::End { hung_up: true },
                _ => {
                    guest_log!(WARN, %error, "vsock: reading the host side failed, treated as its end");
                    return ReadOutcome::End { hung_up: true };
                }
            }
        }
    }

    /// What a read of 0 bytes means; `None` if it means nothing any more, because there is something to read now.
    fn end(&self) -> Option<ReadOutcome> {
        if !self.pollable {
            return Some(ReadOutcome::End { hung_up: false });
        }
        let mut poll = [PollFd::from_borrowed_fd(self.fd.as_fd(), PollFlags::IN)];
        let state = match rustix::event::poll(&mut poll, Some(&Timespec::default())) {
            Ok(_) => poll.iter().map(PollFd::revents).collect(),
            Err(error) => {
                guest_log!(WARN, %error, "vsock: poll of the host side failed, treated as hung up");
                PollFlags::HUP
            }
        };
        let hung_up = state.contains(PollFlags::HUP);
        // A FIFO reads as empty before its first writer opens it, but reports a hang-up only after the last one left.
        match self.kind {
            Kind::Pipe if state.contains(PollFlags::IN) => None,
            Kind::Pipe if !hung_up => Some(ReadOutcome::Blocked),
            _ => Some(ReadOutcome::End { hung_up }),
        }
    }

    /// Writes from guest memory.
    pub(super) fn write(&mut self, parts: &[VolatileSlice<'_>]) -> WriteOutcome {
        self.write_iov(&mut iovecs(parts))
    }

    /// Writes two buffers, one after the other.
    pub(super) fn write_buffers(&mut self, first: &[u8], second: &[u8]) -> WriteOutcome {
        let mut iov = [first, second].map(|bytes| libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        });
        self.write_iov(&mut iov)
    }

    fn write_iov(&mut self, iov: &mut [libc::iovec]) -> WriteOutcome {
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
                    // Once: the guest decides how often this happens, e.g. with output for a full disk.
                    if !std::mem::replace(&mut self.warned, true) {
                        guest_log!(WARN, %error, "vsock: writing the host side failed, bytes are dropped");
                    }
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
            guest_log!(DEBUG, %error, "vsock: shutdown of the host side");
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

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn read(host: &HostFd, buffer: &mut [u8]) -> ReadOutcome {
        host.read(&[VolatileSlice::from(buffer)])
    }

    #[test]
    fn read_of_a_fifo_is_blocked_before_its_first_writer_and_ends_after_its_last() {
        let path = std::env::temp_dir().join(format!("dragonball-host-{}", std::process::id()));
        rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, 0o600.into(), 0).unwrap();
        let reader = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .unwrap();
        let host = HostFd::new(reader.into()).unwrap();
        let mut buffer = [0; 8];
        assert_eq!(read(&host, &mut buffer), ReadOutcome::Blocked);
        let mut writer = OpenOptions::new().write(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(read(&host, &mut buffer), ReadOutcome::Blocked);
        writer.write_all(b"abc").unwrap();
        assert_eq!(read(&host, &mut buffer), ReadOutcome::Data(3));
        assert_eq!(read(&host, &mut buffer), ReadOutcome::Blocked);
        drop(writer);
        assert_eq!(read(&host, &mut buffer), ReadOutcome::End { hung_up: true });
    }

    #[test]
    fn read_of_a_socket_tells_half_closed_from_closed() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let host = HostFd::new(ours.into()).unwrap();
        let mut buffer = [0; 8];
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(read(&host, &mut buffer), ReadOutcome::End { hung_up: false });
        drop(theirs);
        assert_eq!(read(&host, &mut buffer), ReadOutcome::End { hung_up: true });
    }

    #[test]
    fn write_without_a_reader_is_broken_and_raises_no_signal() {
        let (reader, writer) = io::pipe().unwrap();
        let mut pipe = HostFd::new(writer.into()).unwrap();
        assert_eq!(pipe.write_buffers(b"ab", b"c"), WriteOutcome::Data(3));
        drop(reader);
        assert_eq!(pipe.write_buffers(b"abc", &[]), WriteOutcome::Broken);
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut socket = HostFd::new(ours.into()).unwrap();
        drop(theirs);
        assert_eq!(socket.write_buffers(b"abc", &[]), WriteOutcome::Broken);
    }
}
