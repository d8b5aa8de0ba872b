//! Devices that come and go while the guest runs.

use crate::config::{ConfigError, DeviceConfig};
use crate::devices::virtio::balloon::Balloon;
use crate::vm::error::HotplugError;
use crate::vm::info::DeviceInfo;
use crate::vm::machine::Machine;
use crate::vm::{Vm, devices, lock};

impl Vm {
    /// Puts a device into a free slot and tells the guest, which finds it by itself (unless
    /// [`DeviceInfo::needs_bind`]). On a machine not started yet it is there at boot.
    ///
    /// # Errors
    /// [`HotplugError`]; the machine is as before.
    pub fn add_device(&self, config: DeviceConfig) -> Result<DeviceInfo, HotplugError> {
        config.validate()?;
        let id = config.id().to_owned();
        self.with_machine(&id, |machine| {
            if machine.slot_of(&id).is_some() {
                return Err(HotplugError::Exists(id.clone()));
            }
            let no_slot = || HotplugError::NoFreeSlot {
                id: id.clone(),
                slots: machine.slots.len(),
            };
            let slot = machine.free_slot().ok_or_else(no_slot)?;
            if matches!(config, DeviceConfig::Balloon(_)) && machine.with_any(|_: &mut Balloon| ()).is_some()
            {
                return Err(ConfigError::SecondBalloon(id.clone()).into());
            }
            let device = devices::open(&config).and_then(|opened| opened.connect(&machine.windows));
            let device = device.map_err(|reason| HotplugError::Device {
                id: id.clone(),
                reason,
            })?;
            let host_error = |what, source| HotplugError::Host {
                id: id.clone(),
                what,
                source,
            };
            let info = machine
                .plug(slot, device)
                .map_err(|e| host_error(e.what, e.source))?;
            if let Err(error) = machine.ged.notify_slots_changed() {
                machine.unplug(slot);
                return Err(host_error("interrupt of the generic event device", error));
            }
            tracing::info!(id, slot = info.acpi_name, "device added");
            Ok(info)
        })
    }

    /// Takes a device out of the machine. The guest must have unbound its driver first (Linux: write
    /// [`DeviceInfo::acpi_name`] to `/sys/bus/platform/drivers/virtio-mmio/unbind`).
    ///
    /// # Errors
    /// [`HotplugError::NotFound`], or [`HotplugError::InUse`] while a driver is bound.
    pub fn remove_device(&self, id: &str) -> Result<DeviceInfo, HotplugError> {
        self.with_machine(id, |machine| {
            let not_found = || HotplugError::NotFound(id.to_owned());
            let slot = machine.slot_of(id).ok_or_else(not_found)?;
            let active = machine
                .slots
                .lock(slot)
                .is_some_and(|s| s.as_ref().is_some_and(|t| t.is_active()));
            if active {
                return Err(HotplugError::InUse(id.to_owned()));
            }
            let info = machine.unplug(slot).ok_or_else(not_found)?;
            tracing::info!(id, slot = info.acpi_name, "device removed");
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
