//! The shim from outside: the binary run as containerd runs it, and its services over a real socket.

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
