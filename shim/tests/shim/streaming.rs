//! Streams over a real socket, frame by frame as containerd's client (Go's ttrpc) sends them. The tests read and write the
//! process' ends of pipes themselves, which blocks: the shim has threads of its own.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::api;
use containerd_shim_protos::shim_async::TaskClient;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::wrappers::{BytesValue, Int32Value, StringValue};
use runtime::containers::{Direction, ProcessStream, StreamHub};
use shim::forward::Publisher;
use shim::frames::{Frame, Frames, Kind, NO_DATA, REMOTE_CLOSED, REMOTE_OPEN};
use shim::run::serve;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::time::timeout;
use ttrpc::proto::Request;

use crate::fake::{Answer, FakeRuntime};

const PATIENCE: Duration = Duration::from_secs(120);
const SERVICE: &str = "containerd.services.streaming.v1.Streaming";
const INIT: &str = "containerd.services.streaming.v1.StreamInit";
const DATA: &str = "containerd.types.transfer.Data";
const WINDOW_UPDATE: &str = "containerd.types.transfer.WindowUpdate";

/// What the muxer gets is non-blocking; a test would rather wait.
fn blocking(fd: OwnedFd) -> File {
    rustix::fs::fcntl_setfl(&fd, rustix::fs::OFlags::empty()).unwrap();
    fd.into()
}

struct Served {
    _folder: tempfile::TempDir,
    socket: PathBuf,
    streams: Arc<StreamHub>,
}

impl Served {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let (_, events) = mpsc::unbounded_channel();
        let publisher = Publisher::spawn(events, "test", "");
        let runtime = FakeRuntime::new(|_| Ok(Answer::Pid(7)));
        let streams = Arc::<StreamHub>::default();
        let idle = PATIENCE * 10;
        tokio::spawn(serve(listener, runtime, streams.clone(), publisher, idle, || ()));
        Self {
            _folder: folder,
            socket,
            streams,
        }
    }

    fn open(&self, name: &str, direction: Direction) -> (ProcessStream, File) {
        let (stream, fd) = self.streams.open(name, direction).unwrap();
        (stream, blocking(fd))
    }

    async fn connect(&self) -> Peer {
        let (reader, writer) = UnixStream::connect(&self.socket).await.unwrap().into_split();
        Peer {
            frames: Frames::of(reader),
            writer,
        }
    }

    /// A connected stream.
    async fn stream(&self, name: &str) -> Peer {
        let mut peer = self.connect().await;
        peer.request("Stream").await;
        peer.init(name).await;
        assert_eq!(
            peer.message().await,
            Some(("google.protobuf.Empty".into(), vec![]))
        );
        peer
    }
}

/// containerd's side of one stream.
struct Peer {
    frames: Frames<OwnedReadHalf>,
    writer: OwnedWriteHalf,
}

impl Peer {
    async fn request(&mut self, method: &str) {
        let request = Request {
            service: SERVICE.into(),
            method: method.into(),
            ..Default::default()
        };
        self.send(Kind::Request, REMOTE_OPEN, request.write_to_bytes().unwrap())
            .await;
    }

    async fn init(&mut self, name: &str) {
        let init = StringValue {
            value: name.into(),
            ..Default::default()
        };
        self.any(INIT, &init).await;
    }

    /// All three messages have one field, with the number 1.
    async fn any(&mut self, kind: &str, message: &impl Message) {
        let any = Any {
            type_url: kind.into(),
            value: message.write_to_bytes().unwrap(),
            ..Default::default()
        };
        self.send(Kind::Data, 0, any.write_to_bytes().unwrap()).await;
    }

    async fn data(&mut self, bytes: &[u8]) {
        let data = BytesValue {
            value: bytes.to_vec(),
            ..Default::default()
        };
        self.any(DATA, &data).await;
    }

    async fn room(&mut self, value: i32) {
        let update = Int32Value {
            value,
            ..Default::default()
        };
        self.any(WINDOW_UPDATE, &update).await;
    }

    async fn close(&mut self) {
        self.send(Kind::Data, REMOTE_CLOSED | NO_DATA, vec![]).await;
    }

