//! Device models: the fixed ones of the ACPI machine here, virtio devices in [`virtio`].

pub mod cpu_hotplug;
pub mod ged;
pub mod power;
pub mod power_button;
pub mod pvpanic;
pub mod serial;
pub mod virtio;
pub mod vmgenid;
