//! Entry functions of the fuzz targets in `vmm/fuzz`. Not part of the API: they come and go with the devices.
//!
//! Each takes the bytes of the fuzzer as a hostile guest: a script of what the guest does to one device (see `guest.rs`
//! for the actions), over the fake guest of the unit tests. A target fails by a panic of any thread, a sanitizer's
//! report, or a device that does not stop. Nothing outlives a call, and nothing outside a scratch directory is touched.

// Of tests and fuzzing.
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::unwrap_used)]

mod devices;
mod fs;
mod guest;
mod restore;
mod scratch;
mod script;
#[cfg(test)]
mod tests;
mod transport;
mod vsock;

use guest::run;

/// Runs one input.
pub type Target = fn(&[u8]);

/// What a target is called and what runs it. A target is also a file in `vmm/fuzz/fuzz_targets` and an entry in its
/// `Cargo.toml`; a test checks that they agree.
pub const TARGETS: &[(&str, Target)] = &[
    ("balloon", balloon),
    ("block", block),
    ("device_state", device_state),
    ("fs", fs),
    ("hvsock", hvsock),
    ("machine_state", machine_state),
    ("mem", mem),
    ("mmio_transport", mmio_transport),
    ("net", net),
    ("vsock", vsock),
];

/// A disk on an image of 1 MiB, with either engine.
pub fn block(data: &[u8]) {
    run(devices::Disk::default(), data);
}

/// An interface with two queue pairs and the control queue, over sockets instead of a TAP.
pub fn net(data: &[u8]) {
    run(devices::Interface::default(), data);
}

/// Packets, and host ends that talk back.
pub fn vsock(data: &[u8]) {
    run(vsock::Sockets::default(), data);
}

/// Any bytes from a client of the Unix socket beside vsock.
pub fn hvsock(data: &[u8]) {
    crate::devices::virtio::vsock::check_untrusted(data);
}

/// FUSE requests to a share on tmpfs.
pub fn fs(data: &[u8]) {
    run(fs::Share::default(), data);
}

/// Any bytes as the state of a saved machine, behind a header that vouches for them.
pub fn machine_state(data: &[u8]) {
    crate::vm::snapshot::check_untrusted(data);
}

/// A region of two memory sections.
pub fn mem(data: &[u8]) {
    run(devices::Memory::default(), data);
}

/// A balloon with all its queues.
pub fn balloon(data: &[u8]) {
    run(devices::Pages, data);
}

/// Register accesses of any width anywhere in the slot, with suspends and restores in between.
pub fn mmio_transport(data: &[u8]) {
    transport::run(data);
}

/// Any bytes as the saved state of each kind of device and of the transport.
pub fn device_state(data: &[u8]) {
    restore::run(data);
}
