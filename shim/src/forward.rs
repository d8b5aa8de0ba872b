//! Events on their way to containerd: in order, one at a time, and patiently.
//!
//! containerd may restart at any moment and a lost exit event leaves a pod terminating for ever. So an event is sent
//! until containerd answers, and the following ones queue behind it. A full queue drops its oldest event, but never an
//! exit: of those there is one per process, and others, such as kills for memory, come as often as a guest likes. A
//! containerd that dies in the middle of a call may have seen the event; it is sent again, because the restarted one has
//! not.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::EventsClient;
use protobuf::MessageField;
use runtime::types::Event;
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use ttrpc::Code;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context;

use crate::events;

/// Most events that wait, unless more of them are exits; some 200 bytes each.
const QUEUE: usize = 1024;

/// What is never dropped.
const EXIT: &str = "/tasks/exit";

/// How long containerd may take over one event.
const CALL_PATIENCE: Duration = Duration::from_secs(5);

/// First and longest pause between attempts.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// How often an event is sent that containerd answers with an error which may pass.
const MAX_REFUSALS: u32 = 5;

/// The task that publishes.
#[derive(Debug)]
pub struct Publisher {
    task: JoinHandle<()>,
    stop: Arc<Notify>,
}

impl Publisher {
    /// Publishes what comes out of `events` to containerd's ttrpc endpoint at `address`. An empty address only logs the
    /// events: CRI-O has no such endpoint.
    pub fn spawn(events: mpsc::UnboundedReceiver<Event>, namespace: &str, address: &str) -> Self {
        let stop = Arc::new(Notify::new());
        let queue = Queue {
            events,
            namespace: namespace.to_owned(),
            waiting: VecDeque::new(),
            dropped: 0,
        };
        let path = address.strip_prefix("unix://").unwrap_or(address).to_owned();
        let task = tokio::spawn(run(queue, path, Arc::clone(&stop)));
        Self { task, stop }
    }

    /// Publishes what has been sent so far, then ends; gives up after `patience`.
    pub async fn flush(mut self, patience: Duration) {
        self.stop.notify_one();
        if timeout(patience, &mut self.task).await.is_err() {
            tracing::error!(
                seconds = patience.as_secs(),
                "containerd takes no events, the last ones are lost"
            );
            self.task.abort();
        }
    }
}

async fn run(mut queue: Queue, path: String, stop: Arc<Notify>) {
    let mut containerd = Containerd { path, client: None };
    while let Some(envelope) = queue.next(&stop).await {
        if containerd.path.is_empty() {
            tracing::info!(topic = %envelope.topic, event = ?envelope.event.type_url, "event");
            continue;
        }
        let delivery = containerd.deliver(envelope);
        tokio::pin!(delivery);
        loop {
            tokio::select! {
                () = &mut delivery => break,
                // Taken off the channel while the delivery waits, so that the bound below holds.
                () = queue.take_in(&stop), if !queue.has_ended() => {}
            }
        }
    }
}

struct Queue {
    events: mpsc::UnboundedReceiver<Event>,
    namespace: String,
    waiting: VecDeque<Envelope>,
    dropped: u64,
}

impl Queue {
    /// The oldest event; `None` when no more can come.
    async fn next(&mut self, stop: &Notify) -> Option<Envelope> {
        loop {
            if let Some(envelope) = self.waiting.pop_front() {
                return Some(envelope);
            }
            if self.has_ended() {
                return None;
            }
            self.take_in(stop).await;
        }
    }

    /// Nothing more can come out of the channel.
    fn has_ended(&self) -> bool {
        self.events.is_closed() && self.events.is_empty()
    }

    /// Waits for one event, for the order to stop, or for the end of the channel.
    async fn take_in(&mut self, stop: &Notify) {
        tokio::select! {
            biased;
            () = stop.notified() => self.events.close(),
            event = self.events.recv() => if let Some(event) = event {
                self.push(&event);
            },
        }
    }

    fn push(&mut self, event: &Event) {
        match events::envelope(&self.namespace, event, SystemTime::now()) {
            Ok(envelope) => self.waiting.push_back(envelope),
            Err(error) => tracing::error!(?event, %error, "event does not encode"),
        }
        if self.waiting.len() <= QUEUE {
            return;
        }
        let oldest = self.waiting.iter().position(|envelope| envelope.topic != EXIT);
        if let Some(oldest) = oldest.and_then(|oldest| self.waiting.remove(oldest)) {
            self.dropped += 1;
            if self.dropped.is_power_of_two() {
                tracing::error!(topic = %oldest.topic, dropped = self.dropped, "event queue is full, oldest event dropped");
            }
        }
    }
}

