//! The virtio-mmio transport (virtio 1.2, 4.2): registers, feature negotiation and the device status state machine.
//!
//! The guest is not trusted: features and queues can only change in the states the specification allows, queues are
//! checked against guest memory and frozen at DRIVER_OK, and anything else is ignored or answered with
//! DEVICE_NEEDS_RESET.

pub mod interrupt;
pub mod registers;
pub mod slots;

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

pub use interrupt::{INTERRUPT_USED_RING, SlotInterrupt};
use registers::register;

use crate::confinement::Confinement;
use crate::devices::virtio::device::{ActivateError, Activation, ActiveQueue, VirtioDevice};
use crate::devices::virtio::interrupt::Interrupt;
use crate::devices::virtio::queue::ring;
use crate::devices::virtio::state::{QueuePosition, StateError};
use crate::io_loop::IoLoop;
use crate::memory::GuestMemory;

/// "DBAL".
const VENDOR_ID: u32 = u32::from_le_bytes(*b"DBAL");

/// Device status bits (virtio 1.2, 2.1).
mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
}

/// A device cannot start with what the driver, or a saved state, set up.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A queue cannot be used.
    #[error("queue {index}: {source}")]
    Queue {
        /// Queue index.
        index: usize,
        /// What is wrong with it.
        source: QueueError,
    },
    /// The device itself.
    #[error(transparent)]
    Device(#[from] ActivateError),
}

/// A queue the driver set up cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// More entries than a queue can have.
    #[error("size {0}")]
    Size(u32),
    /// A size or an address that is none of a queue's.
    #[error(transparent)]
    Invalid(#[from] virtio_queue::Error),
    /// A part of it is not RAM.
    #[error("{0:x?} is not inside guest memory")]
    Outside(QueueRegisters),
}

/// Saved registers that are none of the device's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum TransportStateError {
    #[error("{saved} queues saved, the device has {present}")]
    Queues { saved: usize, present: usize },
    #[error("device status {0:#x}")]
    Status(u32),
    #[error("the driver uses features {0:#x}, which this host does not offer")]
    Features(u64),
    #[error("queue position {0:?}")]
    Position(QueuePosition),
}

/// A queue as the driver wrote it, not yet validated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRegisters {
    size: u32,
    ready: bool,
    desc: u64,
    avail: u64,
    used: u64,
}

/// What the transport needs from the machine, the same for all devices.
#[derive(Debug, Clone)]
pub struct Host {
    /// Guest RAM.
    pub memory: Arc<GuestMemory>,
    /// Where workers run.
    pub io: IoLoop,
    /// What threads give up.
    pub confinement: Confinement,
}

/// The registers of a slot and where its device stands, as they are saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueRegisters>,
    interrupt_status: u32,
    config_generation: u32,
    /// Empty unless a driver runs the device.
    positions: Vec<QueuePosition>,
}

/// One device behind the registers of one slot.
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    host: Host,
    slot: SlotInterrupt,
    interrupt: Interrupt,
    /// One per queue, bound to QueueNotify.
    kicks: Vec<Arc<EventFd>>,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueRegisters>,
    /// Where the device goes on when it is activated the next time; empty: at the beginning.
    positions: Vec<QueuePosition>,
    /// A driver runs the device, and the device does not run.
    suspended: bool,
}

impl std::fmt::Debug for MmioTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MmioTransport")
            .field("device", &self.device.id())
            .field("status", &self.status)
            .finish_non_exhaustive()
    }
}

fn set_low(target: &mut u64, value: u32) {
    *target = (*target & !0xffff_ffff) | u64::from(value);
}

fn set_high(target: &mut u64, value: u32) {
    *target = (*target & 0xffff_ffff) | u64::from(value) << 32;
}

