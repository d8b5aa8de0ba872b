//! Device models: the fixed ones of the ACPI machine here, virtio devices in [`virtio`].

// What a guest chooses must not be able to panic.
#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

pub(crate) mod cpu_hotplug;
pub(crate) mod ged;
pub(crate) mod power;
pub(crate) mod power_button;
pub(crate) mod pvpanic;
pub(crate) mod serial;
pub mod virtio;
pub(crate) mod vmgenid;
