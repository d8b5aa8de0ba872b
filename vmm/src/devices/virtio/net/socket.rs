//! An interface whose TAP is a socket: each message is a frame with its header, and a test has the other end.

// Of tests and fuzzing.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair, sockopt,
};

use super::Net;
use super::config::NetConfig;
use super::tap::Backend;

/// Stands for one queue of a TAP.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    /// The last offload bits.
    pub offload: AtomicU32,
    /// Whether frames may arrive here.
    pub enabled: AtomicBool,
    /// Refuse to be enabled.
    pub refuse: AtomicBool,
    /// Changes asked for.
    pub changes: AtomicU32,
    /// Changes of `enabled` wait while this is set, as for RTNL.
    pub held: AtomicBool,
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Backend for Socket {
    fn set_offload(&self, offload: u32) -> io::Result<()> {
        self.changes.fetch_add(1, Ordering::SeqCst);
        self.offload.store(offload, Ordering::SeqCst);
        Ok(())
    }

    fn offload(&self) -> Option<u32> {
        Some(self.offload.load(Ordering::SeqCst)).filter(|offload| *offload != u32::MAX)
    }

    fn enabled(&self) -> bool {
        self.enabled.load(Ordering::SeqCst)
    }

    fn set_enabled(&self, enabled: bool) -> io::Result<()> {
        if self.enabled() == enabled {
            return Ok(());
        }
        self.changes.fetch_add(1, Ordering::SeqCst);
        while self.held.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        if self.refuse.load(Ordering::SeqCst) && enabled {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.enabled.store(enabled, Ordering::SeqCst);
        Ok(())
    }
}

/// The other end.
#[derive(Debug)]
pub struct Wire(OwnedFd);

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Wire {
    /// Sends a frame to the guest; false when the "TAP" is full.
    pub fn try_send(&self, frame: &[u8]) -> bool {
        match send(&self.0, frame, SendFlags::DONTWAIT) {
            Ok(count) => {
                assert_eq!(count, frame.len());
                true
            }
            Err(error) => {
                assert_eq!(error, rustix::io::Errno::AGAIN);
                false
            }
        }
    }

    /// Sends a frame to the guest; the "TAP" has room.
    pub fn send(&self, frame: &[u8]) {
        assert!(self.try_send(frame));
    }

    /// The next frame of the guest.
    pub fn try_recv(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 1 << 17];
        match recv(&self.0, &mut frame[..], RecvFlags::DONTWAIT) {
            Ok((count, _)) => {
                frame.truncate(count);
                Some(frame)
            }
            Err(error) => {
                assert_eq!(error, rustix::io::Errno::AGAIN);
                None
            }
        }
    }
}

/// A pair of ends; the buffers hold about `bytes`.
pub fn wire(bytes: usize) -> (Arc<Socket>, Wire) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    for end in [&ours, &theirs] {
        sockopt::set_socket_send_buffer_size(end, bytes).unwrap();
    }
    let socket = Socket {
        fd: ours,
        offload: AtomicU32::new(u32::MAX),
        enabled: AtomicBool::new(true),
        refuse: AtomicBool::new(false),
        changes: AtomicU32::new(0),
        held: AtomicBool::new(false),
    };
    (Arc::new(socket), Wire(theirs))
}

/// An interface over these.
pub fn device(config: &NetConfig, sockets: &[Arc<Socket>]) -> Net {
    let backends = sockets.iter().map(|socket| socket.clone() as Arc<dyn Backend>);
    Net::with_backends(config, backends.collect()).unwrap()
}
