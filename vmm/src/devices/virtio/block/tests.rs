use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use vmm_sys_util::tempdir::TempDir;

use super::{Block, BlockError};
use crate::config::BlockConfig;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::test_ring::{
    BUFFERS, Buf, INDIRECT, MEMORY_SIZE, NEXT, TestGuest, TestRing, Used, WRITE, survive_malformed_chains,
};

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1_0000;
/// 8 MiB and a bit that no sector holds.
const IMAGE_BYTES: usize = (8 << 20) + 100;

/// An image with recognizable sectors, and a device on it.
struct Fixture {
    guest: TestGuest,
    block: Block,
    rings: Vec<TestRing>,
    path: PathBuf,
    _dir: TempDir,
}

fn image() -> (TempDir, PathBuf) {
    let dir = TempDir::new_with_prefix("/tmp/dragonball-blk").unwrap();
    let path = dir.as_path().join("image");
    let mut bytes = vec![0; IMAGE_BYTES];
    for (sector, chunk) in bytes.chunks_mut(512).enumerate() {
        chunk.fill((sector % 251) as u8 + 1);
    }
    File::create(&path).unwrap().write_all(&bytes).unwrap();
    (dir, path)
}

fn config(path: &Path, read_only: bool) -> BlockConfig {
    BlockConfig {
        read_only,
        ..BlockConfig::new("disk-with-a-long-name", path)
    }
}

impl Fixture {
    fn new(read_only: bool) -> Self {
        let (dir, path) = image();
        let guest = TestGuest::new();
        let mut block = Block::new(&config(&path, read_only)).unwrap();
        let rings = guest.activate(&mut block, 64, true);
        Self {
            guest,
            block,
            rings,
            path,
            _dir: dir,
        }
    }

    fn header(&self, kind: u32, sector: u64) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.guest.write(HEADER, &header);
        self.guest.write(STATUS, &[0xee]);
    }

    /// Header, `data`, status; returns the completion and the status byte.
    fn request(&mut self, kind: u32, sector: u64, data: &[Buf]) -> (Used, u8) {
        self.header(kind, sector);
        let mut chain = vec![Buf::Read(HEADER, 16)];
        chain.extend(data);
        chain.push(Buf::Write(STATUS, 1));
        let used = self.rings[0].round_trip(&chain);
        (used, self.guest.read(STATUS, 1)[0])
    }

    fn on_disk(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        File::open(&self.path)
            .unwrap()
            .read_exact_at(&mut bytes, offset)
            .unwrap();
        bytes
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.block.reset();
    }
}

#[test]
fn read_when_scattered_fills_every_buffer() {
    let mut f = Fixture::new(true);
    let (used, status) = f.request(
        VIRTIO_BLK_T_IN,
        3,
        &[
            Buf::Write(DATA, 700),
            Buf::Write(DATA + 0x1000, 324),
            Buf::Write(DATA + 0x2000, 512),
        ],
    );
    assert_eq!((used.len, status), (1537, OK));
    let mut got = f.guest.read(DATA, 700);
    got.extend(f.guest.read(DATA + 0x1000, 324));
    got.extend(f.guest.read(DATA + 0x2000, 512));
    assert_eq!(got, f.on_disk(3 * 512, 1536));
    assert_eq!(f.guest.read(DATA + 700, 1), [0]);
    f.guest.wait_interrupt();
}

#[test]
fn write_when_scattered_reaches_the_image() {
    let mut f = Fixture::new(false);
    f.guest.write(DATA, &[0x55; 100]);
    f.guest.write(DATA + 0x1000, &[0xaa; 412]);
    let data = [Buf::Read(DATA, 100), Buf::Read(DATA + 0x1000, 412)];
    let (used, status) = f.request(VIRTIO_BLK_T_OUT, 7, &data);
    assert_eq!((used.len, status), (1, OK));
    let mut expected = vec![0x55; 100];
    expected.extend([0xaa; 412]);
    assert_eq!(f.on_disk(7 * 512, 512), expected);
    assert_eq!(f.on_disk(8 * 512, 1), [9], "the neighbour changed");
    let (used, status) = f.request(VIRTIO_BLK_T_FLUSH, 0, &[]);
    assert_eq!((used.len, status), (1, OK));
}

#[test]
fn write_when_read_only_is_refused_whatever_was_negotiated() {
    let mut f = Fixture::new(true);
    assert_ne!(f.block.features() & 1 << VIRTIO_BLK_F_RO, 0);
    for kind in [VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        let (used, status) = f.request(kind, 0, &[Buf::Read(DATA, 512)]);
        assert_eq!((used.len, status), (1, IOERR), "type {kind}");
    }
    assert_eq!(f.on_disk(0, 1), [1]);
}

