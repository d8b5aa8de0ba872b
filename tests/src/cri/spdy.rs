//! A client of kubelet's streaming protocol, SPDY/3.1, which `kubectl` and `crictl` speak for exec, attach and port-forward.
//!
//! An HTTP/1.1 POST is upgraded; then frames follow: SYN_STREAM opens a stream and says in headers what it is for, data frames
//! carry its bytes, the FIN flag ends one direction. Headers are compressed with zlib and a dictionary both sides know; a zlib
//! stream may consist of stored blocks, so what we send needs no compressor, and what containerd says in its headers
//! (SYN_REPLY) is nothing we need to read.
//!
//! Frames: <https://www.chromium.org/spdy/spdy-protocol/spdy-protocol-draft3-1/>. Headers and streams of exec and attach: Kubernetes'
//! `remotecommand` v4; of port-forward: `portforward.k8s.io`.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Protocol of exec and attach whose error stream ends with a status in JSON.
pub const REMOTE_COMMAND: &str = "v4.channel.k8s.io";
/// Protocol of port-forward.
pub const PORT_FORWARD: &str = "portforward.k8s.io";

/// Adler-32 of SPDY/3's dictionary, by which a zlib stream names it.
const DICTIONARY: u32 = 0xe3c6_a7c2;
const SYN_STREAM: u16 = 1;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const FIN: u8 = 1;
/// Control frames of version 3.
const CONTROL: u16 = 0x8003;
/// Bytes per data frame; a frame could hold 16 MiB.
const CHUNK: usize = 64 << 10;

/// Why a stream does not work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// containerd refused the call that hands out the address.
    #[error("{0}")]
    Refused(#[from] tonic::Status),
    /// The address is not one of ours.
    #[error("streaming address {0}: not http://HOST:PORT/PATH")]
    Address(String),
    /// The server did not switch protocols.
    #[error("{url}: {answer}, expected 101 Switching Protocols")]
    Upgrade {
        /// The address.
        url: String,
        /// The server's first line.
        answer: String,
    },
    /// The connection broke.
    #[error("{url}: {source}")]
    Connection {
        /// The address.
        url: String,
        /// What the system said.
        source: io::Error,
    },
    /// The awaited did not come.
    #[error("{url}: no {what} within {limit:?}; streams so far: {seen}")]
    Silent {
        /// The address.
        url: String,
        /// What was awaited.
        what: String,
        /// The limit.
        limit: Duration,
        /// Every stream's bytes.
        seen: String,
    },
}

/// A stream to open: the name it has here, and its headers.
pub struct StreamHeaders {
    name: &'static str,
    headers: Vec<(&'static str, String)>,
}

/// The streams of exec and attach.
pub fn command_streams(tty: bool) -> Vec<StreamHeaders> {
    let last = if tty { "resize" } else { "stderr" };
    let open = |name| StreamHeaders {
        name,
        headers: vec![("streamtype", name.to_owned())],
    };
    ["error", "stdin", "stdout", last].map(open).into()
}

/// The streams of one connection to `port`.
pub fn port_streams(port: u16) -> Vec<StreamHeaders> {
    let open = |name: &'static str| StreamHeaders {
        name,
        headers: vec![
            ("streamtype", name.to_owned()),
            ("port", port.to_string()),
            ("requestid", "0".to_owned()),
        ],
    };
    ["error", "data"].map(open).into()
}

#[derive(Default)]
struct Incoming {
    bytes: Vec<u8>,
    ended: bool,
}

