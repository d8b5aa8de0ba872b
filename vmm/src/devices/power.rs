//! Sleep and reset registers of a hardware-reduced ACPI machine (ACPI 6.5, 4.8.3.6 and 4.8.3.7).

use std::ops::ControlFlow;

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::{Aml, aml};

use crate::bus::BusDevice;
use crate::lifecycle::ExitReason;

/// First I/O port: sleep control, sleep status, reset.
pub const PORT: u16 = 0x600;
/// Number of ports.
pub const PORTS: u16 = 3;

const SLEEP_CONTROL: u64 = 0;
const RESET: u64 = 2;
const RESET_VALUE: u8 = 1;
/// SLP_TYP of S5 as published in `_S5`.
const S5: u8 = 5;
/// SLP_EN of the sleep control register; SLP_TYP is in bits 2..=4.
const SLEEP_ENABLE: u8 = 1 << 5;

/// The registers; stateless, a matching write ends the machine.
#[derive(Debug, Default)]
pub struct Power;

impl BusDevice for Power {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // WAK_STS is never set: the machine does not come back from S5.
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) -> ControlFlow<ExitReason> {
        match (offset, data) {
            (SLEEP_CONTROL, &[value]) if value & SLEEP_ENABLE != 0 && (value >> 2) & 7 == S5 => {
                ControlFlow::Break(ExitReason::PowerOff)
            }
            (RESET, &[RESET_VALUE]) => ControlFlow::Break(ExitReason::Reboot),
            _ => ControlFlow::Continue(()),
        }
    }
}

/// Real-mode code at the reset vector that writes the reset register: mov dx, port; mov al, 1; out dx, al; hlt.
///
/// Kernels with EFI support do not trust the reset register of a hardware-reduced machine: they ask EFI, which is not
/// there, and then jump to the BIOS (Linux arch/x86/kernel/reboot.c, reboot_init).
pub fn reset_vector() -> [u8; 7] {
    let [low, high] = (PORT + RESET as u16).to_le_bytes();
    [0xba, low, high, 0xb0, RESET_VALUE, 0xee, 0xf4]
}

/// Names the registers in the FADT.
pub fn describe(mut fadt: FADTBuilder) -> FADTBuilder {
    let register = |index: u16| {
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            u64::from(PORT + index),
        )
    };
    fadt.sleep_control_reg = register(0);
    fadt.sleep_status_reg = register(1);
    fadt.reset_reg = register(2);
    fadt.reset_value = RESET_VALUE;
    fadt.flag(Flags::ResetRegSup)
}

/// Writes `\_S5`, which tells the guest the SLP_TYP of power-off.
pub fn write_aml(sink: &mut Vec<u8>) {
    aml::Name::new("_S5_".into(), &aml::Package::new(vec![&S5])).to_aml_bytes(sink);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn write_when_sleep_enable_with_s5_powers_off() {
        let value = S5 << 2 | SLEEP_ENABLE;
        assert_eq!(Power.write(0, &[value]), ControlFlow::Break(ExitReason::PowerOff));
    }

    #[test]
    fn write_when_reset_value_reboots() {
        assert_eq!(Power.write(2, &[1]), ControlFlow::Break(ExitReason::Reboot));
    }

    #[test]
    fn write_when_anything_else_is_ignored() {
        for (offset, data) in [
            (0, &[S5 << 2][..]),
            (0, &[SLEEP_ENABLE]),
            (2, &[0]),
            (1, &[1]),
            (0, &[0x34, 1]),
        ] {
            assert_eq!(
                Power.write(offset, data),
                ControlFlow::Continue(()),
                "{offset} {data:?}"
            );
        }
    }
}
