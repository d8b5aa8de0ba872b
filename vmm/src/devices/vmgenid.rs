//! The generation of the machine (Microsoft, "Virtual Machine Generation ID"): 16 random bytes in guest memory that change
//! whenever the machine goes on from a saved state, so that two clones do not share what must be unique. Linux mixes them
//! into its random pool and reseeds (drivers/virt/vmgenid.c); kernels without the driver depend on their agent.

#![allow(unsafe_code)]

use acpi_tables::{Aml, aml};

use crate::acpi::shared_page::SharedPage;

/// The device, as the GED names it.
pub const PATH: &str = "\\_SB_.VGEN";

/// A generation nobody has had before.
///
/// # Errors
/// getrandom(2) failed.
pub fn new_id() -> std::io::Result<[u8; 16]> {
    let mut id = [0; 16];
    // SAFETY: `id` has the length given. 16 bytes come in one piece (getrandom(2): up to 256 always do).
    let got = unsafe { libc::getrandom(id.as_mut_ptr().cast(), id.len(), 0) };
    if usize::try_from(got).is_ok_and(|got| got == id.len()) {
        Ok(id)
    } else {
        Err(std::io::Error::last_os_error())
    }
}

/// Writes the device: `ADDR` is where the 16 bytes are.
pub fn write_aml(sink: &mut Vec<u8>) {
    let address = SharedPage::generation_address();
    let (low, high) = (address as u32, (address >> 32) as u32);
    aml::Device::new(
        "VGEN".into(),
        vec![
            &aml::Name::new("_HID".into(), &"DBAL0001"),
            // Linux matches this one, in capitals (drivers/acpi/acpica/nsrepair2.c).
            &aml::Name::new("_CID".into(), &"VM_Gen_Counter"),
            &aml::Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &aml::Name::new("ADDR".into(), &aml::Package::new(vec![&low, &high])),
        ],
    )
    .to_aml_bytes(sink);
}
