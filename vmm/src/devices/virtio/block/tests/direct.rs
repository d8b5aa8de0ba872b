//! Direct I/O, aligned and not, and block sizes.

use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use super::*;
use crate::devices::virtio::block::disk::BlockError;

on_each_engine![
    direct_when_aligned_and_not_moves_the_right_bytes,
    direct_when_neighbours_in_a_block_are_written_at_once_keeps_both,
];

/// Where the test's images are: a file system with direct I/O, if this is one.
fn direct(engine: BlockEngine) -> Option<Fixture> {
    let (_dir, path) = image();
    let mut probe = config(&path, false);
    probe.direct = true;
    match Block::new(&probe) {
        Ok(_) => Some(Fixture::with(|config| {
            config.engine = engine;
            config.direct = true;
        })),
        Err(BlockError::Direct { source, .. }) => {
            eprintln!("not run, /tmp has no direct I/O: {source}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn direct_when_aligned_and_not_moves_the_right_bytes(engine: BlockEngine) {
    let Some(mut f) = direct(engine) else { return };
    // Sector, then pieces as offset in the page and length.
    let cases: [(u64, &[(u64, u32)]); 6] = [
        (8, &[(0, 4096)]),
        (40, &[(0, 4096), (0, 8192)]),
        (104, &[(512, 4096)]),
        (144, &[(0, 1000), (0, 3096)]),
        (201, &[(0, 512)]),
        (251, &[(7, 1024), (9, 512)]),
    ];
    for (sector, pieces) in cases {
        let bufs = |write: bool| -> Vec<_> {
            let at = |n: usize, offset: u64| DATA + n as u64 * 0x4000 + offset;
            pieces
                .iter()
                .enumerate()
                .map(|(n, (offset, len))| match write {
                    true => Buf::Write(at(n, *offset), *len),
                    false => Buf::Read(at(n, *offset), *len),
                })
                .collect()
        };
        let len: u32 = pieces.iter().map(|(_, len)| len).sum();
        let gather = |f: &Fixture| -> Vec<u8> {
            bufs(true)
                .iter()
                .flat_map(|buf| match *buf {
                    Buf::Read(at, len) | Buf::Write(at, len) => f.guest.read(at, len as usize),
                })
                .collect()
        };
        assert_eq!(
            f.request(VIRTIO_BLK_T_IN, sector, &bufs(true)).1,
            OK,
            "sector {sector}"
        );
        assert_eq!(
            gather(&f),
            f.on_disk(sector * 512, len as usize),
            "sector {sector}"
        );
        f.guest.write(DATA, &vec![0xa5; 0x1_0000]);
        assert_eq!(
            f.request(VIRTIO_BLK_T_OUT, sector, &bufs(false)).1,
            OK,
            "sector {sector}"
        );
        assert_eq!(f.on_disk(sector * 512, len as usize), vec![0xa5; len as usize]);
        assert_eq!(f.on_disk(sector * 512 - 1, 1), [pattern(sector - 1)]);
        assert_eq!(
            f.on_disk(sector * 512 + u64::from(len), 1),
            [pattern(sector + u64::from(len) / 512)]
        );
    }
}

fn direct_when_neighbours_in_a_block_are_written_at_once_keeps_both(engine: BlockEngine) {
    let Some(mut f) = direct(engine) else { return };
    for slot in 0..16 {
        f.guest
            .write(slot_address(slot) + 0x1000, &[0xf0 + slot as u8; 512]);
        f.offer(0, slot, VIRTIO_BLK_T_OUT, 8 + slot, 512);
    }
    f.rings[0].kick();
    for _ in 0..16 {
        f.rings[0].wait_used();
    }
    for slot in 0..16 {
        assert_eq!(f.outcome(slot), OK);
        assert_eq!(f.on_disk((8 + slot) * 512, 512), [0xf0 + slot as u8; 512]);
    }
}

#[test]
fn config_space_when_direct_has_the_alignment_as_block_size() {
    let Some(f) = direct(BlockEngine::Sync) else {
        return;
    };
    let mut space = [0; 60];
    f.block.read_config(0, &mut space);
    let block_size = u32::from_le_bytes(space[20..24].try_into().unwrap());
    let capacity = u64::from_le_bytes(space[..8].try_into().unwrap()) * 512;
    assert!(block_size.is_power_of_two() && block_size >= 512);
    assert!(capacity.is_multiple_of(u64::from(block_size)));
    let physical = block_size << space[24];
    assert!((block_size..=0x1_0000).contains(&physical), "{physical}");
}
