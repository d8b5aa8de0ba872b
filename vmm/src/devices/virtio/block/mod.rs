//! virtio-blk (virtio 1.2, section 5.2): a disk backed by a raw image file or a block device.
//!
//! Only raw images: a format with a header (qcow2) lets the guest write that header, and with it the names of host
//! files (GHSA-jmr4-g2hv-mjj6).
//!
//! A queue's requests are checked and turned into steps (`request.rs`, `step.rs`) that own the memory they need. Two
//! engines carry steps out: io_uring on the I/O loop, many at once (`ring.rs`, `worker/uring.rs`), or blocking calls on a
//! thread per queue (`worker/sync.rs`).

pub mod config;
mod device;
mod disk;
mod ranges;
mod request;
mod ring;
mod state;
mod step;
mod target;
#[cfg(test)]
mod tests;
mod throttle;
mod worker;

pub use device::Block;