#[derive(Default)]
struct State {
    streams: HashMap<u32, Incoming>,
    /// The server will say no more.
    closed: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An upgraded connection with its streams open. Dropping it hangs up.
pub struct Connection {
    url: String,
    socket: TcpStream,
    ids: Vec<(&'static str, u32)>,
    shared: Arc<Shared>,
}

impl Connection {
    /// Connects, upgrades, and opens the streams.
    ///
    /// # Errors
    /// When the server does not answer as it should.
    pub fn open(url: &str, protocol: &str, streams: Vec<StreamHeaders>) -> Result<Self, Error> {
        let broken = |source| Error::Connection {
            url: url.to_owned(),
            source,
        };
        let socket = upgrade(url, protocol)?;
        let mut writer = socket.try_clone().map_err(broken)?;
        let mut ids = Vec::new();
        // A client's streams have odd numbers.
        for (id, stream) in (1..).step_by(2).zip(streams) {
            writer
                .write_all(&syn_stream(id, &stream.headers, id == 1))
                .map_err(broken)?;
            ids.push((stream.name, id));
        }
        let shared = Arc::new(Shared::default());
        for (_, id) in &ids {
            shared.lock().streams.insert(*id, Incoming::default());
        }
        let reader = socket.try_clone().map_err(broken)?;
        let sink = Arc::clone(&shared);
        thread::spawn(move || receive(reader, writer, &sink));
        Ok(Self {
            url: url.to_owned(),
            socket,
            ids,
            shared,
        })
    }

    /// Writes to a stream, such as `stdin`, `resize` or `data`.
    ///
    /// # Errors
    /// When the connection is gone.
    pub fn write(&mut self, stream: &str, bytes: &[u8]) -> Result<(), Error> {
        let id = self.id(stream);
        for chunk in bytes.chunks(CHUNK) {
            self.send(&data(id, chunk, 0))?;
        }
        Ok(())
    }

    /// Ends our direction of a stream.
    ///
    /// # Errors
    /// When the connection is gone.
    pub fn close(&mut self, stream: &str) -> Result<(), Error> {
        self.send(&data(self.id(stream), &[], FIN))
    }

    /// What a stream has brought so far.
    pub fn so_far(&self, stream: &str) -> Vec<u8> {
        let state = self.shared.lock();
        let stream = state.streams.get(&self.id(stream));
        stream.map(|stream| stream.bytes.clone()).unwrap_or_default()
    }

    /// Waits until a stream's bytes satisfy `done`.
    ///
    /// # Errors
    /// When they do not within `limit`; `what` names what was awaited.
    pub fn wait(
        &self,
        stream: &str,
        what: &str,
        limit: Duration,
        done: impl Fn(&str) -> bool,
    ) -> Result<(), Error> {
        self.wait_until(stream, what, limit, |incoming| {
            done(&String::from_utf8_lossy(&incoming.bytes))
        })
    }

    /// Waits for the end of a stream and returns everything it brought.
    ///
    /// # Errors
    /// When it does not end within `limit`.
    pub fn finish(&self, stream: &str, limit: Duration) -> Result<Vec<u8>, Error> {
        self.wait_until(stream, &format!("end of {stream}"), limit, |incoming| {
            incoming.ended
        })?;
        Ok(self.so_far(stream))
    }

    /// Waits for the end of a command, and returns its exit code as the error stream's status tells it.
    ///
    /// # Errors
    /// When it does not end within `limit`; the status itself when it tells of no exit code.
    pub fn exit_code(&self, limit: Duration) -> Result<Result<i32, String>, Error> {
        let status = self.finish("error", limit)?;
        Ok(exit_code(&String::from_utf8_lossy(&status)))
    }

