//! The parts of a built machine and how they are taken apart.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_ioctls::{IoEventAddress, VmFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::acpi::shared_page::SharedPage;
use crate::config::DeviceConfig;
use crate::devices::cpu_hotplug::CpuHotplug;
use crate::devices::ged::Ged;
use crate::devices::serial::Serial;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::transport::mmio::registers::register::{INTERRUPT_ACK, QUEUE_NOTIFY};
use crate::devices::virtio::transport::mmio::slots::{self, Slots};
use crate::devices::virtio::transport::mmio::{Host, INTERRUPT_USED_RING, MmioTransport, SlotInterrupt};
use crate::io_loop::IoLoop;
use crate::irq::io_apic::IoApic;
use crate::memory::pager::Pager;
use crate::memory::window::Windows;
use crate::memory::write_log::WriteLog;
use crate::memory::{GuestMemory, layout};
use crate::vcpu::create::VcpuContext;
use crate::vcpu::run::{Vcpu, VcpuThread};
use crate::vm::error::BuildError;
use crate::vm::info::{DeviceAddress, DeviceInfo, DeviceMetrics, VmMetrics};

/// A device cannot be connected to KVM.
#[derive(Debug)]
pub struct ConnectError {
    /// What was attempted.
    pub what: &'static str,
    /// Cause.
    pub source: io::Error,
}

impl ConnectError {
    /// The same, of the device `id`.
    pub fn of_device(self, id: String) -> BuildError {
        BuildError::Connect {
            id,
            what: self.what,
            source: self.source,
        }
    }
}

/// No slot holds a device of that name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoSuchDevice;

/// What the machine knows about a slot, whatever is in it.
#[derive(Debug)]
struct SlotState {
    gsi: u32,
    irqfd: Option<Arc<EventFd>>,
    /// A device was taken out of it.
    used_before: bool,
    /// What is in it.
    content: Option<Content>,
}

impl SlotState {
    /// Where the guest finds what is in slot `index`.
    fn address(&self, index: usize) -> DeviceAddress {
        DeviceAddress::Mmio {
            start: Slots::address(index),
            size: layout::VIRTIO_MMIO_SLOT_SIZE,
            gsi: self.gsi,
            acpi_name: slots::acpi_name(index),
        }
    }
}

/// What a slot was filled with: enough to make the device again in another process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    /// The console.
    Console,
    /// The vsock device of the configuration.
    Vsock,
    /// Hotpluggable memory.
    Mem,
    /// A device of the configuration, or one that was added.
    Device(Box<DeviceConfig>),
    /// The same for a device whose host side was handed over open: it cannot be opened by name.
    Adopted(Box<DeviceConfig>),
}

impl Content {
    /// The device's configuration, if it has one of its own.
    pub fn config(&self) -> Option<&DeviceConfig> {
        match self {
            Self::Device(config) | Self::Adopted(config) => Some(config),
            Self::Console | Self::Vsock | Self::Mem => None,
        }
    }
}

/// The processors of a machine.
#[derive(Debug)]
pub struct Vcpus {
    /// vCPU threads, at the gate or in the guest, by ascending index.
    pub threads: Vec<VcpuThread>,
    /// vCPUs the guest gave back: KVM keeps them as long as the VM, so they are used again.
    pub spare: Vec<Vcpu>,
    /// What they have in common.
    pub context: VcpuContext,
    /// What the guest knows of them.
    pub hotplug: Arc<CpuHotplug>,
}

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

