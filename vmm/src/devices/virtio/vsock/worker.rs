//! The device on the I/O loop: moves packets between the guest's queues and the muxer.
//!
//! The loop sees one descriptor, the muxer's own epoll: what is registered in it, connections first of all, outlives the
//! worker's visits to the loop, and no connection's descriptor can collide with another device's.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::epoll::{ControlOperation, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::muxer::{Filled, Muxer, TOKEN_QUEUES};
use super::packet::TxPacket;
use super::rx_queue::RxQueue;
use crate::devices::virtio::Interrupt;
use crate::devices::virtio::served_queue::queue_position;
use crate::devices::virtio::state::QueuePosition;
use crate::memory::GuestMemory;

/// Packets of each queue between two looks at the other one; each such batch is at most one interrupt.
const BATCH: usize = 256;
/// Batches before the loop's other workers get their turn.
const ROUNDS: usize = 4;
/// Events taken in one go.
const EVENTS: usize = 64;

/// What the driver gave at DRIVER_OK.
#[derive(Debug)]
pub(super) struct Transport {
    pub(super) memory: Arc<GuestMemory>,
    pub(super) rx: Queue,
    pub(super) tx: Queue,
    /// Signalled by the driver when it adds buffers.
    pub(super) kicks: [Arc<EventFd>; 2],
    pub(super) interrupt: Interrupt,
}

/// The worker. It exists as long as the device; between a reset and the next activation it has no transport and is not
/// on the loop.
#[derive(Debug)]
pub(super) struct Worker {
    muxer: Muxer,
    transport: Option<Transport>,
}

impl Worker {
    pub(super) fn new(muxer: Muxer) -> Self {
        Self {
            muxer,
            transport: None,
        }
    }

    /// Takes the queues. The caller then adds the worker to the loop.
    ///
    /// # Errors
    /// epoll refused a kick descriptor; the worker is unchanged.
    pub(super) fn start(&mut self, mut transport: Transport) -> io::Result<()> {
        let epoll = self.muxer.epoll();
        for (index, kick) in transport.kicks.iter().enumerate() {
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, TOKEN_QUEUES);
            if let Err(error) = epoll.ctl(ControlOperation::Add, kick.as_raw_fd(), event) {
                unwatch(&self.muxer, transport.kicks.get(..index).unwrap_or_default());
                return Err(error);
            }
        }
        // Asked for only while packets wait for buffers. Without EVENT_IDX this writes guest memory, which validated
        // queues allow.
        if let Err(error) = transport.rx.disable_notification(&*transport.memory) {
            tracing::debug!(%error, "vsock: rx queue");
        }
        self.transport = Some(transport);
        // Runs what was asked for before the driver was up.
        self.muxer.shared().wake();
        Ok(())
    }

    /// Gives the queues back and says where they stand; connections stay, and go on with the next [`start`](Self::start).
    pub(super) fn suspend(&mut self) -> Vec<QueuePosition> {
        let Some(transport) = self.transport.take() else {
            return Vec::new();
        };
        unwatch(&self.muxer, &transport.kicks);
        vec![queue_position(0, &transport.rx), queue_position(1, &transport.tx)]
    }

    /// Gives the queues back, after a last look at what the guest has sent: a guest that powers off at once must not lose
    /// its last words. Not on the loop any more.
    pub(super) fn stop(&mut self) {
        let Some(mut transport) = self.transport.take() else {
            return;
        };
        drain(&mut self.muxer, &mut transport, BATCH);
        unwatch(&self.muxer, &transport.kicks);
        self.muxer.reset();
    }

    /// Runs until there is nothing to do, or the others' turn has come.
    fn turn(&mut self) {
        let mut events = [EpollEvent::default(); EVENTS];
        for _ in 0..ROUNDS {
            let count = match self.muxer.epoll().wait(0, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, "vsock: epoll failed");
                    return;
                }
            };
            for event in events.iter().take(count) {
                self.muxer.on_event(event.data(), event.event_set());
            }
            self.pump();
            if count < EVENTS {
                break;
            }
        }
        self.muxer.arm_timer();
    }

    /// Moves packets both ways until neither side has any or the rounds are over.
    fn pump(&mut self) {
        let Some(transport) = &mut self.transport else {
            return;
        };
        let mut rounds_in_vain = 0;
        for _ in 0..ROUNDS {
            let sent = drain(&mut self.muxer, transport, BATCH);
            let (filled, received) = fill(&mut self.muxer, transport, BATCH);
            let may_have_more = sent == BATCH || filled == Filled::Budget;
            if !may_have_more && !look_again(transport, filled, self.muxer.is_congested()) {
                return;
            }
            // There is more, so the next round moves something, unless the indices of a queue make no sense: such a queue
            // always claims to have more.
            rounds_in_vain = if sent + received == 0 {
                rounds_in_vain + 1
            } else {
                0
            };
            if rounds_in_vain == 2 {
                return;
            }
        }
        self.muxer.shared().wake();
    }
}

