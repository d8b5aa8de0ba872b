//! One stream between a guest port and a host descriptor.
//!
//! ```text
//!  UDS client ─► Handshake ─┐
//!  connect, attach ─────────┴► Requesting ⇄ Backoff
//!                                  │ RESPONSE
//!  guest REQUEST ─────────────► Established ─► Closing ─► (RST)
//!                                  │ RST from the guest, or SHUTDOWN of both directions
//!                                  └─► Flushing: unknown to the guest, its last bytes still go to a slow host
//! ```
//!
//! Bytes the guest sent are written to the host at once and kept in a buffer only while the host is full. The buffer is
//! what `buf_alloc` promises and so cannot grow beyond it. Bytes for the guest are never kept: they stay in the host's
//! descriptor until there is credit and a guest buffer to read them into.

mod to_guest;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{Epoll, EventSet};

use super::credit::{Inbound, Outbound};
use super::host::{HostFd, WriteOutcome};
use super::metrics::Counters;
use super::origin::Origin;
use super::packet::{Header, Op, Pieces, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use crate::descriptors::Ticket;

/// Names a connection for as long as the device lives; never reused. Also its epoll token.
pub(super) type ConnId = u64;

/// How long a guest may take to answer a SHUTDOWN of both directions, a client to send its CONNECT line, and a guest to
/// answer the REQUEST made for that client.
pub(super) const KILL_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a REQUEST may stay unanswered before it is sent again: Linux before 6.4 can lose the RST it owes while its
/// driver comes up. One that was only slow takes no notice of the second.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// First and longest pause before a refused REQUEST is sent again.
const BACKOFF_FIRST: Duration = Duration::from_millis(1);
const BACKOFF_LONGEST: Duration = Duration::from_millis(10);

/// The two ports that identify a connection to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct PortPair {
    /// Host port.
    pub(super) local: u32,
    /// Guest port.
    pub(super) peer: u32,
}

/// Which way bytes flow through a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The descriptor is read and its bytes sent to the guest, e.g. stdin.
    ToGuest,
    /// The guest's bytes are written to the descriptor, e.g. stdout.
    FromGuest,
    /// Both, e.g. a terminal or a socket.
    Both,
}

impl Direction {
    /// Whether the host descriptor is read.
    pub(super) fn reads_host(self) -> bool {
        self != Self::FromGuest
    }

    /// Whether the host descriptor is written.
    pub(super) fn writes_host(self) -> bool {
        self != Self::ToGuest
    }
}

/// See the picture at the top of this file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Handshake,
    Requesting { attempt: u32, deadline: Instant },
    Backoff { attempt: u32, deadline: Instant },
    Established,
    Closing,
    Flushing,
}

/// What becomes of a connection after something happened to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub(super) enum Verdict {
    /// It goes on.
    Keep,
    /// It ends, and the guest is told with an RST.
    Reset,
    /// It ends, and the guest knows.
    Forget,
}

/// What a connection has for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// A packet without payload.
    Control(Op, u32),
    /// Up to so many bytes of the host descriptor.
    Data(u32),
}

/// What connections need of their surroundings.
#[derive(Debug, Clone, Copy)]
pub(super) struct Context<'a> {
    pub(super) epoll: &'a Epoll,
    pub(super) counters: &'a Counters,
    pub(super) now: Instant,
    pub(super) guest_cid: u64,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    id: ConnId,
    /// `None` until a client has named its port.
    pair: Option<PortPair>,
    phase: Phase,
    origin: Origin,
    /// `None` once neither direction needs it.
    host: Option<HostFd>,
    /// REQUEST or RESPONSE that has to be sent.
    opening: Option<Op>,
    inbound: Inbound,
    outbound: Outbound,
    /// A CREDIT_REQUEST of ours is on its way; one per stall.
    credit_asked: bool,
    /// The guest asked for our credit.
    credit_owed: bool,
    /// Bytes from the guest that the host had no room for; at most `inbound.buf_alloc()`.
    buffer: VecDeque<u8>,
    /// The last write found the host full.
    blocked: bool,
    /// The host may have something to read.
    readable: bool,
    /// Nothing more will be read from the host.
    host_ended: bool,
    /// The host's peer has closed both directions.
    host_hung_up: bool,
    /// End the stream toward the guest as soon as the host has nothing to read.
    end_when_idle: bool,
    /// The host was told that the guest sends no more.
    host_write_finished: bool,
    /// SHUTDOWN flags of the guest.
    peer_shutdown: u32,
    /// SHUTDOWN flags of ours, and those the guest has been told.
    local_shutdown: u32,
    told_shutdown: u32,
    /// When `on_timer` is to be called.
    pub(super) timer: Option<Instant>,
    /// The muxer's bookkeeping: in its ready queue; the timer it has armed.
    pub(super) queued: bool,
    pub(super) armed: Option<Instant>,
}

