//! The device on the I/O loop: moves packets between the guest's queues and the muxer.
//!
//! The loop sees one descriptor, the muxer's own epoll: what is registered in it, connections first of all, outlives the
//! worker's visits to the loop, and no connection's descriptor can collide with another device's.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_queue::{DescriptorChain, Queue, QueueT};
use vmm_sys_util::epoll::{ControlOperation, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::device::{RX, TX};
use super::muxer::{Filled, Muxer, TOKEN_QUEUES};
use super::packet::TxPacket;
use super::rx_queue::RxQueue;
use super::transport_reset::{EventQueue, TransportReset};
use crate::confinement::Confinement;
use crate::devices::virtio::Interrupt;
use crate::devices::virtio::queue::ring;
use crate::devices::virtio::queue::served_queue::queue_position;
use crate::devices::virtio::state::QueuePosition;
use crate::interrupted;
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
    pub(super) event: EventQueue,
    pub(super) interrupt: Interrupt,
}

/// The worker. It exists as long as the device; between a reset and the next activation it has no transport and is not
/// on the loop.
#[derive(Debug)]
pub(super) struct Worker {
    muxer: Muxer,
    transport: Option<Transport>,
    reset: TransportReset,
}

impl Transport {
    /// Everything the driver signals.
    fn kicks(&self) -> [&EventFd; 3] {
        let [rx, tx] = &self.kicks;
        [rx, tx, &self.event.kick]
    }
}

impl Worker {
    pub(super) fn new(muxer: Muxer) -> Self {
        Self {
            muxer,
            transport: None,
            reset: TransportReset::Settled,
        }
    }

    /// The guest that comes with the next transport still has the connections of an earlier process.
    pub(super) fn expect_stale_guest(&mut self) {
        self.reset = TransportReset::ToSend;
        self.muxer.set_guest_stale(true);
    }

    /// Takes the queues. The caller then adds the worker to the loop.
    ///
    /// # Errors
    /// epoll refused a kick descriptor; the worker is unchanged.
    pub(super) fn start(&mut self, mut transport: Transport, confinement: Confinement) -> io::Result<()> {
        self.muxer.start_connector(confinement)?;
        let epoll = self.muxer.epoll();
        let kicks = transport.kicks();
        for (index, kick) in kicks.iter().enumerate() {
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, TOKEN_QUEUES);
            if let Err(error) = epoll.ctl(ControlOperation::Add, kick.as_raw_fd(), event) {
                unwatch(&self.muxer, kicks.get(..index).unwrap_or_default());
                return Err(error);
            }
        }
        // Asked for only while packets wait for buffers. Without EVENT_IDX this writes guest memory, which validated
        // queues allow.
        if let Err(error) = transport.rx.disable_notification(&*transport.memory) {
            guest_log!(DEBUG, %error, "vsock: rx queue");
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
        unwatch(&self.muxer, &transport.kicks());
        vec![
            queue_position(0, &transport.rx),
            queue_position(1, &transport.tx),
            queue_position(2, &transport.event.queue),
        ]
    }

    /// Gives the queues back, after a last look at what the guest has sent: a guest that powers off at once must not lose
    /// its last words. Not on the loop any more.
    pub(super) fn stop(&mut self) {
        if let Some(mut transport) = self.transport.take() {
            drain(&mut self.muxer, &mut transport, BATCH);
            unwatch(&self.muxer, &transport.kicks());
        }
        self.reset = TransportReset::Settled;
        self.muxer.set_guest_stale(false);
        self.muxer.reset();
    }

    /// Goes on with telling the guest that it has no connections, if that is to be done.
    fn settle(&mut self) {
        let Some(transport) = &mut self.transport else {
            return;
        };
        let before = self.reset;
        self.reset = transport
            .event
            .advance(before, &transport.memory, &transport.interrupt);
        if before == TransportReset::ToSend && self.reset != before {
            self.muxer.shared().counters.transport_resets.inc();
        }
        if !before.is_settled() && self.reset.is_settled() {
            guest_log!(
                INFO,
                "vsock: the guest has closed its connections of before the restore"
            );
            self.muxer.set_guest_stale(false);
        }
    }

