//! virtio-mem (virtio 1.2, section 5.15): RAM that comes and goes in blocks while the guest runs.
//!
//! The device owns the hotplug window (see [`memory::window`](crate::memory::window)) and says how much of it the guest
//! should use (`requested_size`); the driver answers by plugging and unplugging blocks until `plugged_size` agrees.
//! Linux takes from the lowest address and gives back from the highest, as far as it can move what is in use: guests that
//! should shrink reliably boot with `memhp_default_state=online_movable`.

mod blocks;
mod device;
mod error;
mod handle;
mod region;
mod state;
#[cfg(test)]
mod tests;
mod worker;

pub use device::Mem;
pub use error::ResizeMemoryError;
pub use handle::MemHandle;

/// Id of the device, which comes with [`MemoryConfig`](crate::config::MemoryConfig) and not with the list of devices.
pub const DEVICE_ID: &str = "mem";
/// Size of a block in bytes: a huge page of the host.
pub const BLOCK_SIZE: u64 = 2 << 20;
/// Granularity of requested sizes in bytes: Linux without huge pages manages hotplugged memory in pages of 4 MiB at least
/// (MAX_PAGE_ORDER) and would never reach an odd number of blocks (drivers/virtio/virtio_mem.c, `sb_size`).
pub const GRANULARITY: u64 = 4 << 20;
