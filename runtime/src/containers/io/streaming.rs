//! containerd's streaming stdio (`io_type = "streaming"`): streams that a client fetches over the shim's own socket instead of
//! from FIFOs.
//!
//! A stream has a name. containerd connects it before it creates the container, and again after its own restart; the
//! container names it in its stdio, `ttrpc+unix://SOCKET?streaming_id=NAME`. So either side may come first, and the client
//! may go and come back: what the two meet in is a [`StreamHub`]. Between the VM's muxer and the client there is a pipe.
//! Who carries bytes between pipe and client, in what frames, is the shim's business; here is what must be true whoever
//! does:
//! - one client at a time has the pipe; a new one takes it over from one that has not noticed its own end yet;
//! - a client that vanishes takes nothing with it: output that it has not been sent waits for the next one in the pipe, which
//!   holds the process up when it is full, as a FIFO without a reader does. The pod does not notice;
//! - stdin ends when the client says so, or when CloseIO has been asked for and no client is there.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::{OwnedMutexGuard, watch};

use crate::error::{Error, ErrorKind, Result};

/// How much output is taken from a process before the client has room for it.
const CHUNK: usize = 32 << 10;

/// The named streams of a shim.
#[derive(Debug, Default)]
pub struct StreamHub {
    streams: Mutex<HashMap<String, Arc<Stream>>>,
}

/// Which way the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the process to the client.
    Output,
    /// From the client to the process.
    Input,
}

#[derive(Debug)]
struct Stream {
    name: String,
    /// Whoever holds the lock is the client that has the pipe.
    pipe: Arc<tokio::sync::Mutex<Pipe>>,
    state: watch::Sender<State>,
}

#[derive(Debug, Default, Clone, Copy)]
struct State {
    /// A process has it.
    opened: Option<Direction>,
    /// Which client is the current one; counted from 1.
    client: u64,
    /// Whether that one is still there.
    connected: bool,
    /// CloseIO has been asked for.
    closed: bool,
    /// Every byte has arrived.
    finished: bool,
    /// The process is gone.
    ended: bool,
}

/// Our end of the pipe whose other end the muxer has.
#[derive(Debug)]
enum Pipe {
    /// No process has the stream yet.
    Waiting,
    Output {
        pipe: pipe::Receiver,
        /// Read, and not sent yet.
        unsent: Vec<u8>,
    },
    Input {
        pipe: pipe::Sender,
        /// Received, and not written yet.
        unsent: Vec<u8>,
    },
    /// Nothing comes any more.
    Finished,
}

impl StreamHub {
    /// A client for the stream `name` has come. One that has it already loses it.
    pub fn connect(self: &Arc<Self>, name: &str) -> Client {
        let stream = self.stream(name);
        let mut number = 0;
        stream.state.send_modify(|state| {
            state.client += 1;
            state.connected = true;
            number = state.client;
        });
        Client {
            hub: Arc::clone(self),
            stream,
            number,
        }
    }

