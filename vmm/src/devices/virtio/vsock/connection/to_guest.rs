//! The half of a connection that makes packets for the guest.

use super::{Connection, Context, Next, Phase, PortPair, Verdict};
use crate::devices::virtio::vsock::host::ReadOutcome;
use crate::devices::virtio::vsock::packet::{
    HOST_CID, Header, Op, Pieces, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};
use crate::devices::virtio::vsock::rx_queue::Source;

impl Connection {
    /// What the connection has for the guest now.
    pub(in super::super) fn next(&self) -> Option<Next> {
        if let Some(op) = self.opening {
            return Some(Next::Control(op, 0));
        }
        let established = self.phase == Phase::Established;
        if !established && self.phase != Phase::Closing {
            return None;
        }
        let reads = established
            && self.readable
            && !self.host_ended
            && self.host.is_some()
            && self.origin.direction().reads_host()
            && self.peer_shutdown & SHUTDOWN_RECEIVE == 0;
        if reads {
            match self.outbound.available() {
                0 if !self.credit_asked => return Some(Next::Control(Op::CreditRequest, 0)),
                0 => {}
                credit => return Some(Next::Data(credit)),
            }
        }
        if self.credit_owed || self.inbound.update_due() {
            return Some(Next::Control(Op::CreditUpdate, 0));
        }
        if self.local_shutdown != self.told_shutdown {
            return Some(Next::Control(Op::Shutdown, self.local_shutdown));
        }
        None
    }

    /// The header of a packet that is being sent; takes note of what it tells the guest.
    pub(in super::super) fn header(&mut self, op: Op, flags: u32, len: u32, context: Context<'_>) -> Header {
        let pair = self.pair.unwrap_or(PortPair { local: 0, peer: 0 });
        self.credit_owed = false;
        match op {
            Op::Request | Op::Response => {
                self.opening = None;
                if op == Op::Request {
                    self.origin.note_requested();
                }
            }
            Op::CreditRequest => self.credit_asked = true,
            Op::Shutdown => self.told_shutdown = flags,
            Op::Rw => self.outbound.consume(len),
            Op::Rst | Op::CreditUpdate => {}
        }
        Header {
            src_cid: HOST_CID,
            dst_cid: context.guest_cid,
            src_port: pair.local,
            dst_port: pair.peer,
            len,
            type_: TYPE_STREAM,
            op: op as u16,
            flags,
            buf_alloc: self.inbound.buf_alloc(),
            fwd_cnt: self.inbound.advertise(),
        }
    }

    /// The connection as what [`Next::Data`] is read from.
    pub(in super::super) fn source<'a>(&'a mut self, context: Context<'a>) -> impl Source + 'a {
        Outgoing {
            connection: self,
            context,
        }
    }

    /// What follows from the result of that read.
    pub(in super::super) fn on_read(&mut self, outcome: ReadOutcome, context: Context<'_>) -> Verdict {
        match outcome {
            ReadOutcome::Data(_) => return Verdict::Keep,
            ReadOutcome::Blocked => {
                self.readable = false;
                if !self.end_when_idle {
                    return Verdict::Keep;
                }
            }
            ReadOutcome::End { hung_up } => self.host_hung_up |= hung_up,
        }
        self.host_ended = true;
        self.local_shutdown |= SHUTDOWN_SEND;
        if !self.origin.direction().writes_host() {
            // A FIFO's writer learns that nobody reads any more.
            self.release(context.epoll);
        }
        self.progress(context)
    }
}

/// A connection whose host descriptor is read for the guest.
struct Outgoing<'a> {
    connection: &'a mut Connection,
    context: Context<'a>,
}

impl Source for Outgoing<'_> {
    fn read(&self, room: &Pieces<'_>) -> ReadOutcome {
        match &self.connection.host {
            Some(host) => host.read(room.parts()),
            None => ReadOutcome::End { hung_up: true },
        }
    }

    fn header(&mut self, len: u32) -> Header {
        self.connection.header(Op::Rw, 0, len, self.context)
    }
}