impl Connection {
    fn new(id: ConnId, phase: Phase, origin: Origin, host: HostFd, buf_alloc: u32) -> Self {
        Self {
            id,
            pair: None,
            phase,
            origin,
            host: Some(host),
            opening: None,
            inbound: Inbound::new(buf_alloc),
            outbound: Outbound::default(),
            credit_asked: false,
            credit_owed: false,
            buffer: VecDeque::new(),
            blocked: false,
            readable: false,
            host_ended: false,
            host_hung_up: false,
            end_when_idle: false,
            host_write_finished: false,
            peer_shutdown: 0,
            local_shutdown: 0,
            told_shutdown: 0,
            timer: None,
            queued: false,
            armed: None,
        }
    }

    /// A client of the Unix socket that has not said CONNECT yet.
    pub(super) fn handshake(id: ConnId, host: HostFd, buf_alloc: u32, now: Instant) -> Self {
        let mut connection = Self::new(id, Phase::Handshake, Origin::Client, host, buf_alloc);
        connection.timer = Some(now + KILL_TIMEOUT);
        connection
    }

    /// A connection the host opens.
    pub(super) fn request(
        id: ConnId,
        pair: PortPair,
        origin: Origin,
        host: HostFd,
        buf_alloc: u32,
        deadline: Instant,
    ) -> Self {
        let phase = Phase::Requesting { attempt: 0, deadline };
        let mut connection = Self::new(id, phase, origin, host, buf_alloc);
        connection.pair = Some(pair);
        connection.opening = Some(Op::Request);
        connection.timer = Some(connection.answer_by(deadline, Instant::now()));
        connection
    }

    /// A connection the guest opened with `header`, for which the host has `host`.
    pub(super) fn accept(
        id: ConnId,
        pair: PortPair,
        host: HostFd,
        buf_alloc: u32,
        header: &Header,
        ticket: Ticket,
    ) -> Self {
        let origin = Origin::Guest { _descriptors: ticket };
        let mut connection = Self::new(id, Phase::Established, origin, host, buf_alloc);
        connection.pair = Some(pair);
        connection.opening = Some(Op::Response);
        connection.outbound.update(header.buf_alloc, header.fwd_cnt);
        connection
    }

    pub(super) fn pair(&self) -> Option<PortPair> {
        self.pair
    }

    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    pub(super) fn origin(&self) -> &Origin {
        &self.origin
    }

    pub(super) fn host(&self) -> Option<&HostFd> {
        self.host.as_ref()
    }

    /// The client has named its port.
    pub(super) fn handshake_done(&mut self, pair: PortPair, now: Instant) {
        let deadline = now + KILL_TIMEOUT;
        self.pair = Some(pair);
        self.phase = Phase::Requesting { attempt: 0, deadline };
        self.opening = Some(Op::Request);
        self.timer = Some(deadline);
    }

    /// Registers the host descriptor. Called once, before the first event is expected.
    ///
    /// # Errors
    /// epoll refused the descriptor.
    pub(super) fn start_host(&mut self, context: Context<'_>) -> std::io::Result<()> {
        let reads = self.origin.direction().reads_host();
        if let Some(host) = &mut self.host {
            // What cannot be polled is always ready; for the rest the first event tells.
            self.readable = !host.register(context.epoll, self.id, reads)?;
        }
        Ok(())
    }

