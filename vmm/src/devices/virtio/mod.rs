//! Virtio devices (OASIS virtio 1.2).
//!
//! A device is configured by the guest through a [`transport`], activated once at DRIVER_OK with frozen queues, and
//! from then on runs as a worker on the I/O loop or on threads of its own until it is reset.
//!
//! A new device is a folder here, a variant of [`DeviceConfig`](crate::config::DeviceConfig), and the line beside it that
//! says what the variant's knobs are.

pub mod balloon;
pub mod block;
pub mod config;
pub mod console;
pub mod counter;
pub mod device;
pub mod fs;
pub mod image;
pub mod interrupt;
pub mod mem;
pub mod net;
pub mod pmem;
pub mod queue;
pub mod rng;
pub mod state;
#[cfg(test)]
pub mod test_allocations;
#[cfg(any(test, feature = "fuzzing"))]
pub mod test_resume;
#[cfg(any(test, feature = "fuzzing"))]
pub mod test_ring;
pub mod transport;
pub mod vsock;
pub mod worker;

pub use device::{ActivateError, Activation, ActiveQueue, CHAIN_FEATURES, VirtioDevice, read_space};
pub use interrupt::Interrupt;
pub use worker::{LoopWorker, OnLoop, Running};
