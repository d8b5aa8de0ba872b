//! The power button (ACPI 6.5, 4.8.2.2.1.2): a control-method button, pressed through the GED.

use acpi_tables::{Aml, aml};

/// The button, as the GED names it.
pub const PATH: &str = "\\_SB_.PWRB";

/// Writes the button. What the guest does about it is user space's decision (Linux: an input event).
pub fn write_aml(sink: &mut Vec<u8>) {
    let hid = aml::EISAName::new("PNP0C0C");
    aml::Device::new("PWRB".into(), vec![&aml::Name::new("_HID".into(), &hid)]).to_aml_bytes(sink);
}
