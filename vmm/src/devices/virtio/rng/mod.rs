//! virtio-rng (virtio 1.2, section 5.4): the host's random bytes for the guest.

pub mod config;
mod device;
#[cfg(test)]
mod tests;
mod worker;

pub use device::Rng;
