//! Both queues, served on the I/O loop.

use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_queue::DescriptorChain;

use super::{ConsoleInput, ConsoleLog};
use crate::devices::virtio::LoopWorker;
use crate::devices::virtio::counter::Counter;
use crate::devices::virtio::queue::chain::Chain;
use crate::devices::virtio::queue::served_queue::{Answer, ServedQueue};
use crate::devices::virtio::state::QueuePosition;
use crate::memory::GuestMemory;

/// Event data: which queue an event is about.
const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;
/// Output taken from one chain; the ring keeps no more, and Linux sends at most a page.
const MAX_CHAIN_BYTES: u64 = 64 << 10;
/// Chains per turn, so that a guest that only prints leaves the loop to others.
const BUDGET: usize = 64;
/// Bytes copied at a time.
const COPY_BYTES: usize = 4096;

/// What moved.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) output: Counter,
    pub(super) input: Counter,
}

/// Moves the guest's output into the log and the input into the guest's buffers.
#[derive(Debug)]
pub(super) struct ConsoleWorker {
    receive: ServedQueue,
    transmit: ServedQueue,
    log: ConsoleLog,
    input: ConsoleInput,
    counters: Arc<Counters>,
}

impl ConsoleWorker {
    pub(super) fn new(
        receive: ServedQueue,
        transmit: ServedQueue,
        log: ConsoleLog,
        input: ConsoleInput,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            receive,
            transmit,
            log,
            input,
            counters,
        }
    }

    fn take_output(&mut self) {
        let Self {
            transmit: queue,
            log,
            counters,
            ..
        } = self;
        let limit = queue.size();
        queue.turn(BUDGET, |_, memory, chain| {
            Answer::Written(transmit(memory, chain, limit, log, counters))
        });
    }

    /// Fills receive buffers as long as there is input. Kicks are asked for only when input waits for buffers.
    fn give_input(&mut self) {
        self.receive.take_kick();
        // Nothing to read means somebody took it already.
        let _ = self.input.wake_fd().read();
        let memory = self.receive.memory().clone();
        for _ in 0..BUDGET {
            if self.input.pending().is_empty() {
                self.receive.suppress_kicks();
                self.receive.notify();
                return;
            }
            if let Some(chain) = self.receive.pop(&memory) {
                let head = chain.head_index();
                let written = self.fill(&memory, chain);
                self.receive.complete(head, written);
            } else if !self.receive.enable_kicks() {
                self.receive.notify();
                return;
            }
        }
        self.receive.notify();
        self.input.wake();
    }

    fn fill(&self, memory: &GuestMemory, chain: DescriptorChain<&GuestMemory>) -> u32 {
        let buffer = match Chain::parse(memory, chain, self.receive.size()) {
            Ok(chain) => chain.writable,
            Err(error) => {
                guest_log!(DEBUG, %error, "console: receive buffer dropped");
                return 0;
            }
        };
        let mut pending = self.input.pending();
        let bytes = pending.peek(usize::try_from(buffer.len()).unwrap_or(usize::MAX));
        if let Err(error) = buffer.write(memory, 0, &bytes) {
            guest_log!(DEBUG, %error, "console: input not delivered");
            return 0;
        }
        pending.consume(bytes.len());
        self.counters.input.add(bytes.len() as u64);
        // At most INPUT_CAPACITY.
        u32::try_from(bytes.len()).unwrap_or(u32::MAX)
    }
}

impl LoopWorker for ConsoleWorker {
    fn positions(&self) -> Vec<QueuePosition> {
        vec![self.receive.position(), self.transmit.position()]
    }
}

impl MutEventSubscriber for ConsoleWorker {
    fn init(&mut self, ops: &mut EventOps) {
        let watched = [
            (&**self.transmit.kick(), TRANSMIT),
            (&**self.receive.kick(), RECEIVE),
            (self.input.wake_fd(), RECEIVE),
        ];
        for (fd, data) in watched {
            if let Err(error) = ops.add(Events::with_data(fd, data, EventSet::IN)) {
                guest_log!(ERROR, ?error, "console: cannot watch a queue");
            }
        }
        // What the driver offered before a suspend, or another process was told of, comes without a kick.
        self.transmit.kick_self();
        self.input.wake();
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        match events.data() {
            TRANSMIT => self.take_output(),
            _ => self.give_input(),
        }
    }
}

/// One chain of output. The device writes nothing into it, so the used length is 0.
fn transmit(
    memory: &GuestMemory,
    chain: DescriptorChain<&GuestMemory>,
    limit: u16,
    log: &ConsoleLog,
    counters: &Counters,
) -> u32 {
    let chain = match Chain::parse(memory, chain, limit) {
        Ok(chain) => chain,
        Err(error) => {
            guest_log!(DEBUG, %error, "console: chain dropped");
            return 0;
        }
    };
    let mut left = chain.readable.len().min(MAX_CHAIN_BYTES);
    let mut offset = 0;
    let mut buffer = [0; COPY_BYTES];
    while left > 0 {
        let now = left.min(COPY_BYTES as u64);
        let Some(piece) = buffer.get_mut(..now as usize) else {
            break;
        };
        if let Err(error) = chain.readable.read(memory, offset, piece) {
            guest_log!(DEBUG, %error, "console: output lost");
            break;
        }
        log.write(piece);
        counters.output.add(now);
        offset += now;
        left -= now;
    }
    0
}
