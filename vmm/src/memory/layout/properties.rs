//! Random machines: the map has what was asked for, and nothing is in two places.

use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;

/// RAM from the least a kernel boots in to 2 TiB, often at a boundary of the map.
fn ram() -> impl Strategy<Value = u64> {
    let mib = prop_oneof![4..8192u64, 3070..3075u64, 4095..4098u64, 1..1u64 << 21];
    mib.prop_map(|mib| mib.max(2) * MIB)
}

/// Sizes of windows in bytes, often none.
fn window() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), 1..512 * MIB, (0..1u64 << 20).prop_map(|mib| mib * MIB)]
}

fn overlap(a: (u64, u64), b: (u64, u64)) -> bool {
    a.0 < b.0 + b.1 && b.0 < a.0 + a.1
}

proptest! {
    #[test]
    fn layout_when_built_has_the_sizes_asked_for_in_places_of_their_own(
        ram in ram(), hotplug in window(), pmem in window(),
    ) {
        let layout = MemoryLayout::with_windows(ram, hotplug, pmem);
        let regions = layout.regions();
        let size = |kind| regions.iter().filter(|r| r.kind == kind).map(|r| r.size).sum::<u64>();
        prop_assert_eq!(size(RegionKind::Ram), ram);
        for (kind, asked) in [(RegionKind::Hotplug, hotplug), (RegionKind::Pmem, pmem)] {
            prop_assert!(size(kind) >= asked && size(kind) - asked < WINDOW_ALIGN);
            let window = layout.window(kind);
            prop_assert_eq!(window.is_some(), asked > 0);
            let aligned = |r: Region| r.start.is_multiple_of(WINDOW_ALIGN) && r.size.is_multiple_of(WINDOW_ALIGN);
            prop_assert!(window.is_none_or(aligned));
        }
        let hole = (RAM_LOW_MAX, RAM_HIGH_START - RAM_LOW_MAX);
        for (index, region) in regions.iter().enumerate() {
            prop_assert!(region.size > 0 && !overlap((region.start, region.size), hole));
            for other in &regions[index + 1..] {
                prop_assert!(region.start + region.size <= other.start);
                // A Linux memory section has RAM or a window, never both.
                let section = |address: u64| address / WINDOW_ALIGN;
                prop_assert!(other.kind == region.kind || section(region.start + region.size - 1) < section(other.start));
            }
        }
        prop_assert_eq!(layout.end(), regions.iter().map(|r| r.start + r.size).max().unwrap());
    }

    #[test]
    fn kind_when_asked_for_any_range_is_that_of_the_one_region_around_it(
        ram in ram(), hotplug in window(), pmem in window(),
        at in any::<prop::sample::Index>(), before in 0..3u64, len in prop_oneof![0..4u64, any::<u64>()],
    ) {
        let layout = MemoryLayout::with_windows(ram, hotplug, pmem);
        // Around an end or a start, where it can go wrong.
        let edges: Vec<u64> = layout.regions().iter().flat_map(|r| [r.start, r.start + r.size]).collect();
        let address = at.get(&edges).saturating_sub(before);
        let around = layout.regions().iter().find(|r| {
            let (start, end) = (u128::from(r.start), u128::from(r.start + r.size));
            start <= u128::from(address) && u128::from(address) + u128::from(len) <= end
        });
        prop_assert_eq!(layout.kind(address, len), around.map(|r| r.kind));
    }

    #[test]
    fn memory_map_when_built_covers_ram_except_for_the_pc_area(ram in ram()) {
        let map = memory_map(ram);
        let regions = ram_regions(ram);
        for (index, entry) in map.iter().enumerate() {
            prop_assert!(entry.size > 0);
            let inside = |r: &(u64, u64)| entry.start >= r.0 && entry.start + entry.size <= r.0 + r.1;
            prop_assert!(regions.iter().any(inside), "{:x?}", entry);
            prop_assert!(map[index + 1..].iter().all(|other| entry.start + entry.size <= other.start));
        }
        let usable: u64 = map.iter().filter(|e| e.kind == RangeKind::Ram).map(|e| e.size).sum();
        prop_assert_eq!(usable, ram - (HIGH_RAM_START - LOW_RAM_END));
        // What the boot code puts where the guest finds it is in RAM, the tables are in a range of their own.
        let kind = |start: u64, size: u64| {
            let around = |e: &&Range| e.start <= start && start + size <= e.start + e.size;
            map.iter().find(around).map(|e| e.kind)
        };
        for (start, size) in [(GDT, 0x40), (PVH_START_INFO, 0x1000), (ZERO_PAGE, 0x1000), (PAGE_TABLES, 0x3000), (CMDLINE, CMDLINE_MAX as u64)] {
            prop_assert_eq!(kind(start, size), Some(RangeKind::Ram));
        }
        prop_assert_eq!(kind(ACPI_TABLES, ACPI_TABLES_SIZE), Some(RangeKind::Acpi));
        prop_assert_eq!(kind(SHARED_PAGE, RESET_VECTOR + 16 - SHARED_PAGE), Some(RangeKind::Reserved));
    }
}
