//! virtio-net (virtio 1.2, section 5.1) over a TAP.
//!
//! A frame travels with a header of 12 bytes (`struct virtio_net_hdr`, 5.1.6) in front. The TAP reads and writes the same
//! header (IFF_VNET_HDR), so that checksums and segmentation are the two kernels' affair: a frame moves between guest
//! memory and the TAP in one system call, header included, without a copy of ours. Only `num_buffers`, which the TAP
//! leaves alone, is written here.
//!
//! Queues: receive 0, transmit 0, receive 1, … and the control queue after the last pair (5.1.2).
//!
//! UFO is not offered: since Linux 4.14 the TAP accepts TUN_F_UFO and does nothing about it, so it cannot say whether it
//! means it.

pub mod config;
mod control;
mod counters;
mod device;
mod handle;
mod rx;
#[cfg(any(test, feature = "fuzzing"))]
pub mod socket;
mod state;
mod switch;
mod tap;
#[cfg(test)]
mod tests;
mod tx;
mod worker;

pub use device::{Net, NetError};
pub use handle::NetHandle;
pub use tap::TapError;

/// Bytes of the header in front of each frame (5.1.6).
const HEADER: usize = 12;
/// Offset of `num_buffers` in it.
const NUM_BUFFERS: u64 = 10;
/// Largest frame, header included: 65,550 bytes of frame (5.1.6.3.1).
const FRAME_MAX: usize = 65_562;
/// Frames per queue and turn of the loop: at most 4 MiB, about a millisecond.
const BUDGET: usize = 64;
/// Linux' UIO_MAXIOV.
const MAX_SEGMENTS: usize = 1024;
