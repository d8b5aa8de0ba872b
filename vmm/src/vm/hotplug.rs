//! Devices that come and go while the guest runs.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::config::{ConfigError, DeviceConfig, NetConfig};
use crate::devices::ged::Event;
use crate::devices::virtio::config::{Complete, OpenError, Opened};
use crate::devices::virtio::net::{Net, NetHandle};
use crate::vm::error::HotplugError;
use crate::vm::info::DeviceInfo;
use crate::vm::machine::Machine;
use crate::vm::registry::{ConnectError, Content, RemoveError};
use crate::vm::{Vm, VmState, lock};

impl Vm {
    /// Puts a device into a free slot and tells the guest, which finds it by itself (unless
    /// [`DeviceInfo::needs_bind`]). On a machine not started yet it is there at boot.
    ///
    /// # Errors
    /// [`HotplugError`]; the machine is as before.
    pub fn add_device(&self, config: DeviceConfig) -> Result<DeviceInfo, HotplugError> {
        config.validate()?;
        let open = || Ok((config.knobs().open()?, ()));
        self.plug(&config, Content::Device, open).map(|(info, ())| info)
    }

    /// As [`add_device`](Self::add_device), for a network interface: also gives a handle to change its link and limits,
    /// and can take over open TAP queues (`tap_fds`, one for each queue pair; none: the TAP is opened by name).
    ///
    /// # Errors
    /// [`HotplugError`]; the machine is as before.
    pub fn add_net(
        &self,
        config: NetConfig,
        tap_fds: Vec<OwnedFd>,
    ) -> Result<(DeviceInfo, NetHandle), HotplugError> {
        let device = DeviceConfig::Net(config.clone());
        device.validate()?;
        let content = match tap_fds.is_empty() {
            true => Content::Device,
            false => Content::Adopted,
        };
        self.plug(&device, content, || {
            let net = match tap_fds.is_empty() {
                true => Net::new(&config),
                false => Net::with_fds(&config, tap_fds),
            };
            let net = net?;
            let handle = net.handle();
            Ok((Complete::opened(net), handle))
        })
    }

    /// Puts the device of `config` that `open` opens into a free slot, and passes on what else it gives.
    fn plug<T>(
        &self,
        config: &DeviceConfig,
        content: impl FnOnce(Box<DeviceConfig>) -> Content,
        open: impl FnOnce() -> Result<(Box<dyn Opened>, T), OpenError>,
    ) -> Result<(DeviceInfo, T), HotplugError> {
        let id = config.id();
        let device_error = |source: OpenError| HotplugError::Device {
            id: id.to_owned(),
            source,
        };
        // What is refused anyway is not opened. Opening takes as long as the host's storage does, and nobody waits for it.
        slot_for(&*self.machine_for(id)?, config)?;
        let (opened, extra) = open().map_err(device_error)?;

        let _operation = lock(&self.operation);
        let machine = self.machine_for(id)?;
        let slot = slot_for(&machine, config)?;
        let device = opened.connect(&machine.windows).map_err(device_error)?;
        let plugged = machine
            .devices
            .plug(slot, content(Box::new(config.clone())), device);
        let host_error = |what, source| HotplugError::Host {
            id: id.to_owned(),
            what,
            source,
        };
        let info = plugged.map_err(|error| match error {
            ConnectError::Closed => self.ended(id),
            ConnectError::Host { what, source } => host_error(what, source),
        })?;
        if let Err(error) = machine.board.ged.notify(Event::Slots) {
            machine.devices.unplug(slot);
            return Err(host_error("interrupt of the generic event device", error));
        }
        tracing::info!(id, slot = info.address.name(), "device added");
        Ok((info, extra))
    }

    /// Takes a device out of the machine. The guest must have unbound its driver first (Linux: write
    /// [`DeviceAddress::name`](crate::vm::DeviceAddress::name) to `/sys/bus/platform/drivers/virtio-mmio/unbind`).
    ///
    /// # Errors
    /// [`HotplugError::NotFound`], or [`HotplugError::InUse`] while a driver is bound.
    pub fn remove_device(&self, id: &str) -> Result<DeviceInfo, HotplugError> {
        let _operation = lock(&self.operation);
        let machine = self.machine_for(id)?;
        let not_found = || HotplugError::NotFound(id.to_owned());
        let slot = machine.devices.slot_of(id).ok_or_else(not_found)?;
        let removed = machine.devices.unplug_idle(slot);
        let info = removed.map_err(|error| match error {
            RemoveError::Empty => not_found(),
            RemoveError::Active => HotplugError::InUse(id.to_owned()),
        })?;
        tracing::info!(id, slot = info.address.name(), "device removed");
        Ok(info)
    }

    fn machine_for(&self, id: &str) -> Result<Arc<Machine>, HotplugError> {
        self.machine.get().ok_or_else(|| self.ended(id))
    }

    fn ended(&self, id: &str) -> HotplugError {
        HotplugError::State {
            id: id.to_owned(),
            state: self
                .lifecycle
                .ending()
                .map_or_else(|| self.state(), VmState::Stopped),
        }
    }
}

/// The slot for the device of `config`, if `machine` can have it.
fn slot_for(machine: &Machine, config: &DeviceConfig) -> Result<usize, HotplugError> {
    let id = config.id();
    if machine.devices.slot_of(id).is_some() {
        return Err(HotplugError::Exists(id.to_owned()));
    }
    let balloon = |config: &DeviceConfig| matches!(config, DeviceConfig::Balloon(_));
    if balloon(config) && machine.devices.has(balloon) {
        return Err(ConfigError::SecondBalloon(id.to_owned()).into());
    }
    machine
        .devices
        .free_slot()
        .ok_or_else(|| HotplugError::NoFreeSlot {
            id: id.to_owned(),
            slots: machine.devices.len(),
        })
}
