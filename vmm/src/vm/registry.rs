//! The devices of a machine: what is in which slot, and how it is connected to KVM.
//!
//! The list is locked for as long as it takes to read or change it. A device that is to do something is locked by its slot
//! alone, because that may take long: a disk that is suspended waits for the host's storage.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use kvm_ioctls::{IoEventAddress, VmFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::config::DeviceConfig;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::transport::mmio::registers::register::{INTERRUPT_ACK, QUEUE_NOTIFY};
use crate::devices::virtio::transport::mmio::slots::{self, Slots};
use crate::devices::virtio::transport::mmio::{
    Host, INTERRUPT_USED_RING, MmioTransport, SlotInterrupt, StartError,
};
use crate::memory::layout;
use crate::vm::info::{DeviceAddress, DeviceInfo, DeviceMetrics};
use crate::vm::lock;

/// A device cannot be connected to KVM.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The machine ends.
    #[error("the machine ends")]
    Closed,
    /// The host refused.
    #[error("{what}: {source}")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// Cause.
        source: io::Error,
    },
}

/// A device cannot be taken out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RemoveError {
    /// There is none in the slot.
    Empty,
    /// A driver runs it.
    Active,
}

/// A device that was stopped for a save, or is of a restored machine, cannot go on.
#[derive(Debug, thiserror::Error)]
#[error("device {id}: {source}")]
pub struct ResumeError {
    /// Device id.
    pub id: String,
    /// Cause.
    pub source: StartError,
}

/// No slot holds a device of that name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoSuchDevice;

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

/// What the machine knows about a slot, whatever is in it.
#[derive(Debug)]
struct SlotState {
    gsi: u32,
    /// A device was taken out of it.
    used_before: bool,
    filled: Option<Filled>,
}

/// What is in a slot.
#[derive(Debug)]
struct Filled {
    id: String,
    content: Content,
    irqfd: Arc<EventFd>,
    /// What it counted when somebody asked the last time.
    seen: DeviceMetrics,
}

#[derive(Debug)]
struct List {
    slots: Vec<SlotState>,
    /// Takes what drivers acknowledge without anybody looking at it; made with the first device.
    acknowledged: Option<Arc<EventFd>>,
    /// The machine ends: nothing is filled any more.
    closed: bool,
}

/// The devices of a machine.
#[derive(Debug)]
pub struct Registry {
    slots: Arc<Slots>,
    vm: Arc<VmFd>,
    host: Host,
    list: Mutex<List>,
}

