//! Random machines, their tables read by iasl, which is not ours.

use proptest::prelude::*;

use super::*;

prop_compose! {
    fn any_platform()(max_vcpus in 1..=crate::config::MAX_VCPUS)(
        boot_vcpus in 1..=max_vcpus,
        max_vcpus in Just(max_vcpus),
        gsis in prop::sample::subsequence((5..128).collect::<Vec<u32>>(), 1..=1 + usize::from(slots::MAX_SLOTS)).prop_shuffle(),
        serial in any::<bool>(),
    ) -> Platform {
        Platform { boot_vcpus, max_vcpus, ged_gsi: gsis[0], slot_gsis: gsis[1..].to_vec(), io_apic_pins: 128, serial }
    }
}

/// Numbers after `label` in a disassembled table, e.g. `[02Dh 0045 001h] Local Apic ID : 01`.
fn numbers(source: &str, label: &str) -> Vec<u32> {
    let number =
        |line: &str| u32::from_str_radix(line.split_once(label)?.1.split_once(':')?.1.trim(), 16).ok();
    source.lines().filter_map(number).collect()
}

/// Numbers of the `Interrupt` resources, in order: the line after each opening parenthesis and brace.
fn interrupts(source: &str) -> Vec<u32> {
    let of = |text: &str| {
        let number = text
            .split_once('{')?
            .1
            .split_once('}')?
            .0
            .trim()
            .trim_end_matches(',');
        u32::from_str_radix(number.strip_prefix("0x")?, 16).ok()
    };
    source
        .split("Interrupt (")
        .skip(1)
        .map(|text| of(text).unwrap())
        .collect()
}

proptest! {
    #[test]
    fn tables_when_the_machine_is_any_fit_and_are_sound(platform in any_platform(), base in 0u64..1 << 40) {
        let image = tables(&platform, base);
        prop_assert!(image.len() as u64 <= layout::ACPI_TABLES_SIZE);
        let names: Vec<String> = parse(&image, base).into_iter().map(|table| table.0).collect();
        prop_assert_eq!(names, ["FACP", "APIC", "DSDT"]);
    }
}

mod slow_properties {
    use super::*;

    proptest! {
        // iasl takes up to a second for the largest machines.
        #![proptest_config(ProptestConfig { cases: 8, max_shrink_iters: 8, ..ProptestConfig::default() })]

        #[test]
        fn tables_when_the_machine_is_any_are_read_by_iasl_as_that_machine(platform in any_platform()) {
            let scratch = Scratch::new("any");
            let image = tables(&platform, layout::ACPI_TABLES);
            let sources: std::collections::HashMap<_, _> = parse(&image, layout::ACPI_TABLES)
                .into_iter()
                .map(|(name, table)| (name.clone(), disassemble(&scratch.0, &name, &table)))
                .collect();

            let dsdt = &sources["DSDT"];
            prop_assert_eq!(dsdt.matches("\"LNRO0005\"").count(), platform.slot_gsis.len());
            prop_assert_eq!(dsdt.matches("\"ACPI0007\"").count(), usize::from(platform.max_vcpus));
            prop_assert_eq!(dsdt.contains("PNP0501"), platform.serial);
            let interrupts = interrupts(dsdt);
            let mut expected = platform.slot_gsis.clone();
            expected.push(platform.ged_gsi);
            if platform.serial {
                // IRQ 4, as on every PC.
                expected.push(4);
            }
            prop_assert_eq!(&interrupts, &expected);
            for (slot, _) in platform.slot_gsis.iter().enumerate() {
                let address = format!("0x{:08X},", slots::Slots::address(slot));
                prop_assert_eq!(dsdt.matches(&address).count(), 1, "{}", address);
            }

            let madt = &sources["APIC"];
            let all: Vec<u32> = (0..platform.max_vcpus.into()).collect();
            prop_assert_eq!(numbers(madt, "Local Apic ID"), all);
            let boot = u32::from(platform.boot_vcpus);
            prop_assert_eq!(numbers(madt, "Processor Enabled").iter().sum::<u32>(), boot);
            prop_assert_eq!(numbers(madt, "Runtime Online Capable").iter().sum::<u32>(), u32::from(platform.max_vcpus) - boot);
        }
    }
}
