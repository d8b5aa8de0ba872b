//! Device models: the fixed ones of the ACPI machine here, virtio devices in [`virtio`].

pub mod ged;
pub mod power;
pub mod pvpanic;
pub mod serial;
pub mod virtio;