impl MmioTransport {
    /// Puts `device` behind registers. `kicks` are the ioeventfds of its queues, in order.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        host: Host,
        slot: SlotInterrupt,
        kicks: Vec<Arc<EventFd>>,
    ) -> Self {
        let queues = initial_queues(&*device);
        let transport = Self {
            device,
            host,
            interrupt: Interrupt::new(Arc::new(slot.clone())),
            slot,
            kicks,
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues,
            positions: Vec::new(),
            suspended: false,
        };
        transport.show_constants();
        transport.show_registers();
        transport.show_config();
        transport
    }

    /// The device's id.
    pub fn id(&self) -> &str {
        self.device.id()
    }

    /// The device itself if it is a `T`.
    pub fn device_as<T: VirtioDevice>(&mut self) -> Option<&mut T> {
        let device: &mut dyn Any = &mut *self.device;
        device.downcast_mut()
    }

    /// Whether a driver runs the device.
    pub fn is_active(&self) -> bool {
        self.status & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK
    }

    /// What the device counts, by name.
    pub fn counters(&self) -> BTreeMap<String, u64> {
        let counters = self.device.counters().into_iter();
        counters.map(|(name, value)| (name.to_owned(), value)).collect()
    }

    /// The ioeventfds, one per queue.
    pub fn kicks(&self) -> &[Arc<EventFd>] {
        &self.kicks
    }

    /// Interrupt of the device.
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// Interrupts the guest again if the driver has not acknowledged the last interrupt.
    pub fn repeat_interrupt(&self) {
        self.slot.repeat();
    }

    /// Makes the slot look empty.
    pub fn show_empty(&self) {
        self.slot.registers().show_empty();
    }

    /// What the guest reads at `offset` of the slot; it reads the registers without this transport.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        self.slot.registers().read(offset, data);
    }

    fn show_constants(&self) {
        let registers = self.slot.registers();
        registers.show_empty();
        registers.show(register::DEVICE_ID, self.device.device_type());
        registers.show(register::VENDOR_ID, VENDOR_ID);
        // No shared memory region: length and base read as -1 (virtio 1.2, 4.2.2.1).
        for register in [
            register::SHM_LEN_LOW,
            register::SHM_LEN_HIGH,
            register::SHM_BASE_LOW,
            register::SHM_BASE_HIGH,
        ] {
            registers.show(register, u32::MAX);
        }
    }

    /// Shows the registers that depend on what the driver wrote.
    fn show_registers(&self) {
        let queue = usize::try_from(self.queue_sel)
            .ok()
            .and_then(|sel| self.queues.get(sel));
        let features = match self.device_features_sel {
            0 => self.device.features() as u32,
            1 => (self.device.features() >> 32) as u32,
            _ => 0,
        };
        let registers = self.slot.registers();
        registers.show(register::DEVICE_FEATURES, features);
        registers.show(
            register::QUEUE_NUM_MAX,
            queue.map_or(0, |_| u32::from(self.max_queue_size(self.queue_sel))),
        );
        registers.show(register::QUEUE_READY, u32::from(queue.is_some_and(|q| q.ready)));
        registers.show(register::STATUS, self.status);
    }

    /// Shows the device's configuration space; returns whether it is another one than before.
    fn show_config(&self) -> bool {
        self.interrupt
            .show_config(|space| self.device.read_config(0, space))
    }

    fn max_queue_size(&self, index: u32) -> u16 {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        self.device.queue_sizes().get(index).copied().unwrap_or(0)
    }

    /// Guest write at `offset` into the slot.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            // Before DRIVER the driver must not write the configuration (virtio 1.2, 2.5.2).
            if self.status & status::DRIVER != 0 {
                self.device.write_config(offset, data);
                self.show_config();
            }
            return;
        }
        let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else {
            guest_log!(
                DEBUG,
                device = self.device.id(),
                offset,
                len = data.len(),
                "virtio-mmio: register width ignored"
            );
            return;
        };
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES => self.write_driver_features(value),
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            register::QUEUE_SEL => self.queue_sel = value,
            register::QUEUE_NUM
            | register::QUEUE_READY
            | register::QUEUE_DESC_LOW..=register::QUEUE_DEVICE_HIGH => self.write_queue(offset, value),
            register::QUEUE_NOTIFY => self.notify_queue(value),
            register::INTERRUPT_ACK => {
                let pending = self.slot.registers().interrupt_status();
                pending.fetch_and(!value, Ordering::SeqCst);
                return;
            }
            register::STATUS => {
                self.write_status(value);
                self.show_config();
            }
            _ => return,
        }
        self.show_registers();
    }

    fn write_driver_features(&mut self, value: u32) {
        if self.status & status::DRIVER == 0 || self.status & status::FEATURES_OK != 0 {
            return;
        }
        match self.driver_features_sel {
            0 => set_low(&mut self.driver_features, value),
            1 => set_high(&mut self.driver_features, value),
            _ => {}
        }
    }

    /// Queues may be configured between FEATURES_OK and DRIVER_OK only.
    fn write_queue(&mut self, offset: u64, value: u32) {
        if self.status & (status::FEATURES_OK | status::DRIVER_OK | status::NEEDS_RESET)
            != status::FEATURES_OK
        {
            return;
        }
        let selected = usize::try_from(self.queue_sel)
            .ok()
            .and_then(|sel| self.queues.get_mut(sel));
        let Some(queue) = selected else { return };
        match offset {
            register::QUEUE_READY => queue.ready = value == 1,
            // A ready queue must not change (virtio 1.2, 4.2.2.2).
            _ if queue.ready => {}
            register::QUEUE_NUM => queue.size = value,
            register::QUEUE_DESC_LOW => set_low(&mut queue.desc, value),
            register::QUEUE_DESC_HIGH => set_high(&mut queue.desc, value),
            register::QUEUE_DRIVER_LOW => set_low(&mut queue.avail, value),
            register::QUEUE_DRIVER_HIGH => set_high(&mut queue.avail, value),
            register::QUEUE_DEVICE_LOW => set_low(&mut queue.used, value),
            register::QUEUE_DEVICE_HIGH => set_high(&mut queue.used, value),
            _ => {}
        }
    }

    /// Only reached when KVM did not consume the write through the queue's ioeventfd.
    fn notify_queue(&self, index: u32) {
        let kick = usize::try_from(index)
            .ok()
            .and_then(|index| self.kicks.get(index));
        if let Some(kick) = kick
            && self.is_active()
            && let Err(error) = kick.write(1)
        {
            guest_log!(WARN, device = self.device.id(), %error, "virtio-mmio: cannot write a kick");
        }
    }

    /// Whether a write starts or stops the device's worker: of the status register, with DRIVER_OK or 0.
    pub fn starts_or_stops(offset: u64, data: &[u8]) -> bool {
        let value = <[u8; 4]>::try_from(data).map(u32::from_le_bytes);
        offset == register::STATUS && value.is_ok_and(|value| value == 0 || value & status::DRIVER_OK != 0)
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let old = self.status & !status::NEEDS_RESET;
        let added = value & !old & !status::NEEDS_RESET;
        if value & old != old {
            guest_log!(
                WARN,
                device = self.device.id(),
                value,
                old,
                "virtio-mmio: driver cleared status bits, ignored"
            );
            return;
        }
        // Each step requires the ones before it (virtio 1.2, 3.1.1).
        let mut next = old | added & (status::ACKNOWLEDGE | status::FAILED);
        if added & status::DRIVER != 0 && next & status::ACKNOWLEDGE != 0 {
            next |= status::DRIVER;
        }
        if added & status::FEATURES_OK != 0 && next & status::DRIVER != 0 && self.features_acceptable() {
            next |= status::FEATURES_OK;
        }
        let start = added & status::DRIVER_OK != 0 && next & status::FEATURES_OK != 0;
        self.status = next | self.status & status::NEEDS_RESET;
        if start && next & status::FAILED == 0 && self.status & status::NEEDS_RESET == 0 {
            self.status |= status::DRIVER_OK;
            // The driver sees a failure in the status register.
            let _ = self.activate();
        }
    }

    fn features_acceptable(&self) -> bool {
        let offered = self.device.features();
        let unknown = self.driver_features & !offered;
        let version_1 = self.driver_features & (1 << VIRTIO_F_VERSION_1) != 0;
        if unknown != 0 || !version_1 {
            guest_log!(
                WARN,
                device = self.device.id(),
                features = format_args!("{:#x}", self.driver_features),
                offered = format_args!("{offered:#x}"),
                "virtio-mmio: features refused"
            );
        }
        unknown == 0 && version_1
    }

    fn activate(&mut self) -> Result<(), StartError> {
        let result = self
            .activation()
            .and_then(|activation| Ok(self.device.activate(activation)?));
        self.positions.clear();
        if let Err(error) = &result {
            guest_log!(
                ERROR,
                device = self.device.id(),
                %error,
                "virtio-mmio: device needs reset"
            );
            self.status |= status::NEEDS_RESET;
            self.show_registers();
            self.interrupt.config(|space| self.device.read_config(0, space));
        }
        result
    }

    fn activation(&self) -> Result<Activation, StartError> {
        let mut queues = Vec::new();
        let all = self.queues.iter().zip(self.device.queue_sizes()).zip(&self.kicks);
        for (index, ((registers, max_size), kick)) in all.enumerate() {
            if !registers.ready {
                continue;
            }
            let mut queue = self
                .validate_queue(registers, *max_size)
                .map_err(|source| StartError::Queue { index, source })?;
            if let Some(position) = self.positions.iter().find(|p| usize::from(p.index) == index) {
                queue.set_next_avail(position.next_avail);
                queue.set_next_used(position.next_used);
            }
            queues.push(ActiveQueue {
                index,
                queue,
                kick: kick.clone(),
            });
        }
        Ok(Activation {
            memory: self.host.memory.clone(),
            features: self.driver_features,
            queues,
            interrupt: self.interrupt.clone(),
            io: self.host.io.clone(),
            confinement: self.host.confinement,
        })
    }

    fn validate_queue(&self, registers: &QueueRegisters, max_size: u16) -> Result<Queue, QueueError> {
        let mut queue = Queue::new(max_size)?;
        let size = u16::try_from(registers.size).map_err(|_| QueueError::Size(registers.size))?;
        queue.try_set_size(size)?;
        queue.try_set_desc_table_address(GuestAddress(registers.desc))?;
        queue.try_set_avail_ring_address(GuestAddress(registers.avail))?;
        queue.try_set_used_ring_address(GuestAddress(registers.used))?;
        queue.set_event_idx(self.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        queue.set_ready(true);
        if ring::is_in_memory(&queue, &self.host.memory) {
            Ok(queue)
        } else {
            Err(QueueError::Outside(*registers))
        }
    }

    /// Stops the device between two requests. It goes on with [`resume`](Self::resume).
    pub fn suspend(&mut self) {
        if self.is_active() && !self.suspended {
            self.positions = self.device.suspend();
            self.suspended = true;
        }
    }

    /// Lets a suspended (or restored) device go on where it stood.
    ///
    /// # Errors
    /// [`StartError`]; the driver is told to reset the device.
    pub fn resume(&mut self) -> Result<(), StartError> {
        if !std::mem::take(&mut self.suspended) {
            return Ok(());
        }
        self.activate()?;
        if self.show_config() {
            // Changed while nobody could tell the driver.
            self.interrupt.config(|_| {});
        }
        self.slot.repeat();
        Ok(())
    }

    /// The registers, and what the device itself knows. The device must be suspended.
    ///
    /// # Errors
    /// [`StateError`] when the device cannot be saved.
    pub fn save(&self) -> Result<(TransportState, Vec<u8>), StateError> {
        let registers = self.slot.registers();
        let state = TransportState {
            status: self.status,
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            driver_features: self.driver_features,
            queue_sel: self.queue_sel,
            queues: self.queues.clone(),
            interrupt_status: registers.interrupt_status().load(Ordering::SeqCst),
            config_generation: registers.config_generation().load(Ordering::SeqCst),
            positions: self.positions.clone(),
        };
        Ok((state, self.device.save()?))
    }

    /// Takes over what [`save`](Self::save) gave; the device goes on with [`resume`](Self::resume).
    ///
    /// # Errors
    /// [`StateError`] when it does not fit the device; the transport is of no use then.
    pub fn restore(&mut self, state: TransportState, device: &[u8]) -> Result<(), StateError> {
        let invalid = |error: TransportStateError| StateError::invalid(self.device.id(), error);
        if state.queues.len() != self.queues.len() {
            return Err(invalid(TransportStateError::Queues {
                saved: state.queues.len(),
                present: self.queues.len(),
            }));
        }
        // The states a driver can reach: each bit with the ones before it (virtio 1.2, 3.1.1).
        let steps = [
            status::ACKNOWLEDGE,
            status::DRIVER,
            status::FEATURES_OK,
            status::DRIVER_OK,
        ];
        let gap = steps
            .iter()
            .zip(steps.iter().skip(1))
            .any(|(before, after)| state.status & after != 0 && state.status & before == 0);
        let known = steps.iter().sum::<u32>() | status::NEEDS_RESET | status::FAILED;
        if gap || state.status & !known != 0 {
            return Err(invalid(TransportStateError::Status(state.status)));
        }
        let unknown = state.driver_features & !self.device.features();
        if unknown != 0 && state.status & status::FEATURES_OK != 0 {
            return Err(invalid(TransportStateError::Features(unknown)));
        }
        let mut ready: Vec<usize> = (0..state.queues.len())
            .filter(|index| state.queues.get(*index).is_some_and(|queue| queue.ready))
            .collect();
        for position in &state.positions {
            // Each ready queue has at most one.
            let found = ready
                .iter()
                .position(|index| *index == usize::from(position.index));
            let found = found.ok_or_else(|| invalid(TransportStateError::Position(*position)))?;
            ready.swap_remove(found);
        }
        self.device.restore(device)?;
        self.status = state.status;
        self.device_features_sel = state.device_features_sel;
        self.driver_features_sel = state.driver_features_sel;
        self.driver_features = state.driver_features;
        self.queue_sel = state.queue_sel;
        self.queues = state.queues;
        self.positions = state.positions;
        self.suspended = self.is_active();
        let registers = self.slot.registers();
        registers
            .interrupt_status()
            .store(state.interrupt_status, Ordering::SeqCst);
        registers
            .config_generation()
            .store(state.config_generation, Ordering::SeqCst);
        self.show_registers();
        self.show_config();
        Ok(())
    }

    /// Stops the device and forgets everything the driver set up. When this returns the device no longer touches guest
    /// memory.
    pub fn reset(&mut self) {
        self.device.reset();
        self.status = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        self.queues = initial_queues(&*self.device);
        self.positions.clear();
        self.suspended = false;
        let pending = self.slot.registers().interrupt_status();
        pending.store(0, Ordering::SeqCst);
        self.show_registers();
    }
}

fn initial_queues(device: &dyn VirtioDevice) -> Vec<QueueRegisters> {
    let queue = |max: &u16| QueueRegisters {
        size: u32::from(*max),
        ..QueueRegisters::default()
    };
    device.queue_sizes().iter().map(queue).collect()
}

#[cfg(test)]
mod tests;
