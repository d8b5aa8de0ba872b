use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use super::file::{ALIGN, PmemError};
use super::*;
use crate::config::PmemConfig;
use crate::devices::virtio::image::ImageError;
use crate::devices::virtio::test_resume::{activate_at, config};
use crate::devices::virtio::test_ring::{BUFFERS, Buf, TestGuest, TestRing, flood, survive_malformed_chains};
use crate::devices::virtio::{CHAIN_FEATURES, VirtioDevice};
use crate::guest_log::recorder::assert_limited;
use crate::memory::GuestMemory;
use crate::memory::window::Windows;
use crate::memory::window::fake::windows;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempfile::TempFile;

const MIB: u64 = 1 << 20;

struct Host {
    file: TempFile,
    windows: Windows,
    memory: Arc<GuestMemory>,
}

fn host(content: &[u8]) -> Host {
    let file = TempFile::new().unwrap();
    file.as_file().write_all(content).unwrap();
    let (windows, memory, _slots) = windows(0, 512 * MIB);
    Host {
        file,
        windows,
        memory,
    }
}

impl Host {
    fn config(&self, read_only: bool) -> PmemConfig {
        PmemConfig {
            id: "pmem".to_owned(),
            path: self.file.as_path().to_owned(),
            read_only,
        }
    }

    fn open(&self, read_only: bool) -> Result<Pmem, PmemError> {
        Pmem::new(PmemFile::open(&self.config(read_only))?, &self.windows)
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(self.file.as_path()).unwrap()
    }
}

fn start(guest: &TestGuest, device: &mut Pmem) -> TestRing {
    let ring = guest.ring(0, 16, true);
    activate_at(guest, device, std::slice::from_ref(&ring), CHAIN_FEATURES, &[]).unwrap();
    ring
}

fn address(device: &Pmem) -> (u64, u64) {
    (
        u64::from_le_bytes(config(device, 0)),
        u64::from_le_bytes(config(device, 8)),
    )
}

/// Sends a request of this type; returns the answer.
fn request(guest: &TestGuest, ring: &mut TestRing, kind: u32) -> u32 {
    guest.write(BUFFERS, &kind.to_le_bytes());
    guest.write(BUFFERS + 8, &[0xff; 4]);
    let used = ring.round_trip(&[Buf::Read(BUFFERS, 4), Buf::Write(BUFFERS + 8, 4)]);
    assert_eq!(used.len, 4);
    u32::from_le_bytes(guest.read(BUFFERS + 8, 4).try_into().unwrap())
}

#[test]
fn file_when_not_aligned_is_padded_with_zeros() {
    let host = host(&[7; 5000]);
    let device = host.open(true).unwrap();
    let (start, size) = address(&device);
    assert_eq!(size, ALIGN);
    assert_eq!(start, host.windows.pmem().unwrap().region().start);
    let mut bytes = vec![0; 8192];
    host.memory.read_slice(&mut bytes, GuestAddress(start)).unwrap();
    assert_eq!((bytes[4999], bytes[5000], bytes[8191]), (7, 0, 0));
    let last: u8 = host.memory.read_obj(GuestAddress(start + size - 1)).unwrap();
    assert_eq!(last, 0);
}

#[test]
fn writes_when_read_only_stay_out_of_the_file_and_else_reach_it() {
    let host = host(&[7; 4096]);
    for (read_only, expected) in [(true, 7), (false, 9)] {
        let guest = TestGuest::new();
        let mut device = host.open(read_only).unwrap();
        let mut ring = start(&guest, &mut device);
        host.memory
            .write_obj(9u8, GuestAddress(address(&device).0))
            .unwrap();
        assert_eq!(request(&guest, &mut ring, 0), 0);
        guest.wait_interrupt();
        assert_eq!(host.content()[0], expected);
        assert_eq!(device.counters()[0], ("flushes", 1));
    }
}

#[test]
fn request_when_unknown_or_malformed_is_an_error() {
    let host = host(b"x");
    let guest = TestGuest::new();
    let mut device = host.open(false).unwrap();
    let mut ring = start(&guest, &mut device);
    assert_eq!(request(&guest, &mut ring, 1), 1);
    survive_malformed_chains(&mut ring);
    assert_limited(&["pmem: chain dropped"], 300, || flood(&mut ring, 300));
    for chain in [
        [Buf::Read(BUFFERS, 4), Buf::Write(BUFFERS + 8, 3)],
        [Buf::Read(BUFFERS, 4), Buf::Read(BUFFERS + 8, 4)],
    ] {
        assert_eq!(ring.round_trip(&chain).len, 0);
    }
    let used = ring.round_trip(&[Buf::Read(BUFFERS, 3), Buf::Write(BUFFERS + 8, 4)]);
    assert_eq!((used.len, guest.read(BUFFERS + 8, 4)), (4, vec![1, 0, 0, 0]));
    assert_eq!(request(&guest, &mut ring, 0), 0);
    ring.set_avail_index(9999);
    ring.kick();
    device.reset();
}

