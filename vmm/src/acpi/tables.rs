//! The ACPI tables of a hardware-reduced machine: RSDP, XSDT, FADT, MADT and a DSDT, whose content each device writes next
//! to its registers.

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::memory::{GuestMemory, layout};

const OEM_ID: [u8; 6] = *b"DRGNBL";
const OEM_TABLE_ID: [u8; 8] = *b"DRAGONBL";
const OEM_REVISION: u32 = 1;

/// IAPC_BOOT_ARCH (ACPI 6.5, 5.2.9.3): no VGA, no CMOS clock; no 8042 either, since its bit stays 0.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
const BOOT_ARCH_NO_CMOS: u16 = 1 << 5;

/// What the tables say.
pub struct Tables {
    /// vCPUs running at boot.
    pub boot_vcpus: u8,
    /// vCPUs that can exist.
    pub max_vcpus: u8,
    /// The AML of the DSDT.
    pub dsdt: Vec<u8>,
    /// Completes the FADT with the registers of the machine.
    pub fadt: fn(FADTBuilder) -> FADTBuilder,
}

/// The tables do not fit.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// More bytes than the area reserved for them.
    #[error("ACPI tables: {0} bytes do not fit in {max}", max = layout::ACPI_TABLES_SIZE)]
    TooLarge(usize),
    /// Guest memory does not reach there.
    #[error("ACPI tables: cannot write at {address:#x}: {source}")]
    Write {
        /// Guest physical address.
        address: u64,
        /// Cause.
        source: GuestMemoryError,
    },
}

impl Tables {
    /// Writes all tables to [`layout::ACPI_TABLES`]; returns the address of the RSDP, which comes first.
    ///
    /// # Errors
    /// [`AcpiError`] when they do not fit.
    pub fn write(&self, memory: &GuestMemory) -> Result<u64, AcpiError> {
        let bytes = self.image(layout::ACPI_TABLES);
        if bytes.len() as u64 > layout::ACPI_TABLES_SIZE {
            return Err(AcpiError::TooLarge(bytes.len()));
        }
        memory
            .write_slice(&bytes, GuestAddress(layout::ACPI_TABLES))
            .map_err(|source| AcpiError::Write {
                address: layout::ACPI_TABLES,
                source,
            })?;
        Ok(layout::ACPI_TABLES)
    }

    /// All tables as they lie in memory from `base`.
    pub fn image(&self, base: u64) -> Vec<u8> {
        let mut image = vec![0; Rsdp::len()];
        let mut append = |table: &dyn Aml| {
            image.resize(image.len().next_multiple_of(16), 0);
            let address = base + image.len() as u64;
            table.to_aml_bytes(&mut image);
            address
        };
        let dsdt = append(&dsdt(&self.dsdt));
        let fadt = append(&(self.fadt)(fadt(dsdt)).finalize());
        let madt = append(&self.madt());
        let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        xsdt.add_entry(fadt);
        xsdt.add_entry(madt);
        let xsdt = append(&xsdt);
        let mut rsdp = Vec::new();
        Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
        image.splice(..rsdp.len(), rsdp);
        image
    }

    fn madt(&self) -> Sdt {
        // Header, local APIC address, flags; revision 6 is ACPI 6.4 and later.
        let mut madt = Sdt::new(*b"APIC", 44, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        madt.write_u32(36, layout::LOCAL_APIC);
        for index in 0..self.max_vcpus {
            let status = if index < self.boot_vcpus {
                EnabledStatus::Enabled
            } else {
                EnabledStatus::DisabledOnlineCapable
            };
            append(&mut madt, &ProcessorLocalApic::new(index, index, status));
        }
        append(&mut madt, &IoApic::new(0, layout::IO_APIC, 0));
        madt
    }
}

fn fadt(dsdt: u64) -> FADTBuilder {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        // No fixed-hardware buttons.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (BOOT_ARCH_NO_VGA | BOOT_ARCH_NO_CMOS).into();
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"DRAGONBL").into();
    fadt
}

fn append(table: &mut Sdt, structure: &dyn Aml) {
    let mut bytes = Vec::new();
    structure.to_aml_bytes(&mut bytes);
    table.append_slice(&bytes);
}

fn dsdt(aml: &[u8]) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(aml);
    dsdt
}
