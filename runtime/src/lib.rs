//! Kata-compatible sandboxes and containers over the in-process VMM `dragonball`.
//!
//! A pod is a [`Sandbox`](sandbox) with its own VM; containers live in it through the guest agent. The shim talks to this
//! crate in the types of [`types`]; no containerd wire type enters it.

pub mod agent;
pub mod check;
pub mod config;
pub mod containers;
pub mod cri;
pub mod error;
pub mod handler;
pub mod host;
pub mod hypervisor;
mod instance;
#[cfg(test)]
mod layers;
pub mod paths;
pub mod resource;
pub mod sandbox;
pub mod timeline;
pub mod types;
