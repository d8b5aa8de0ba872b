//! virtio-vsock (virtio 1.2, 5.10): streams between guest and host, ended in this process.
//!
//! A stream is named by two pairs of context id and port; the guest is [`guest_cid`](crate::config::VsockConfig), the
//! host is 2. Packets with a 44-byte header travel on two queues; a REQUEST answered by a RESPONSE opens a stream (an RST
//! refuses it), RW carries bytes, SHUTDOWN half-closes, RST ends. Flow control is by credit, see `credit.rs`.
//!
//! The muxer is the host side of all streams. Each ends in a descriptor:
//!
//! | opened by | with | descriptor |
//! |---|---|---|
//! | [`VsockHandle::connect`] | a thread of this process | one end of a socket pair, the thread has the other |
//! | [`VsockHandle::attach`] | the runtime | the attached FIFO, pipe, socket, terminal or file itself |
//! | `CONNECT <port>` | a client of the Unix socket | the client's socket |
//! | a REQUEST of the guest | [`VsockHandle::listen`] | one end of a socket pair, `accept` returns the other |
//! | a REQUEST of the guest | nobody in this process | a connection to the Unix socket `<path>_<port>` |
//!
//! Everything runs in one worker on the VM's I/O loop ([`worker`]), without locks shared with other threads but for the
//! command queue. The guest is not trusted: what it can make the host keep is bounded by [`muxer`]'s constants.

mod attach;
pub mod config;
mod connection;
mod credit;
mod device;
mod error;
mod handle;
mod host;
mod listener;
mod metrics;
mod muxer;
mod origin;
mod packet;
mod rx_queue;
mod shared;
mod state;
mod transport_reset;
mod uds;
mod worker;

#[cfg(test)]
mod tests;

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use uds::check_untrusted;

pub use attach::AttachOptions;
pub use connection::Direction;
pub use device::Vsock;
pub use error::{ConnectPhase, VsockError};
pub use handle::VsockHandle;
pub use listener::VsockListener;
pub use metrics::VsockMetrics;
