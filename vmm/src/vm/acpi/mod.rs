//! What the guest finds in its ACPI tables, put together from what each device writes.

use acpi_tables::aml;

use crate::acpi::tables::Tables;
use crate::devices::virtio::transport::mmio::slots;
use crate::devices::{cpu_hotplug, ged, power, power_button, pvpanic, serial, vmgenid};

/// What the firmware of a board would know of it.
#[derive(Debug, Clone)]
pub struct Platform {
    /// vCPUs running at boot.
    pub boot_vcpus: u8,
    /// vCPUs that can exist.
    pub max_vcpus: u8,
    /// Interrupt of the generic event device.
    pub ged_gsi: u32,
    /// Interrupt of each virtio-mmio slot.
    pub slot_gsis: Vec<u32>,
    /// Pins of the I/O APIC.
    pub io_apic_pins: u8,
    /// Whether there is a COM1.
    pub serial: bool,
}

impl Platform {
    /// Its tables.
    pub fn tables(&self) -> Tables {
        Tables {
            boot_vcpus: self.boot_vcpus,
            max_vcpus: self.max_vcpus,
            dsdt: self.dsdt(),
            fadt: power::describe,
        }
    }

    fn dsdt(&self) -> Vec<u8> {
        let mut scope = Vec::new();
        cpu_hotplug::write_aml(&mut scope, self.max_vcpus);
        slots::write_aml(&mut scope, &self.slot_gsis);
        power_button::write_aml(&mut scope);
        vmgenid::write_aml(&mut scope);
        ged::write_aml(&mut scope, self.ged_gsi);
        pvpanic::write_aml(&mut scope);
        if self.serial {
            serial::write_aml(&mut scope);
        }
        let mut dsdt = aml::Scope::raw("\\_SB_".into(), scope);
        power::write_aml(&mut dsdt);
        dsdt
    }
}

#[cfg(test)]
mod tests;
