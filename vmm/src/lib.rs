//! `dragonball`: a virtual machine monitor as a library.
//!
//! One [`Vm`](vm::Vm) is one KVM virtual machine inside the calling process. There is no control socket and no
//! action queue: every operation is a method that ends in KVM ioctls, and callers may be on any thread.
//!
//! The machine is discovered through ACPI only (hardware-reduced, no PCI, no legacy devices); devices are virtio over
//! mmio, declared in the DSDT, and can be added while the guest runs on unmodified kernels.
//!
//! Modules are floors: each imports only what is listed below it (`tests/layers.rs` holds them to it). The ground's
//! `guest_log` stands first because of its macro.

#[macro_use]
mod guest_log;

pub mod vm;

pub mod probe;

pub mod config;

mod vcpu;

pub mod devices;

mod acpi;
mod boot;
mod irq;

mod bus;

pub mod memory;

mod io_loop;
mod rate_limiter;

pub mod confinement;
mod descriptors;
mod interrupted;
mod kvm;
mod lifecycle;

#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;

pub use config::VmConfig;
pub use confinement::Confinement;
pub use vcpu::metrics::VcpuMetrics;
pub use vm::Vm;
