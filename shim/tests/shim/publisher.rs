//! The publisher against a containerd that is slow, refuses, restarts or is not there.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use containerd_shim_protos::api::Empty;
use containerd_shim_protos::events::task::TaskOOM;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Events, create_events};
use protobuf::Message;
use runtime::types::Event;
use shim::forward::Publisher;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::time::{sleep, timeout};
use ttrpc::Code;
use ttrpc::asynchronous::{Server, TtrpcContext};

const PATIENCE: Duration = Duration::from_secs(120);

/// containerd's events service: remembers the container ids of the events it got.
#[derive(Clone, Default)]
struct Containerd {
    got: Arc<Mutex<Vec<String>>>,
    /// Codes to answer with first.
    refusals: Arc<Mutex<VecDeque<Code>>>,
    delay: Duration,
}

#[async_trait]
impl Events for Containerd {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        sleep(self.delay).await;
        if let Some(code) = self.refusals.lock().unwrap().pop_front() {
            return Err(ttrpc::Error::RpcStatus(ttrpc::get_status(code, "no")));
        }
        let envelope = request.envelope.unwrap();
        assert_eq!(
            (envelope.namespace.as_str(), envelope.topic.as_str()),
            ("ns", "/tasks/oom")
        );
        assert!(envelope.timestamp.seconds > 1_700_000_000);
        let event = TaskOOM::parse_from_bytes(&envelope.event.value).unwrap();
        self.got.lock().unwrap().push(event.container_id);
        Ok(Empty::new())
    }
}

impl Containerd {
    async fn listen(&self, socket: &Path) -> Server {
        let service: Arc<dyn Events + Send + Sync> = Arc::new(self.clone());
        let mut server = Server::new()
            .bind(&format!("unix://{}", socket.display()))
            .unwrap()
            .register_service(create_events(service));
        server.start().await.unwrap();
        server
    }

    fn got(&self) -> Vec<String> {
        self.got.lock().unwrap().clone()
    }

    async fn has(&self, count: usize) {
        let wait = async {
            while self.got().len() < count {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, wait).await.unwrap();
    }
}

struct Shim {
    folder: tempfile::TempDir,
    events: UnboundedSender<Event>,
    publisher: Publisher,
}

impl Shim {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (events, receiver) = unbounded_channel();
        let publisher = Publisher::spawn(receiver, "ns", folder.path().join("ttrpc").to_str().unwrap());
        Self {
            folder,
            events,
            publisher,
        }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("ttrpc")
    }

    fn send(&self, numbers: std::ops::Range<usize>) {
        for number in numbers {
            self.events
                .send(Event::TaskOom {
                    container_id: number.to_string(),
                })
                .unwrap();
        }
    }
}

fn numbers(range: std::ops::Range<usize>) -> Vec<String> {
    range.map(|number| number.to_string()).collect()
}

#[tokio::test]
async fn events_when_flushed_have_arrived_in_order() {
    let shim = Shim::new();
    let containerd = Containerd {
        delay: Duration::from_millis(1),
        ..Default::default()
    };
    let _server = containerd.listen(&shim.socket()).await;

    shim.send(0..200);
    shim.publisher.flush(PATIENCE).await;

    assert_eq!(containerd.got(), numbers(0..200));
}

#[tokio::test]
async fn events_when_containerd_restarts_arrive_once_and_in_order() {
    let shim = Shim::new();
    let containerd = Containerd::default();
    let mut server = containerd.listen(&shim.socket()).await;
    shim.send(0..10);
    containerd.has(10).await;

    server.shutdown().await.unwrap();
    drop(server);
    std::fs::remove_file(shim.socket()).unwrap();
    shim.send(10..50);
    sleep(Duration::from_millis(300)).await;
    assert_eq!(containerd.got().len(), 10);
    let _server = containerd.listen(&shim.socket()).await;
    shim.send(50..60);
    shim.publisher.flush(PATIENCE).await;

    assert_eq!(containerd.got(), numbers(0..60));
}

#[tokio::test]
async fn events_when_containerd_does_not_listen_yet_are_kept() {
    let shim = Shim::new();
    shim.send(0..5);
    sleep(Duration::from_millis(200)).await;
    let containerd = Containerd::default();

    let _server = containerd.listen(&shim.socket()).await;
    shim.publisher.flush(PATIENCE).await;

    assert_eq!(containerd.got(), numbers(0..5));
}

#[tokio::test]
async fn event_when_refused_for_a_while_is_tried_again() {
    let shim = Shim::new();
    let containerd = Containerd::default();
    *containerd.refusals.lock().unwrap() = [Code::INTERNAL, Code::INTERNAL].into();
    let _server = containerd.listen(&shim.socket()).await;
    shim.send(0..2);
    containerd.has(2).await;

    *containerd.refusals.lock().unwrap() = [Code::INVALID_ARGUMENT].into();
    shim.send(2..4);
    shim.publisher.flush(PATIENCE).await;

    assert_eq!(containerd.got(), ["0", "1", "3"]);
}

#[tokio::test]
async fn event_when_always_refused_does_not_hold_others_up() {
    let shim = Shim::new();
    let containerd = Containerd::default();
    *containerd.refusals.lock().unwrap() = vec![Code::UNKNOWN; 6].into();
    let _server = containerd.listen(&shim.socket()).await;

    shim.send(0..2);
    shim.publisher.flush(PATIENCE).await;

    assert_eq!(containerd.got(), ["1"]);
}

#[tokio::test]
async fn queue_when_full_keeps_the_newest() {
    let shim = Shim::new();
    shim.send(0..1500);
    sleep(Duration::from_millis(300)).await;
    let containerd = Containerd::default();

    let _server = containerd.listen(&shim.socket()).await;
    shim.publisher.flush(PATIENCE).await;

    // The first one was already on its way when the queue behind it filled up.
    let mut expected = numbers(1500 - 1024..1500);
    expected.insert(0, "0".to_owned());
    assert_eq!(containerd.got(), expected);
}

#[tokio::test]
async fn flush_gives_up_when_containerd_is_not_there() {
    let shim = Shim::new();
    shim.send(0..1);
    let start = Instant::now();

    shim.publisher.flush(Duration::from_millis(200)).await;

    assert!(start.elapsed() < PATIENCE);
}

#[tokio::test]
async fn events_when_there_is_no_address_are_only_logged() {
    let (events, receiver) = unbounded_channel();
    let publisher = Publisher::spawn(receiver, "ns", "");
    events
        .send(Event::TaskOom {
            container_id: "c".into(),
        })
        .unwrap();

    timeout(PATIENCE, publisher.flush(PATIENCE * 2)).await.unwrap();
}

#[tokio::test]
async fn publisher_when_its_source_ends_ends() {
    let Shim {
        folder,
        events,
        publisher,
    } = Shim::new();
    let containerd = Containerd::default();
    let _server = containerd.listen(&folder.path().join("ttrpc")).await;
    events
        .send(Event::TaskOom {
            container_id: "0".into(),
        })
        .unwrap();
    containerd.has(1).await;

    // The publisher is waiting for the next event now.
    drop(events);

    timeout(PATIENCE, publisher.flush(PATIENCE * 2)).await.unwrap();
}