    /// Runs until there is nothing to do, or the others' turn has come.
    fn turn(&mut self) {
        let mut events = [EpollEvent::default(); EVENTS];
        for _ in 0..ROUNDS {
            let count = match interrupted::again(|| self.muxer.epoll().wait(0, &mut events)) {
                Ok(count) => count,
                Err(error) => {
                    guest_log!(ERROR, %error, "vsock: epoll failed");
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
        if !self.reset.is_settled() {
            self.settle();
        }
        let open = self.reset.is_settled();
        let Some(transport) = &mut self.transport else {
            return;
        };
        let mut rounds_in_vain = 0;
        for _ in 0..ROUNDS {
            let sent = drain(&mut self.muxer, transport, BATCH);
            let (filled, received) = match open {
                true => fill(&mut self.muxer, transport, BATCH),
                false => (Filled::Idle, 0),
            };
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
        let Some(chain) = take(&mut transport.tx, memory, "tx") else {
            break;
        };
        let head = chain.head_index();
        match TxPacket::parse(memory, chain) {
            Ok(packet) => muxer.on_packet(packet),
            Err((error, header)) => {
                guest_log!(DEBUG, %error, "vsock: malformed tx packet");
                muxer.on_malformed(header);
            }
        }
        if let Err(error) = ring::give_back(&mut transport.tx, memory, head, 0) {
            guest_log!(DEBUG, %error, head, "vsock: cannot return a tx buffer");
        }
        taken += 1;
    }
    if taken > 0 {
        notify(TX, &mut transport.tx, memory, &transport.interrupt);
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
        notify(RX, &mut transport.rx, memory, &transport.interrupt);
    }
    (filled, used)
}

/// The next chain of queue `name`. A ring that the driver broke looks empty: the device's other rings go on.
pub(super) fn take<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemory,
    name: &'static str,
) -> Option<DescriptorChain<&'m GuestMemory>> {
    ring::take(queue, memory).unwrap_or_else(|error| {
        guest_log!(WARN, queue = name, %error, "vsock: the driver broke a ring");
        None
    })
}

/// One interrupt for a batch in queue `index`, if the driver wants one.
fn notify(index: usize, queue: &mut Queue, memory: &GuestMemory, interrupt: &Interrupt) {
    match queue.needs_notification(memory) {
        Ok(false) => {}
        Ok(true) => interrupt.used(index),
        Err(error) => {
            guest_log!(DEBUG, %error, "vsock: cannot tell whether the driver wants an interrupt");
            interrupt.used(index);
        }
    }
}

/// Asks the driver to tell about new buffers where they are needed; true if some came before it could see that.
fn look_again(transport: &mut Transport, filled: Filled, congested: bool) -> bool {
    let memory = &*transport.memory;
    let enable = |queue: &mut Queue| {
        queue.enable_notification(memory).unwrap_or_else(|error| {
            guest_log!(DEBUG, %error, "vsock: cannot ask for notifications");
            false
        })
    };
    let tx = !congested && enable(&mut transport.tx);
    let rx = filled == Filled::NoBuffers && enable(&mut transport.rx);
    tx || rx
}

fn unwatch(muxer: &Muxer, kicks: &[&EventFd]) {
    for kick in kicks {
        if let Err(error) =
            muxer
                .epoll()
                .ctl(ControlOperation::Delete, kick.as_raw_fd(), EpollEvent::default())
        {
            guest_log!(WARN, %error, "vsock: cannot remove a kick descriptor from epoll");
        }
    }
}

impl MutEventSubscriber for Worker {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        self.turn();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(self.muxer.epoll(), EventSet::IN)) {
            guest_log!(
                ERROR,
                ?error,
                "vsock: the I/O loop does not take the device's epoll"
            );
        }
    }
}