/// A built machine; exists until the reaper takes it apart. Fields are dropped in this order.
#[derive(Debug)]
pub struct Machine {
    /// Processors.
    pub vcpus: Vcpus,
    /// Everything that is no device of the configuration.
    pub board: Board,
    slot_states: Vec<SlotState>,
    /// Takes what drivers acknowledge without anybody looking at it; made with the first device.
    acknowledged: Option<Arc<EventFd>>,
    /// KVM's side of the machine.
    pub vm: Arc<VmFd>,
    /// What devices put into guest memory.
    pub windows: Windows,
    /// Guest RAM and windows.
    pub memory: Arc<GuestMemory>,
    /// The loop of the device workers.
    pub io: IoLoop,
    io_thread: JoinHandle<()>,
    /// Where its memory came from, and what is known of the changes since.
    pub origin: Origin,
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
        (io, io_thread): (IoLoop, JoinHandle<()>),
    ) -> Self {
        let slot_states = board
            .slot_gsis
            .iter()
            .map(|gsi| SlotState {
                gsi: *gsi,
                irqfd: None,
                used_before: false,
                content: None,
            })
            .collect();
        Self {
            vcpus,
            board,
            slot_states,
            acknowledged: None,
            vm,
            windows,
            memory,
            io,
            io_thread,
            origin,
        }
    }

    /// What is in slot `index`, and whether it held another device before.
    pub fn slot(&self, index: usize) -> Option<(Option<&Content>, bool)> {
        let state = self.slot_states.get(index)?;
        Some((state.content.as_ref(), state.used_before))
    }

    /// Marks a slot as one that held a device before.
    pub fn set_used_before(&mut self, index: usize) {
        if let Some(state) = self.slot_states.get_mut(index) {
            state.used_before = true;
        }
    }

    /// Runs `operation` on the transport of every filled slot, locked against the guest.
    pub fn each_transport<E>(
        &self,
        mut operation: impl FnMut(usize, &mut MmioTransport) -> Result<(), E>,
    ) -> Result<(), E> {
        for index in 0..self.board.slots.len() {
            if let Some(mut slot) = self.board.slots.lock(index)
                && let Some(transport) = slot.as_mut()
            {
                operation(index, transport)?;
            }
        }
        Ok(())
    }

    /// The slot a new device goes to: preferably one that never had a device, because Linux binds its driver by itself
    /// there.
    pub fn free_slot(&self) -> Option<usize> {
        let free = |index: &usize| self.board.slots.lock(*index).is_some_and(|slot| slot.is_none());
        let fresh = |index: &usize| self.slot_states.get(*index).is_some_and(|s| !s.used_before);
        let all = 0..self.board.slots.len();
        all.clone()
            .find(|i| free(i) && fresh(i))
            .or_else(|| all.clone().find(free))
    }

    /// The slot of the device called `id`.
    pub fn slot_of(&self, id: &str) -> Option<usize> {
        (0..self.board.slots.len()).find(|index| {
            self.board
                .slots
                .lock(*index)
                .is_some_and(|slot| slot.as_ref().is_some_and(|t| t.id() == id))
        })
    }

    /// Runs `operation` on the device called `id`, locked against the guest. `None` when that device is not a `T`.
    ///
    /// # Errors
    /// There is no such device.
    pub fn with_device<T: VirtioDevice, R>(
        &self,
        id: &str,
        operation: impl FnOnce(&mut T) -> R,
    ) -> Result<Option<R>, NoSuchDevice> {
        for index in 0..self.board.slots.len() {
            if let Some(mut slot) = self.board.slots.lock(index)
                && let Some(transport) = slot.as_mut()
                && transport.id() == id
            {
                return Ok(transport.device_as::<T>().map(operation));
            }
        }
        Err(NoSuchDevice)
    }

    /// Runs `operation` on the first device that is a `T`, locked against the guest. `None` when there is none.
    pub fn with_any<T: VirtioDevice, R>(&self, operation: impl FnOnce(&mut T) -> R) -> Option<R> {
        for index in 0..self.board.slots.len() {
            if let Some(mut slot) = self.board.slots.lock(index)
                && let Some(device) = slot.as_mut().and_then(MmioTransport::device_as::<T>)
            {
                return Some(operation(device));
            }
        }
        None
    }

    /// Puts `device` into the empty slot `index`: interrupt, doorbells, registers, presence, in this order.
    ///
    /// # Errors
    /// [`ConnectError`]; the slot is empty as before.
    pub fn plug(
        &mut self,
        index: usize,
        content: Content,
        device: Box<dyn VirtioDevice>,
    ) -> Result<DeviceInfo, ConnectError> {
        let no_slot = |source| ConnectError { what: "slot", source };
        let registers = self.board.slots.registers(index).map_err(no_slot)?;
        let state = self.slot_states.get_mut(index);
        let state = state.ok_or_else(|| no_slot(io::ErrorKind::NotFound.into()))?;
        let irqfd = new_eventfd()?;
        self.vm
            .register_irqfd(&irqfd, state.gsi)
            .map_err(connect_error("KVM_IRQFD"))?;
        let queues = device.queue_sizes().len();
        let registered = register_kicks(&self.vm, index, queues).and_then(|kicks| {
            register_acknowledged(&self.vm, index, &mut self.acknowledged)
                .inspect_err(|_| unregister_kicks(&self.vm, index, &kicks))?;
            Ok(kicks)
        });
        let kicks = match registered {
            Ok(kicks) => kicks,
            Err(error) => {
                unregister("KVM_IRQFD", self.vm.unregister_irqfd(&irqfd, state.gsi));
                return Err(error);
            }
        };
        let info = DeviceInfo {
            id: device.id().to_owned(),
            address: state.address(index),
            needs_bind: state.used_before,
        };
        let host = Host {
            memory: self.memory.clone(),
            io: self.io.clone(),
        };
        let interrupt = SlotInterrupt::new(registers, irqfd.clone());
        state.irqfd = Some(irqfd);
        state.content = Some(content);
        if let Some(mut slot) = self.board.slots.lock(index) {
            *slot = Some(MmioTransport::new(device, host, interrupt, kicks));
        }
        self.board.slots.set_present(index, true);
        Ok(info)
    }

    /// Takes the device out of slot `index` and stops it.
    pub fn unplug(&mut self, index: usize) -> Option<DeviceInfo> {
        let mut transport = self.board.slots.lock(index)?.take()?;
        self.board.slots.set_present(index, false);
        transport.reset();
        transport.show_empty();
        unregister_kicks(&self.vm, index, transport.kicks());
        if let Some(acknowledged) = &self.acknowledged {
            let address = acknowledge_address(index);
            let undone = self
                .vm
                .unregister_ioevent(acknowledged, &address, INTERRUPT_USED_RING);
            unregister("KVM_IOEVENTFD", undone);
        }
        let state = self.slot_states.get_mut(index)?;
        if let Some(irqfd) = state.irqfd.take() {
            unregister("KVM_IRQFD", self.vm.unregister_irqfd(&irqfd, state.gsi));
        }
        state.used_before = true;
        state.content = None;
        Some(DeviceInfo {
            id: transport.id().to_owned(),
            address: state.address(index),
            needs_bind: true,
        })
    }

    /// Counters of all vCPUs and devices.
    pub fn metrics(&self) -> VmMetrics {
        let device = |index| {
            let slot = self.board.slots.lock(index)?;
            let transport = slot.as_ref()?;
            Some(DeviceMetrics {
                id: transport.id().to_owned(),
                active: transport.is_active(),
                interrupts: transport.interrupt().raised(),
                counters: transport.counters(),
            })
        };
        VmMetrics {
            vcpus: self
                .vcpus
                .threads
                .iter()
                .map(|vcpu| vcpu.counters.snapshot())
                .collect(),
            devices: (0..self.board.slots.len()).filter_map(device).collect(),
            suppressed_log_lines: crate::guest_log::suppressed(),
        }
    }

    /// Ends all threads and device workers; the gate must have been ended before. What is left is memory and file
    /// descriptors, freed when the result is dropped.
    pub fn shut_down(mut self) -> Remains {
        let vcpus = std::mem::take(&mut self.vcpus.threads);
        for vcpu in &vcpus {
            vcpu.kick();
        }
        for vcpu in vcpus {
            vcpu.join();
        }
        // Output the guest had queued before its last breath still reaches the console.
        if let Err(error) = self.io.drain() {
            tracing::warn!(%error, "devices are stopped without draining");
        }
        self.windows.close();
        for index in 0..self.board.slots.len() {
            if let Some(mut slot) = self.board.slots.lock(index)
                && let Some(transport) = slot.as_mut()
            {
                transport.reset();
            }
            if let Some(mut slot) = self.board.slots.lock(index) {
                *slot = None;
            }
        }
        self.io.stop();
        if self.io_thread.join().is_err() {
            tracing::error!("I/O loop panicked");
        }
        Remains {
            _vm: self.vm,
            _slots: self.board.slots,
            _origin: self.origin,
            _memory: self.memory,
        }
    }
}

