//! What a user of containerd sees: one file per concern, each test against a real containerd and the
//! runtime named by `E2E_RUNTIME`.

// All of it is a test; clippy.toml knows functions with an attribute for that only.
#![allow(clippy::expect_used, clippy::unwrap_used)]

mod api;
mod cleanup;
mod confinement;
mod events;
mod exec;
mod failures;
mod files;
mod hooks;
mod hosts;
mod hvsock;
mod isolation;
mod like_runc;
mod localhost;
mod memory;
mod namespaces;
mod net;
mod pods;
mod process;
mod shared_pids;
mod signals;
mod streams;
mod terminal;
mod volumes;
