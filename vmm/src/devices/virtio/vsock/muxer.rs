//! The table of connections and everything that decides about them; knows the guest's queues only as packets.

mod clients;
mod commands;

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::connection::{ConnId, Connection, Context, Next, Phase, PortPair, Verdict};
use super::error::VsockError;
use super::host::HostFd;
use super::origin::Origin;
use super::packet::{HOST_CID, Header, Op, TYPE_STREAM, TxPacket};
use super::rx_queue::RxQueue;
use super::shared::Shared;
use super::uds::Endpoint;
use crate::confinement::Confinement;
use crate::descriptors::{Budget, Ticket};

/// Most connections at a time, clients that have not said CONNECT and last bytes on their way included.
pub(super) const MAX_CONNECTIONS: usize = 1024;
/// Most of them the guest may have opened: the host, which controls the guest through others, always finds room.
pub(super) const MAX_OF_GUEST: usize = 768;
/// Descriptors a connection of the guest costs: both ends of a socket pair.
const DESCRIPTORS: usize = 2;
/// `buf_alloc` of a connection: four of Linux's largest packets, so that the guest keeps sending while we write.
const LARGE_BUFFER: u32 = 256 * 1024;
/// `buf_alloc` when there are more than [`LARGE_BUFFERS`] connections. Together: 88 MiB at the worst, when a guest fills
/// 1,024 connections that nobody reads.
const SMALL_BUFFER: u32 = 64 * 1024;
const LARGE_BUFFERS: usize = 128;
/// RSTs without a connection that wait for an rx buffer. When there are more, the tx queue waits.
const MAX_RESETS: usize = 256;
/// Epoll tokens; connections use their id.
pub(super) const TOKEN_QUEUES: u64 = 0;
pub(super) const TOKEN_WAKE: u64 = 1;
pub(super) const TOKEN_TIMER: u64 = 2;
pub(super) const TOKEN_CLIENTS: u64 = 3;
const FIRST_CONNECTION: ConnId = 16;
/// In the timers: accept clients again.
const TIMER_ACCEPT: ConnId = 0;

/// Why [`Muxer::fill`] stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Filled {
    /// Nothing left for the guest.
    Idle,
    /// The guest has no rx buffers left.
    NoBuffers,
    /// The budget is used up.
    Budget,
}

/// The muxer.
#[derive(Debug)]
pub(super) struct Muxer {
    shared: Arc<Shared>,
    guest_cid: u64,
    epoll: Epoll,
    timer: TimerFd,
    timer_armed: Option<Instant>,
    timers: BTreeSet<(Instant, ConnId)>,
    endpoint: Option<Endpoint>,
    connections: HashMap<ConnId, Connection>,
    /// Connections of the guest among them.
    of_guest: usize,
    /// What connections of the guest are taken from.
    descriptors: Arc<Budget>,
    by_ports: HashMap<PortPair, ConnId>,
    next_id: ConnId,
    /// Connections that may have something for the guest, each once.
    ready: VecDeque<ConnId>,
    /// RSTs for pairs of ports that have no connection.
    resets: VecDeque<Header>,
    /// Connections in [`Phase::Backoff`].
    waiting: HashSet<ConnId>,
    /// Connections in [`Phase::Flushing`], oldest first.
    flushing: BTreeSet<ConnId>,
    warned_of_loss: bool,
    /// The guest has connections of an earlier process and is about to forget them.
    guest_stale: bool,
}