    /// A process has the stream `name` from now on. Returns the muxer's end of the pipe. Needs tokio's context.
    ///
    /// # Errors
    /// `AlreadyExists` when another process has it.
    pub fn open(self: &Arc<Self>, name: &str, direction: Direction) -> Result<(ProcessStream, OwnedFd)> {
        let stream = self.stream(name);
        let refused = |kind, why: &dyn std::fmt::Display| Error::new(kind, format!("stream {name:?}: {why}"));
        let failed = |error: io::Error| refused(ErrorKind::Internal, &error);
        let taken = || {
            refused(
                ErrorKind::AlreadyExists,
                &"it is a stream of another process already",
            )
        };
        let (read, write) = io::pipe().map_err(failed)?;
        let (ours, muxers) = match direction {
            Direction::Output => {
                let pipe = pipe::Receiver::from_owned_fd(read.into()).map_err(failed)?;
                let unsent = Vec::new();
                (Pipe::Output { pipe, unsent }, OwnedFd::from(write))
            }
            Direction::Input => {
                let pipe = pipe::Sender::from_owned_fd(write.into()).map_err(failed)?;
                let unsent = Vec::new();
                (Pipe::Input { pipe, unsent }, OwnedFd::from(read))
            }
        };
        fcntl(&muxers, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(|errno| failed(errno.into()))?;
        // Clients take the lock only once the stream is open.
        let mut pipe = stream.pipe.try_lock().map_err(|_| taken())?;
        if !matches!(*pipe, Pipe::Waiting) {
            return Err(taken());
        }
        *pipe = ours;
        drop(pipe);
        stream.state.send_modify(|state| state.opened = Some(direction));
        let hub = Arc::clone(self);
        Ok((ProcessStream { hub, stream }, muxers))
    }

    fn stream(&self, name: &str) -> Arc<Stream> {
        let mut streams = self.streams();
        let stream = streams.entry(name.to_owned()).or_insert_with(|| {
            Arc::new(Stream {
                name: name.to_owned(),
                pipe: Arc::new(tokio::sync::Mutex::new(Pipe::Waiting)),
                state: watch::Sender::default(),
            })
        });
        Arc::clone(stream)
    }

    fn forget(&self, stream: &Arc<Stream>) {
        let mut streams = self.streams();
        if streams
            .get(&stream.name)
            .is_some_and(|known| Arc::ptr_eq(known, stream))
        {
            streams.remove(&stream.name);
        }
    }

    fn streams(&self) -> MutexGuard<'_, HashMap<String, Arc<Stream>>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stream {
    /// Ends stdin when CloseIO has been asked for and no client can send any more.
    fn end_input_if_due(&self) {
        let state = *self.state.borrow();
        let due = state.opened == Some(Direction::Input) && state.closed && !state.connected;
        // Locked, a client has it: it calls this when it goes.
        if due && let Ok(mut pipe) = self.pipe.try_lock() {
            // What a client that vanished has sent comes first; if the pipe has no room for it, it is lost with its sender.
            if let Pipe::Input { pipe, unsent } = &mut *pipe
                && !unsent.is_empty()
                && let Err(error) = pipe.try_write(unsent)
            {
                tracing::warn!(stream = self.name, bytes = unsent.len(), %error, "input lost");
            }
            *pipe = Pipe::Finished;
        }
    }
}

/// A process' hold on a stream; dropping it is the end of the stream.
#[derive(Debug)]
pub struct ProcessStream {
    hub: Arc<StreamHub>,
    stream: Arc<Stream>,
}

impl ProcessStream {
    /// CloseIO: stdin ends as soon as no client is there that could send more.
    pub fn close(&self) {
        self.stream.state.send_modify(|state| state.closed = true);
        self.stream.end_input_if_due();
    }

    /// Waits until the client has been sent everything and been told of the end. Without a client there is nothing to wait
    /// for.
    pub async fn delivered(&self) {
        let mut state = self.stream.state.subscribe();
        // It cannot fail: the sender is in `self`.
        let _ = state.wait_for(|state| state.finished || !state.connected).await;
    }
}

impl Drop for ProcessStream {
    fn drop(&mut self) {
        self.stream.state.send_modify(|state| state.ended = true);
        self.hub.forget(&self.stream);
    }
}

/// A client that is connected to a stream; dropping it means that it is gone.
#[derive(Debug)]
pub struct Client {
    hub: Arc<StreamHub>,
    stream: Arc<Stream>,
    number: u64,
}

impl Client {
    /// Waits until a process has the stream and no earlier client does; `None` when that is over or never comes.
    pub async fn lease(&self) -> Option<Lease> {
        let mut state = self.stream.state.subscribe();
        let opened = state.wait_for(|state| state.opened.is_some() || self.lost(state));
        // The sender is in `self`.
        let direction = opened.await.ok()?.opened?;
        let pipe = Arc::clone(&self.stream.pipe);
        tokio::select! {
            biased;
            () = self.over() => None,
            pipe = pipe.lock_owned() => Some(Lease { pipe, direction, stream: Arc::clone(&self.stream) }),
        }
    }

    /// Waits until the stream is another client's, or nobody's.
    pub async fn over(&self) {
        let mut state = self.stream.state.subscribe();
        // The sender is in `self`.
        let _ = state.wait_for(|state| self.lost(state)).await;
    }

