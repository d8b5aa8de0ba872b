//! Kata-compatible sandboxes and containers over the in-process VMM `dragonball`.
//!
//! A pod is a [`Sandbox`](sandbox) with its own VM; containers live in it through the guest agent. The shim talks to this
//! crate in the types of [`types`]; no containerd wire type enters it.
//!
//! Floors, lowest first; each imports only what stands before it (`layers.rs` holds that):
//!
//! | module | what it knows |
//! |---|---|
//! | [`error`], [`types`], [`paths`], [`timeline`] | kinds of errors, requests and events, names on the host, marks for measuring |
//! | [`host`] | primitives of the kernel, and the journal that undoes them after a crash |
//! | [`config`] | `configuration.toml` and annotations |
//! | [`hypervisor`], [`agent`] | the VM and the guest's agent behind traits |
//! | [`resource`] | what a pod needs around its VM: devices, share, rootfs, volumes, network, cgroup; set up, told to the agent, undone |
//! | [`sandbox`] | a pod: its configuration, boot, watch and end |
//! | [`containers`] | containers and processes in a pod |
//! | [`handler`] | the one pod of a shim process, and what may be asked of it |
//! | [`check`], [`features`] | whether a host can do all this, and what a container may ask for |

// What a guest says must not be able to panic.
#![deny(clippy::indexing_slicing)]

pub mod agent;
pub mod check;
pub mod config;
pub mod containers;
pub mod cri;
pub mod error;
pub mod features;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
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