#[test]
fn access_when_beyond_the_end_is_an_error() {
    let mut f = Fixture::new(false);
    let last = IMAGE_BYTES as u64 / 512 - 1;
    let one = [Buf::Write(DATA, 512)];
    assert_eq!(f.request(VIRTIO_BLK_T_IN, last, &one).1, OK);
    for sector in [last + 1, u64::MAX, u64::MAX / 512, u64::MAX / 512 + 1, 1 << 55] {
        assert_eq!(
            f.request(VIRTIO_BLK_T_IN, sector, &one).1,
            IOERR,
            "sector {sector:#x}"
        );
        assert_eq!(
            f.request(VIRTIO_BLK_T_OUT, sector, &[Buf::Read(DATA, 512)]).1,
            IOERR
        );
    }
    assert_eq!(
        f.request(VIRTIO_BLK_T_IN, last, &[Buf::Write(DATA, 1024)]).1,
        IOERR
    );
}

#[test]
fn data_when_not_whole_sectors_is_an_error() {
    let mut f = Fixture::new(false);
    for len in [1, 511, 513] {
        assert_eq!(f.request(VIRTIO_BLK_T_IN, 0, &[Buf::Write(DATA, len)]).1, IOERR);
        assert_eq!(f.request(VIRTIO_BLK_T_OUT, 0, &[Buf::Read(DATA, len)]).1, IOERR);
    }
    assert_eq!(f.request(VIRTIO_BLK_T_IN, 0, &[]).1, IOERR);
    assert_eq!(f.request(VIRTIO_BLK_T_OUT, 0, &[]).1, IOERR);
    assert_eq!(f.on_disk(0, 2), [1, 1]);
}

#[test]
fn data_when_in_the_wrong_direction_is_an_error() {
    let mut f = Fixture::new(false);
    assert_eq!(f.request(VIRTIO_BLK_T_OUT, 0, &[Buf::Write(DATA, 512)]).1, IOERR);
    assert_eq!(f.request(VIRTIO_BLK_T_IN, 0, &[Buf::Read(DATA, 512)]).1, IOERR);
    assert_eq!(f.on_disk(0, 1), [1]);
}

#[test]
fn request_when_nothing_is_writable_is_dropped() {
    let mut f = Fixture::new(false);
    f.header(VIRTIO_BLK_T_OUT, 0);
    let used = f.rings[0].round_trip(&[Buf::Read(HEADER, 16), Buf::Read(DATA, 512)]);
    assert_eq!(used.len, 0);
    assert_eq!(f.on_disk(0, 1), [1]);
}

#[test]
fn header_when_short_is_an_error_and_when_split_is_not() {
    let mut f = Fixture::new(false);
    f.header(VIRTIO_BLK_T_IN, 1);
    let used = f.rings[0].round_trip(&[
        Buf::Read(HEADER, 15),
        Buf::Write(DATA, 512),
        Buf::Write(STATUS, 1),
    ]);
    assert_eq!((used.len, f.guest.read(STATUS, 1)[0]), (1, IOERR));
    // Framing is the driver's choice (virtio 1.2, 2.7.4): header in three pieces, status with the data.
    f.header(VIRTIO_BLK_T_IN, 1);
    let used = f.rings[0].round_trip(&[
        Buf::Read(HEADER, 3),
        Buf::Read(HEADER + 3, 9),
        Buf::Read(HEADER + 12, 4),
        Buf::Write(DATA, 513),
    ]);
    assert_eq!(used.len, 513);
    assert_eq!(f.guest.read(DATA, 513), [vec![2; 512], vec![OK]].concat());
}

#[test]
fn indirect_request_is_served() {
    let mut f = Fixture::new(true);
    f.header(VIRTIO_BLK_T_IN, 5);
    let table = BUFFERS + 0x2000;
    let ring = &mut f.rings[0];
    ring.descriptor_at(table, 0, HEADER, 16, NEXT, 1);
    ring.descriptor_at(table, 1, DATA, 512, NEXT | WRITE, 2);
    ring.descriptor_at(table, 2, STATUS, 1, WRITE, 0);
    ring.descriptor(9, table, 48, INDIRECT, 0);
    ring.offer(9);
    ring.kick();
    assert_eq!(ring.wait_used(), Used { head: 9, len: 513 });
    assert_eq!(f.guest.read(DATA, 512), [6; 512]);
}