/// What is slow to free: the VM's file descriptor and its memory, in this order.
#[derive(Debug)]
pub struct Remains {
    _vm: Arc<VmFd>,
    _slots: Arc<Slots>,
    _origin: Origin,
    _memory: Arc<GuestMemory>,
}

fn register_kicks(vm: &VmFd, slot: usize, queues: usize) -> Result<Vec<Arc<EventFd>>, ConnectError> {
    let address = IoEventAddress::Mmio(Slots::address(slot) + QUEUE_NOTIFY);
    let mut kicks = Vec::new();
    for queue in (0u32..).take(queues) {
        let registered = new_eventfd().and_then(|kick| {
            vm.register_ioevent(&kick, &address, queue)
                .map_err(connect_error("KVM_IOEVENTFD"))?;
            Ok(kick)
        });
        match registered {
            Ok(kick) => kicks.push(kick),
            Err(error) => {
                unregister_kicks(vm, slot, &kicks);
                return Err(error);
            }
        }
    }
    Ok(kicks)
}

fn unregister_kicks(vm: &VmFd, slot: usize, kicks: &[Arc<EventFd>]) {
    let address = IoEventAddress::Mmio(Slots::address(slot) + QUEUE_NOTIFY);
    for (queue, kick) in (0u32..).zip(kicks) {
        unregister("KVM_IOEVENTFD", vm.unregister_ioevent(kick, &address, queue));
    }
}