/// Takes up to `budget` packets from the tx queue; returns how many. Stops while the muxer has too many answers waiting
/// (virtio 1.2, 5.10.6.2: rx buffers must become available first).
fn drain(muxer: &mut Muxer, transport: &mut Transport, budget: usize) -> usize {
    let memory = &*transport.memory;
    let mut taken = 0;
    while taken < budget && !muxer.is_congested() {
        let Some(chain) = transport.tx.pop_descriptor_chain(memory) else {
            break;
        };
        let head = chain.head_index();
        match TxPacket::parse(memory, chain) {
            Ok(packet) => muxer.on_packet(packet),
            Err((error, header)) => {
                tracing::debug!(%error, "vsock: malformed tx packet");
                muxer.on_malformed(header);
            }
        }
        if let Err(error) = transport.tx.add_used(memory, head, 0) {
            tracing::debug!(%error, head, "vsock: cannot return a tx buffer");
        }
        taken += 1;
    }
    if taken > 0 {
        notify(&mut transport.tx, memory, &transport.interrupt);
    }
    taken
}

/// Puts up to `budget` packets into the rx queue; returns how many buffers were used.
fn fill(muxer: &mut Muxer, transport: &mut Transport, budget: usize) -> (Filled, usize) {
    let memory = &*transport.memory;
    let shared = muxer.shared().clone();
    let mut rx = RxQueue::new(&mut transport.rx, memory, &shared.counters);
    let filled = muxer.fill(&mut rx, budget);
    let used = rx.used();
    if filled == Filled::NoBuffers {
        shared.counters.rx_stalls.inc();
    }
    if used > 0 {
        notify(&mut transport.rx, memory, &transport.interrupt);
    }
    (filled, used)
}

/// One interrupt for a batch, if the driver wants one.
fn notify(queue: &mut Queue, memory: &GuestMemory, interrupt: &Interrupt) {
    match queue.needs_notification(memory) {
        Ok(false) => {}
        Ok(true) => interrupt.signal_used(),
        Err(error) => {
            tracing::debug!(%error, "vsock: cannot tell whether the driver wants an interrupt");
            interrupt.signal_used();
        }
    }
}

/// Asks the driver to tell about new buffers where they are needed; true if some came before it could see that.
fn look_again(transport: &mut Transport, filled: Filled, congested: bool) -> bool {
    let memory = &*transport.memory;
    let enable = |queue: &mut Queue| {
        queue.enable_notification(memory).unwrap_or_else(|error| {
            tracing::debug!(%error, "vsock: cannot ask for notifications");
            false
        })
    };
    let tx = !congested && enable(&mut transport.tx);
    let rx = filled == Filled::NoBuffers && enable(&mut transport.rx);
    tx || rx
}

fn unwatch(muxer: &Muxer, kicks: &[Arc<EventFd>]) {
    for kick in kicks {
        if let Err(error) =
            muxer
                .epoll()
                .ctl(ControlOperation::Delete, kick.as_raw_fd(), EpollEvent::default())
        {
            tracing::warn!(%error, "vsock: cannot remove a kick descriptor from epoll");
        }
    }
}

impl MutEventSubscriber for Worker {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        self.turn();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(self.muxer.epoll(), EventSet::IN)) {
            tracing::error!(?error, "vsock: the I/O loop does not take the device's epoll");
        }
    }
}