struct Containerd {
    path: String,
    client: Option<EventsClient>,
}

/// Why an attempt did not succeed.
enum Failure {
    /// containerd is not there or did not answer: it may be restarting.
    Away(String),
    /// containerd answered with an error that may pass.
    Refused(String),
    /// containerd will never take this event.
    Invalid(String),
}

impl Containerd {
    /// Returns once containerd has the event, or will never take it.
    async fn deliver(&mut self, envelope: Envelope) {
        let topic = envelope.topic.clone();
        let request = ForwardRequest {
            envelope: MessageField::some(envelope),
            ..Default::default()
        };
        let mut pause = PAUSES.0;
        let mut refusals = 0;
        let mut away = false;
        loop {
            match self.attempt(&request).await {
                Ok(()) => {
                    tracing::debug!(topic, away, "event published");
                    return;
                }
                Err(Failure::Away(error)) => {
                    self.client = None;
                    if !away {
                        tracing::warn!(topic, error, "containerd is away, event waits");
                    }
                    away = true;
                }
                Err(Failure::Refused(error)) if refusals < MAX_REFUSALS => {
                    tracing::warn!(topic, error, "containerd refuses event, trying again");
                    refusals += 1;
                }
                Err(Failure::Refused(error) | Failure::Invalid(error)) => {
                    tracing::error!(topic, error, "event dropped");
                    return;
                }
            }
            sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    async fn attempt(&mut self, request: &ForwardRequest) -> Result<(), Failure> {
        let client = match &self.client {
            Some(client) => client,
            None => {
                let stream = timeout(CALL_PATIENCE, UnixStream::connect(&self.path)).await;
                let stream = match stream {
                    Ok(Ok(stream)) => stream,
                    Ok(Err(error)) => return Err(Failure::Away(format!("{}: {error}", self.path))),
                    Err(_) => return Err(Failure::Away(format!("{}: connecting takes too long", self.path))),
                };
                self.client
                    .insert(EventsClient::new(Client::new(Socket::from(stream))))
            }
        };
        match client
            .forward(context::with_duration(CALL_PATIENCE), request)
            .await
        {
            Ok(_) => Ok(()),
            Err(ttrpc::Error::RpcStatus(status)) => {
                let text = format!("{:?}: {}", status.code(), status.message());
                Err(match status.code() {
                    Code::DEADLINE_EXCEEDED | Code::UNAVAILABLE => Failure::Away(text),
                    Code::INVALID_ARGUMENT | Code::UNIMPLEMENTED | Code::PERMISSION_DENIED => {
                        Failure::Invalid(text)
                    }
                    _ => Failure::Refused(text),
                })
            }
            Err(error) => Err(Failure::Away(error.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use runtime::types::{ContainerProcess, ProcessExit};

    use super::*;

    #[test]
    fn queue_when_full_keeps_exits_and_drops_the_oldest_of_the_rest() {
        let (_sender, events) = mpsc::unbounded_channel();
        let mut queue = Queue {
            events,
            namespace: "ns".to_owned(),
            waiting: VecDeque::new(),
            dropped: 0,
        };
        let exit = Event::TaskExit {
            process: ContainerProcess::default(),
            pid: 1,
            exit: ProcessExit {
                status: 1,
                at: SystemTime::UNIX_EPOCH,
            },
        };
        let oom = Event::TaskOom {
            container_id: "hog".to_owned(),
        };

        queue.push(&exit);
        (0..2 * QUEUE).for_each(|_| queue.push(&oom));
        queue.push(&exit);

        assert_eq!(queue.waiting.len(), QUEUE);
        let exits = queue
            .waiting
            .iter()
            .filter(|envelope| envelope.topic == EXIT)
            .count();
        assert_eq!((exits, queue.waiting[0].topic.as_str()), (2, EXIT));
        (0..2 * QUEUE).for_each(|_| queue.push(&exit));
        assert!(queue.waiting.iter().all(|envelope| envelope.topic == EXIT));
        assert_eq!(queue.waiting.len(), 2 + 2 * QUEUE);
    }
}
