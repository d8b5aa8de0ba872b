//! The guest physical address map.
//!
//! ```text
//! 0x0000_0500  GDT                    0x0000_6000  PVH start info
//! 0x0000_7000  zero page              0x0000_9000  page tables
//! 0x0002_0000  command line (64 KiB)  0x000e_0000  ACPI tables (64 KiB)
//! 0x000f_0000  shared page            0x000f_fff0  reset vector
//! 0x0010_0000  RAM ................................ up to 3 GiB
//! 0xd000_0000  virtio-mmio slots      0xfec0_0000  I/O APIC
//! 0xfee0_0000  local APIC             0xfffb_c000  KVM's private pages (Intel)
//! 0x1_0000_0000 RAM beyond 3 GiB
//!               window of hotpluggable memory (virtio-mem)
//!               window of persistent memory (virtio-pmem)
//! ```
//!
//! The windows begin at the next multiples of [`WINDOW_ALIGN`] after RAM (4 GiB at least) and are not in the memory map
//! handed to the guest: what is in them is announced by the devices.

/// Where RAM below 4 GiB ends and the hole for devices begins.
pub const RAM_LOW_MAX: u64 = 0xc000_0000;
/// Where RAM beyond the hole begins.
pub const RAM_HIGH_START: u64 = 0x1_0000_0000;

/// Alignment of windows and of everything put into them: a Linux memory section (128 MiB on x86-64). Hotplugged memory
/// must fill sections, and RAM and device memory in one section do not get along (mm/memory_hotplug.c).
pub const WINDOW_ALIGN: u64 = 128 << 20;

/// Global descriptor table of the boot processor.
pub const GDT: u64 = 0x500;
/// PVH start info, followed by its module list and memory map.
pub const PVH_START_INFO: u64 = 0x6000;
/// Linux `boot_params`.
pub const ZERO_PAGE: u64 = 0x7000;
/// Initial page tables: PML4, PDPT and one page directory.
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Room for the command line, its final zero included.
pub const CMDLINE_MAX: usize = 0x1_0000;
/// End of conventional memory; the page below 640 KiB is what a BIOS would reserve.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI tables; the RSDP is the first.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// Room for the ACPI tables.
pub const ACPI_TABLES_SIZE: u64 = 0x1_0000;
/// Where a BIOS would be; ends with the reset vector.
pub const BIOS: u64 = 0xf_0000;
/// The page the machine shares with AML; reserved, like the rest of the BIOS area.
pub const SHARED_PAGE: u64 = BIOS;
/// Where real-mode code jumps to reset the machine: the last 16 bytes below 1 MiB.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// First address a kernel may be loaded at.
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// First virtio-mmio slot.
pub const VIRTIO_MMIO_START: u64 = 0xd000_0000;
/// Address space of one slot. The registers and configuration need 0x200; a page keeps slots apart.
pub const VIRTIO_MMIO_SLOT_SIZE: u64 = 0x1000;

/// I/O APIC registers.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Local APIC registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// One page KVM needs on Intel for the identity map.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages KVM needs on Intel for a task state segment.
pub const KVM_TSS: usize = 0xfffb_d000;

/// What a part of guest physical memory is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RegionKind {
    /// RAM from boot on, always visible to the guest.
    Ram,
    /// The window of virtio-mem: RAM where blocks are plugged.
    Hotplug,
    /// The window of virtio-pmem: files where devices are.
    Pmem,
}

/// A part of guest physical memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// First byte.
    pub start: u64,
    /// Length in bytes, never 0.
    pub size: u64,
    /// What it is for.
    pub kind: RegionKind,
}

/// Where guest memory is: RAM and windows. The regions of a [`GuestMemory`](super::GuestMemory) in the same order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryLayout {
    regions: Vec<Region>,
}

impl MemoryLayout {
    /// `ram` bytes of RAM without windows.
    pub fn ram(ram: u64) -> Self {
        Self::with_windows(ram, 0, 0)
    }

    /// `ram` bytes of RAM, and windows of at least `hotplug` and `pmem` bytes (rounded up to [`WINDOW_ALIGN`]; 0: none).
    pub fn with_windows(ram: u64, hotplug: u64, pmem: u64) -> Self {
        let mut regions = Vec::new();
        let mut end = RAM_HIGH_START;
        for (start, size) in ram_regions(ram) {
            let kind = RegionKind::Ram;
            regions.push(Region { start, size, kind });
            end = end.max(start + size);
        }
        for (size, kind) in [(hotplug, RegionKind::Hotplug), (pmem, RegionKind::Pmem)] {
            let (start, size) = (
                end.next_multiple_of(WINDOW_ALIGN),
                size.next_multiple_of(WINDOW_ALIGN),
            );
            if size > 0 {
                regions.push(Region { start, size, kind });
                end = start + size;
            }
        }
        Self { regions }
    }

    /// All regions in ascending order.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// First address after everything.
    pub fn end(&self) -> u64 {
        self.regions.last().map_or(0, |region| region.start + region.size)
    }

    /// The window of this kind.
    pub fn window(&self, kind: RegionKind) -> Option<Region> {
        let window = |region: &&Region| kind != RegionKind::Ram && region.kind == kind;
        self.regions.iter().find(window).copied()
    }

