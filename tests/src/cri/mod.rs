//! Pods as kubelet runs them: through containerd's CRI plugin, with networks by CNI's plugins.

pub mod client;
pub mod cni;
pub mod config;
mod member;
mod pod;
pub mod pods;
pub mod private;
pub mod spdy;
pub mod traffic;
pub mod view;
pub mod wire;
