//! The transmit queue, served on the I/O loop.

use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_queue::DescriptorChain;

use super::ConsoleLog;
use crate::devices::virtio::chain::Chain;
use crate::devices::virtio::served_queue::{Served, ServedQueue};
use crate::devices::virtio::state::QueuePosition;
use crate::devices::virtio::{ActiveQueue, Interrupt};
use crate::memory::GuestMemory;

/// Output taken from one chain; the ring keeps no more, and Linux sends at most a page.
const MAX_CHAIN_BYTES: u64 = 64 << 10;
/// Chains per turn, so that a guest that only prints leaves the loop to others.
const BUDGET: usize = 64;
/// Bytes copied at a time.
const COPY_BYTES: usize = 4096;

/// Moves the guest's output into the log.
#[derive(Debug)]
pub(super) struct ConsoleWorker {
    queue: ServedQueue,
    log: ConsoleLog,
}

impl ConsoleWorker {
    pub(super) fn new(
        device: &str,
        transmit: ActiveQueue,
        memory: Arc<GuestMemory>,
        interrupt: Interrupt,
        log: ConsoleLog,
    ) -> Self {
        Self {
            queue: ServedQueue::new(device, transmit, memory, interrupt),
            log,
        }
    }

    /// Where the transmit queue stands.
    pub(super) fn position(&self) -> QueuePosition {
        self.queue.position()
    }
}

impl MutEventSubscriber for ConsoleWorker {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&**self.queue.kick(), EventSet::IN)) {
            tracing::error!(?error, "console: cannot watch the transmit queue");
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        self.queue.take_kick();
        let Self { queue, log } = self;
        let limit = queue.size();
        if queue.serve(BUDGET, |memory, chain| transmit(memory, chain, limit, log)) == Served::More {
            queue.kick_self();
        }
    }
}

/// One chain of output. The device writes nothing into it, so the used length is 0.
fn transmit(memory: &GuestMemory, chain: DescriptorChain<&GuestMemory>, limit: u16, log: &ConsoleLog) -> u32 {
    let chain = match Chain::parse(memory, chain, limit) {
        Ok(chain) => chain,
        Err(error) => {
            tracing::debug!(%error, "console: chain dropped");
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
            tracing::debug!(%error, "console: output lost");
            break;
        }
        log.write(piece);
        offset += now;
        left -= now;
    }
    0
}
