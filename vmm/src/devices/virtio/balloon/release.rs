//! Freeing what the guest names.

use crate::memory::window::Windows;
use crate::memory::{GuestMemory, discard};

/// The host's page and the balloon's unit (5.5.6: 4096 bytes whatever the guest's page size is).
pub(super) const PAGE: u64 = 4096;

/// What was done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Released {
    /// Bytes freed.
    pub(super) bytes: u64,
    /// Ranges that were not the guest's RAM, or that the host did not free.
    pub(super) refused: u64,
}

/// Frees whole pages in `ranges` (address and length) as far as they are RAM of the guest, which need not name them in
/// order or once.
pub(super) fn release(memory: &GuestMemory, windows: &Windows, ranges: &[(u64, u64)]) -> Released {
    let mut released = Released::default();
    let mut pages: Vec<(u64, u64)> = Vec::with_capacity(ranges.len());
    for (address, len) in ranges {
        let first = address.checked_next_multiple_of(PAGE);
        let end = address.checked_add(*len).map(|end| end / PAGE * PAGE);
        match (first, end) {
            (Some(first), Some(end)) if first < end && windows.is_ram(first, end - first) => {
                pages.push((first, end));
            }
            _ => released.refused += 1,
        }
    }
    for (start, end) in merge(pages) {
        match discard(memory, start, end - start) {
            Ok(()) => released.bytes += end - start,
            Err(error) => {
                // E.g. a part of a huge page of hugetlbfs.
                guest_log!(DEBUG, start, end, %error, "balloon: cannot free");
                released.refused += 1;
            }
        }
    }
    released
}

/// Sorts ranges (start and end) and joins those that touch.
fn merge(mut ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    ranges.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::new();
    for (start, end) in ranges {
        match merged.last_mut() {
            Some((_, last)) if start <= *last => *last = end.max(*last),
            _ => merged.push((start, end)),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::window::fake::windows;

    #[test]
    fn merge_when_ranges_touch_or_overlap_joins_them() {
        let ranges = vec![(8, 9), (1, 2), (2, 3), (8, 8), (5, 7), (6, 7)];
        assert_eq!(merge(ranges), [(1, 3), (5, 7), (8, 9)]);
    }

    #[test]
    fn release_when_not_ram_or_not_a_page_is_refused() {
        let (windows, memory, _slots) = windows(1, 1);
        let hotplug = windows.hotplug().unwrap().region().start;
        let pmem = windows.pmem().unwrap().region().start;
        let ranges = [
            (100, 4096),
            (0, 0),
            (16 << 20, 4096),
            (u64::MAX - 4095, 4096),
            (u64::MAX - 10, 20),
            (hotplug, 4096),
            (pmem, 4096),
        ];
        let released = release(&memory, &windows, &ranges);
        assert_eq!((released.bytes, released.refused), (0, 7));
        windows.hotplug().unwrap().plug(0, 128 << 20).unwrap();
        windows.hotplug().unwrap().open(0, 128 << 20).unwrap();
        let ranges = [(hotplug, 8192), (4097, 12_000), (hotplug + 4096, 8192)];
        let released = release(&memory, &windows, &ranges);
        assert_eq!((released.bytes, released.refused), (12_288 + 4096, 0));
    }
}
