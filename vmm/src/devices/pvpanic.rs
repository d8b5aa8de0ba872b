//! pvpanic: the guest kernel tells us that it panicked (QEMU docs/specs/pvpanic; Linux drivers/misc/pvpanic).

use std::ops::ControlFlow;

use acpi_tables::{Aml, aml};

use crate::bus::BusDevice;
use crate::lifecycle::ExitReason;

/// Its only I/O port.
pub const PORT: u16 = 0x505;

/// The guest panicked.
const PANICKED: u8 = 1;

/// The device; reading names the events it understands, writing one reports it.
#[derive(Debug, Default)]
pub struct PvPanic;

impl BusDevice for PvPanic {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = PANICKED;
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) -> ControlFlow<ExitReason> {
        match data.first() {
            Some(events) if events & PANICKED != 0 => ControlFlow::Break(ExitReason::Panic),
            _ => ControlFlow::Continue(()),
        }
    }
}

/// Writes the ACPI device `QEMU0001`, which Linux's pvpanic-mmio driver binds to.
pub fn write_aml(sink: &mut Vec<u8>) {
    aml::Device::new(
        "PEVT".into(),
        vec![
            &aml::Name::new("_HID".into(), &"QEMU0001"),
            &aml::Name::new("_STA".into(), &0x0bu8),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&aml::IO::new(PORT, PORT, 1, 1)]),
            ),
        ],
    )
    .to_aml_bytes(sink);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn write_when_panicked_ends_the_machine() {
        assert_eq!(PvPanic.write(0, &[1]), ControlFlow::Break(ExitReason::Panic));
    }

    #[test]
    fn write_when_crash_loaded_or_nothing_continues() {
        assert_eq!(PvPanic.write(0, &[2]), ControlFlow::Continue(()));
        assert_eq!(PvPanic.write(0, &[]), ControlFlow::Continue(()));
    }

    #[test]
    fn read_when_wide_names_the_supported_events_once() {
        let mut data = [0xff; 4];
        PvPanic.read(0, &mut data);
        assert_eq!(data, [1, 0, 0, 0]);
    }
}