    /// A packet of the guest for this connection. Its credit fields are taken, then its operation.
    pub(super) fn on_packet(
        &mut self,
        header: &Header,
        payload: &mut Pieces<'_>,
        context: Context<'_>,
    ) -> Verdict {
        self.outbound.update(header.buf_alloc, header.fwd_cnt);
        if self.outbound.available() > 0 {
            self.credit_asked = false;
        }
        match (self.phase, Op::from_wire(header.op)) {
            (Phase::Requesting { .. }, Some(Op::Response)) => self.establish(context),
            (Phase::Requesting { attempt, deadline }, Some(Op::Rst)) => {
                self.refused(attempt, deadline, context)
            }
            (Phase::Established | Phase::Closing, Some(op)) => {
                self.on_stream_packet(op, header, payload, context)
            }
            // The guest has refused this pair of ports and knows nothing of it.
            (Phase::Backoff { .. }, _) => Verdict::Keep,
            _ => {
                context.counters.malformed.inc();
                Verdict::Reset
            }
        }
    }

    fn on_stream_packet(
        &mut self,
        op: Op,
        header: &Header,
        payload: &mut Pieces<'_>,
        context: Context<'_>,
    ) -> Verdict {
        match op {
            Op::Rw => {
                if self.peer_shutdown & SHUTDOWN_SEND != 0 || !self.inbound.receive(header.len) {
                    context.counters.malformed.inc();
                    return Verdict::Reset;
                }
                context.counters.tx_bytes.add(u64::from(header.len));
                self.deliver(payload, context);
                self.progress(context)
            }
            Op::Shutdown => {
                self.peer_shutdown |= header.flags & SHUTDOWN_BOTH;
                if self.peer_shutdown == SHUTDOWN_BOTH {
                    // The guest has closed its socket and waits for this RST (virtio 1.2, 5.10.6.6).
                    return Verdict::Reset;
                }
                if self.peer_shutdown & SHUTDOWN_RECEIVE != 0
                    && let Some(host) = &self.host
                {
                    host.finish_reading();
                }
                self.progress(context)
            }
            Op::CreditUpdate => Verdict::Keep,
            Op::CreditRequest => {
                self.credit_owed = true;
                Verdict::Keep
            }
            Op::Rst => Verdict::Forget,
            Op::Request | Op::Response => {
                context.counters.malformed.inc();
                Verdict::Reset
            }
        }
    }

    /// The guest accepted.
    fn establish(&mut self, context: Context<'_>) -> Verdict {
        self.phase = Phase::Established;
        self.timer = None;
        let registered = match (&self.origin, self.pair, &mut self.host) {
            // Registered since the handshake, whose events may already have told of the data behind the CONNECT line.
            (Origin::Client, Some(pair), Some(host)) => {
                self.readable = true;
                let line = format!("OK {}\n", pair.local);
                if host.write_buffers(line.as_bytes(), &[]) != WriteOutcome::Data(line.len()) {
                    return Verdict::Reset;
                }
                Ok(())
            }
            _ => self.start_host(context),
        };
        if let Err(source) = registered {
            self.origin.fail(self.pair, source);
            return Verdict::Reset;
        }
        context.counters.connections.inc();
        self.origin.established();
        if self.end_when_idle {
            self.end(context)
        } else {
            Verdict::Keep
        }
    }

    /// The guest answered a REQUEST with RST: nobody listens (yet).
    fn refused(&mut self, attempt: u32, deadline: Instant, context: Context<'_>) -> Verdict {
        if !self.origin.retries() {
            context.counters.refused.inc();
            return Verdict::Forget;
        }
        self.origin.note_refused();
        let pause = BACKOFF_FIRST
            .saturating_mul(1 << attempt.min(10))
            .min(BACKOFF_LONGEST);
        self.phase = Phase::Backoff { attempt, deadline };
        self.timer = Some(deadline.min(context.now + pause));
        Verdict::Keep
    }

    /// Sends a refused REQUEST again, now.
    pub(super) fn retry(&mut self, context: Context<'_>) {
        if let Phase::Backoff { attempt, deadline } = self.phase {
            self.request_again(attempt, deadline, context);
        }
    }

    fn request_again(&mut self, attempt: u32, deadline: Instant, context: Context<'_>) {
        // One that has found no rx buffer yet is still to be sent the first time.
        if self.opening.is_none() {
            context.counters.retries.inc();
        }
        self.phase = Phase::Requesting {
            attempt: attempt.saturating_add(1),
            deadline,
        };
        self.opening = Some(Op::Request);
        self.timer = Some(self.answer_by(deadline, context.now));
    }

