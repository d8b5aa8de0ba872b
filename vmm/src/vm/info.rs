//! What a machine tells about itself.

use std::collections::BTreeMap;
use std::time::{Instant, SystemTime};

use serde::{Deserialize, Serialize};

use crate::vcpu::metrics::VcpuMetrics;

/// A device and where the guest finds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// Id from the configuration.
    pub id: String,
    /// Where the guest finds it.
    pub address: DeviceAddress,
    /// The slot held another device before: Linux keeps the platform device then, so the guest must write the
    /// [`name`](DeviceAddress::name) to `/sys/bus/platform/drivers/virtio-mmio/bind` itself, and again while that says
    /// ENODEV: the ACPI scan that makes the device present runs beside it.
    pub needs_bind: bool,
}

/// Where the guest finds a device, by the transport that carries it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceAddress {
    /// virtio-mmio.
    Mmio {
        /// First address of its registers.
        start: u64,
        /// Size of its address window in bytes.
        size: u64,
        /// Its interrupt.
        gsi: u32,
        /// Name of the platform device in the guest, e.g. `LNRO0005:03` (`/sys/bus/platform/devices/…`).
        acpi_name: String,
    },
}

impl DeviceAddress {
    /// Name of the device on its bus in the guest's sysfs: for virtio-mmio that of the platform device, e.g. `LNRO0005:03`.
    pub fn name(&self) -> &str {
        match self {
            Self::Mmio { acpi_name, .. } => acpi_name,
        }
    }
}

/// Kernel thread ids, for cgroups and scheduling.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadIds {
    /// vCPU index and thread id.
    pub vcpus: Vec<(u8, i32)>,
    /// The I/O loop.
    pub io: i32,
}

/// A moment, on both clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// For durations.
    pub instant: Instant,
    /// For timelines across processes.
    pub time: SystemTime,
}

impl Mark {
    /// Now.
    pub fn now() -> Self {
        Self {
            instant: Instant::now(),
            time: SystemTime::now(),
        }
    }
}

/// When the phases of a boot happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BootTimings {
    /// `Vm::new` was called.
    pub build_started: Mark,
    /// `Vm::new` was done.
    pub built: Mark,
    /// The vCPUs were let into the guest.
    pub started: Option<Mark>,
}

/// Counters of a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmMetrics {
    /// VM exits, by vCPU index.
    pub vcpus: Vec<VcpuMetrics>,
    /// Devices, in slot order.
    pub devices: Vec<DeviceMetrics>,
    /// Log lines the guests of the process caused that were not written: more than a few of a kind in a minute.
    pub suppressed_log_lines: u64,
}

/// Counters of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceMetrics {
    /// Device id.
    pub id: String,
    /// A driver runs it.
    pub active: bool,
    /// Interrupts sent to the guest.
    pub interrupts: u64,
    /// What the device itself counts, by name.
    pub counters: BTreeMap<String, u64>,
}
