//! Kata-compatible sandboxes and containers over the in-process VMM `dragonball`.
//!
//! A pod is a [`Sandbox`](sandbox) with its own VM; containers live in it through the guest agent. The shim talks to this
//! crate in the types of [`types`]; no containerd wire type enters it.

pub mod error;
pub mod types;