    /// What the `len` bytes at `address` are, or `None` when they are not in one region.
    pub fn kind(&self, address: u64, len: u64) -> Option<RegionKind> {
        let end = address.checked_add(len)?;
        let inside = |region: &&Region| address >= region.start && end <= region.start + region.size;
        self.regions.iter().find(inside).map(|region| region.kind)
    }
}

/// The kind of an entry of the memory map (e820 numbering).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum RangeKind {
    /// Usable RAM.
    Ram = 1,
    /// Not for the operating system.
    Reserved = 2,
    /// ACPI tables, usable after they are read.
    Acpi = 3,
}

/// An entry of the memory map handed to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub start: u64,
    /// Length in bytes, never 0.
    pub size: u64,
    /// What it is.
    pub kind: RangeKind,
}

/// The RAM regions (start, size) of a guest with `size` bytes of memory.
pub fn ram_regions(size: u64) -> Vec<(u64, u64)> {
    let low = size.min(RAM_LOW_MAX);
    let high = size - low;
    let mut regions = vec![(0, low)];
    if high > 0 {
        regions.push((RAM_HIGH_START, high));
    }
    regions
}

/// The memory map of a guest with `size` bytes of memory, in ascending order.
pub fn memory_map(size: u64) -> Vec<Range> {
    let low = size.min(RAM_LOW_MAX);
    let range = |start, end, kind| Range {
        start,
        size: end - start,
        kind,
    };
    let mut map = vec![
        range(0, LOW_RAM_END, RangeKind::Ram),
        range(LOW_RAM_END, 0xa_0000, RangeKind::Reserved),
        range(ACPI_TABLES, ACPI_TABLES + ACPI_TABLES_SIZE, RangeKind::Acpi),
        range(BIOS, HIGH_RAM_START, RangeKind::Reserved),
        range(HIGH_RAM_START, low, RangeKind::Ram),
    ];
    if size > low {
        map.push(range(
            RAM_HIGH_START,
            RAM_HIGH_START + (size - low),
            RangeKind::Ram,
        ));
    }
    map
}

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A spread of sizes around every boundary of the map.
    fn sizes() -> impl Iterator<Item = u64> {
        let edges = [
            64,
            65,
            128,
            1024,
            3071,
            3072,
            3073,
            4095,
            4096,
            4097,
            6144,
            1 << 20,
        ];
        edges.into_iter().map(|mib: u64| mib * MIB)
    }

    #[test]
    fn ram_regions_when_summed_give_the_size_and_avoid_the_hole() {
        for size in sizes() {
            let regions = ram_regions(size);
            assert_eq!(regions.iter().map(|r| r.1).sum::<u64>(), size);
            for (start, len) in regions {
                assert!(start + len <= RAM_LOW_MAX || start >= RAM_HIGH_START);
            }
        }
    }

    #[test]
    fn memory_map_when_built_is_sorted_without_overlap_and_inside_ram() {
        for size in sizes() {
            let map = memory_map(size);
            for pair in map.windows(2) {
                assert!(pair[0].start + pair[0].size <= pair[1].start, "{pair:?}");
            }
            let regions = ram_regions(size);
            for entry in map {
                assert!(entry.size > 0);
                let inside = |(start, len): &(u64, u64)| {
                    entry.start >= *start && entry.start + entry.size <= start + len
                };
                assert!(regions.iter().any(inside), "{entry:?} of {size:#x}");
            }
        }
    }

    #[test]
    fn windows_when_laid_out_are_aligned_above_ram_and_not_in_the_memory_map() {
        for size in sizes() {
            let layout = MemoryLayout::with_windows(size, 300 * MIB, 1);
            let hotplug = layout.window(RegionKind::Hotplug).unwrap();
            let pmem = layout.window(RegionKind::Pmem).unwrap();
            assert_eq!((hotplug.size, pmem.size), (384 * MIB, WINDOW_ALIGN));
            assert!(hotplug.start >= RAM_HIGH_START && hotplug.start.is_multiple_of(WINDOW_ALIGN));
            assert_eq!(pmem.start, hotplug.start + hotplug.size);
            for entry in memory_map(size) {
                assert!(entry.start + entry.size <= hotplug.start);
            }
            let kind = |address, len| layout.kind(address, len);
            assert_eq!(kind(0, 1), Some(RegionKind::Ram));
            assert_eq!(kind(hotplug.start - 1, 2), None);
            assert_eq!(kind(hotplug.start, hotplug.size), Some(RegionKind::Hotplug));
            assert_eq!(kind(pmem.start - 1, 2), None);
            assert_eq!(kind(pmem.start + pmem.size - 1, 1), Some(RegionKind::Pmem));
            assert_eq!(kind(pmem.start + pmem.size, 1), None);
            assert_eq!(kind(u64::MAX, 2), None);
            assert_eq!(MemoryLayout::ram(size).window(RegionKind::Hotplug), None);
        }
    }

    #[test]
    fn fixed_structures_when_listed_do_not_overlap() {
        let fixed = [
            (GDT, 0x40),
            (PVH_START_INFO, 0x1000),
            (ZERO_PAGE, 0x1000),
            (PAGE_TABLES, 0x3000),
            (CMDLINE, CMDLINE_MAX as u64),
            (ACPI_TABLES, ACPI_TABLES_SIZE),
            (SHARED_PAGE, 0x1000),
            (RESET_VECTOR, 16),
            (HIGH_RAM_START, 1),
        ];
        for pair in fixed.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
        }
    }
}
