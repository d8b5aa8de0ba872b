//! Transports: how a driver finds a device, sets it up and hears from it.
//!
//! Devices do not know theirs: they are activated with queues and an [`Interrupt`](super::Interrupt).

pub mod mmio;