fn acknowledge_address(slot: usize) -> IoEventAddress {
    IoEventAddress::Mmio(Slots::address(slot) + INTERRUPT_ACK)
}

/// Lets KVM take the acknowledgement of used buffers alone, the usual one: InterruptStatus keeps the bit then, which only tells
/// a driver to look at its queues. Each interrupt saves the exit to this process. An acknowledgement of a changed configuration
/// comes here and clears the status.
fn register_acknowledged(
    vm: &VmFd,
    slot: usize,
    acknowledged: &mut Option<Arc<EventFd>>,
) -> Result<(), ConnectError> {
    let eventfd = match acknowledged {
        Some(eventfd) => eventfd,
        None => acknowledged.insert(new_eventfd()?),
    };
    vm.register_ioevent(eventfd, &acknowledge_address(slot), INTERRUPT_USED_RING)
        .map_err(connect_error("KVM_IOEVENTFD"))
}

/// Undoing a registration fails only if it was not there; there is nobody to tell.
fn unregister(what: &str, result: Result<(), kvm_ioctls::Error>) {
    if let Err(error) = result {
        tracing::warn!(what, %error, "cannot undo a registration");
    }
}

fn new_eventfd() -> Result<Arc<EventFd>, ConnectError> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
        .map(Arc::new)
        .map_err(|source| ConnectError {
            what: "eventfd",
            source,
        })
}

fn connect_error(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> ConnectError {
    move |error| ConnectError {
        what,
        source: io::Error::from_raw_os_error(error.errno()),
    }
}