impl Muxer {
    /// A muxer without connections.
    ///
    /// # Errors
    /// [`VsockError::Create`].
    pub(super) fn new(
        shared: Arc<Shared>,
        guest_cid: u64,
        endpoint: Option<Endpoint>,
        descriptors: Arc<Budget>,
    ) -> Result<Self, VsockError> {
        let failed = |what| move |source| VsockError::Create { what, source };
        let epoll = Epoll::new().map_err(failed("an epoll"))?;
        let timer = TimerFd::new().map_err(|errno| failed("a timerfd")(errno.into()))?;
        // Edge triggered and never read: each write or expiry is an edge of its own.
        let edge = |token| EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token);
        let add = |fd, token| {
            epoll
                .ctl(ControlOperation::Add, fd, edge(token))
                .map_err(failed("an epoll registration"))
        };
        add(shared.wake_fd().as_raw_fd(), TOKEN_WAKE)?;
        add(timer.as_raw_fd(), TOKEN_TIMER)?;
        if let Some(endpoint) = &endpoint {
            add(endpoint.listener.as_raw_fd(), TOKEN_CLIENTS)?;
        }
        Ok(Self {
            shared,
            guest_cid,
            epoll,
            timer,
            timer_armed: None,
            timers: BTreeSet::new(),
            endpoint,
            connections: HashMap::new(),
            of_guest: 0,
            descriptors,
            by_ports: HashMap::new(),
            next_id: FIRST_CONNECTION,
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            waiting: HashSet::new(),
            flushing: BTreeSet::new(),
            warned_of_loss: false,
            guest_stale: false,
        })
    }

    /// Starts the thread that connects the guest to sockets of the host, if there are any.
    ///
    /// # Errors
    /// The host refuses the thread.
    pub(super) fn start_connector(&mut self, confinement: Confinement) -> io::Result<()> {
        match &mut self.endpoint {
            Some(endpoint) => endpoint.start_connector(confinement),
            None => Ok(()),
        }
    }

    /// Everything the muxer waits for is in this epoll.
    pub(super) fn epoll(&self) -> &Epoll {
        &self.epoll
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// While the guest is stale, packets for connections of before are dropped: it ends them by itself, and an RST that
    /// arrives after that could end a new one with the same ports.
    pub(super) fn set_guest_stale(&mut self, stale: bool) {
        self.guest_stale = stale;
    }

    /// Whether the guest's packets have to wait until it takes answers.
    pub(super) fn is_congested(&self) -> bool {
        self.resets.len() >= MAX_RESETS
    }

    /// Handles one event of the epoll.
    pub(super) fn on_event(&mut self, token: u64, events: EventSet) {
        match token {
            TOKEN_QUEUES => {}
            TOKEN_WAKE => self.run_commands(),
            TOKEN_TIMER => self.run_timers(),
            TOKEN_CLIENTS => self.accept_clients(),
            id => self.on_host_event(id, events),
        }
    }

    fn next_id(&mut self) -> ConnId {
        let id = self.next_id;
        // 2^64 connections are not reached.
        self.next_id = self.next_id.wrapping_add(1);
        id
    }

    fn buf_alloc(&self) -> u32 {
        if self.connections.len() < LARGE_BUFFERS {
            LARGE_BUFFER
        } else {
            SMALL_BUFFER
        }
    }

    /// Makes sure one more connection of the host fits; last bytes for a host that does not read go first.
    fn make_room(&mut self) -> bool {
        if self.connections.len() >= MAX_CONNECTIONS {
            self.give_up_last_bytes(|_| true);
        }
        self.connections.len() < MAX_CONNECTIONS
    }

    /// Makes sure one more connection of the guest fits; last bytes of others of its own go first.
    fn make_room_for_guest(&mut self) -> bool {
        let is_full =
            |muxer: &Self| muxer.of_guest >= MAX_OF_GUEST || muxer.connections.len() >= MAX_CONNECTIONS;
        if is_full(self) {
            self.give_up_last_bytes(Origin::is_guest);
        }
        !is_full(self)
    }

    /// Drops the oldest connection that only waits for the host to read, and is of such an origin.
    fn give_up_last_bytes(&mut self, of: impl Fn(&Origin) -> bool) {
        let is_of = |id: &&ConnId| self.connections.get(id).is_some_and(|c| of(c.origin()));
        if let Some(id) = self.flushing.iter().find(is_of).copied() {
            // Once: a guest could make this happen all the time.
            if !std::mem::replace(&mut self.warned_of_loss, true) {
                guest_log!(
                    WARN,
                    "vsock: table full, dropping the last bytes of connections whose readers do not read"
                );
            }
            self.remove(id);
        }
    }

    fn insert(&mut self, id: ConnId, connection: Connection) {
        if let Some(pair) = connection.pair() {
            self.by_ports.insert(pair, id);
        }
        self.of_guest += usize::from(connection.origin().is_guest());
        self.connections.insert(id, connection);
        self.shared
            .counters
            .open_connections
            .set(self.connections.len() as u64);
        self.settle(id, Verdict::Keep);
    }

    /// Calls `f` on a connection, then does what follows from it.
    fn with(&mut self, id: ConnId, f: impl FnOnce(&mut Connection, Context<'_>) -> Verdict) {
        let context = Context {
            epoll: &self.epoll,
            counters: &self.shared.counters,
            now: Instant::now(),
            guest_cid: self.guest_cid,
        };
        if let Some(connection) = self.connections.get_mut(&id) {
            let verdict = f(connection, context);
            self.settle(id, verdict);
        }
    }

    /// Brings the muxer's bookkeeping in line with a connection that has changed.
    fn settle(&mut self, id: ConnId, verdict: Verdict) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        if verdict != Verdict::Keep {
            let pair = connection.pair();
            if let (Verdict::Reset, Some(pair)) = (verdict, pair) {
                self.push_reset(pair);
            }
            self.end(id);
            return;
        }
        connection.update_interest(&self.epoll);
        if connection.timer != connection.armed {
            if let Some(armed) = connection.armed {
                self.timers.remove(&(armed, id));
            }
            if let Some(timer) = connection.timer {
                self.timers.insert((timer, id));
            }
            connection.armed = connection.timer;
        }
        if matches!(connection.phase(), Phase::Backoff { .. }) {
            self.waiting.insert(id);
        } else {
            self.waiting.remove(&id);
        }
        if !connection.queued && connection.next().is_some() {
            connection.queued = true;
            self.ready.push_back(id);
        }
    }

    /// The guest knows nothing of a connection any more: frees its ports, and everything unless the host still has to
    /// take bytes.
    fn end(&mut self, id: ConnId) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        if let Some(pair) = connection.pair()
            && self.by_ports.get(&pair) == Some(&id)
        {
            self.by_ports.remove(&pair);
        }
        if connection.linger() {
            self.flushing.insert(id);
            self.settle(id, Verdict::Keep);
        } else {
            self.remove(id);
        }
    }

    fn remove(&mut self, id: ConnId) {
        let Some(mut connection) = self.connections.remove(&id) else {
            return;
        };
        self.of_guest -= usize::from(connection.origin().is_guest());
        self.flushing.remove(&id);
        self.waiting.remove(&id);
        if let Some(armed) = connection.armed {
            self.timers.remove(&(armed, id));
        }
        self.shared
            .counters
            .open_connections
            .set(self.connections.len() as u64);
        connection.release(&self.epoll);
        if let Some(pair) = connection.pair() {
            if self.by_ports.get(&pair) == Some(&id) {
                self.by_ports.remove(&pair);
            }
            if !connection.origin().is_guest() {
                self.shared.free_port(pair.local);
            }
            if connection.origin().is_attached() {
                self.shared.end_attached(pair.local);
            }
        }
    }

    fn push_reset(&mut self, pair: PortPair) {
        self.resets.push_back(Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: pair.local,
            dst_port: pair.peer,
            type_: TYPE_STREAM,
            op: Op::Rst as u16,
            ..Header::default()
        });
    }

    /// Takes a packet of the guest.
    pub(super) fn on_packet(&mut self, packet: TxPacket<'_>) {
        let TxPacket { header, mut payload } = packet;
        self.shared.counters.tx_packets.inc();
        let Some(pair) = self.check(&header) else {
            return;
        };
        if let Some(&id) = self.by_ports.get(&pair) {
            self.with(id, |connection, context| {
                connection.on_packet(&header, &mut payload, context)
            });
            return;
        }
        match Op::from_wire(header.op) {
            Some(Op::Request) => self.accept(pair, &header),
            // Never answered: two sides that refuse each other's refusals would not end.
            Some(Op::Rst) => {}
            _ if self.guest_stale => {}
            _ => self.resets.push_back(header.refusal()),
        }
    }

    /// Takes the header of a packet whose payload is not there.
    pub(super) fn on_malformed(&mut self, header: Option<Header>) {
        self.shared.counters.malformed.inc();
        let Some(pair) = header.and_then(|header| self.check(&header)) else {
            return;
        };
        match self.by_ports.get(&pair) {
            Some(&id) => self.settle(id, Verdict::Reset),
            None if self.guest_stale => {}
            None => self.push_reset(pair),
        }
    }

    /// The pair of ports of a packet from the guest to the host.
    fn check(&mut self, header: &Header) -> Option<PortPair> {
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            // As Linux's vhost does: there is nobody to answer.
            self.shared.counters.malformed.inc();
            return None;
        }
        if header.type_ != TYPE_STREAM {
            self.shared.counters.malformed.inc();
            if header.op != Op::Rst as u16 {
                self.resets.push_back(header.refusal());
            }
            return None;
        }
        Some(PortPair {
            local: header.dst_port,
            peer: header.src_port,
        })
    }

    /// The guest opens a connection.
    fn accept(&mut self, pair: PortPair, header: &Header) {
        // A guest that calls out, to say it is ready for instance, may have started to listen.
        self.retry_waiting();
        if !self.make_room_for_guest() {
            self.refuse(header, &"table of connections full");
            return;
        }
        let ticket = match self.descriptors.take(DESCRIPTORS) {
            Ok(ticket) => ticket,
            Err(error) => return self.refuse(header, &error),
        };
        let opened = match self.shared.listener(pair.local) {
            Some(backlog) => UnixStream::pair().and_then(|(ours, theirs)| {
                let connection = self.prepare_accept(pair, ours.into(), header, ticket)?;
                if backlog.push(theirs) {
                    Ok(connection)
                } else {
                    Err(io::ErrorKind::QuotaExceeded.into())
                }
            }),
            None => match &self.endpoint {
                Some(endpoint) => endpoint
                    .connect_out(pair.local)
                    .and_then(|socket| self.prepare_accept(pair, socket, header, ticket)),
                None => Err(io::ErrorKind::ConnectionRefused.into()),
            },
        };
        match opened {
            Ok(connection) => {
                self.shared.counters.connections.inc();
                let id = self.next_id();
                self.insert(id, connection);
            }
            Err(error) => self.refuse(header, &error),
        }
    }

    /// The connection the next [`Self::next_id`] will name.
    fn prepare_accept(
        &self,
        pair: PortPair,
        socket: OwnedFd,
        header: &Header,
        ticket: Ticket,
    ) -> io::Result<Connection> {
        let host = HostFd::new(socket)?;
        let mut connection = Connection::accept(self.next_id, pair, host, self.buf_alloc(), header, ticket);
        connection.start_host(Context {
            epoll: &self.epoll,
            counters: &self.shared.counters,
            now: Instant::now(),
            guest_cid: self.guest_cid,
        })?;
        Ok(connection)
    }

    fn refuse(&mut self, header: &Header, why: &dyn std::fmt::Display) {
        guest_log!(DEBUG, port = header.dst_port, %why, "vsock: refusing a connection of the guest");
        self.shared.counters.refused.inc();
        self.resets.push_back(header.refusal());
    }

    fn retry_waiting(&mut self) {
        for id in std::mem::take(&mut self.waiting) {
            self.with(id, |connection, context| {
                connection.retry(context);
                Verdict::Keep
            });
        }
    }

    fn on_host_event(&mut self, id: ConnId, events: EventSet) {
        match self.connections.get(&id).map(Connection::phase) {
            Some(Phase::Handshake) => self.on_client(id),
            Some(_) => self.with(id, |connection, context| {
                connection.on_host_event(events, context)
            }),
            // Closed by an event before this one.
            None => {}
        }
    }

    fn run_timers(&mut self) {
        self.timer_armed = None;
        let now = Instant::now();
        while let Some(&(when, id)) = self.timers.first()
            && when <= now
        {
            self.timers.pop_first();
            if id == TIMER_ACCEPT {
                self.accept_clients();
                continue;
            }
            if let Some(connection) = self.connections.get_mut(&id) {
                connection.armed = None;
            }
            self.with(id, |connection, context| connection.on_timer(context));
        }
    }

    /// Sets the timerfd to the next deadline; at the end of each turn.
    pub(super) fn arm_timer(&mut self) {
        let next = self.timers.first().map(|&(when, _)| when);
        if next == self.timer_armed {
            return;
        }
        let result = match next {
            // Zero would disarm it.
            Some(when) => {
                let pause = when
                    .saturating_duration_since(Instant::now())
                    .max(Duration::from_micros(1));
                self.timer.reset(pause, None)
            }
            None => self.timer.clear(),
        };
        match result {
            Ok(()) => self.timer_armed = next,
            Err(error) => guest_log!(ERROR, %error, "vsock: cannot set the timer"),
        }
    }

    /// Gives the guest what there is for it, connection by connection in turn, at most about `budget` packets.
    pub(super) fn fill(&mut self, rx: &mut RxQueue<'_>, budget: usize) -> Filled {
        while rx.used() < budget {
            if let Some(&header) = self.resets.front() {
                let Some(buffer) = rx.take() else {
                    return Filled::NoBuffers;
                };
                rx.put(&buffer, header);
                self.resets.pop_front();
                continue;
            }
            let Some(&id) = self.ready.front() else {
                return Filled::Idle;
            };
            let context = Context {
                epoll: &self.epoll,
                counters: &self.shared.counters,
                now: Instant::now(),
                guest_cid: self.guest_cid,
            };
            let mut verdict = Verdict::Keep;
            if let Some(connection) = self.connections.get_mut(&id) {
                match connection.next() {
                    None => {}
                    Some(Next::Control(op, flags)) => {
                        let Some(buffer) = rx.take() else {
                            return Filled::NoBuffers;
                        };
                        rx.put(&buffer, connection.header(op, flags, 0, context));
                    }
                    Some(Next::Data(credit)) => {
                        let Some(outcome) = rx.put_data(credit, &mut connection.source(context)) else {
                            return Filled::NoBuffers;
                        };
                        verdict = connection.on_read(outcome, context);
                    }
                }
                connection.queued = false;
            }
            self.ready.pop_front();
            self.settle(id, verdict);
        }
        Filled::Budget
    }

    /// The device was reset: the guest has forgotten its connections. Listeners, and connections that are being opened,
    /// stay.
    pub(super) fn reset(&mut self) {
        self.resets.clear();
        self.ready.clear();
        let ids: Vec<ConnId> = self.connections.keys().copied().collect();
        for id in ids {
            let Some(connection) = self.connections.get_mut(&id) else {
                continue;
            };
            connection.queued = false;
            if connection.survive_reset() {
                self.settle(id, Verdict::Keep);
            } else {
                self.with(id, |connection, context| {
                    connection.flush_now(context);
                    Verdict::Keep
                });
                self.remove(id);
            }
        }
        self.resets.clear();
    }
}

impl Drop for Muxer {
    fn drop(&mut self) {
        self.reset();
        self.shared.stop();
    }
}
