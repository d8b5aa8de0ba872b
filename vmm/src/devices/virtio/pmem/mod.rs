//! virtio-pmem (virtio 1.2, section 5.19): a file as memory of the guest.
//!
//! The file is mapped into the pmem window, so the guest's loads and stores go to the host's page cache without any exit;
//! the device's only request is "flush". Read-only is enforced without the guest's help: the file is mapped MAP_PRIVATE, so
//! pages the guest writes become this VM's own. A memslot or mapping without write permission would instead turn a write
//! of another device into such a page (DAX) into an error or a signal.

pub mod config;
mod device;
mod file;
mod state;
#[cfg(test)]
mod tests;
mod worker;

pub use device::Pmem;
pub use file::PmemFile;