    async fn send(&mut self, kind: Kind, flags: u8, message: Vec<u8>) {
        let frame = Frame {
            kind,
            stream: 1,
            flags,
            message,
        };
        self.writer.write_all(&frame.encode().unwrap()).await.unwrap();
    }

    async fn frame(&mut self) -> Option<Frame> {
        timeout(PATIENCE, self.frames.next()).await.unwrap().unwrap()
    }

    /// The next message: type and value. `None` when the stream has been closed in order.
    async fn message(&mut self) -> Option<(String, Vec<u8>)> {
        let frame = self.frame().await.expect("the connection was closed");
        assert_eq!((frame.kind, frame.stream), (Kind::Data, 1), "{frame:?}");
        if frame.flags == REMOTE_CLOSED | NO_DATA {
            return None;
        }
        assert_eq!(frame.flags, 0);
        let any = Any::parse_from_bytes(&frame.message).unwrap();
        Some((any.type_url, any.value))
    }

    /// The next bytes of an output.
    async fn bytes(&mut self) -> Option<Vec<u8>> {
        let (kind, value) = self.message().await?;
        assert_eq!(kind, DATA);
        Some(BytesValue::parse_from_bytes(&value).unwrap().value)
    }

    /// How much more the shim has room for.
    async fn window(&mut self) -> i32 {
        let (kind, value) = self.message().await.expect("stdin was closed");
        assert_eq!(kind, WINDOW_UPDATE);
        Int32Value::parse_from_bytes(&value).unwrap().value
    }

    /// Exactly `count` bytes of output.
    async fn exactly(&mut self, count: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < count {
            all.extend(self.bytes().await.expect("the end comes too early"));
        }
        assert_eq!(all.len(), count);
        all
    }
}