#[test]
fn unknown_types_are_unsupported() {
    let mut f = Fixture::new(false);
    for kind in [2, 3, 7, 9, 0x8000_0000, u32::MAX] {
        let (used, status) = f.request(kind, 0, &[Buf::Write(DATA, 512)]);
        assert_eq!((used.len, status), (1, UNSUPP), "type {kind:#x}");
    }
}

#[test]
fn serial_is_the_start_of_the_id() {
    let mut f = Fixture::new(false);
    let (used, status) = f.request(VIRTIO_BLK_T_GET_ID, 0, &[Buf::Write(DATA, 20)]);
    assert_eq!((used.len, status), (21, OK));
    assert_eq!(f.guest.read(DATA, 20), b"disk-with-a-long-nam");
    assert_eq!(
        f.request(VIRTIO_BLK_T_GET_ID, 0, &[Buf::Write(DATA, 19)]).1,
        IOERR
    );
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [
        &sector.to_le_bytes()[..],
        &sectors.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat()
}

#[test]
fn discard_and_write_zeroes_zero_their_ranges_only() {
    let mut f = Fixture::new(false);
    for (kind, flags, sector) in [
        (VIRTIO_BLK_T_DISCARD, 0, 8),
        (VIRTIO_BLK_T_WRITE_ZEROES, 0, 32),
        (VIRTIO_BLK_T_WRITE_ZEROES, 1, 64),
    ] {
        f.guest.write(
            DATA,
            &[range(sector, 8, flags), range(sector + 8, 0, flags)].concat(),
        );
        let (used, status) = f.request(kind, 0, &[Buf::Read(DATA, 32)]);
        assert_eq!((used.len, status), (1, OK), "type {kind} flags {flags}");
        assert_eq!(f.on_disk(sector * 512, 4096), vec![0; 4096]);
        assert_ne!(f.on_disk((sector - 1) * 512, 512), vec![0; 512]);
        assert_ne!(f.on_disk((sector + 8) * 512, 512), vec![0; 512]);
    }
    assert_eq!(std::fs::metadata(&f.path).unwrap().len(), IMAGE_BYTES as u64);
}

#[test]
fn ranges_when_invalid_are_refused() {
    let mut f = Fixture::new(false);
    let last = IMAGE_BYTES as u64 / 512;
    let cases = [
        (VIRTIO_BLK_T_DISCARD, range(0, 8, 1), 16, UNSUPP),
        (VIRTIO_BLK_T_WRITE_ZEROES, range(0, 8, 2), 16, UNSUPP),
        (VIRTIO_BLK_T_DISCARD, range(last, 1, 0), 16, IOERR),
        (VIRTIO_BLK_T_DISCARD, range(u64::MAX, 1, 0), 16, IOERR),
        (VIRTIO_BLK_T_WRITE_ZEROES, range(0, u32::MAX, 0), 16, IOERR),
        (VIRTIO_BLK_T_WRITE_ZEROES, range(0, 8, 0), 15, IOERR),
        (VIRTIO_BLK_T_DISCARD, vec![0; 17 * 16], 17 * 16, IOERR),
    ];
    for (kind, bytes, len, expected) in cases {
        f.guest.write(DATA, &bytes);
        assert_eq!(
            f.request(kind, 0, &[Buf::Read(DATA, len)]).1,
            expected,
            "type {kind} {bytes:?}"
        );
    }
    assert_eq!(f.request(VIRTIO_BLK_T_DISCARD, 0, &[]).1, IOERR);
    assert_eq!(f.on_disk(0, 1), [1]);
}

#[test]
fn file_when_it_shrinks_gives_errors() {
    let mut f = Fixture::new(false);
    File::options()
        .write(true)
        .open(&f.path)
        .unwrap()
        .set_len(4096)
        .unwrap();
    assert_eq!(f.request(VIRTIO_BLK_T_IN, 0, &[Buf::Write(DATA, 4096)]).1, OK);
    assert_eq!(f.request(VIRTIO_BLK_T_IN, 7, &[Buf::Write(DATA, 1024)]).1, IOERR);
}

#[test]
fn many_requests_complete_with_few_interrupts() {
    let mut f = Fixture::new(true);
    f.header(VIRTIO_BLK_T_IN, 0);
    for index in 0..21 {
        let data = Buf::Write(DATA + index * 512, 512);
        f.rings[0].submit(&[Buf::Read(HEADER, 16), data, Buf::Write(STATUS, 1)]);
    }
    f.rings[0].kick();
    for _ in 0..21 {
        assert_eq!(f.rings[0].wait_used().len, 513);
    }
    // used_event is 0: only the first completion asked for an interrupt.
    assert_eq!(f.guest.wait_interrupt(), 1);
}

#[test]
fn large_request_crosses_memory_limits_safely() {
    let mut f = Fixture::new(true);
    let (used, status) = f.request(VIRTIO_BLK_T_IN, 0, &[Buf::Write(DATA, 4 << 20)]);
    assert_eq!((used.len, status), ((4 << 20) + 1, OK));
    assert_eq!(f.guest.read(DATA, 4 << 20), f.on_disk(0, 4 << 20));
    // The last byte of memory is fine, one more is not.
    let end = MEMORY_SIZE as u64;
    assert_eq!(f.request(VIRTIO_BLK_T_IN, 0, &[Buf::Write(end - 512, 512)]).1, OK);
    let (used, status) = f.request(VIRTIO_BLK_T_IN, 0, &[Buf::Write(end - 511, 512)]);
    assert_eq!((used.len, status), (0, 0xee), "an invalid chain gets no status");
}

#[test]
fn malformed_chains_are_returned() {
    let mut f = Fixture::new(false);
    survive_malformed_chains(&mut f.rings[0]);
    assert_eq!(f.on_disk(0, 4096)[..512], [1; 512]);
    assert_eq!(f.request(VIRTIO_BLK_T_IN, 0, &[Buf::Write(DATA, 512)]).1, OK);
}

#[test]
fn reset_joins_the_worker_and_leaves_memory_alone() {
    let mut f = Fixture::new(false);
    f.block.reset();
    f.block.reset();
    f.header(VIRTIO_BLK_T_IN, 0);
    f.rings[0].submit(&[
        Buf::Read(HEADER, 16),
        Buf::Write(DATA, 512),
        Buf::Write(STATUS, 1),
    ]);
    f.rings[0].kick();
    std::thread::sleep(Duration::from_millis(50));
    assert!(f.rings[0].try_used().is_none());
    assert_eq!(f.guest.read(DATA, 512), [0; 512]);
    f.rings = f.guest.activate(&mut f.block, 64, false);
    assert_eq!(f.request(VIRTIO_BLK_T_IN, 0, &[Buf::Write(DATA, 512)]).1, OK);
}

#[test]
fn reset_when_avail_index_jumped_still_ends() {
    let mut f = Fixture::new(false);
    f.rings[0].set_avail_index(5000);
    f.rings[0].kick();
    f.block.reset();
}

#[test]
fn image_when_used_twice_is_locked() {
    let (_dir, path) = image();
    let writer = Block::new(&config(&path, false)).unwrap();
    for read_only in [false, true] {
        let error = Block::new(&config(&path, read_only)).unwrap_err();
        assert!(matches!(error, BlockError::Locked { .. }), "{error}");
    }
    drop(writer);
    let _reader = Block::new(&config(&path, true)).unwrap();
    let _second = Block::new(&config(&path, true)).unwrap();
    assert!(matches!(
        Block::new(&config(&path, false)),
        Err(BlockError::Locked { .. })
    ));
}

#[test]
fn image_when_unusable_is_refused_with_its_name() {
    let dir = TempDir::new_with_prefix("/tmp/dragonball-blk").unwrap();
    let small = dir.as_path().join("small");
    std::fs::write(&small, [0; 511]).unwrap();
    let missing = dir.as_path().join("missing");
    for (path, expected) in [
        (missing, "cannot open"),
        (
            dir.as_path().to_path_buf(),
            "neither a regular file nor a block device",
        ),
        (
            PathBuf::from("/dev/null"),
            "neither a regular file nor a block device",
        ),
        (small, "has 511 bytes"),
    ] {
        let error = Block::new(&config(&path, true)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert!(error.contains(&format!("{path:?}")), "{error}");
    }
}

#[test]
fn config_space_has_capacity_and_limits() {
    let (_dir, path) = image();
    let block = Block::new(&config(&path, false)).unwrap();
    assert_ne!(block.features() & 1 << VIRTIO_BLK_F_FLUSH, 0);
    let mut space = [0xff; 64];
    block.read_config(0, &mut space);
    assert_eq!(space[..8], (IMAGE_BYTES as u64 / 512).to_le_bytes());
    assert_eq!(space[12..16], 254u32.to_le_bytes());
    assert_eq!(space[20..24], 512u32.to_le_bytes());
    assert_eq!(space[60..], [0; 4]);
    block.read_config(u64::MAX, &mut space);
    assert_eq!(space, [0; 64]);
}
