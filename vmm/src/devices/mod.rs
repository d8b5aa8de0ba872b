//! Device models: the fixed ones of the ACPI machine here, virtio devices in [`virtio`].

// What a guest chooses must not be able to panic.
#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

pub mod cpu_hotplug;
pub mod ged;
pub mod power;
pub mod power_button;
pub mod pvpanic;
pub mod serial;
pub mod virtio;
pub mod vmgenid;
