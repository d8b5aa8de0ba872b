//! The request queue, served on a thread of its own: memslots and freed memory take milliseconds.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use virtio_queue::DescriptorChain;

use super::handle::Shared;
use super::region::{Request, Response};
use crate::devices::virtio::Interrupt;
use crate::devices::virtio::counter::counters;
use crate::devices::virtio::queue::chain::Chain;
use crate::devices::virtio::queue::served_queue::{Answer, ServedQueue};
use crate::devices::virtio::state::QueuePosition;
use crate::devices::virtio::worker::queue_thread::ThreadWorker;
use crate::memory::GuestMemory;

/// Requests per turn.
const BUDGET: usize = 4;
/// `struct virtio_mem_req`: le16 type, 6 bytes of padding, le64 address, le16 number of blocks, 6 bytes of padding.
const REQUEST_BYTES: usize = 24;
/// `struct virtio_mem_resp`: le16 type, 6 bytes of padding, le16 state.
const RESPONSE_BYTES: usize = 10;

counters! {
    /// What the device counts.
    pub(super) struct Counters {
        acknowledged: "requests_acknowledged",
        refused: "requests_refused",
        invalid: "requests_invalid",
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
        let Self {
            queue,
            interrupt,
            shared,
            counters,
        } = self;
        queue.turn(BUDGET, |queue, memory, chain| {
            let answer = answer(shared, counters, memory, chain, queue.size());
            // plugged_size changes with the request, without an interrupt (5.15.6.1).
            interrupt.show_config(|space| shared.read_config(0, space));
            answer
        });
    }
}

/// Carries out one chain, or a part of it. A chain without room for the response is not carried out.
fn answer(
    shared: &Shared,
    counters: &Counters,
    memory: &GuestMemory,
    chain: DescriptorChain<&GuestMemory>,
    limit: u16,
) -> Answer {
    let chain = match Chain::parse(memory, chain, limit) {
        Ok(chain) if chain.writable.len() >= RESPONSE_BYTES as u64 => chain,
        Ok(_) => {
            counters.invalid.inc();
            return Answer::Written(0);
        }
        Err(error) => {
            guest_log!(DEBUG, %error, "mem: chain dropped");
            counters.invalid.inc();
            return Answer::Written(0);
        }
    };
    let mut bytes = [0; REQUEST_BYTES];
    let read = chain.readable.read(memory, 0, &mut bytes);
    let request = read.ok().and_then(|()| decode(bytes));
    let response = match request {
        Some(request) => shared.update(|state| {
            let region = state.region.as_mut();
            region.map_or(Some(Response::Error), |region| region.handle(request))
        }),
        None => Some(Response::Error),
    };
    let Some(response) = response else {
        return Answer::Again;
    };
    guest_log!(DEBUG, ?request, ?response, "mem");
    let counter = match response {
        Response::Ack | Response::State(_) => &counters.acknowledged,
        Response::Nack | Response::Busy => &counters.refused,
        Response::Error => &counters.invalid,
    };
    counter.inc();
    match chain.writable.write(memory, 0, &encode(response)) {
        Ok(()) => Answer::Written(RESPONSE_BYTES as u32),
        Err(_) => Answer::Written(0),
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
