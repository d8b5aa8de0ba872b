//! Pods as kubelet runs them, through containerd's CRI plugin and CNI's plugins. Each scenario is played under runc, then under the
//! runtime that is tested, and both must have the same result.
//!
//! The network these tests change is a namespace's of their own: `tests/private-network`.

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
