//! Virtio devices (OASIS virtio 1.2).
//!
//! A device is configured by the guest through a [`transport`], activated once at DRIVER_OK with frozen queues, and
//! from then on runs as a worker on the I/O loop or on threads of its own until it is reset.
//!
//! A new device is a folder here, a variant of [`DeviceConfig`](crate::config::DeviceConfig), and the line beside it that
//! says what the variant's knobs are.

pub(crate) mod balloon;
pub(crate) mod block;
pub(crate) mod config;
pub mod console;
pub(crate) mod counter;
pub(crate) mod device;
pub mod fs;
pub(crate) mod image;
pub(crate) mod interrupt;
pub(crate) mod mem;
pub mod net;
pub(crate) mod pmem;
pub(crate) mod queue;
pub(crate) mod rng;
pub(crate) mod state;
#[cfg(test)]
pub mod test_allocations;
#[cfg(any(test, feature = "fuzzing"))]
pub mod test_resume;
#[cfg(any(test, feature = "fuzzing"))]
pub mod test_ring;
pub(crate) mod transport;
pub mod vsock;
pub(crate) mod worker;

pub(crate) use device::{ActivateError, Activation, ActiveQueue, CHAIN_FEATURES, VirtioDevice, read_space};
pub(crate) use interrupt::Interrupt;
pub(crate) use worker::{LoopWorker, OnLoop, Running};
