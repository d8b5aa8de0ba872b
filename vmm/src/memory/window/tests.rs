use std::io::Write;

use super::fake::{tempfile, windows};
use super::*;
use vm_memory::Bytes;

const MIB: u64 = 1 << 20;

fn file(content: &[u8]) -> File {
    let mut file = tempfile();
    file.write_all(content).unwrap();
    file
}

#[test]
fn plug_when_unplugged_again_sets_and_removes_the_memslot() {
    let (windows, memory, slots) = windows(512 * MIB, 0);
    let window = windows.hotplug().unwrap();
    window.plug(WINDOW_ALIGN, WINDOW_ALIGN).unwrap();
    let start = window.region().start + WINDOW_ALIGN;
    let slot = slots.set.lock().unwrap()[&(HOTPLUG_SLOTS + 1)];
    let host = memory.get_host_address(GuestAddress(start)).unwrap() as u64;
    assert_eq!((slot.guest, slot.size, slot.host), (start, WINDOW_ALIGN, host));
    assert_eq!(window.plugged(), [(WINDOW_ALIGN, WINDOW_ALIGN)]);
    window.unplug(WINDOW_ALIGN).unwrap();
    assert!(slots.set.lock().unwrap().is_empty());
    assert!(window.unplug(WINDOW_ALIGN).is_err());
}

#[test]
fn plug_when_overlapping_unaligned_or_outside_is_refused() {
    let (windows, _memory, slots) = windows(512 * MIB, 0);
    let window = windows.hotplug().unwrap();
    window.plug(WINDOW_ALIGN, WINDOW_ALIGN).unwrap();
    for (offset, size) in [
        (WINDOW_ALIGN, 4096),
        (0, 2 * WINDOW_ALIGN),
        (4096, 4096),
        (0, 0),
        (0, 4095),
        (512 * MIB, 4096),
        (384 * MIB, 2 * WINDOW_ALIGN),
        (u64::MAX - WINDOW_ALIGN + 1, WINDOW_ALIGN),
    ] {
        assert!(
            matches!(window.plug(offset, size), Err(WindowError::Range { .. })),
            "{offset:#x} {size:#x}"
        );
    }
    slots.broken.store(true, Ordering::SeqCst);
    assert!(matches!(
        window.plug(0, WINDOW_ALIGN),
        Err(WindowError::Host { .. })
    ));
    assert_eq!(window.plugged(), [(WINDOW_ALIGN, WINDOW_ALIGN)]);
    assert!(matches!(windows.pmem(), Err(WindowError::Missing(_))));
}

#[test]
fn is_ram_when_in_a_window_depends_on_what_is_plugged() {
    let (windows, _memory, _slots) = windows(512 * MIB, 1);
    let window = windows.hotplug().unwrap();
    let start = window.region().start;
    window.plug(0, WINDOW_ALIGN).unwrap();
    assert!(windows.is_ram(0, 16 * MIB));
    assert!(!windows.is_ram(0, 16 * MIB + 1));
    assert!(!windows.is_ram(start, 1), "sealed");
    window.open(2 * MIB, 4 * MIB).unwrap();
    window.open(6 * MIB, 2 * MIB).unwrap();
    assert!(windows.is_ram(start + 3 * MIB, 5 * MIB));
    assert!(!windows.is_ram(start + 3 * MIB, 5 * MIB + 1));
    assert!(!windows.is_ram(start + 2 * MIB - 1, 2));
    assert_eq!(windows.ram_bytes(), 22 * MIB);
    window.close(4 * MIB, 2 * MIB).unwrap();
    assert!(!windows.is_ram(start + 4 * MIB, 1));
    assert_eq!(windows.ram_bytes(), 20 * MIB);
    assert!(windows.pmem().unwrap().open(0, 2 * MIB).is_err());
    let pmem = windows.pmem().unwrap();
    let mapping = pmem
        .map_file(&file(b"x"), (1, 2 * MIB), FilePlace::FirstGap, Sharing::Private)
        .unwrap();
    assert!(!windows.is_ram(mapping.start(), 1));
}

#[test]
fn file_when_mapped_is_readable_padded_with_zeros_and_gone_after_drop() {
    let (windows, memory, slots) = windows(0, 256 * MIB);
    let window = windows.pmem().unwrap();
    let content = vec![7; 5000];
    let first = window
        .map_file(
            &file(&content),
            (5000, 2 * MIB),
            FilePlace::FirstGap,
            Sharing::Private,
        )
        .unwrap();
    let second = window
        .map_file(
            &file(b"second"),
            (6, 2 * MIB),
            FilePlace::FirstGap,
            Sharing::Shared,
        )
        .unwrap();
    assert_eq!(second.start(), first.start() + WINDOW_ALIGN);
    let byte = |address| memory.read_obj::<u8>(GuestAddress(address)).unwrap();
    assert_eq!((byte(first.start()), byte(first.start() + 4999)), (7, 7));
    // Behind the end of the file, in its last page and in pages it does not have.
    assert_eq!(
        (byte(first.start() + 5000), byte(first.start() + 2 * MIB - 1)),
        (0, 0)
    );
    assert_eq!(slots.set.lock().unwrap()[&PMEM_SLOTS].size, 2 * MIB);
    assert!(matches!(
        window.map_file(
            &file(b"third"),
            (5, 2 * MIB),
            FilePlace::FirstGap,
            Sharing::Shared
        ),
        Err(WindowError::Full { .. })
    ));
    let start = first.start();
    drop(first);
    assert_eq!(byte(start), 0);
    assert_eq!(slots.set.lock().unwrap().len(), 1);
    let third = window
        .map_file(
            &file(b"third"),
            (5, 2 * MIB),
            FilePlace::FirstGap,
            Sharing::Shared,
        )
        .unwrap();
    assert_eq!(third.start(), start);
}

#[test]
fn file_when_written_keeps_private_writes_out_and_lets_shared_ones_through() {
    let (windows, memory, _slots) = windows(0, 256 * MIB);
    let window = windows.pmem().unwrap();
    for (sharing, expected) in [(Sharing::Private, b'a'), (Sharing::Shared, b'b')] {
        let file = file(b"aaaa");
        let mapping = window
            .map_file(&file, (4, 2 * MIB), FilePlace::FirstGap, sharing)
            .unwrap();
        memory.write_obj(b'b', GuestAddress(mapping.start())).unwrap();
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_at(&file, &mut byte, 0).unwrap();
        assert_eq!(byte[0], expected);
    }
}

#[test]
fn file_when_kvm_refuses_leaves_the_window_empty() {
    let (windows, memory, slots) = windows(0, 128 * MIB);
    let window = windows.pmem().unwrap();
    slots.broken.store(true, Ordering::SeqCst);
    assert!(
        window
            .map_file(&file(b"x"), (1, 2 * MIB), FilePlace::FirstGap, Sharing::Shared)
            .is_err()
    );
    assert!(window.plugged().is_empty());
    let start = GuestAddress(window.region().start);
    assert_eq!(memory.read_obj::<u8>(start).unwrap(), 0);
}

#[test]
fn close_when_files_are_mapped_leaves_their_memslots_to_the_vm() {
    let (windows, _memory, slots) = windows(0, 128 * MIB);
    let window = windows.pmem().unwrap();
    let mapping = window
        .map_file(&file(b"x"), (1, 2 * MIB), FilePlace::FirstGap, Sharing::Shared)
        .unwrap();
    windows.close();
    drop(mapping);
    assert_eq!(slots.set.lock().unwrap().len(), 1);
}
