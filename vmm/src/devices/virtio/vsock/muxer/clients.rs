//! Clients of the Unix socket, until their connection is requested.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use super::{Muxer, TIMER_ACCEPT};
use crate::devices::virtio::vsock::connection::{ConnId, Connection, Context, PortPair, Verdict};
use crate::devices::virtio::vsock::host::HostFd;
use crate::devices::virtio::vsock::uds::{self, Handshake};

/// Clients of the Unix socket taken in one go.
const ACCEPT_BATCH: usize = 64;
/// How long not to accept clients after accept(2) has failed, e.g. without file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

impl Muxer {
    /// Takes clients of the Unix socket.
    pub(super) fn accept_clients(&mut self) {
        for _ in 0..ACCEPT_BATCH {
            let Some(endpoint) = &self.endpoint else { return };
            let client = match endpoint.listener.accept() {
                Ok((client, _)) => client,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    guest_log!(WARN, %error, "vsock: cannot accept a client");
                    self.timers.insert((Instant::now() + ACCEPT_PAUSE, TIMER_ACCEPT));
                    return;
                }
            };
            if let Err(error) = self.add_client(client.into()) {
                guest_log!(WARN, %error, "vsock: cannot take a client");
            }
        }
        // There may be more, of which no edge will tell.
        self.timers.insert((Instant::now(), TIMER_ACCEPT));
    }

    fn add_client(&mut self, client: OwnedFd) -> io::Result<()> {
        if !self.make_room() {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        let host = HostFd::new(client)?;
        let now = Instant::now();
        let mut connection = Connection::handshake(self.next_id, host, self.buf_alloc(), now);
        connection.start_host(Context {
            epoll: &self.epoll,
            counters: &self.shared.counters,
            now,
            guest_cid: self.guest_cid,
        })?;
        let id = self.next_id();
        self.insert(id, connection);
        Ok(())
    }

    /// A client has sent something of its CONNECT line, or left.
    pub(super) fn on_client(&mut self, id: ConnId) {
        let handshake = self
            .connections
            .get(&id)
            .and_then(Connection::host)
            .map_or(Handshake::Bad, uds::handshake);
        match handshake {
            Handshake::Incomplete => {}
            Handshake::Bad => self.settle(id, Verdict::Forget),
            Handshake::Port(port) => {
                let pair = PortPair {
                    local: self.shared.take_port(),
                    peer: port,
                };
                self.by_ports.insert(pair, id);
                self.with(id, |connection, context| {
                    connection.handshake_done(pair, context.now);
                    Verdict::Keep
                });
            }
        }
    }
}
