//! The wire protocol between the runtime on the host and the agent in the guest: ttrpc over vsock port 1024.
//!
//! Message and service modules are generated from `protos/` at build time, with async client and server.

// What a guest says must not be able to panic.
#![deny(clippy::indexing_slicing)]

/// `google.protobuf.Empty`, where the generated services look for it.
pub mod empty {
    pub use protobuf::well_known_types::empty::Empty;
}

include!(concat!(env!("OUT_DIR"), "/modules.rs"));

pub mod oci_convert;
pub mod pid_namespace;

/// Vsock port of the guest where the agent connects the host to TCP ports of the pod's own loopback.
///
/// The host writes one line, `CONNECT tcp4 PORT` or `CONNECT tcp6 PORT`. The agent connects to that port of 127.0.0.1
/// or \[::1] and answers `OK`, after which the connection carries the bytes of both directions, the end of each by
/// itself; or `ERROR errno text`, after which it closes.
pub const CONNECT_PORT: u32 = 1030;