    fn wait_until(
        &self,
        stream: &str,
        what: &str,
        limit: Duration,
        done: impl Fn(&Incoming) -> bool,
    ) -> Result<(), Error> {
        let id = self.id(stream);
        let deadline = Instant::now() + limit;
        let mut state = self.shared.lock();
        loop {
            if state.streams.get(&id).is_some_and(&done) {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.closed || left.is_zero() {
                return Err(self.silent(&state, what, limit));
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn silent(&self, state: &State, what: &str, limit: Duration) -> Error {
        let show = |(name, id): &(&str, u32)| {
            let bytes = state
                .streams
                .get(id)
                .map(|stream| stream.bytes.as_slice())
                .unwrap_or_default();
            format!("{name}: {:?}", crate::command::tail(bytes))
        };
        Error::Silent {
            url: self.url.clone(),
            what: what.to_owned(),
            limit,
            seen: self.ids.iter().map(show).collect::<Vec<_>>().join(", "),
        }
    }

    fn id(&self, stream: &str) -> u32 {
        let found = self.ids.iter().find(|(name, _)| *name == stream);
        found
            .map(|(_, id)| *id)
            .unwrap_or_else(|| panic!("no stream {stream:?} in {:?}", self.ids))
    }

    fn send(&mut self, frame: &[u8]) -> Result<(), Error> {
        self.socket.write_all(frame).map_err(|source| Error::Connection {
            url: self.url.clone(),
            source,
        })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Wakes the reader; fails only when the server hung up first.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }
}

/// The upgraded connection. Nothing follows the answer's headers before our first frame.
fn upgrade(url: &str, protocol: &str) -> Result<TcpStream, Error> {
    let rest = url.strip_prefix("http://").and_then(|rest| rest.split_once('/'));
    let (host, path) = rest.ok_or_else(|| Error::Address(url.to_owned()))?;
    let broken = |source| Error::Connection {
        url: url.to_owned(),
        source,
    };
    let mut socket = TcpStream::connect(host).map_err(broken)?;
    let request = format!(
        "POST /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\
         X-Stream-Protocol-Version: {protocol}\r\nContent-Length: 0\r\n\r\n"
    );
    socket.write_all(request.as_bytes()).map_err(broken)?;
    // One byte at a time: what follows the headers belongs to the frames.
    let mut lines = BufReader::with_capacity(1, &socket);
    let mut first = String::new();
    lines.read_line(&mut first).map_err(broken)?;
    if !first.starts_with("HTTP/1.1 101") {
        let answer = first.trim_end().to_owned();
        return Err(Error::Upgrade {
            url: url.to_owned(),
            answer,
        });
    }
    let mut line = String::new();
    while line != "\r\n" {
        line.clear();
        if lines.read_line(&mut line).map_err(broken)? == 0 {
            return Err(broken(io::ErrorKind::UnexpectedEof.into()));
        }
    }
    Ok(socket)
}

/// Reads frames until the connection ends.
fn receive(mut reader: TcpStream, mut writer: TcpStream, shared: &Shared) {
    while let Ok((head, body)) = frame(&mut reader) {
        let (kind, flags) = (u32::from_be_bytes([head[0], head[1], head[2], head[3]]), head[4]);
        let number = || body.first_chunk().map(|bytes| u32::from_be_bytes(*bytes));
        let (stream, bytes, ends) = match u16::try_from(kind & 0xffff) {
            _ if kind >> 31 == 0 => (Some(kind), body.as_slice(), flags & FIN != 0),
            Ok(PING) => {
                // A broken connection shows at the next read.
                let _ = writer.write_all(&[&head[..], &body].concat());
                continue;
            }
            Ok(RST_STREAM) => (number(), &[][..], true),
            Ok(GOAWAY) => break,
            // SYN_REPLY may end a stream; settings and windows are advice.
            _ => (number(), &[][..], flags & FIN != 0),
        };
        let mut state = shared.lock();
        if let Some(incoming) = stream.and_then(|id| state.streams.get_mut(&id)) {
            incoming.bytes.extend_from_slice(bytes);
            incoming.ended |= ends;
        }
        shared.changed.notify_all();
    }
    shared.lock().closed = true;
    shared.changed.notify_all();
}

/// One frame: its eight first bytes, and what follows.
fn frame(reader: &mut impl Read) -> io::Result<([u8; 8], Vec<u8>)> {
    let mut head = [0; 8];
    reader.read_exact(&mut head)?;
    let length = u32::from_be_bytes([0, head[5], head[6], head[7]]);
    let mut body = vec![0; length as usize];
    reader.read_exact(&mut body)?;
    Ok((head, body))
}

fn data(stream: u32, bytes: &[u8], flags: u8) -> Vec<u8> {
    [&stream.to_be_bytes()[..], &length(flags, bytes), bytes].concat()
}

fn syn_stream(stream: u32, headers: &[(&str, String)], first: bool) -> Vec<u8> {
    let mut body = stream.to_be_bytes().to_vec();
    // No associated stream, highest priority, no slot.
    body.extend([0; 6]);
    body.extend(header_block(headers, first));
    let kind = [CONTROL.to_be_bytes(), SYN_STREAM.to_be_bytes()].concat();
    [&kind[..], &length(0, &body), &body].concat()
}

/// Flags and a 24-bit length.
fn length(flags: u8, body: &[u8]) -> [u8; 4] {
    let [_, a, b, c] = u32::try_from(body.len()).unwrap_or(u32::MAX).to_be_bytes();
    [flags, a, b, c]
}

/// Names and values as a piece of the connection's one zlib stream: a stored block (RFC 1951, 3.2.4), and an empty one that
/// makes the reader hand out what it has. The stream's first piece begins with zlib's header, which names the dictionary
/// (RFC 1950: CMF 0x78, FLG with FDICT).
fn header_block(headers: &[(&str, String)], first: bool) -> Vec<u8> {
    let long = |text: &str| {
        let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
        [&length.to_be_bytes()[..], text.as_bytes()].concat()
    };
    let mut plain = u32::try_from(headers.len())
        .unwrap_or(u32::MAX)
        .to_be_bytes()
        .to_vec();
    for (name, value) in headers {
        plain.extend(long(name));
        plain.extend(long(value));
    }
    let mut block = Vec::new();
    if first {
        block.extend([0x78, 0x20]);
        block.extend(DICTIONARY.to_be_bytes());
    }
    for bytes in [plain.as_slice(), &[]] {
        let length = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
        block.push(0);
        block.extend(length.to_le_bytes());
        block.extend((!length).to_le_bytes());
        block.extend(bytes);
    }
    block
}

/// Kubernetes' `Status`: success, or a cause `ExitCode`; an empty stream is success of protocols before v4.
fn exit_code(status: &str) -> Result<i32, String> {
    let value: serde_json::Value = serde_json::from_str(status).map_err(|_| status.to_owned())?;
    if value["status"] == "Success" {
        return Ok(0);
    }
    let causes = value["details"]["causes"].as_array().cloned().unwrap_or_default();
    let code = causes.iter().find(|cause| cause["reason"] == "ExitCode");
    code.and_then(|cause| cause["message"].as_str()?.parse().ok())
        .ok_or_else(|| status.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_block_when_first_names_the_dictionary() {
        let block = header_block(&[("a", "b".to_owned())], true);
        let expected = [
            &[0x78, 0x20, 0xe3, 0xc6, 0xa7, 0xc2][..],
            &[0, 14, 0, 0xf1, 0xff],
            &[0, 0, 0, 1, 0, 0, 0, 1, b'a', 0, 0, 0, 1, b'b'],
            &[0, 0, 0, 0xff, 0xff],
        ];
        assert_eq!(block, expected.concat());
        // Its check bits: RFC 1950, 2.2.
        assert_eq!(0x7820 % 31, 0);
        assert_eq!(
            header_block(&[("a", "b".to_owned())], false),
            expected[1..].concat()
        );
    }

    #[test]
    fn frame_when_written_reads_back() {
        let written = data(7, b"hello", FIN);
        let (head, body) = frame(&mut written.as_slice()).unwrap();
        assert_eq!((&head[..4], head[4]), (&[0, 0, 0, 7][..], FIN));
        assert_eq!(body, b"hello");
    }

    #[test]
    fn exit_code_when_status_tells_one_is_it() {
        let failed = r#"{"status":"Failure","details":{"causes":[{"reason":"ExitCode","message":"7"}]}}"#;
        assert_eq!(exit_code(failed), Ok(7));
        assert_eq!(exit_code(r#"{"status":"Success"}"#), Ok(0));
        assert_eq!(
            exit_code("no such container"),
            Err("no such container".to_owned())
        );
    }
}
