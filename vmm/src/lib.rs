//! `dragonball`: a virtual machine monitor as a library.
//!
//! One [`Vm`](vm::Vm) is one KVM virtual machine inside the calling process. There is no control socket and no
//! action queue: every operation is a method that ends in KVM ioctls, and callers may be on any thread.
//!
//! The machine is discovered through ACPI only (hardware-reduced, no PCI, no legacy devices); devices are virtio over
//! mmio, declared in the DSDT, and can be added while the guest runs on unmodified kernels.

#[macro_use]
mod guest_log;

mod acpi;
mod boot;
mod bus;
pub mod config;
pub mod devices;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod io_loop;
mod irq;
pub mod memory;
pub mod probe;
pub mod rate_limiter;
mod vcpu;
pub mod vm;

pub use config::VmConfig;
pub use vcpu::metrics::VcpuMetrics;
pub use vm::Vm;