impl Registry {
    /// Empty `slots` with these interrupts, in order. Devices use `host`.
    pub fn new(slots: Arc<Slots>, gsis: &[u32], vm: Arc<VmFd>, host: Host) -> Self {
        let slot = |gsi: &u32| SlotState {
            gsi: *gsi,
            used_before: false,
            filled: None,
        };
        Self {
            slots,
            vm,
            host,
            list: Mutex::new(List {
                slots: gsis.iter().map(slot).collect(),
                acknowledged: None,
                closed: false,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, List> {
        lock(&self.list)
    }

    /// Number of slots, filled or not.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// What is in each slot, and whether it held another device before.
    pub fn contents(&self) -> Vec<(Option<Content>, bool)> {
        let content = |slot: &SlotState| slot.filled.as_ref().map(|filled| filled.content.clone());
        let list = self.lock();
        list.slots
            .iter()
            .map(|slot| (content(slot), slot.used_before))
            .collect()
    }

    /// Marks a slot as one that held a device before.
    pub fn set_used_before(&self, index: usize) {
        if let Some(state) = self.lock().slots.get_mut(index) {
            state.used_before = true;
        }
    }

    /// The slot a new device goes to: preferably one that never had a device, because Linux binds its driver by itself
    /// there.
    pub fn free_slot(&self) -> Option<usize> {
        let list = self.lock();
        let free = |fresh: bool| {
            list.slots
                .iter()
                .position(|slot| slot.filled.is_none() && !(fresh && slot.used_before))
        };
        free(true).or_else(|| free(false))
    }

    /// The slot of the device called `id`.
    pub fn slot_of(&self, id: &str) -> Option<usize> {
        let list = self.lock();
        let is = |slot: &SlotState| slot.filled.as_ref().is_some_and(|filled| filled.id == id);
        list.slots.iter().position(is)
    }

    /// Whether there is a device with such a configuration.
    pub fn has(&self, wanted: impl Fn(&DeviceConfig) -> bool) -> bool {
        let config = |slot: &SlotState| {
            let content = slot.filled.as_ref().map(|filled| &filled.content);
            content.and_then(Content::config).is_some_and(&wanted)
        };
        self.lock().slots.iter().any(config)
    }

    /// Runs `operation` on the transport in slot `index`, locked against the guest. `None` when the slot is empty.
    pub fn with_transport<T>(
        &self,
        index: usize,
        operation: impl FnOnce(&mut MmioTransport) -> T,
    ) -> Option<T> {
        self.slots.lock(index)?.as_mut().map(operation)
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
        let index = self.slot_of(id).ok_or(NoSuchDevice)?;
        let mut slot = self.slots.lock(index).ok_or(NoSuchDevice)?;
        match slot.as_mut() {
            Some(transport) if transport.id() == id => Ok(transport.device_as::<T>().map(operation)),
            _ => Err(NoSuchDevice),
        }
    }

    /// Runs `operation` on the first device that is a `T`, locked against the guest. `None` when there is none.
    pub fn with_any<T: VirtioDevice, R>(&self, operation: impl FnOnce(&mut T) -> R) -> Option<R> {
        for index in 0..self.slots.len() {
            if let Some(mut slot) = self.slots.lock(index)
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
        &self,
        index: usize,
        content: Content,
        device: Box<dyn VirtioDevice>,
    ) -> Result<DeviceInfo, ConnectError> {
        let no_slot = |source| ConnectError::Host { what: "slot", source };
        let registers = self.slots.registers(index).map_err(no_slot)?;
        let mut list = self.lock();
        if list.closed {
            return Err(ConnectError::Closed);
        }
        let List {
            slots, acknowledged, ..
        } = &mut *list;
        let state = slots.get_mut(index);
        let state = state.ok_or_else(|| no_slot(io::ErrorKind::NotFound.into()))?;
        let irqfd = new_eventfd()?;
        self.vm
            .register_irqfd(&irqfd, state.gsi)
            .map_err(connect_error("KVM_IRQFD"))?;
        let queues = device.queue_sizes().len();
        let registered = register_kicks(&self.vm, index, queues).and_then(|kicks| {
            register_acknowledged(&self.vm, index, acknowledged)
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
        let id = device.id().to_owned();
        let info = info(id.clone(), index, state);
        let interrupt = SlotInterrupt::new(registers, irqfd.clone());
        let transport = MmioTransport::new(device, self.host.clone(), interrupt, kicks);
        state.filled = Some(Filled {
            id,
            content,
            irqfd,
            seen: metrics(&transport),
        });
        if let Some(mut slot) = self.slots.lock(index) {
            *slot = Some(transport);
        }
        self.slots.set_present(index, true);
        Ok(info)
    }

    /// Takes the device out of slot `index` unless a driver runs it.
    ///
    /// # Errors
    /// [`RemoveError`].
    pub fn unplug_idle(&self, index: usize) -> Result<DeviceInfo, RemoveError> {
        let transport = {
            let mut slot = self.slots.lock(index).ok_or(RemoveError::Empty)?;
            match slot.as_ref() {
                Some(transport) if transport.is_active() => return Err(RemoveError::Active),
                _ => slot.take().ok_or(RemoveError::Empty)?,
            }
        };
        self.unplugged(index, transport).ok_or(RemoveError::Empty)
    }

    /// Takes the device out of slot `index` and stops it.
    pub fn unplug(&self, index: usize) -> Option<DeviceInfo> {
        let transport = self.slots.lock(index)?.take()?;
        self.unplugged(index, transport)
    }

    /// The rest of a removal, after the guest can reach the device no more.
    fn unplugged(&self, index: usize, mut transport: MmioTransport) -> Option<DeviceInfo> {
        self.slots.set_present(index, false);
        transport.reset();
        transport.show_empty();
        unregister_kicks(&self.vm, index, transport.kicks());
        let mut list = self.lock();
        if let Some(acknowledged) = &list.acknowledged {
            let address = acknowledge_address(index);
            let undone = self
                .vm
                .unregister_ioevent(acknowledged, &address, INTERRUPT_USED_RING);
            unregister("KVM_IOEVENTFD", undone);
        }
        let state = list.slots.get_mut(index)?;
        if let Some(filled) = state.filled.take() {
            unregister("KVM_IRQFD", self.vm.unregister_irqfd(&filled.irqfd, state.gsi));
        }
        state.used_before = true;
        Some(info(transport.id().to_owned(), index, state))
    }

    /// Stops all devices and empties the slots, for good. The vCPUs must be gone.
    pub fn close(&self) {
        self.lock().closed = true;
        for index in 0..self.slots.len() {
            let transport = self.slots.lock(index).and_then(|mut slot| slot.take());
            if let Some(mut transport) = transport {
                transport.reset();
            }
        }
    }

    /// Stops all devices between two requests.
    pub fn suspend(&self) {
        for index in 0..self.slots.len() {
            if let Some(mut slot) = self.slots.lock(index)
                && let Some(transport) = slot.as_mut()
            {
                transport.suspend();
            }
        }
    }

    /// Lets all suspended devices go on.
    ///
    /// # Errors
    /// The first that cannot; the others go on.
    pub fn resume(&self) -> Result<(), ResumeError> {
        let mut result = Ok(());
        for index in 0..self.slots.len() {
            if let Some(mut slot) = self.slots.lock(index)
                && let Some(transport) = slot.as_mut()
            {
                let resumed = transport.resume().map_err(|source| ResumeError {
                    id: transport.id().to_owned(),
                    source,
                });
                result = result.and(resumed);
            }
        }
        result
    }

    /// Counters of the devices in slot order. Those of a device that is busy with something are as they were when somebody
    /// asked the last time.
    pub fn metrics(&self) -> Vec<DeviceMetrics> {
        let mut list = self.lock();
        let filled = list.slots.iter_mut().enumerate();
        filled
            .filter_map(|(index, slot)| {
                let filled = slot.filled.as_mut()?;
                if let Some(slot) = self.slots.try_lock(index)
                    && let Some(transport) = slot.as_ref()
                {
                    filled.seen = metrics(transport);
                }
                Some(filled.seen.clone())
            })
            .collect()
    }
}

fn info(id: String, index: usize, state: &SlotState) -> DeviceInfo {
    DeviceInfo {
        id,
        address: DeviceAddress::Mmio {
            start: Slots::address(index),
            size: layout::VIRTIO_MMIO_SLOT_SIZE,
            gsi: state.gsi,
            acpi_name: slots::acpi_name(index),
        },
        needs_bind: state.used_before,
    }
}

fn metrics(transport: &MmioTransport) -> DeviceMetrics {
    DeviceMetrics {
        id: transport.id().to_owned(),
        active: transport.is_active(),
        interrupts: transport.interrupt().raised(),
        counters: transport.counters(),
    }
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
        .map_err(|source| ConnectError::Host {
            what: "eventfd",
            source,
        })
}

fn connect_error(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> ConnectError {
    move |error| ConnectError::Host {
        what,
        source: io::Error::from_raw_os_error(error.errno()),
    }
}