#[test]
fn file_when_locked_empty_or_no_file_is_refused() {
    let host = host(b"x");
    let reader = host.open(true).unwrap();
    let second = host.open(true).unwrap();
    assert_ne!(address(&reader), address(&second));
    assert!(matches!(
        host.open(false),
        Err(PmemError::Image {
            source: ImageError::Locked { .. },
            ..
        })
    ));
    drop((reader, second));
    let writer = host.open(false).unwrap();
    assert!(matches!(
        host.open(true),
        Err(PmemError::Image {
            source: ImageError::Locked { .. },
            ..
        })
    ));
    drop(writer);

    host.file.as_file().set_len(0).unwrap();
    assert!(matches!(host.open(true), Err(PmemError::Size { .. })));
    host.file.as_file().set_len(600 * MIB).unwrap();
    assert!(matches!(host.open(true), Err(PmemError::Window { .. })));
    let open = |path: &str| {
        PmemFile::open(&PmemConfig {
            id: "pmem".to_owned(),
            path: PathBuf::from(path),
            read_only: true,
        })
    };
    assert!(matches!(
        open("/nowhere/at/all"),
        Err(PmemError::Image {
            source: ImageError::Open { .. },
            ..
        })
    ));
    assert!(matches!(
        open("/dev/null"),
        Err(PmemError::Image {
            source: ImageError::Type { .. },
            ..
        })
    ));
}

#[test]
fn device_when_dropped_frees_its_place() {
    let host = host(b"x");
    let first = host.open(true).unwrap();
    let place = address(&first);
    drop(first);
    assert!(host.windows.pmem().unwrap().plugged().is_empty());
    assert_eq!(address(&host.open(true).unwrap()), place);
}

#[test]
fn suspend_when_flushes_wait_serves_them_after_the_next_activation() {
    let host = host(b"x");
    let guest = TestGuest::new();
    let mut device = host.open(false).unwrap();
    let mut ring = start(&guest, &mut device);
    assert_eq!(request(&guest, &mut ring, 0), 0);
    let positions = device.suspend();
    let saved = device.save().unwrap();
    ring.submit(&[Buf::Read(BUFFERS, 4), Buf::Write(BUFFERS + 8, 4)]);
    let rings = std::slice::from_ref(&ring);
    activate_at(&guest, &mut device, rings, CHAIN_FEATURES, &positions).unwrap();
    assert_eq!(ring.wait_used().len, 4);
    let positions = device.suspend();
    drop(device);

    let mut restored = host.open(false).unwrap();
    restored.restore(&saved).unwrap();
    ring.submit(&[Buf::Read(BUFFERS, 4), Buf::Write(BUFFERS + 8, 4)]);
    let rings = std::slice::from_ref(&ring);
    activate_at(&guest, &mut restored, rings, CHAIN_FEATURES, &positions).unwrap();
    assert_eq!(ring.wait_used().len, 4);
}

/// As a restore makes the device.
fn open_again(host: &Host, read_only: bool, saved: &[u8]) -> Result<Pmem, PmemError> {
    let file = PmemFile::open(&host.config(read_only))?;
    let mut device = Pmem::at_saved_place(file, &host.windows, saved)?;
    device.restore(saved)?;
    Ok(device)
}

#[test]
fn restore_when_other_devices_were_removed_maps_each_where_it_was() {
    let host = host(b"x");
    host.file.as_file().set_len(100 * MIB).unwrap();
    let first = host.open(true).unwrap();
    // Larger than what is free before it, smaller than both.
    host.file.as_file().set_len(250 * MIB).unwrap();
    let second = host.open(true).unwrap();
    let (saved, place) = (second.save().unwrap(), address(&second));
    drop((first, second));
    let restored = open_again(&host, true, &saved).unwrap();
    assert_eq!(address(&restored), place);
    assert_eq!(host.windows.pmem().unwrap().plugged().len(), 1);
    let byte: u8 = host.memory.read_obj(GuestAddress(place.0)).unwrap();
    assert_eq!(byte, b'x');
}

#[test]
fn restore_when_the_place_is_taken_or_the_size_differs_is_refused() {
    let host = host(b"x");
    let first = host.open(true).unwrap();
    let saved = first.save().unwrap();
    assert!(matches!(
        open_again(&host, true, &saved),
        Err(PmemError::Window { .. })
    ));
    let mut second = host.open(true).unwrap();
    assert!(second.restore(&saved).is_err(), "it is elsewhere");
    for start in [0, address(&second).0 + 4096, u64::MAX] {
        let bytes = postcard::to_stdvec(&(start, ALIGN)).unwrap();
        let error = open_again(&host, true, &bytes).unwrap_err();
        assert!(matches!(error, PmemError::Window { .. }), "{start:#x}: {error}");
    }
    drop((first, second));
    host.file.as_file().set_len(ALIGN + 1).unwrap();
    for bytes in [&saved[..], &[]] {
        assert!(matches!(open_again(&host, true, bytes), Err(PmemError::State(_))));
    }
    assert!(host.windows.pmem().unwrap().plugged().is_empty());
}