    /// When to look after a REQUEST that is sent now.
    fn answer_by(&self, deadline: Instant, now: Instant) -> Instant {
        if self.origin.retries() {
            deadline.min(now + ANSWER_TIMEOUT)
        } else {
            deadline
        }
    }

    /// After a reset of the device: what was being opened is opened again, everything else has ended. True if the
    /// connection goes on.
    pub(super) fn survive_reset(&mut self) -> bool {
        match self.phase {
            Phase::Requesting { attempt, deadline } | Phase::Backoff { attempt, deadline }
                if self.origin.retries() =>
            {
                self.phase = Phase::Requesting { attempt, deadline };
                self.opening = Some(Op::Request);
                self.timer = Some(self.answer_by(deadline, Instant::now()));
                self.outbound = Outbound::default();
                self.origin.note_driver_down();
                true
            }
            _ => false,
        }
    }

    /// Writes `payload` to the host, or keeps what the host has no room for.
    fn deliver(&mut self, payload: &mut Pieces<'_>, context: Context<'_>) {
        let wanted = self.origin.direction().writes_host() && self.local_shutdown & SHUTDOWN_RECEIVE == 0;
        let Some(host) = self.host.as_mut().filter(|_| wanted) else {
            self.drop_bytes(payload.len(), context);
            return;
        };
        if self.buffer.is_empty() && payload.len() > 0 {
            match host.write(payload.parts()) {
                WriteOutcome::Data(count) => {
                    self.inbound.forward(count);
                    payload.skip(count);
                }
                WriteOutcome::Blocked => self.blocked = true,
                WriteOutcome::Broken => {
                    self.drop_bytes(payload.len(), context);
                    self.host_does_not_read(context);
                    return;
                }
            }
        }
        if payload.len() > 0 {
            let mut rest = vec![0; payload.len()];
            payload.copy_to(&mut rest);
            self.buffer.extend(&rest);
            self.flush(context);
        }
    }

    /// Writes the buffer to the host until it is empty or the host is full.
    fn flush(&mut self, context: Context<'_>) {
        while !self.blocked && !self.buffer.is_empty() {
            let Some(host) = &mut self.host else { return };
            let (first, second) = self.buffer.as_slices();
            match host.write_buffers(first, second) {
                WriteOutcome::Data(count) => {
                    self.buffer.drain(..count.min(self.buffer.len()));
                    self.inbound.forward(count);
                }
                WriteOutcome::Blocked => self.blocked = true,
                WriteOutcome::Broken => {
                    let lost = self.buffer.len();
                    self.buffer.clear();
                    self.drop_bytes(lost, context);
                    self.host_does_not_read(context);
                }
            }
        }
        if self.buffer.is_empty() {
            // Give the memory back: most connections never need it again.
            self.buffer = VecDeque::new();
        }
    }

    fn drop_bytes(&mut self, count: usize, context: Context<'_>) {
        self.inbound.forward(count);
        context.counters.dropped_bytes.add(count as u64);
    }

    /// A write failed for good. A stream is closed; an attached descriptor keeps the guest's writer going, like a
    /// terminal whose window is gone, and a FIFO may even get a new reader.
    fn host_does_not_read(&mut self, context: Context<'_>) {
        if !self.origin.is_attached() && self.phase == Phase::Established {
            self.close(context.now);
        }
    }

    /// Announces the end of both directions and gives the guest [`KILL_TIMEOUT`] to agree.
    fn close(&mut self, now: Instant) {
        self.local_shutdown = SHUTDOWN_BOTH;
        self.host_ended = true;
        self.phase = Phase::Closing;
        self.timer = Some(now + KILL_TIMEOUT);
    }

    /// What follows from half-closes, after any event.
    fn progress(&mut self, context: Context<'_>) -> Verdict {
        if self.phase != Phase::Established {
            return Verdict::Keep;
        }
        let guest_ended = self.peer_shutdown & SHUTDOWN_SEND != 0 && self.buffer.is_empty();
        if guest_ended && !self.origin.direction().reads_host() {
            // Closing the descriptor is the only way to tell a FIFO's reader.
            return Verdict::Reset;
        }
        if guest_ended && !self.host_write_finished {
            self.host_write_finished = true;
            if let Some(host) = &self.host {
                host.finish_writing();
            }
        }
        let nothing_to_read = self.host_ended || self.peer_shutdown & SHUTDOWN_RECEIVE != 0;
        let abandoned = nothing_to_read && self.host_hung_up && !self.origin.is_attached();
        if abandoned || (self.host_ended && guest_ended) {
            self.close(context.now);
        }
        Verdict::Keep
    }

