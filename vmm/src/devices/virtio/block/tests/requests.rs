//! Requests of every kind, well-formed and not, on both engines.

use std::fs::File;
use std::time::Duration;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::*;
use crate::devices::virtio::block::disk::BlockError;
use crate::devices::virtio::config::{OpenError, OpenErrorKind};
use crate::devices::virtio::image::ImageError;
use crate::devices::virtio::test_ring::{
    INDIRECT, MEMORY_SIZE, NEXT, Used, WRITE, flood, survive_malformed_chains,
};
use crate::guest_log::recorder::assert_limited;

on_each_engine![
    read_when_scattered_fills_every_buffer,
    write_when_scattered_reaches_the_image,
    write_when_read_only_is_refused_whatever_was_negotiated,
    access_when_beyond_the_end_is_an_error,
    data_when_not_whole_sectors_is_an_error,
    data_when_in_the_wrong_direction_is_an_error,
    request_when_nothing_is_writable_is_dropped,
    header_when_short_is_an_error_and_when_split_is_not,
    indirect_request_is_served,
    unknown_types_are_unsupported,
    serial_is_the_start_of_the_id,
    discard_and_write_zeroes_zero_their_ranges_only,
    ranges_when_invalid_are_refused,
    file_when_it_shrinks_gives_errors,
    many_requests_complete_with_few_interrupts,
    write_zeroes_when_the_file_system_cannot_is_written,
    large_request_crosses_memory_limits_safely,
    malformed_chains_are_returned,
    reset_joins_the_worker_and_leaves_memory_alone,
    reset_when_avail_index_jumped_still_ends,
];

