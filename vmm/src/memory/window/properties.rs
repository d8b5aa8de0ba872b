//! Random plugging and unplugging against a list of what must be plugged.

use proptest::collection::vec;
use proptest::prelude::*;

use super::fake::{tempfile, windows};
use super::*;

/// Size of the window.
const WINDOW: u64 = 8 * WINDOW_ALIGN;
/// Half a unit, so that offsets and sizes are misaligned now and then.
const HALF: u64 = WINDOW_ALIGN / 2;

#[derive(Debug, Clone, Copy)]
enum Step {
    Plug(u64, u64),
    Unplug(u64),
    /// Map a file of so many bytes into the first gap.
    Map(u64),
    /// Drop the n-th mapping, modulo their number.
    Drop(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let offset = prop_oneof![8 => (0..9u64).prop_map(|unit| unit * WINDOW_ALIGN), 1 => (0..18u64).prop_map(|half| half * HALF), 1 => any::<u64>()];
    let size = prop_oneof![8 => (1..7u64).prop_map(|halves| halves * HALF), 1 => Just(PAGE), 1 => prop_oneof![Just(0), Just(PAGE + 1), any::<u64>()]];
    prop_oneof![
        (offset.clone(), size.clone()).prop_map(|(offset, size)| Step::Plug(offset, size)),
        offset.prop_map(Step::Unplug),
        size.prop_map(Step::Map),
        (0..8usize).prop_map(Step::Drop),
    ]
}

/// Whether `size` bytes at `offset` may be plugged beside `plugged`.
fn allowed(plugged: &[(u64, u64)], offset: u64, size: u64) -> bool {
    let free = |other: &(u64, u64)| offset + size <= other.0 || other.0 + other.1 <= offset;
    size > 0
        && size.is_multiple_of(PAGE)
        && offset.is_multiple_of(WINDOW_ALIGN)
        && offset.checked_add(size).is_some_and(|end| end <= WINDOW)
        && plugged.iter().all(free)
}

proptest! {
    #[test]
    fn window_when_plugged_at_random_shows_the_vcpus_what_succeeded(
        steps in vec((step(), prop::bool::weighted(0.1)), 1..40),
    ) {
        let (windows, memory, slots) = windows(WINDOW, 0);
        let window = windows.hotplug().unwrap();
        let start = window.region().start;
        let host = memory.get_host_address(GuestAddress(start)).unwrap() as u64;
        let mut plugged: Vec<(u64, u64)> = Vec::new();
        let mut mappings: Vec<FileMapping> = Vec::new();
        for (step, kvm_refuses) in steps {
            slots.broken.store(kvm_refuses, Ordering::SeqCst);
            match step {
                Step::Plug(offset, size) => {
                    let expected = allowed(&plugged, offset, size) && !kvm_refuses;
                    prop_assert_eq!(window.plug(offset, size).is_ok(), expected);
                    if expected {
                        plugged.push((offset, size));
                    }
                }
                Step::Unplug(offset) => {
                    // A file's place is given back by its mapping.
                    if mappings.iter().any(|mapping| mapping.start() == start.wrapping_add(offset)) {
                        continue;
                    }
                    let expected = plugged.iter().any(|piece| piece.0 == offset) && !kvm_refuses;
                    prop_assert_eq!(window.unplug(offset).is_ok(), expected);
                    if expected {
                        plugged.retain(|piece| piece.0 != offset);
                    }
                }
                Step::Map(size) => {
                    let first = (0..8).map(|unit| unit * WINDOW_ALIGN).find(|at| allowed(&plugged, *at, size));
                    let expected = first.filter(|_| !kvm_refuses);
                    let mapping = window.map_file(&tempfile(), (1, size), FilePlace::FirstGap, Sharing::Private).ok();
                    prop_assert_eq!(mapping.as_ref().map(|mapping| mapping.start() - start), expected);
                    plugged.extend(mapping.as_ref().map(|mapping| (mapping.start() - start, size)));
                    mappings.extend(mapping);
                }
                Step::Drop(_) if mappings.is_empty() => {}
                Step::Drop(index) => {
                    let mapping = mappings.swap_remove(index % mappings.len());
                    let offset = mapping.start() - start;
                    drop(mapping);
                    if !kvm_refuses {
                        plugged.retain(|piece| piece.0 != offset);
                    }
                }
            }
            plugged.sort_unstable();
            prop_assert_eq!(window.plugged(), plugged.clone());
            let memslots: Vec<_> = slots.set.lock().unwrap().values().map(|s| (s.guest, s.size, s.host)).collect();
            let expected: Vec<_> = plugged.iter().map(|(at, size)| (start + at, *size, host + at)).collect();
            prop_assert_eq!(memslots, expected);
        }
        slots.broken.store(false, Ordering::SeqCst);
        windows.close();
    }
}
