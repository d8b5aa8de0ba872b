//! The agent's end of a container's terminal.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::cmsg_space;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};
use nix::unistd::{Uid, fchown};
use tokio::io::unix::AsyncFd;

/// The socket that a container process sends its terminal to while it is made.
pub struct ConsoleSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ConsoleSocket {
    /// Listens on `path`.
    ///
    /// # Errors
    /// The path is too long for a socket, or taken.
    pub fn bind(path: PathBuf) -> io::Result<Self> {
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The terminal of a process that exists by now: it was sent before the helper answered, so there is nothing
    /// to wait for.
    ///
    /// # Errors
    /// None was sent.
    pub fn receive(self) -> io::Result<Pty> {
        let (stream, _) = self.listener.accept()?;
        let mut name = [0; 64];
        let mut slices = [IoSliceMut::new(&mut name)];
        let mut space = cmsg_space!([RawFd; 1]);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let message = recvmsg::<UnixAddr>(stream.as_raw_fd(), &mut slices, Some(&mut space), flags)?;
        let received = message.cmsgs()?.find_map(|control| match control {
            ControlMessageOwned::ScmRights(descriptors) => descriptors.first().copied(),
            _ => None,
        });
        let master = received.ok_or_else(|| io::Error::other("the container sent no terminal"))?;
        // SAFETY: the kernel just made this descriptor for us, and nobody else knows it.
        Pty::new(unsafe { OwnedFd::from_raw_fd(master) })
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        // The bundle that holds it is removed with the container at the latest.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A terminal's master side.
pub struct Pty {
    master: AsyncFd<OwnedFd>,
}

impl Pty {
    fn new(master: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_truncate(fcntl(&master, FcntlArg::F_GETFL)?);
        fcntl(&master, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        // SAFETY: an OwnedFd keeps its descriptor open and the same for as long as it is registered.
        let master = unsafe { AsyncFd::register(master)? };
        Ok(Self { master })
    }

    /// Reads what the terminal shows; 0 when the last process closed it.
    ///
    /// # Errors
    /// The terminal failed.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.master.readable().await?;
            let result = ready.try_io(|master| Ok(nix::unistd::read(master.get_ref(), buffer)?));
            match result {
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => return Ok(0),
                Ok(result) => return result,
                Err(_would_block) => {}
            }
        }
    }

    /// Types `data`.
    ///
    /// # Errors
    /// Nobody has the terminal open any more.
    pub async fn write_all(&self, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let mut ready = self.master.writable().await?;
            match ready.try_io(|master| Ok(nix::unistd::write(master.get_ref(), data)?)) {
                Ok(written) => data = data.get(written?..).unwrap_or_default(),
                Err(_would_block) => {}
            }
        }
        Ok(())
    }

    /// Makes the terminal the user's, who may want to open it anew (`/dev/stdout`), as runc does. One that is not root's has
    /// been made in a user namespace, for whoever is root there, and stays as it is.
    ///
    /// # Errors
    /// The terminal has no other side to ask, or it may not be given away.
    pub fn give_to(&self, uid: u32) -> io::Result<()> {
        let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
        // SAFETY: TIOCGPTPEER takes open flags and touches no memory; the descriptor is open (tty_ioctl(4)).
        let peer = unsafe { libc::ioctl(self.master.get_ref().as_raw_fd(), libc::TIOCGPTPEER, flags) };
        let peer = nix::errno::Errno::result(peer)?;
        // SAFETY: the kernel just made this descriptor for us, and nobody else knows it.
        let peer = File::from(unsafe { OwnedFd::from_raw_fd(peer) });
        if peer.metadata()?.uid() == 0 {
            fchown(&peer, Some(Uid::from_raw(uid)), None)?;
        }
        Ok(())
    }

    /// Tells the programs on the terminal its new size.
    ///
    /// # Errors
    /// The terminal failed.
    pub fn resize(&self, rows: u16, columns: u16) -> io::Result<()> {
        resize(self.master.get_ref().as_fd(), rows, columns)
    }
}

/// Sets the size of the terminal that `descriptor` is a side of.
///
/// # Errors
/// It is not a terminal's.
pub fn resize(descriptor: BorrowedFd<'_>, rows: u16, columns: u16) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads one `winsize`, which outlives the call; the descriptor is open.
    let result = unsafe { libc::ioctl(descriptor.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    nix::errno::Errno::result(result)?;
    Ok(())
}
