//! containerd's streaming service, `containerd.services.streaming.v1.Streaming/Stream`: the stdio of a process over the shim's
//! socket, for `io_type = "streaming"`.
//!
//! containerd connects once for each stream and opens it by its name (`StreamInit`). An empty message answers. Then, in
//! messages of type `google.protobuf.Any`:
//! - output: the client says how many bytes it has room for (`WindowUpdate`, they add up), the shim sends no more than that
//!   (`Data`), and closes the stream after the last byte;
//! - stdin: the same with exchanged roles. The client closes the stream to end it.
//!
//! ttrpc's crate cannot serve this: it hands each data frame to a task of its own, so that two of them may change places, and
//! takes the client's opening request for a first, empty message. So the frames are read and written here ([`crate::frames`]).
//! The stream itself, which outlives its clients, is the runtime's [`StreamHub`].

use std::io;
use std::sync::Arc;

use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use runtime::containers::{Client, Direction, Lease, StreamHub};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use ttrpc::Code;

use crate::frames::{Frame, Frames, Kind, NO_DATA, REMOTE_CLOSED};

include!(concat!(env!("OUT_DIR"), "/wire_streaming.rs"));

const SERVICE: &str = "containerd.services.streaming.v1.Streaming";
const METHOD: &str = "Stream";

const INIT: &str = "containerd.services.streaming.v1.StreamInit";
const DATA: &str = "containerd.types.transfer.Data";
const WINDOW_UPDATE: &str = "containerd.types.transfer.WindowUpdate";
const EMPTY: &str = "google.protobuf.Empty";

/// Most bytes in one message, as containerd sends them.
const MAX_DATA: usize = 32 << 10;
/// How much stdin a client may send before it is told to go on.
const WINDOW: i64 = 2 * (MAX_DATA as i64);

/// A request for a stream, the first frame of its connection.
#[derive(Debug)]
pub struct StreamRequest {
    stream: u32,
    method: String,
}

impl StreamRequest {
    /// What `frame` asks of this service; `None` when it asks something else.
    pub fn of(frame: &Frame) -> Option<Self> {
        let request = (frame.kind == Kind::Request)
            .then(|| ttrpc::Request::parse_from_bytes(&frame.message).ok())
            .flatten()
            .filter(|request| request.service == SERVICE)?;
        Some(Self {
            stream: frame.stream,
            method: request.method,
        })
    }
}

/// Serves the stream that `request` has opened on `connection`, until either side ends it or the client is gone.
///
/// # Errors
/// Of the connection: the client is gone, or does not keep to the protocol.
pub async fn serve<C: AsyncRead + AsyncWrite>(
    connection: C,
    request: StreamRequest,
    streams: Arc<StreamHub>,
) -> io::Result<()> {
    let (reader, writer) = tokio::io::split(connection);
    let mut wire = Wire {
        frames: Frames::of(reader),
        writer,
        stream: request.stream,
    };
    if request.method != METHOD {
        let message = format!("method {SERVICE}/{}", request.method);
        return wire.refuse(Code::UNIMPLEMENTED, message).await;
    }
    let Some(init) = wire.next().await? else {
        return Ok(());
    };
    let name = match init.message {
        Some((kind, value)) if kind == INIT => streaming::StreamInit::parse_from_bytes(&value)?.id,
        _ => String::new(),
    };
    if name.is_empty() {
        let message = format!("the first message of a stream must be a {INIT} with an id");
        return wire.refuse(Code::INVALID_ARGUMENT, message).await;
    }
    let client = streams.connect(&name);
    wire.send(EMPTY, &[]).await?;
    tracing::debug!(stream = name, "client connected");
    let mut room = 0;
    let Some(lease) = wire.wait_for_process(&client, &mut room).await? else {
        return wire.close().await;
    };
    match lease.direction() {
        Direction::Output => wire.carry_output(&client, lease, room).await,
        Direction::Input => wire.carry_input(&client, lease).await,
    }
}

/// A message from the client.
struct Received {
    /// Its type and value, if it is not only an end.
    message: Option<(String, Vec<u8>)>,
    /// The client sends nothing more.
    last: bool,
}

/// The one stream of a connection.
struct Wire<C> {
    frames: Frames<ReadHalf<C>>,
    writer: WriteHalf<C>,
    stream: u32,
}

impl<C: AsyncRead + AsyncWrite> Wire<C> {
    /// The next message; `None` when the client has closed the connection. It may be given up.
    async fn next(&mut self) -> io::Result<Option<Received>> {
        loop {
            let Some(frame) = self.frames.next().await? else {
                return Ok(None);
            };
            if frame.kind != Kind::Data || frame.stream != self.stream {
                // A client of containerd's has a connection for each of its streams.
                tracing::debug!(kind = ?frame.kind, stream = frame.stream, "frame of no stream ignored");
                continue;
            }
            let last = frame.is_last();
            let message = if frame.has_message() {
                let any = Any::parse_from_bytes(&frame.message)?;
                let kind = any.type_url.rsplit('/').next().unwrap_or_default();
                Some((kind.to_owned(), any.value))
            } else {
                None
            };
            return Ok(Some(Received { message, last }));
        }
    }

