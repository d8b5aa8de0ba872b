//! The device against the fake guest.

mod allocations;
mod direct;
mod engines;
mod lifecycle;
mod ranges;
mod requests;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};
use vmm_sys_util::tempdir::TempDir;

use super::Block;
use super::disk::BlockError;
use crate::config::{BlockConfig, BlockEngine};
use crate::devices::virtio::image::ImageError;
use crate::devices::virtio::state::QueuePosition;
use crate::devices::virtio::test_ring::{BUFFERS, Buf, PATIENCE, TestGuest, TestRing, Used};
use crate::devices::virtio::{Activation, CHAIN_FEATURES, VirtioDevice};

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1_0000;
/// 8 MiB and a bit that no sector holds.
const IMAGE_BYTES: usize = (8 << 20) + 100;

/// Runs each named function once per engine; on a host without io_uring only the other.
macro_rules! on_each_engine {
    ($($name:ident),* $(,)?) => {
        mod sync {
            $(#[test] fn $name() { super::$name(crate::config::BlockEngine::Sync); })*
        }
        mod io_uring {
            $(#[test] fn $name() {
                match crate::devices::virtio::block::ring::available() {
                    Ok(()) => super::$name(crate::config::BlockEngine::IoUring),
                    Err(reason) => eprintln!("not run: {reason}"),
                }
            })*
        }
    };
}
use on_each_engine;

/// A device on an image that another one has just let go of: a child that another test forks has a copy of the lock until
/// it executes its program.
fn anew(config: &BlockConfig) -> Block {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match Block::new(config) {
            Err(BlockError::Image {
                source: ImageError::Locked { .. },
                ..
            }) if Instant::now() < deadline => {}
            result => return result.unwrap(),
        }
    }
}

/// An image with recognizable sectors.
fn image() -> (TempDir, PathBuf) {
    let dir = TempDir::new_with_prefix("/tmp/dragonball-blk").unwrap();
    let path = dir.as_path().join("image");
    let mut bytes = vec![0; IMAGE_BYTES];
    for (sector, chunk) in bytes.chunks_mut(512).enumerate() {
        chunk.fill(pattern(sector as u64));
    }
    File::create(&path).unwrap().write_all(&bytes).unwrap();
    (dir, path)
}

/// What each byte of a fresh sector is.
fn pattern(sector: u64) -> u8 {
    (sector % 251) as u8 + 1
}

/// A range of a DISCARD or WRITE_ZEROES.
fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [
        &sector.to_le_bytes()[..],
        &sectors.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat()
}

fn config(path: &Path, read_only: bool) -> BlockConfig {
    BlockConfig {
        read_only,
        ..BlockConfig::new("disk-with-a-long-name", path)
    }
}

/// A device on an image, and a driver.
struct Fixture {
    guest: TestGuest,
    block: Block,
    rings: Vec<TestRing>,
    path: PathBuf,
    _dir: TempDir,
}

impl Fixture {
    fn new(engine: BlockEngine, read_only: bool) -> Self {
        Self::with(|config| {
            config.engine = engine;
            config.read_only = read_only;
        })
    }

    /// On a copy of the image in memory, on a file system that has holes but no FALLOC_FL_ZERO_RANGE: tmpfs.
    fn on_tmpfs(engine: BlockEngine, change: impl FnOnce(&mut BlockConfig)) -> (Self, TempDir) {
        let dir = TempDir::new_with_prefix("/dev/shm/dragonball-blk").unwrap();
        let path = dir.as_path().join("image");
        let mut f = Self::with(|config| {
            std::fs::copy(&config.path, &path).unwrap();
            config.path.clone_from(&path);
            config.engine = engine;
            change(config);
        });
        f.path = path;
        (f, dir)
    }

    /// On the configuration `change` makes; the driver accepts no feature but those of rings.
    fn with(change: impl FnOnce(&mut BlockConfig)) -> Self {
        let (dir, path) = image();
        let mut config = config(&path, false);
        change(&mut config);
        let guest = TestGuest::new();
        let mut block = Block::new(&config).unwrap();
        let rings = guest.activate(&mut block, 64, true);
        Self {
            guest,
            block,
            rings,
            path,
            _dir: dir,
        }
    }

    /// Activates the device on the rings there are, at `positions`, as after a suspend.
    fn activate_at(&mut self, positions: &[QueuePosition], features: u64) {
        let mut queues: Vec<_> = self.rings.iter().map(TestRing::active).collect();
        for queue in &mut queues {
            if let Some(at) = positions.iter().find(|p| usize::from(p.index) == queue.index) {
                virtio_queue::QueueT::set_next_avail(&mut queue.queue, at.next_avail);
                virtio_queue::QueueT::set_next_used(&mut queue.queue, at.next_used);
            }
        }
        let activation = Activation {
            memory: self.guest.memory.clone(),
            features: CHAIN_FEATURES | features,
            queues,
            interrupt: self.guest.interrupt(),
            io: self.guest.io.clone(),
            confinement: crate::confinement::Confinement::default(),
        };
        self.block.activate(activation).unwrap();
    }

    /// Writes a header at `at`.
    fn header_at(&self, at: u64, kind: u32, sector: u64) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.guest.write(at, &header);
    }

    fn header(&self, kind: u32, sector: u64) {
        self.header_at(HEADER, kind, sector);
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

    /// Offers request number `slot`, over `len` bytes of its own, on `queue`, without a kick. See [`Self::outcome`].
    fn offer(&mut self, queue: usize, slot: u64, kind: u32, sector: u64, len: u32) -> u16 {
        let at = slot_address(slot);
        self.header_at(at, kind, sector);
        self.guest.write(at + 16, &[0xee]);
        let data = if kind == virtio_bindings::virtio_blk::VIRTIO_BLK_T_OUT {
            Buf::Read(at + 0x1000, len)
        } else {
            Buf::Write(at + 0x1000, len)
        };
        self.rings[queue].submit(&[Buf::Read(at, 16), data, Buf::Write(at + 16, 1)])
    }

    /// Status of request number `slot`, 0xee while it has none.
    fn outcome(&self, slot: u64) -> u8 {
        self.guest.read(slot_address(slot) + 16, 1)[0]
    }

    fn on_disk(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        File::open(&self.path)
            .unwrap()
            .read_exact_at(&mut bytes, offset)
            .unwrap();
        bytes
    }

    fn counter(&self, name: &str) -> u64 {
        let counters = self.block.counters();
        counters.iter().find(|(n, _)| *n == name).unwrap().1
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.block.reset();
    }
}

/// Slots of 260 KiB from 4 MiB on: header, status, and from 4 KiB on 256 KiB of data; 40 of them.
fn slot_address(slot: u64) -> u64 {
    assert!(slot < 40);
    (4 << 20) + slot * (260 << 10)
}