    fn lost(&self, state: &State) -> bool {
        state.ended || state.client != self.number
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let mut unused = false;
        self.stream.state.send_modify(|state| {
            if state.client == self.number {
                state.connected = false;
                unused = state.opened.is_none();
            }
        });
        if unused {
            self.hub.forget(&self.stream);
        }
        self.stream.end_input_if_due();
    }
}

/// A client's hold on the pipe. Its methods may be given up at any time: nothing is lost then.
#[derive(Debug)]
pub struct Lease {
    pipe: OwnedMutexGuard<Pipe>,
    direction: Direction,
    stream: Arc<Stream>,
}

impl Lease {
    /// Which way the bytes go.
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// What is to be sent next, at most `limit` bytes; `None` at the end of the output. It comes again until it is
    /// [`sent`](Self::sent).
    ///
    /// # Errors
    /// Of reading the pipe.
    pub async fn next(&mut self, limit: usize) -> io::Result<Option<&[u8]>> {
        let Pipe::Output { pipe, unsent } = &mut *self.pipe else {
            return Ok(None);
        };
        if unsent.is_empty() {
            let mut chunk = vec![0; CHUNK];
            let count = pipe.read(&mut chunk).await?;
            if count == 0 {
                return Ok(None);
            }
            chunk.truncate(count);
            *unsent = chunk;
        }
        Ok(unsent.get(..limit.min(unsent.len())))
    }

    /// Whether there is output that waits to be sent.
    pub fn has_unsent(&self) -> bool {
        matches!(&*self.pipe, Pipe::Output { unsent, .. } if !unsent.is_empty())
    }

    /// The first `count` bytes of [`next`](Self::next) are on their way.
    pub fn sent(&mut self, count: usize) {
        if let Pipe::Output { unsent, .. } = &mut *self.pipe {
            unsent.drain(..count.min(unsent.len()));
        }
    }

    /// Takes input of the client's; it reaches the process by [`flush`](Self::flush).
    pub fn received(&mut self, bytes: &[u8]) {
        if let Pipe::Input { unsent, .. } = &mut *self.pipe {
            unsent.extend_from_slice(bytes);
        }
    }

    /// Writes what was received, as the process takes it.
    ///
    /// # Errors
    /// `BrokenPipe` when it reads no more.
    pub async fn flush(&mut self) -> io::Result<()> {
        let Pipe::Input { pipe, unsent } = &mut *self.pipe else {
            return Ok(());
        };
        while !unsent.is_empty() {
            let count = pipe.write(unsent).await?;
            unsent.drain(..count);
        }
        Ok(())
    }

