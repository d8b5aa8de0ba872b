mod properties;

use std::path::{Path, PathBuf};
use std::process::Command;

use super::*;
use crate::memory::layout;

fn tables(platform: &Platform, base: u64) -> Vec<u8> {
    platform.tables().image(base)
}

fn platform(max_vcpus: u8, slots: u32) -> Platform {
    Platform {
        boot_vcpus: 1,
        max_vcpus,
        ged_gsi: 5,
        slot_gsis: (6..6 + slots).collect(),
        io_apic_pins: 24,
        serial: true,
    }
}

fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte))
}

/// The tables of an image, by following the pointers a guest would follow.
fn parse(image: &[u8], base: u64) -> Vec<(String, Vec<u8>)> {
    let at = |address: u64| {
        let start = usize::try_from(address - base).unwrap();
        let length = u32::from_le_bytes(image[start + 4..start + 8].try_into().unwrap()) as usize;
        let table = image[start..start + length].to_vec();
        assert_eq!(checksum(&table), 0, "{}", String::from_utf8_lossy(&table[..4]));
        (String::from_utf8_lossy(&table[..4]).into_owned(), table)
    };
    let pointer =
        |bytes: &[u8], offset: usize| u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap());
    assert_eq!(&image[..8], b"RSD PTR ");
    assert_eq!(checksum(&image[..20]), 0);
    assert_eq!(checksum(&image[..36]), 0);
    let xsdt = at(pointer(image, 24));
    let mut tables: Vec<_> = xsdt.1[36..]
        .chunks(8)
        .map(|entry| at(pointer(entry, 0)))
        .collect();
    let fadt = tables.iter().find(|t| t.0 == "FACP").unwrap();
    tables.push(at(pointer(&fadt.1, 140)));
    tables
}

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("dragonball-acpi-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Disassembles a table with iasl and, for AML, compiles the result again; returns the source.
fn disassemble(dir: &Path, name: &str, table: &[u8]) -> String {
    let file = dir.join(format!("{name}.dat"));
    std::fs::write(&file, table).unwrap();
    let output = Command::new("iasl")
        .current_dir(dir)
        .arg("-d")
        .arg(&file)
        .output()
        .expect("iasl (acpica-tools)");
    let log = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{log}");
    assert!(!log.contains("Invalid") && !log.contains("Error"), "{log}");
    let source = file.with_extension("dsl");
    let text = std::fs::read_to_string(&source).unwrap();
    if name == "DSDT" {
        let output = Command::new("iasl")
            .current_dir(dir)
            .arg(&source)
            .output()
            .unwrap();
        let log =
            String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && log.contains("0 Errors"),
            "{log}\n{text}"
        );
    }
    text
}

#[test]
fn tables_when_read_by_iasl_describe_the_machine() {
    let image = tables(&platform(3, 18), 0xe_0000);
    let scratch = Scratch::new("iasl");
    let mut sources = std::collections::HashMap::new();
    for (name, table) in parse(&image, 0xe_0000) {
        sources.insert(name.clone(), disassemble(&scratch.0, &name, &table));
    }

    let dsdt = &sources["DSDT"];
    assert_eq!(dsdt.matches("\"LNRO0005\"").count(), 18);
    assert_eq!(dsdt.matches("\"ACPI0007\"").count(), 3);
    for expected in [
        "\"ACPI0004\"",
        "\"ACPI0013\"",
        "\"QEMU0001\"",
        "PNP0501",
        "_S5",
        "Notify (\\_SB.VIOC, Zero)",
    ] {
        assert!(dsdt.contains(expected), "{expected} in {dsdt}");
    }
    let fadt = &sources["FACP"];
    assert!(fadt.contains("Hardware Reduced (V5) : 1"), "{fadt}");
    assert!(fadt.contains("Reset Register Supported (V2) : 1"), "{fadt}");
    let madt = &sources["APIC"];
    assert_eq!(madt.matches("Processor Enabled : 1").count(), 1, "{madt}");
    assert_eq!(madt.matches("Runtime Online Capable : 1").count(), 2, "{madt}");
}

#[test]
fn tables_when_the_machine_is_as_large_as_possible_fit_their_area() {
    let image = tables(
        &platform(crate::config::MAX_VCPUS, u32::from(slots::MAX_SLOTS)),
        0xe_0000,
    );
    assert!((image.len() as u64) < layout::ACPI_TABLES_SIZE, "{}", image.len());
    parse(&image, 0xe_0000);
}

#[test]
fn dsdt_when_there_is_no_serial_port_does_not_mention_it() {
    let without = Platform {
        serial: false,
        ..platform(1, 1)
    };
    let image = tables(&without, 0xe_0000);
    assert!(!image.windows(4).any(|w| w == b"COM1"));
}
