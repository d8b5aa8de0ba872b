//! virtio-blk (virtio 1.2, section 5.2): a disk backed by a raw image file or a block device.
//!
//! Only raw images: a format with a header (qcow2) lets the guest write that header, and with it the names of host
//! files (GHSA-jmr4-g2hv-mjj6).

mod device;
mod disk;
mod request;
#[cfg(test)]
mod tests;
mod worker;

pub use device::Block;
pub use disk::BlockError;
