//! What the guest said: a bounded ring of bytes that can also be copied to a file descriptor.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::interrupted;

/// Bytes kept unless asked otherwise.
const DEFAULT_CAPACITY: usize = 64 << 10;
/// Bytes written to a device that says it has room.
const POLLED_BYTES: usize = 256;

/// The guest's console output. Clones share one ring.
///
/// Writing never blocks and never grows beyond the capacity: the oldest bytes go first. A sink that does not keep up
/// loses output (counted), it does not slow the guest down.
#[derive(Debug, Clone)]
pub struct ConsoleLog {
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    ring: VecDeque<u8>,
    capacity: usize,
    sink: Option<Sink>,
    dropped: u64,
}

#[derive(Debug)]
struct Sink {
    file: File,
    kind: SinkKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SinkKind {
    /// `send` with MSG_DONTWAIT.
    Socket,
    /// `write` on a description that is non-blocking or cannot block.
    File,
    /// `write` of a little at a time, when poll says there is room.
    Polled,
}

impl Default for ConsoleLog {
    fn default() -> Self {
        Self::with_capacity(DEFAULT_CAPACITY)
    }
}

impl ConsoleLog {
    /// A ring of `capacity` bytes.
    pub fn with_capacity(capacity: usize) -> Self {
        Self {
            state: Arc::new(Mutex::new(State {
                ring: VecDeque::new(),
                capacity,
                sink: None,
                dropped: 0,
            })),
        }
    }

    /// Appends output of the guest.
    pub fn write(&self, bytes: &[u8]) {
        let mut state = self.lock();
        state.copy_to_sink(bytes);
        let skip = bytes.len().saturating_sub(state.capacity);
        let kept = bytes.get(skip..).unwrap_or_default();
        let excess = (state.ring.len() + kept.len()).saturating_sub(state.capacity);
        state.ring.drain(..excess);
        state.ring.extend(kept);
    }

    /// The last `lines` lines, oldest first; a line not yet ended counts. Bytes that are not UTF-8 are replaced.
    pub fn tail(&self, lines: usize) -> Vec<String> {
        let text = {
            let mut state = self.lock();
            String::from_utf8_lossy(state.ring.make_contiguous()).into_owned()
        };
        let all: Vec<&str> = text.lines().collect();
        let first = all.len().saturating_sub(lines);
        all.iter().skip(first).map(|line| (*line).to_owned()).collect()
    }

    /// Copies the ring so far, and everything from now on, to `fd`, in place of an earlier sink.
    ///
    /// Writes never block: a FIFO is opened again for a non-blocking description of our own (the caller's may be shared
    /// with others), a socket is written with MSG_DONTWAIT, a terminal when it has room. A sink that ends (EPIPE) is
    /// forgotten.
    ///
    /// # Errors
    /// The descriptor cannot be examined.
    pub fn set_sink(&self, fd: OwnedFd) -> io::Result<()> {
        let sink = Sink::new(fd)?;
        let mut state = self.lock();
        state.sink = Some(sink);
        let so_far: Vec<u8> = state.ring.iter().copied().collect();
        state.copy_to_sink(&so_far);
        Ok(())
    }

    /// Bytes a sink did not take.
    pub fn dropped(&self) -> u64 {
        self.lock().dropped
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn copy_to_sink(&mut self, bytes: &[u8]) {
        let Some(sink) = &mut self.sink else { return };
        let (taken, result) = sink.write(bytes);
        self.dropped += (bytes.len() - taken) as u64;
        if let Err(error) = result {
            guest_log!(DEBUG, %error, "console: sink is gone");
            self.sink = None;
        }
    }
}

impl Sink {
    fn new(fd: OwnedFd) -> io::Result<Self> {
        let file = File::from(fd);
        let file_type = file.metadata()?.file_type();
        if file_type.is_socket() {
            return Ok(Self {
                file,
                kind: SinkKind::Socket,
            });
        }
        if file_type.is_file() || file_type.is_block_device() {
            return Ok(Self {
                file,
                kind: SinkKind::File,
            });
        }
        let own = if file_type.is_fifo() {
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            OpenOptions::new()
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(path)
                .ok()
        } else {
            // A terminal or port may be open exclusively, and opening a pty master again makes another pty.
            None
        };
        Ok(match own {
            Some(file) => Self {
                file,
                kind: SinkKind::File,
            },
            None => Self {
                file,
                kind: SinkKind::Polled,
            },
        })
    }

    /// Writes what fits now: bytes taken, and an error when the sink has ended.
    fn write(&mut self, bytes: &[u8]) -> (usize, io::Result<()>) {
        let mut taken = 0;
        while let Some(rest) = bytes.get(taken..).filter(|rest| !rest.is_empty()) {
            match interrupted::again(|| self.write_once(rest)) {
                Ok(0) => break,
                Ok(count) => taken += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return (taken, Err(error)),
            }
        }
        (taken, Ok(()))
    }

    fn write_once(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.kind {
            SinkKind::File => self.file.write(bytes),
            SinkKind::Polled => self.write_polled(bytes),
            SinkKind::Socket => self.send(bytes),
        }
    }

    fn write_polled(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut poll = libc::pollfd {
            fd: self.file.as_raw_fd(),
            events: libc::POLLOUT,
            revents: 0,
        };
        // SAFETY: one pollfd, alive during the call.
        if unsafe { libc::poll(&raw mut poll, 1, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
        if poll.revents == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.file.write(bytes.get(..POLLED_BYTES).unwrap_or(bytes))
    }

    fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the pointer and length are those of a live slice, the descriptor is owned by `self.file`.
        let sent = unsafe { libc::send(self.file.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }
}
