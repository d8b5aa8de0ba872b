//! The shim from outside: the binary run as containerd runs it, and its services over a real socket.

// All of it is a test; clippy.toml knows functions with an attribute for that only.
#![allow(clippy::expect_used, clippy::unwrap_used)]

mod cli;
mod containerd;
mod delete;
mod fake;
mod harness;
mod panic;
mod publisher;
mod sandbox;
mod start;
mod streaming;
mod task;
