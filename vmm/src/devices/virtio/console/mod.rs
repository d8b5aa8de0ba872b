//! virtio-console (virtio 1.2, section 5.3): `hvc0` in the guest, its output kept in a bounded [`ConsoleLog`].

mod device;
mod log;
#[cfg(test)]
mod tests;
mod worker;

pub use device::Console;
pub use log::ConsoleLog;
