//! The ACPI tables of a hardware-reduced machine, and what they share with the machine's registers.

pub mod aml;
pub mod shared_page;
pub mod tables;
