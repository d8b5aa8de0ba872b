//! The wire protocol between the runtime on the host and the agent in the guest: ttrpc over vsock port 1024.
//!
//! Message and service modules are generated from `protos/` at build time, with async client and server.

/// `google.protobuf.Empty`, where the generated services look for it.
pub mod empty {
    pub use protobuf::well_known_types::empty::Empty;
}

include!(concat!(env!("OUT_DIR"), "/modules.rs"));

pub mod oci_convert;
