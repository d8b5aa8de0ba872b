//! The agent as the runtime sees it: every test starts one in namespaces of its own and drives it over ttrpc.
//! Needs root, busybox-static and iproute2.

// All of it is a test; clippy.toml knows functions with an attribute for that only.
#![allow(clippy::expect_used, clippy::unwrap_used)]

mod errors;
mod exec;
mod hanging;
mod harness;
mod hooks;
mod lifecycle;
mod localhost;
mod mounts;
mod network;
mod pods;
mod stdio;
mod volumes;