    /// The end has come: of the output, and the client has been told; or of stdin, by the client's word.
    pub fn finish(mut self) {
        *self.pipe = Pipe::Finished;
        self.stream.state.send_modify(|state| state.finished = true);
    }
}

/// The name in a stream's address, `ttrpc+unix://SOCKET?streaming_id=NAME`.
///
/// # Errors
/// What is wrong with it.
pub(super) fn name_in(address: &str) -> std::result::Result<String, String> {
    let (_, rest) = address.split_once("://").unwrap_or_default();
    let (socket, query) = rest.split_once('?').unwrap_or((rest, ""));
    let name = query
        .split('&')
        .find_map(|pair| pair.strip_prefix("streaming_id="));
    match name {
        Some(name) if !name.is_empty() && socket.starts_with('/') => Ok(super::logger::decode(name)),
        Some(name) if !name.is_empty() => Err("the socket's path is not absolute".to_owned()),
        _ => Err("streaming_id is missing".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::time::Duration;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    async fn soon<T>(call: impl Future<Output = T>) -> T {
        tokio::time::timeout(LIMIT, call).await.expect("nothing came")
    }

    fn hub() -> Arc<StreamHub> {
        Arc::default()
    }

    #[tokio::test]
    async fn output_when_a_client_vanishes_goes_on_with_the_next() {
        let hub = hub();
        let first = hub.connect("c-stdout");
        let (process, fd) = hub.open("c-stdout", Direction::Output).unwrap();
        let mut guest = File::from(fd);
        guest.write_all(b"one two three").unwrap();

        let mut lease = soon(first.lease()).await.unwrap();
        assert_eq!(lease.direction(), Direction::Output);
        assert_eq!(soon(lease.next(4)).await.unwrap().unwrap(), b"one ");
        lease.sent(4);
        // Taken, but never sent.
        assert_eq!(soon(lease.next(4)).await.unwrap().unwrap(), b"two ");
        drop((lease, first));
        soon(process.delivered()).await;

        guest.write_all(b" four").unwrap();
        drop(guest);
        let second = hub.connect("c-stdout");
        let mut lease = soon(second.lease()).await.unwrap();
        let mut rest = Vec::new();
        while let Some(bytes) = soon(lease.next(100)).await.unwrap().map(<[u8]>::to_vec) {
            lease.sent(bytes.len());
            rest.extend(bytes);
        }
        assert_eq!(rest, b"two three four");
        lease.finish();
        soon(process.delivered()).await;
    }

    #[tokio::test]
    async fn client_when_another_comes_loses_the_stream() {
        let hub = hub();
        let (process, _fd) = hub.open("s", Direction::Output).unwrap();
        let first = hub.connect("s");
        let lease = soon(first.lease()).await.unwrap();
        let second = hub.connect("s");

        soon(first.over()).await;
        assert!(soon(first.lease()).await.is_none());
        drop(lease);
        assert!(soon(second.lease()).await.is_some());
        // The first one's end is not the second's.
        drop(first);
        let third = {
            let waiting = process.delivered();
            tokio::pin!(waiting);
            let pending = futures::poll!(&mut waiting).is_pending();
            drop(second);
            soon(waiting).await;
            pending
        };
        assert!(third, "the second client was still there");
    }

    #[tokio::test]
    async fn input_when_the_client_ends_it_or_is_gone_at_close_io_ends() {
        let hub = hub();
        for says_so in [true, false] {
            let (process, fd) = hub.open("c-stdin", Direction::Input).unwrap();
            let client = hub.connect("c-stdin");
            let mut lease = soon(client.lease()).await.unwrap();
            lease.received(b"words");
            soon(lease.flush()).await.unwrap();
            // The client is there: more may come.
            process.close();
            lease.received(b" more");
            soon(lease.flush()).await.unwrap();
            if says_so {
                lease.finish();
            } else {
                drop((lease, client));
            }
            let mut text = String::new();
            let mut guest = File::from(fd);
            fcntl(&guest, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
            guest.read_to_string(&mut text).unwrap();
            assert_eq!(text, "words more");
        }
    }

    #[tokio::test]
    async fn input_when_its_client_is_gone_waits_for_the_next() {
        let hub = hub();
        let (_process, fd) = hub.open("s", Direction::Input).unwrap();
        let first = hub.connect("s");
        let mut lease = soon(first.lease()).await.unwrap();
        // Received, and not written: the next client's input comes after it.
        lease.received(b"one ");
        drop((lease, first));
        let second = hub.connect("s");
        let mut lease = soon(second.lease()).await.unwrap();
        lease.received(b"two");
        soon(lease.flush()).await.unwrap();
        lease.finish();

        let mut text = String::new();
        File::from(fd).read_to_string(&mut text).unwrap();
        assert_eq!(text, "one two");
    }

    #[tokio::test]
    async fn stream_when_its_process_is_gone_is_over_and_its_name_free() {
        let hub = hub();
        let client = hub.connect("s");
        let (process, _fd) = hub.open("s", Direction::Output).unwrap();
        assert_eq!(
            hub.open("s", Direction::Output).unwrap_err().kind,
            ErrorKind::AlreadyExists
        );
        drop(process);
        soon(client.over()).await;
        hub.open("s", Direction::Input).unwrap();
    }

    #[tokio::test]
    async fn client_when_no_process_ever_comes_leaves_nothing() {
        let hub = hub();
        drop(hub.connect("s"));
        assert!(hub.streams().is_empty());
    }

    #[test]
    fn address_when_complete_names_a_stream() {
        let name = |address| name_in(address);
        assert_eq!(
            name("ttrpc+unix:///run/containerd/s/x?streaming_id=c1-stdout").unwrap(),
            "c1-stdout"
        );
        assert!(name("ttrpc+unix:///run/x").unwrap_err().contains("streaming_id"));
        assert!(name("ttrpc+unix:///run/x?streaming_id=").is_err());
        assert!(
            name("ttrpc+unix://x?streaming_id=a")
                .unwrap_err()
                .contains("path")
        );
    }
}
