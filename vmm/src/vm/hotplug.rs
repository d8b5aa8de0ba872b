//! Devices that come and go while the guest runs.

use std::os::fd::OwnedFd;

use crate::config::{ConfigError, DeviceConfig, NetConfig};
use crate::devices::ged::Event;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::config::{Complete, OpenError, Opened};
use crate::devices::virtio::net::{Net, NetHandle};
use crate::vm::error::HotplugError;
use crate::vm::info::DeviceInfo;
use crate::vm::machine::{Content, Machine};
use crate::vm::{Vm, lock};

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
        let id = config.id().to_owned();
        self.with_machine(&id, |machine| {
            if machine.slot_of(&id).is_some() {
                return Err(HotplugError::Exists(id.clone()));
            }
            let no_slot = || HotplugError::NoFreeSlot {
                id: id.clone(),
                slots: machine.board.slots.len(),
            };
            let slot = machine.free_slot().ok_or_else(no_slot)?;
            let second = matches!(config, DeviceConfig::Balloon(_));
            if second && machine.with_any(|_: &mut Balloon| ()).is_some() {
                return Err(ConfigError::SecondBalloon(id.clone()).into());
            }
            let opened = open().and_then(|(opened, extra)| Ok((opened.connect(&machine.windows)?, extra)));
            let (device, extra) = opened.map_err(|source| HotplugError::Device {
                id: id.clone(),
                source,
            })?;
            let host_error = |what, source| HotplugError::Host {
                id: id.clone(),
                what,
                source,
            };
            let info = machine
                .plug(slot, content(Box::new(config.clone())), device)
                .map_err(|e| host_error(e.what, e.source))?;
            if let Err(error) = machine.board.ged.notify(Event::Slots) {
                machine.unplug(slot);
                return Err(host_error("interrupt of the generic event device", error));
            }
            tracing::info!(id, slot = info.address.name(), "device added");
            Ok((info, extra))
        })
    }

    /// Takes a device out of the machine. The guest must have unbound its driver first (Linux: write
    /// [`DeviceAddress::name`](crate::vm::DeviceAddress::name) to `/sys/bus/platform/drivers/virtio-mmio/unbind`).
    ///
    /// # Errors
    /// [`HotplugError::NotFound`], or [`HotplugError::InUse`] while a driver is bound.
    pub fn remove_device(&self, id: &str) -> Result<DeviceInfo, HotplugError> {
        self.with_machine(id, |machine| {
            let not_found = || HotplugError::NotFound(id.to_owned());
            let slot = machine.slot_of(id).ok_or_else(not_found)?;
            let active = machine
                .board
                .slots
                .lock(slot)
                .is_some_and(|s| s.as_ref().is_some_and(|t| t.is_active()));
            if active {
                return Err(HotplugError::InUse(id.to_owned()));
            }
            let info = machine.unplug(slot).ok_or_else(not_found)?;
            tracing::info!(id, slot = info.address.name(), "device removed");
            Ok(info)
        })
    }

    fn with_machine<T>(
        &self,
        id: &str,
        operation: impl FnOnce(&mut Machine) -> Result<T, HotplugError>,
    ) -> Result<T, HotplugError> {
        match &mut *lock(&self.machine) {
            Some(machine) => operation(machine),
            None => Err(HotplugError::State {
                id: id.to_owned(),
                state: self.state(),
            }),
        }
    }
}