fn read_when_scattered_fills_every_buffer(engine: BlockEngine) {
    let mut f = Fixture::new(engine, true);
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

fn write_when_scattered_reaches_the_image(engine: BlockEngine) {
    let mut f = Fixture::new(engine, false);
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

fn write_when_read_only_is_refused_whatever_was_negotiated(engine: BlockEngine) {
    let mut f = Fixture::new(engine, true);
    assert_ne!(f.block.features() & 1 << VIRTIO_BLK_F_RO, 0);
    for kind in [VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        let (used, status) = f.request(kind, 0, &[Buf::Read(DATA, 512)]);
        assert_eq!((used.len, status), (1, IOERR), "type {kind}");
    }
    assert_eq!(f.on_disk(0, 1), [1]);
}

fn access_when_beyond_the_end_is_an_error(engine: BlockEngine) {
    let mut f = Fixture::new(engine, false);
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

fn data_when_not_whole_sectors_is_an_error(engine: BlockEngine) {
    let mut f = Fixture::new(engine, false);
    for len in [1, 511, 513] {
        assert_eq!(f.request(VIRTIO_BLK_T_IN, 0, &[Buf::Write(DATA, len)]).1, IOERR);
        assert_eq!(f.request(VIRTIO_BLK_T_OUT, 0, &[Buf::Read(DATA, len)]).1, IOERR);
    }
    assert_eq!(f.request(VIRTIO_BLK_T_IN, 0, &[]).1, IOERR);
    assert_eq!(f.request(VIRTIO_BLK_T_OUT, 0, &[]).1, IOERR);
    assert_eq!(f.on_disk(0, 2), [1, 1]);
}

fn data_when_in_the_wrong_direction_is_an_error(engine: BlockEngine) {
    let mut f = Fixture::new(engine, false);
    assert_eq!(f.request(VIRTIO_BLK_T_OUT, 0, &[Buf::Write(DATA, 512)]).1, IOERR);
    assert_eq!(f.request(VIRTIO_BLK_T_IN, 0, &[Buf::Read(DATA, 512)]).1, IOERR);
    assert_eq!(f.on_disk(0, 1), [1]);
}

fn request_when_nothing_is_writable_is_dropped(engine: BlockEngine) {
    let mut f = Fixture::new(engine, false);
    f.header(VIRTIO_BLK_T_OUT, 0);
    let used = f.rings[0].round_trip(&[Buf::Read(HEADER, 16), Buf::Read(DATA, 512)]);
    assert_eq!(used.len, 0);
    assert_eq!(f.on_disk(0, 1), [1]);
}

fn header_when_short_is_an_error_and_when_split_is_not(engine: BlockEngine) {
    let mut f = Fixture::new(engine, false);
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

fn indirect_request_is_served(engine: BlockEngine) {
    let mut f = Fixture::new(engine, true);
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

fn unknown_types_are_unsupported(engine: BlockEngine) {
    let mut f = Fixture::new(engine, false);
    for kind in [2, 3, 7, 9, 0x8000_0000, u32::MAX] {
        let (used, status) = f.request(kind, 0, &[Buf::Write(DATA, 512)]);
        assert_eq!((used.len, status), (1, UNSUPP), "type {kind:#x}");
    }
}

fn serial_is_the_start_of_the_id(engine: BlockEngine) {
    let mut f = Fixture::new(engine, false);
    let (used, status) = f.request(VIRTIO_BLK_T_GET_ID, 0, &[Buf::Write(DATA, 20)]);
    assert_eq!((used.len, status), (21, OK));
    assert_eq!(f.guest.read(DATA, 20), b"disk-with-a-long-nam");
    assert_eq!(
        f.request(VIRTIO_BLK_T_GET_ID, 0, &[Buf::Write(DATA, 19)]).1,
        IOERR
    );
}

fn discard_and_write_zeroes_zero_their_ranges_only(engine: BlockEngine) {
    let mut f = Fixture::new(engine, false);
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

fn write_zeroes_when_the_file_system_cannot_is_written(engine: BlockEngine) {
    let (mut f, _dir) = Fixture::on_tmpfs(engine, |_| ());
    // More than one step writes, and not whole pages.
    let sectors = (3 << 20) / 512 + 3;
    f.guest
        .write(DATA, &[range(5, sectors, 0), range(8192, 2, 0)].concat());
    let (used, status) = f.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &[Buf::Read(DATA, 32)]);
    assert_eq!((used.len, status), (1, OK));
    let end = u64::from(5 + sectors);
    for (from, until) in [(5, end), (8192, 8194)] {
        let len = ((until - from) * 512) as usize;
        assert!(f.on_disk(from * 512, len).iter().all(|byte| *byte == 0));
        assert_eq!(f.on_disk(from * 512 - 1, 1), [pattern(from - 1)]);
        assert_eq!(f.on_disk(until * 512, 1), [pattern(until)]);
    }
    assert_eq!(f.counter("write_zeroes_bytes"), u64::from(sectors + 2) * 512);
}

fn ranges_when_invalid_are_refused(engine: BlockEngine) {
    let mut f = Fixture::new(engine, false);
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

fn file_when_it_shrinks_gives_errors(engine: BlockEngine) {
    let mut f = Fixture::new(engine, false);
    File::options()
        .write(true)
        .open(&f.path)
        .unwrap()
        .set_len(4096)
        .unwrap();
    assert_eq!(f.request(VIRTIO_BLK_T_IN, 0, &[Buf::Write(DATA, 4096)]).1, OK);
    assert_eq!(f.request(VIRTIO_BLK_T_IN, 7, &[Buf::Write(DATA, 1024)]).1, IOERR);
}

fn many_requests_complete_with_few_interrupts(engine: BlockEngine) {
    let mut f = Fixture::new(engine, true);
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

fn large_request_crosses_memory_limits_safely(engine: BlockEngine) {
    let mut f = Fixture::new(engine, true);
    let (used, status) = f.request(VIRTIO_BLK_T_IN, 0, &[Buf::Write(DATA, 4 << 20)]);
    assert_eq!((used.len, status), ((4 << 20) + 1, OK));
    assert_eq!(f.guest.read(DATA, 4 << 20), f.on_disk(0, 4 << 20));
    // Longer than a step, in pieces that are and are not.
    let pieces = [
        Buf::Write(DATA, 5 << 20),
        Buf::Write(DATA + (5 << 20), 2 << 20),
        Buf::Write(DATA + (7 << 20), 512),
    ];
    f.guest.write(DATA, &vec![0; 8 << 20]);
    let len = (7 << 20) + 512;
    let (used, status) = f.request(VIRTIO_BLK_T_IN, 3, &pieces);
    assert_eq!((used.len as usize, status), (len + 1, OK));
    assert!(f.guest.read(DATA, len) == f.on_disk(3 * 512, len));
    assert_eq!(f.guest.read(DATA + len as u64, 512), [0; 512]);
    // The last byte of memory is fine, one more is not.
    let end = MEMORY_SIZE as u64;
    assert_eq!(f.request(VIRTIO_BLK_T_IN, 0, &[Buf::Write(end - 512, 512)]).1, OK);
    let (used, status) = f.request(VIRTIO_BLK_T_IN, 0, &[Buf::Write(end - 511, 512)]);
    assert_eq!((used.len, status), (0, 0xee), "an invalid chain gets no status");
}

fn malformed_chains_are_returned(engine: BlockEngine) {
    let mut f = Fixture::new(engine, false);
    survive_malformed_chains(&mut f.rings[0]);
    assert_limited(&["block: chain dropped"], 300, || flood(&mut f.rings[0], 300));
    assert_eq!(f.on_disk(0, 4096)[..512], [1; 512]);
    assert_eq!(f.request(VIRTIO_BLK_T_IN, 0, &[Buf::Write(DATA, 512)]).1, OK);
}

fn reset_joins_the_worker_and_leaves_memory_alone(engine: BlockEngine) {
    let mut f = Fixture::new(engine, false);
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

fn reset_when_avail_index_jumped_still_ends(engine: BlockEngine) {
    let mut f = Fixture::new(engine, false);
    f.rings[0].set_avail_index(5000);
    f.rings[0].kick();
    f.block.reset();
}

#[test]
fn image_when_it_cannot_be_used_says_what_can_be_done() {
    let dir = TempDir::new_with_prefix("/tmp/dragonball-blk").unwrap();
    let path = |name: &str| dir.as_path().join(name);
    std::fs::write(path("small"), [0; 511]).unwrap();
    std::fs::write(path("used"), [0; 512]).unwrap();
    let _user = Block::new(&config(&path("used"), false)).unwrap();
    for (name, kind) in [
        ("missing", OpenErrorKind::Missing),
        ("small", OpenErrorKind::Unfit),
        (".", OpenErrorKind::Unfit),
        ("used", OpenErrorKind::Busy),
    ] {
        let error = OpenError::from(Block::new(&config(&path(name), true)).unwrap_err());
        assert_eq!(error.kind(), kind, "{name}");
        assert!(
            error.to_string().starts_with("disk disk-with-a-long-name: "),
            "{error}"
        );
    }
}

#[test]
fn image_when_used_twice_is_locked() {
    let (_dir, path) = image();
    let writer = Block::new(&config(&path, false)).unwrap();
    for read_only in [false, true] {
        let error = Block::new(&config(&path, read_only)).unwrap_err();
        assert!(
            matches!(
                error,
                BlockError::Image {
                    source: ImageError::Locked { .. },
                    ..
                }
            ),
            "{error}"
        );
    }
    drop(writer);
    let _reader = anew(&config(&path, true));
    let _second = Block::new(&config(&path, true)).unwrap();
    assert!(matches!(
        Block::new(&config(&path, false)),
        Err(BlockError::Image {
            source: ImageError::Locked { .. },
            ..
        })
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
    // 16 ranges of 128 MiB to discard, or of 16 MiB to write zeroes to.
    let field = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
    assert_eq!((field(36), field(40)), ((128 << 20) / 512, 16));
    assert_eq!((field(48), field(52)), ((16 << 20) / 512, 16));
    block.read_config(u64::MAX, &mut space);
    assert_eq!(space, [0; 64]);
}
