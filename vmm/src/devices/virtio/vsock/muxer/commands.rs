//! What the handles ask for.

use std::os::unix::net::UnixStream;
use std::time::Instant;

use super::{MAX_CONNECTIONS, Muxer};
use crate::devices::virtio::vsock::connection::{Connection, PortPair};
use crate::devices::virtio::vsock::error::VsockError;
use crate::devices::virtio::vsock::host::HostFd;
use crate::devices::virtio::vsock::origin::{Caller, Origin, Progress};
use crate::devices::virtio::vsock::shared::Command;

impl Muxer {
    /// Does what the handles ask for. Also called when the device is activated.
    pub(super) fn run_commands(&mut self) {
        for command in self.shared.take_commands() {
            match command {
                Command::Connect {
                    local,
                    port,
                    deadline,
                    reply,
                    progress,
                } => {
                    let opened = self.room_for(port).and_then(|()| {
                        let opened = UnixStream::pair()
                            .and_then(|(ours, theirs)| Ok((HostFd::new(ours.into())?, theirs)));
                        opened.map_err(|source| VsockError::Connect { port, source })
                    });
                    match opened {
                        Ok((host, theirs)) => {
                            let origin = Origin::Caller(Caller {
                                stream: Some(theirs),
                                reply,
                                progress,
                            });
                            self.request(PortPair { local, peer: port }, origin, host, deadline);
                        }
                        Err(error) => {
                            self.shared.free_port(local);
                            // A caller that has given up does not care.
                            let _ = reply.try_send(Err(error));
                        }
                    }
                }
                Command::Attach {
                    host,
                    local,
                    port,
                    direction,
                    deadline,
                } => match self.room_for(port) {
                    Ok(()) => {
                        let origin = Origin::Attached {
                            direction,
                            progress: Progress::default(),
                        };
                        self.request(PortPair { local, peer: port }, origin, host, deadline);
                    }
                    Err(error) => {
                        guest_log!(WARN, %error, "vsock: attached descriptor closed");
                        self.shared.free_port(local);
                        self.shared.end_attached(local);
                    }
                },
                Command::CloseAttached { local } => {
                    let id = self.connections.iter().find_map(|(&id, connection)| {
                        let pair = connection.pair()?;
                        (pair.local == local && connection.origin().is_attached()).then_some(id)
                    });
                    if let Some(id) = id {
                        self.with(id, |connection, context| connection.end(context));
                    }
                }
            }
        }
    }

    fn room_for(&mut self, port: u32) -> Result<(), VsockError> {
        if self.make_room() {
            return Ok(());
        }
        self.shared.counters.refused.inc();
        Err(VsockError::TooManyConnections {
            port,
            limit: MAX_CONNECTIONS,
        })
    }

    fn request(&mut self, pair: PortPair, origin: Origin, host: HostFd, deadline: Instant) {
        let id = self.next_id();
        let connection = Connection::request(id, pair, origin, host, self.buf_alloc(), deadline);
        self.insert(id, connection);
    }
}
