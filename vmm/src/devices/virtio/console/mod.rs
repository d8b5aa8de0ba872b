//! virtio-console (virtio 1.2, section 5.3): `hvc0` in the guest, its output kept in a bounded [`ConsoleLog`], its input
//! in a bounded [`ConsoleInput`].

mod device;
mod input;
mod log;
mod state;
#[cfg(test)]
mod tests;
mod worker;

pub use device::Console;
pub use input::{ConsoleInput, INPUT_CAPACITY, PendingInput};
pub use log::ConsoleLog;