    /// The host descriptor became ready for `events`.
    pub(super) fn on_host_event(&mut self, events: EventSet, context: Context<'_>) -> Verdict {
        let gone = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        if gone || events.intersects(EventSet::IN | EventSet::READ_HANG_UP) {
            self.readable = true;
        }
        if events.contains(EventSet::HANG_UP) {
            self.host_hung_up = true;
        }
        if gone || events.contains(EventSet::OUT) {
            self.blocked = false;
            self.flush(context);
        }
        if self.phase == Phase::Flushing && self.buffer.is_empty() {
            return Verdict::Forget;
        }
        self.progress(context)
    }

    /// The time in `timer` has come.
    pub(super) fn on_timer(&mut self, context: Context<'_>) -> Verdict {
        self.timer = None;
        match self.phase {
            Phase::Handshake => Verdict::Forget,
            Phase::Requesting { attempt, deadline } if context.now < deadline => {
                self.request_again(attempt, deadline, context);
                Verdict::Keep
            }
            Phase::Requesting { .. } => {
                self.origin.gave_up(self.pair);
                if self.opening.is_none() {
                    Verdict::Reset
                } else {
                    Verdict::Forget
                }
            }
            Phase::Backoff { deadline, .. } if context.now >= deadline => {
                self.origin.gave_up(self.pair);
                Verdict::Forget
            }
            Phase::Backoff { .. } => {
                self.retry(context);
                Verdict::Keep
            }
            Phase::Closing => Verdict::Reset,
            Phase::Established | Phase::Flushing => Verdict::Keep,
        }
    }

    /// [`close_attached`](super::VsockHandle::close_attached): ends the stream toward the guest once everything that
    /// is in the descriptor now has been sent, or the whole connection if the descriptor is not read. Whoever ends an
    /// output has waited for its reader as long as it wanted: what the reader has not taken is given up, or a reader that
    /// never reads would keep buffer and descriptor for ever.
    pub(super) fn end(&mut self, context: Context<'_>) -> Verdict {
        self.end_when_idle = true;
        if self.origin.direction().reads_host() {
            // Provokes the read that finds the descriptor idle; before that, the connection is still wanted.
            self.readable = true;
            return Verdict::Keep;
        }
        self.drop_bytes(self.buffer.len(), context);
        self.buffer = VecDeque::new();
        match self.phase {
            Phase::Established => {
                self.close(context.now);
                Verdict::Keep
            }
            Phase::Flushing => Verdict::Forget,
            Phase::Requesting { .. } if self.opening.is_none() => Verdict::Reset,
            Phase::Handshake | Phase::Requesting { .. } | Phase::Backoff { .. } => Verdict::Forget,
            Phase::Closing => Verdict::Keep,
        }
    }

    /// Keeps the connection, unknown to the guest, only as long as the host has not taken the last bytes. False if there
    /// are none.
    pub(super) fn linger(&mut self) -> bool {
        self.phase = Phase::Flushing;
        self.timer = None;
        self.host.is_some() && !self.buffer.is_empty()
    }

    /// One last try to give the host what it is owed, at the end of the device.
    pub(super) fn flush_now(&mut self, context: Context<'_>) {
        self.blocked = false;
        self.flush(context);
    }

    /// Leaves epoll; the connection is about to be dropped.
    pub(super) fn release(&mut self, epoll: &Epoll) {
        if let Some(mut host) = self.host.take() {
            host.unregister(epoll);
        }
    }

    /// Keeps the interest in write readiness equal to the need of it.
    pub(super) fn update_interest(&mut self, epoll: &Epoll) {
        let wait = self.blocked && !self.buffer.is_empty();
        let reads = self.origin.direction().reads_host() && self.phase != Phase::Flushing;
        if let Some(host) = &mut self.host
            && let Err(error) = host.wait_for_output(epoll, self.id, reads, wait)
        {
            guest_log!(WARN, %error, "vsock: cannot wait for room on the host side");
        }
    }
}
