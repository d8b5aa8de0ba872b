//! The request queue, served on a thread of its own: memslots and freed memory take milliseconds.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_queue::DescriptorChain;

use super::handle::Shared;
use super::region::{Request, Response};
use crate::devices::virtio::Interrupt;
use crate::devices::virtio::chain::Chain;
use crate::devices::virtio::queue_thread::ThreadWorker;
use crate::devices::virtio::served_queue::ServedQueue;
use crate::devices::virtio::state::QueuePosition;
use crate::memory::GuestMemory;

/// Requests per turn.
const BUDGET: usize = 4;
/// `struct virtio_mem_req`: le16 type, 6 bytes of padding, le64 address, le16 number of blocks, 6 bytes of padding.
const REQUEST_BYTES: usize = 24;
/// `struct virtio_mem_resp`: le16 type, 6 bytes of padding, le16 state.
const RESPONSE_BYTES: usize = 10;

/// What the device counts.
#[derive(Debug, Default)]
pub(super) struct Counters {
    acknowledged: AtomicU64,
    refused: AtomicU64,
    invalid: AtomicU64,
}

impl Counters {
    /// All counters by name.
    pub(super) fn all(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("requests_acknowledged", self.acknowledged.load(Ordering::Relaxed)),
            ("requests_refused", self.refused.load(Ordering::Relaxed)),
            ("requests_invalid", self.invalid.load(Ordering::Relaxed)),
        ]
    }
}

/// Carries out the driver's requests.
#[derive(Debug)]
pub(super) struct MemWorker {
    queue: ServedQueue,
    interrupt: Interrupt,
    shared: Arc<Shared>,
    counters: Arc<Counters>,
}

impl MemWorker {
    pub(super) fn new(
        queue: ServedQueue,
        interrupt: Interrupt,
        shared: Arc<Shared>,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            queue,
            interrupt,
            shared,
            counters,
        }
    }

    /// Where the queue stands.
    pub(super) fn position(&self) -> QueuePosition {
        self.queue.position()
    }
}

impl ThreadWorker for MemWorker {
    fn watched(&self) -> Vec<RawFd> {
        vec![self.queue.kick().as_raw_fd()]
    }

    fn ready(&mut self, _index: usize) {
        self.queue.take_kick();
        self.queue.suppress_kicks();
        let memory = self.queue.memory().clone();
        for _ in 0..BUDGET {
            let Some(chain) = self.queue.pop(&memory) else {
                if self.queue.enable_kicks() {
                    self.queue.suppress_kicks();
                    continue;
                }
                self.queue.notify();
                return;
            };
            let head = chain.head_index();
            let written = answer(&self.shared, &self.counters, &memory, chain, self.queue.size());
            // plugged_size changes with the request, without an interrupt (5.15.6.1).
            self.interrupt
                .show_config(|space| self.shared.read_config(0, space));
            match written {
                Some(written) => self.queue.complete(head, written),
                None => {
                    self.queue.put_back(1);
                    break;
                }
            }
        }
        self.queue.notify();
        self.queue.kick_self();
    }
}

/// Carries out one chain; returns the bytes written, or `None` if it has to be taken again for the rest. A chain without room
/// for the response is not carried out.
fn answer(
    shared: &Shared,
    counters: &Counters,
    memory: &GuestMemory,
    chain: DescriptorChain<&GuestMemory>,
    limit: u16,
) -> Option<u32> {
    let chain = match Chain::parse(memory, chain, limit) {
        Ok(chain) if chain.writable.len() >= RESPONSE_BYTES as u64 => chain,
        Ok(_) => {
            counters.invalid.fetch_add(1, Ordering::Relaxed);
            return Some(0);
        }
        Err(error) => {
            guest_log!(DEBUG, %error, "mem: chain dropped");
            counters.invalid.fetch_add(1, Ordering::Relaxed);
            return Some(0);
        }
    };
    let mut bytes = [0; REQUEST_BYTES];
    let read = chain.readable.read(memory, 0, &mut bytes);
    let request = read.ok().and_then(|()| decode(bytes));
    let response = match request {
        Some(request) => shared.update(|state| {
            let region = state.region.as_mut();
            region.map_or(Some(Response::Error), |region| region.handle(request))
        })?,
        None => Response::Error,
    };
    guest_log!(DEBUG, ?request, ?response, "mem");
    let counter = match response {
        Response::Ack | Response::State(_) => &counters.acknowledged,
        Response::Nack | Response::Busy => &counters.refused,
        Response::Error => &counters.invalid,
    };
    counter.fetch_add(1, Ordering::Relaxed);
    match chain.writable.write(memory, 0, &encode(response)) {
        Ok(()) => Some(RESPONSE_BYTES as u32),
        Err(_) => Some(0),
    }
}

fn decode(bytes: [u8; REQUEST_BYTES]) -> Option<Request> {
    let [t0, t1, _, _, _, _, _, _, rest @ ..] = bytes;
    let [a0, a1, a2, a3, a4, a5, a6, a7, n0, n1, ..] = rest;
    let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
    let count = u16::from_le_bytes([n0, n1]);
    match u16::from_le_bytes([t0, t1]) {
        0 => Some(Request::Plug(address, count)),
        1 => Some(Request::Unplug(address, count)),
        2 => Some(Request::UnplugAll),
        3 => Some(Request::State(address, count)),
        _ => None,
    }
}

fn encode(response: Response) -> [u8; RESPONSE_BYTES] {
    let (kind, state) = match response {
        Response::Ack => (0, 0),
        Response::State(state) => (0, state as u8),
        Response::Nack => (1, 0),
        Response::Busy => (2, 0),
        Response::Error => (3, 0),
    };
    [kind, 0, 0, 0, 0, 0, 0, 0, state, 0]
}
