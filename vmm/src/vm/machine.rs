//! The parts of a built machine and how they are taken apart.
//!
//! The parts that change have locks of their own, none of which is held while waiting for a file or the guest. So whoever ends
//! the machine, waits for its end or reads its counters needs nothing from an operation that hangs.

use std::fs::File;
use std::sync::{Arc, Mutex};

use kvm_ioctls::VmFd;

use crate::acpi::shared_page::SharedPage;
use crate::confinement::{Confinement, Thread};
use crate::devices::ged::Ged;
use crate::devices::serial::Serial;
use crate::devices::virtio::transport::mmio::Host;
use crate::devices::virtio::transport::mmio::slots::Slots;
use crate::io_loop::IoLoop;
use crate::irq::io_apic::IoApic;
use crate::memory::GuestMemory;
use crate::memory::pager::Pager;
use crate::memory::window::Windows;
use crate::memory::write_log::WriteLog;
use crate::vm::info::VmMetrics;
use crate::vm::lock;
use crate::vm::registry::Registry;
use crate::vm::vcpus::Vcpus;

/// The parts of the board.
#[derive(Debug)]
pub struct Board {
    /// The device slots.
    pub slots: Arc<Slots>,
    /// Interrupt of each slot.
    pub slot_gsis: Vec<u32>,
    /// Tells the guest about changes.
    pub ged: Arc<Ged>,
    /// The interrupt controller.
    pub io_apic: Arc<IoApic>,
    /// What AML reads.
    pub shared: Arc<SharedPage>,
    /// COM1, if there is one.
    pub serial: Option<Arc<Serial>>,
}

/// A built machine. [`shut_down`](Self::shut_down) ends what runs of it; what is left then is slow to free: descriptors and
/// memory, in the order of the fields.
#[derive(Debug)]
pub struct Machine {
    /// Processors.
    pub vcpus: Vcpus,
    /// Devices.
    pub devices: Registry,
    /// Everything that is no device of the configuration.
    pub board: Board,
    /// KVM's side of the machine.
    pub vm: Arc<VmFd>,
    /// What devices put into guest memory.
    pub windows: Windows,
    /// The loop of the device workers.
    pub io: IoLoop,
    io_thread: Mutex<Option<Thread<()>>>,
    /// Where its memory came from, and what is known of the changes since. Locked by a save.
    pub origin: Mutex<Origin>,
    /// Guest RAM and windows.
    pub memory: Arc<GuestMemory>,
    /// Their registers are memory of the guest, too: until KVM's side is gone.
    _slots: Arc<Slots>,
}

/// Where the memory of a machine came from.
#[derive(Debug, Default)]
pub struct Origin {
    /// What was written since the last full save, if that is to be known.
    pub log: Option<WriteLog>,
    /// The file pages not touched yet still come from.
    pub backing: Option<File>,
    /// Who brings them in.
    pub pager: Option<Pager>,
}

impl Machine {
    /// A machine without devices and vCPU threads.
    pub fn new(
        vm: Arc<VmFd>,
        (memory, windows, origin): (Arc<GuestMemory>, Windows, Origin),
        board: Board,
        vcpus: Vcpus,
        (io, io_thread): (IoLoop, Thread<()>),
        confinement: Confinement,
    ) -> Self {
        let host = Host {
            memory: memory.clone(),
            io: io.clone(),
            confinement,
        };
        Self {
            vcpus,
            devices: Registry::new(board.slots.clone(), &board.slot_gsis, vm.clone(), host),
            _slots: board.slots.clone(),
            board,
            vm,
            windows,
            io,
            io_thread: Mutex::new(Some(io_thread)),
            origin: Mutex::new(origin),
            memory,
        }
    }

    /// Counters of all vCPUs and devices.
    pub fn metrics(&self) -> VmMetrics {
        VmMetrics {
            vcpus: self.vcpus.metrics(),
            devices: self.devices.metrics(),
            suppressed_log_lines: crate::guest_log::suppressed(),
        }
    }

    /// Ends all threads and device workers, for good; the gate must have been ended before.
    pub fn shut_down(&self) {
        self.vcpus.end();
        // Nobody is left who writes a status register.
        self.board.slots.end_thread();
        // Output the guest had queued before its last breath still reaches the console.
        if let Err(error) = self.io.drain() {
            tracing::warn!(%error, "devices are stopped without draining");
        }
        self.windows.close();
        self.devices.close();
        self.io.stop();
        let thread = lock(&self.io_thread).take();
        if thread.is_some_and(|thread| thread.join().is_none()) {
            tracing::error!("I/O loop panicked");
        }
    }
}
