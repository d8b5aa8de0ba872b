//! Pods as kubelet runs them, through containerd's CRI plugin and CNI's plugins. Each scenario is played under runc, then under the
//! runtime that is tested, and both must have the same result.
//!
//! The network these tests change is a namespace's of their own: `tests/private-network`.

// All of it is a test; clippy.toml knows functions with an attribute for that only.
#![allow(clippy::expect_used, clippy::unwrap_used)]

mod bad_input;
mod bridge;
mod cleanup;
mod containers;
mod exec;
mod forward;
mod links;
mod namespaces;
mod resources;
mod sandbox;
mod several;
mod smoke;