    async fn send(&mut self, kind: &str, value: &[u8]) -> io::Result<()> {
        let any = Any {
            type_url: kind.to_owned(),
            value: value.to_vec(),
            ..Default::default()
        };
        self.write(Kind::Data, 0, any.write_to_bytes()?).await
    }

    /// Ends the stream, in order.
    async fn close(&mut self) -> io::Result<()> {
        self.write(Kind::Data, REMOTE_CLOSED | NO_DATA, Vec::new()).await
    }

    /// Ends the stream with an error.
    async fn refuse(&mut self, code: Code, message: String) -> io::Result<()> {
        tracing::warn!("stream refused: {message}");
        let response = ttrpc::Response {
            status: MessageField::some(ttrpc::get_status(code, message)),
            ..Default::default()
        };
        self.write(Kind::Response, 0, response.write_to_bytes()?).await
    }

    async fn write(&mut self, kind: Kind, flags: u8, message: Vec<u8>) -> io::Result<()> {
        let stream = self.stream;
        let frame = Frame {
            kind,
            stream,
            flags,
            message,
        };
        self.writer.write_all(&frame.encode()?).await?;
        self.writer.flush().await
    }

    /// Waits until a process has the stream; `None` when that is not to be. Meanwhile the client of an output says how much
    /// `room` it has.
    async fn wait_for_process(&mut self, client: &Client, room: &mut i64) -> io::Result<Option<Lease>> {
        loop {
            tokio::select! {
                biased;
                received = self.next() => {
                    let Some(received) = received? else { return Err(gone()) };
                    add_room(room, &received)?;
                    if received.last {
                        return Ok(None);
                    }
                }
                lease = client.lease() => return Ok(lease),
            }
        }
    }

    /// Sends what the process writes, as far as there is room, up to its end.
    async fn carry_output(&mut self, client: &Client, mut lease: Lease, mut room: i64) -> io::Result<()> {
        loop {
            let limit = usize::try_from(room).unwrap_or_default().min(MAX_DATA);
            let readable = limit > 0 || !lease.has_unsent();
            let chunk = tokio::select! {
                biased;
                () = client.over() => return self.close().await,
                received = self.next() => {
                    let Some(received) = received? else { return Err(gone()) };
                    add_room(&mut room, &received)?;
                    if received.last {
                        // It wants no more. The process does not hear of that, as with a FIFO.
                        return self.close().await;
                    }
                    continue;
                }
                chunk = lease.next(limit), if readable => chunk?.map(<[u8]>::to_vec),
            };
            let Some(bytes) = chunk else {
                self.close().await?;
                lease.finish();
                return Ok(());
            };
            if bytes.is_empty() {
                // There is something, and no room for it.
                continue;
            }
            let count = bytes.len();
            let data = streaming::Data {
                data: bytes,
                ..Default::default()
            };
            let data = data.write_to_bytes()?;
            tokio::select! {
                biased;
                // A client that does not read must not keep the next one from it.
                () = client.over() => return Ok(()),
                sent = self.send(DATA, &data) => sent?,
            }
            lease.sent(count);
            room = room.saturating_sub_unsigned(count as u64);
        }
    }

    /// Takes what the client sends to the process, up to its end.
    async fn carry_input(&mut self, client: &Client, mut lease: Lease) -> io::Result<()> {
        // How much the client may still send.
        let mut window = 0;
        // What an earlier client has sent comes first.
        let mut last = false;
        loop {
            tokio::select! {
                biased;
                () = client.over() => return self.close().await,
                flushed = lease.flush() => if let Err(error) = flushed {
                    tracing::debug!(%error, "stdin is not read any more");
                    lease.finish();
                    return self.close().await;
                }
            }
            if last {
                lease.finish();
                return self.close().await;
            }
            if window <= WINDOW / 2 {
                let update = streaming::WindowUpdate {
                    update: i32::try_from(WINDOW - window).unwrap_or(i32::MAX),
                    ..Default::default()
                };
                self.send(WINDOW_UPDATE, &update.write_to_bytes()?).await?;
                window = WINDOW;
            }
            let received = tokio::select! {
                biased;
                () = client.over() => return self.close().await,
                received = self.next() => received?,
            };
            let Some(received) = received else {
                return Err(gone());
            };
            last = received.last;
            if let Some((kind, value)) = received.message {
                if kind != DATA {
                    return Err(unexpected(&kind));
                }
                let data = streaming::Data::parse_from_bytes(&value)?.data;
                // A client that sends more than it may is read no faster than the process reads.
                window = window.saturating_sub_unsigned(data.len() as u64).max(0);
                lease.received(&data);
            }
        }
    }
}

/// Notes how much more the client of an output has room for.
fn add_room(room: &mut i64, received: &Received) -> io::Result<()> {
    let Some((kind, value)) = &received.message else {
        return Ok(());
    };
    if kind != WINDOW_UPDATE {
        return Err(unexpected(kind));
    }
    let update = streaming::WindowUpdate::parse_from_bytes(value)?.update;
    *room = room.saturating_add(update.max(0).into());
    Ok(())
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, "the client is gone")
}

fn unexpected(kind: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("unexpected message of type {kind:?}"),
    )
}
