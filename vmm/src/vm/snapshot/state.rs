//! What a saved machine consists of, besides its memory.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::VmConfig;
use crate::devices::serial::SerialState;
use crate::devices::virtio::transport::mmio::TransportState;
use crate::irq::io_apic::IoApicState;
use crate::memory::image::Contents;
use crate::vcpu::cpuid::CpuModel;
use crate::vcpu::state::VcpuState;
use crate::vm::registry::Content;

/// A machine between two instructions.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// Names this save; a difference names the save it is against.
    pub id: [u8; 16],
    /// Configuration it was built from.
    pub config: VmConfig,
    /// Its memory.
    pub memory: MemoryState,
    /// Time.
    pub clock: ClockState,
    /// What the guest was shown of the host's CPU.
    pub cpu: CpuModel,
    /// vCPUs the guest has, by index up to the maximum.
    pub present: Vec<bool>,
    /// Those vCPUs.
    pub vcpus: Vec<VcpuState>,
    /// Interrupt controller.
    pub io_apic: IoApicState,
    /// Events the guest has not fetched from the GED.
    pub ged_pending: u8,
    /// COM1, if there is one.
    pub serial: Option<SerialState>,
    /// virtio-mmio slots in order.
    pub slots: Vec<SlotState>,
}

/// Where the memory is.
#[derive(Debug, Serialize, Deserialize)]
pub struct MemoryState {
    /// Size of the window of virtio-pmem in bytes; the other regions follow from the configuration.
    pub pmem_window: u64,
    /// What the memory file has.
    pub contents: Contents,
    /// The full save this one is a difference against.
    pub base: Option<Base>,
}

/// A save another one builds on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// Its folder.
    pub dir: PathBuf,
    /// Its [`MachineState::id`].
    pub id: [u8; 16],
}

/// The machine's clocks when it was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockState {
    /// kvmclock, in ns.
    pub kvmclock: u64,
    /// CLOCK_REALTIME of the host at that moment, in ns.
    pub realtime: u64,
}

/// A slot.
#[derive(Debug, Serialize, Deserialize)]
pub struct SlotState {
    /// A device was taken out of it before.
    pub used_before: bool,
    /// The device in it.
    pub device: Option<DeviceState>,
}

/// A device.
#[derive(Debug, Serialize, Deserialize)]
pub struct DeviceState {
    /// What it is.
    pub content: Content,
    /// Its registers.
    pub transport: TransportState,
    /// What it knows itself.
    pub state: Vec<u8>,
}
