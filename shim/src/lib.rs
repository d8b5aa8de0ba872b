//! The process between containerd and a pod's virtual machine.
//!
//! containerd runs `containerd-shim-kata-v2` with the bundle as working folder and Go-style flags ([`args`]):
//! - `start` ([`start`]) binds the pod's socket, re-executes the binary as the long-running shim and prints the address;
//! - no action ([`run`]) is that shim: Task service v2 and v3, the Sandbox service and streams ([`streaming_service`]) on the
//!   inherited socket, events to containerd ([`events`]), logs into the bundle's FIFO ([`logging`]);
//! - `delete` ([`delete`]) cleans up behind a shim that died;
//! - `-version` and `-info` ([`info`]) describe the binary.
//!
//! Requests become [`runtime::types`] values ([`convert`]) and errors become gRPC codes ([`grpc`]); nothing below this
//! crate sees a containerd message, and nothing here knows KVM.

// What a guest or a client says must not be able to panic.
#![deny(clippy::indexing_slicing)]

pub mod accept;
pub mod address;
pub mod args;
pub mod bootstrap;
pub mod bundle;
pub mod convert;
pub mod delete;
pub mod events;
pub mod forward;
pub mod frames;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod grpc;
pub mod idle;
pub mod info;
pub mod logfmt;
pub mod logging;
pub mod options;
pub mod pod;
pub mod process;
pub mod requests;
pub mod run;
pub mod sandbox_service;
pub mod server;
pub mod signals;
pub mod socket;
pub mod spawn;
pub mod start;
pub mod streaming_service;
pub mod task_service;
pub mod version;