/// Bytes that show a change of order.
fn pattern(count: usize) -> Vec<u8> {
    (0..count as u32 / 4).flat_map(u32::to_le_bytes).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn output_when_large_arrives_in_order_within_the_window_and_ends() {
    let served = Served::new();
    let mut peer = served.stream("c-stdout").await;
    let (process, mut guest) = served.open("c-stdout", Direction::Output);
    let expected = pattern(1 << 20);
    let output = expected.clone();
    let writing = tokio::task::spawn_blocking(move || guest.write_all(&output).unwrap());

    let mut all = Vec::new();
    while all.len() < expected.len() {
        peer.room(10_000).await;
        let wanted = 10_000.min(expected.len() - all.len());
        // Never a byte more: `exactly` would see it here or in the next round.
        all.extend(peer.exactly(wanted).await);
    }

    writing.await.unwrap();
    assert!(all == expected);
    assert_eq!(peer.bytes().await, None, "the end needs no window");
    timeout(PATIENCE, process.delivered()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn output_when_its_client_vanishes_waits_for_the_next() {
    let served = Served::new();
    let (process, mut guest) = served.open("c-stdout", Direction::Output);
    let mut peer = served.stream("c-stdout").await;
    guest.write_all(b"one").unwrap();
    peer.room(100).await;
    assert_eq!(peer.bytes().await.unwrap(), b"one");
    drop(peer);
    timeout(PATIENCE, process.delivered()).await.unwrap();

    // Nobody reads, and the process does not notice.
    guest.write_all(b"two").unwrap();
    drop(guest);
    let mut peer = served.stream("c-stdout").await;
    peer.room(100).await;
    assert_eq!(peer.bytes().await.unwrap(), b"two");
    assert_eq!(peer.bytes().await, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn output_when_its_client_closes_the_stream_is_closed_by_the_shim_too() {
    let served = Served::new();
    let (_process, mut guest) = served.open("c-stdout", Direction::Output);
    let mut peer = served.stream("c-stdout").await;
    peer.close().await;
    assert_eq!(peer.bytes().await, None);
    assert_eq!(peer.frame().await, None, "and then the connection");
    guest.write_all(b"still a reader").unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn client_when_another_takes_its_stream_over_is_sent_away() {
    let served = Served::new();
    let (_process, mut guest) = served.open("s", Direction::Output);
    let mut first = served.stream("s").await;
    let mut second = served.stream("s").await;
    assert_eq!(first.bytes().await, None);
    second.room(100).await;
    guest.write_all(b"words").unwrap();
    assert_eq!(second.bytes().await.unwrap(), b"words");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stdin_when_sent_arrives_in_order_and_ends() {
    let served = Served::new();
    let mut peer = served.stream("c-stdin").await;
    let (_process, mut guest) = served.open("c-stdin", Direction::Input);
    let reading = tokio::task::spawn_blocking(move || {
        let mut all = Vec::new();
        guest.read_to_end(&mut all).unwrap();
        all
    });

    let expected = pattern(1 << 20);
    let mut room = 0;
    for chunk in expected.chunks(8 << 10) {
        while room < chunk.len() {
            room += usize::try_from(peer.window().await).unwrap();
        }
        room -= chunk.len();
        peer.data(chunk).await;
    }
    peer.close().await;

    assert!(timeout(PATIENCE, reading).await.unwrap().unwrap() == expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stdin_when_the_process_is_gone_is_closed() {
    let served = Served::new();
    let (process, guest) = served.open("c-stdin", Direction::Input);
    let mut peer = served.stream("c-stdin").await;
    assert!(peer.window().await > 0);
    drop((guest, process));
    assert_eq!(peer.message().await, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stdin_when_its_client_vanishes_stays_open_until_close_io() {
    let served = Served::new();
    let (process, mut guest) = served.open("c-stdin", Direction::Input);
    let mut peer = served.stream("c-stdin").await;
    peer.window().await;
    peer.data(b"one ").await;
    let mut words = [0; 4];
    guest.read_exact(&mut words).unwrap();
    drop(peer);
    let mut peer = served.stream("c-stdin").await;
    peer.window().await;
    peer.data(b"two").await;
    guest.read_exact(&mut words[..3]).unwrap();
    assert_eq!(&words[..3], b"two");

    process.close();
    drop(peer);
    let rest = tokio::task::spawn_blocking(move || {
        let mut rest = Vec::new();
        guest.read_to_end(&mut rest).unwrap();
        rest
    });
    assert_eq!(timeout(PATIENCE, rest).await.unwrap().unwrap(), b"");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stream_when_asked_for_wrongly_is_refused() {
    let served = Served::new();
    let mut peer = served.connect().await;
    peer.request("Other").await;
    let refused = peer.frame().await.unwrap();
    assert_eq!(refused.kind, Kind::Response);
    let response = ttrpc::Response::parse_from_bytes(&refused.message).unwrap();
    assert_eq!(response.status.code(), ttrpc::Code::UNIMPLEMENTED);

    let mut peer = served.connect().await;
    peer.request("Stream").await;
    peer.data(b"not an init").await;
    let refused = peer.frame().await.unwrap();
    let response = ttrpc::Response::parse_from_bytes(&refused.message).unwrap();
    assert_eq!(response.status.code(), ttrpc::Code::INVALID_ARGUMENT);
    assert!(
        response.status.message().contains("StreamInit"),
        "{}",
        response.status.message()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn service_when_its_request_comes_in_pieces_is_ttrpcs() {
    let served = Served::new();
    // Connections that say nothing, or go before they do, are in nobody's way.
    let _silent = served.connect().await;
    drop(served.connect().await);
    let client = ttrpc::asynchronous::Client::connect(&format!("unix://{}", served.socket.display()))
        .await
        .unwrap();
    let start = api::StartRequest {
        id: "c".into(),
        ..Default::default()
    };
    let context = || ttrpc::context::with_duration(PATIENCE);
    let task = TaskClient::new(client);
    assert_eq!(task.start(context(), &start).await.unwrap().pid, 7);

    let request = Request {
        service: "containerd.task.v3.Task".into(),
        method: "Start".into(),
        payload: start.write_to_bytes().unwrap(),
        ..Default::default()
    };
    let bytes = Frame {
        kind: Kind::Request,
        stream: 1,
        flags: 0,
        message: request.write_to_bytes().unwrap(),
    };
    let mut peer = served.connect().await;
    for byte in bytes.encode().unwrap() {
        peer.writer.write_all(&[byte]).await.unwrap();
        peer.writer.flush().await.unwrap();
    }
    let response = ttrpc::Response::parse_from_bytes(&peer.frame().await.unwrap().message).unwrap();
    let response = api::StartResponse::parse_from_bytes(&response.payload).unwrap();
    assert_eq!(response.pid, 7);
}
