//! The ACPI tables of a hardware-reduced machine: RSDP, XSDT, FADT, MADT and a DSDT put together from what each device
//! writes next to its registers.

pub mod shared_page;

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink, aml};
use vm_memory::{Bytes, GuestAddress};

use crate::devices::virtio::slots;
use crate::devices::{cpu_hotplug, ged, power, power_button, pvpanic, serial, vmgenid};
use crate::memory::{GuestMemory, layout};

const OEM_ID: [u8; 6] = *b"DRGNBL";
const OEM_TABLE_ID: [u8; 8] = *b"DRAGONBL";
const OEM_REVISION: u32 = 1;

/// IAPC_BOOT_ARCH (ACPI 6.5, 5.2.9.3): no VGA, no CMOS clock; no 8042 either, since its bit stays 0.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
const BOOT_ARCH_NO_CMOS: u16 = 1 << 5;

/// What the tables describe.
#[derive(Debug, Clone)]
pub struct Machine {
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

/// The tables do not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AcpiError {
    /// More bytes than the area reserved for them.
    #[error("ACPI tables: {0} bytes do not fit in {max}", max = layout::ACPI_TABLES_SIZE)]
    TooLarge(usize),
    /// Guest memory does not reach there.
    #[error("ACPI tables: cannot write at {address:#x}: {reason}")]
    Write {
        /// Guest physical address.
        address: u64,
        /// Cause.
        reason: String,
    },
}

/// Writes all tables to [`layout::ACPI_TABLES`]; returns the address of the RSDP, which comes first.
///
/// # Errors
/// [`AcpiError`] when they do not fit.
pub fn write_tables(memory: &GuestMemory, machine: &Machine) -> Result<u64, AcpiError> {
    let bytes = tables(machine, layout::ACPI_TABLES);
    if bytes.len() as u64 > layout::ACPI_TABLES_SIZE {
        return Err(AcpiError::TooLarge(bytes.len()));
    }
    memory
        .write_slice(&bytes, GuestAddress(layout::ACPI_TABLES))
        .map_err(|e| AcpiError::Write {
            address: layout::ACPI_TABLES,
            reason: e.to_string(),
        })?;
    Ok(layout::ACPI_TABLES)
}

/// All tables as they lie in memory from `base`.
fn tables(machine: &Machine, base: u64) -> Vec<u8> {
    let mut image = vec![0; Rsdp::len()];
    let mut append = |table: &dyn Aml| {
        image.resize(image.len().next_multiple_of(16), 0);
        let address = base + image.len() as u64;
        table.to_aml_bytes(&mut image);
        address
    };
    let dsdt = append(&dsdt(machine));
    let fadt = append(&fadt(dsdt));
    let madt = append(&madt(machine));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = append(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    image.splice(..rsdp.len(), rsdp);
    image
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        // No fixed-hardware buttons.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (BOOT_ARCH_NO_VGA | BOOT_ARCH_NO_CMOS).into();
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"DRAGONBL").into();
    power::describe(fadt).finalize()
}

fn madt(machine: &Machine) -> Sdt {
    // Header, local APIC address, flags; revision 6 is ACPI 6.4 and later.
    let mut madt = Sdt::new(*b"APIC", 44, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    madt.write_u32(36, layout::LOCAL_APIC);
    for index in 0..machine.max_vcpus {
        let status = if index < machine.boot_vcpus {
            EnabledStatus::Enabled
        } else {
            EnabledStatus::DisabledOnlineCapable
        };
        append(&mut madt, &ProcessorLocalApic::new(index, index, status));
    }
    append(&mut madt, &IoApic::new(0, layout::IO_APIC, 0));
    madt
}

fn append(table: &mut Sdt, structure: &dyn Aml) {
    let mut bytes = Vec::new();
    structure.to_aml_bytes(&mut bytes);
    table.append_slice(&bytes);
}

fn dsdt(machine: &Machine) -> Sdt {
    let mut scope = Vec::new();
    cpu_hotplug::write_aml(&mut scope, machine.max_vcpus);
    slots::write_aml(&mut scope, &machine.slot_gsis);
    power_button::write_aml(&mut scope);
    vmgenid::write_aml(&mut scope);
    ged::write_aml(&mut scope, machine.ged_gsi);
    pvpanic::write_aml(&mut scope);
    if machine.serial {
        serial::write_aml(&mut scope);
    }
    let mut body = aml::Scope::raw("\\_SB_".into(), scope);
    power::write_aml(&mut body);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&body);
    dsdt
}

/// AML that is already encoded.
pub struct Raw<'a>(pub &'a [u8]);

impl Aml for Raw<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.0);
    }
}

#[cfg(test)]
mod tests;
