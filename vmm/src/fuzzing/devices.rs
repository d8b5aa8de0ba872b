//! Disk, interface, memory and balloon.

use std::any::Any;
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::tempdir::TempDir;

use super::guest::{Guest, Subject};
use super::scratch::scratch;
use super::script::Script;
use crate::config::{BalloonConfig, BlockConfig, BlockEngine, NetConfig};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::block::Block;
use crate::devices::virtio::mem::Mem;
use crate::devices::virtio::net::socket::{Socket, Wire, device, wire};
use crate::devices::virtio::state;
use crate::memory::layout::WINDOW_ALIGN;
use crate::memory::window::fake::windows;

const IMAGE_BYTES: u64 = 1 << 20;
const QUEUE_SIZE: u16 = 64;
const MEM_BLOCK: u64 = 2 << 20;

/// An image, and the device on it: one after the other with each engine.
#[derive(Default)]
pub(super) struct Disk {
    dir: Option<TempDir>,
    builds: usize,
}

impl Subject for Disk {
    fn build(&mut self) -> Box<dyn VirtioDevice> {
        let path = self.dir.get_or_insert_with(scratch).as_path().join("image");
        if self.builds == 0 {
            File::create(&path).unwrap().set_len(IMAGE_BYTES).unwrap();
        }
        let engines = [BlockEngine::IoUring, BlockEngine::Sync];
        let config = BlockConfig {
            engine: engines[self.builds % engines.len()],
            queues: 2,
            queue_size: QUEUE_SIZE,
            ..BlockConfig::new("disk", path)
        };
        self.builds += 1;
        let auto = || BlockConfig {
            engine: BlockEngine::Auto,
            ..config.clone()
        };
        // A host may have no io_uring.
        let block = Block::new(&config).or_else(|_| Block::new(&auto()));
        Box::new(block.unwrap())
    }

    /// `struct virtio_blk_req` (virtio 1.2, 5.2.6).
    fn act(&mut self, device: &mut dyn VirtioDevice, guest: &mut Guest, script: &mut Script) {
        let (kind, queue) = (script.byte(), usize::from(script.byte() & 1));
        if kind == 255 {
            let device: &mut dyn Any = device;
            let disk = device.downcast_mut::<Block>().unwrap();
            let _ = disk.gauge().measure(|size| disk.resize(size));
            return;
        }
        let mut header = [0; 16];
        header[0] = kind % 16;
        header[8..16].copy_from_slice(&u64::from(script.size()).to_le_bytes());
        let data = script.bytes(64);
        let (said, room) = (script.size(), script.size());
        match kind & 16 {
            0 => guest.request(queue, &[(&header, 16), (data, said)], &[1]),
            _ => guest.request(queue, &[(&header, 16)], &[room, 1]),
        }
        guest.kick(queue);
    }
}

/// Two queue pairs.
pub(super) struct Interface {
    sockets: Vec<Arc<Socket>>,
    wires: Vec<Wire>,
}

impl Default for Interface {
    fn default() -> Self {
        let (sockets, wires) = (0..2).map(|_| wire(1 << 17)).unzip();
        Self { sockets, wires }
    }
}

impl Subject for Interface {
    fn build(&mut self) -> Box<dyn VirtioDevice> {
        let config = NetConfig {
            queue_size: QUEUE_SIZE,
            queue_pairs: 2,
            ..NetConfig::new("net", "tap")
        };
        Box::new(device(&config, &self.sockets))
    }

    /// Frames to the guest, and from it.
    fn act(&mut self, _device: &mut dyn VirtioDevice, _guest: &mut Guest, script: &mut Script) {
        let what = script.byte();
        let wire = &self.wires[usize::from(what & 1)];
        if what & 2 == 0 {
            let len = (script.size() as usize).min(0x1_0000);
            let mut frame = script.bytes(32).to_vec();
            frame.resize(len, what);
            wire.try_send(&frame);
        } else {
            while wire.try_recv().is_some() {}
        }
    }
}

/// A region of which the guest may have all.
#[derive(Default)]
pub(super) struct Memory {
    start: u64,
}

impl Subject for Memory {
    fn build(&mut self) -> Box<dyn VirtioDevice> {
        let size = 2 * WINDOW_ALIGN;
        let (windows, _memory, _slots) = windows(size, 0);
        let window = windows.hotplug().unwrap().clone();
        self.start = window.region().start;
        let mut device = Mem::new("mem", window, size);
        // As if the host had asked for all of it: that waits for the guest.
        type Fields = (u64, u64, u64, Vec<(u64, u64)>, Option<(u64, u64, u64)>);
        let asked: Fields = (self.start, size, size, Vec::new(), None);
        device.restore(&state::encode("mem", &asked).unwrap()).unwrap();
        Box::new(device)
    }

    /// `struct virtio_mem_req` (virtio 1.2, 5.15.6), or another target.
    fn act(&mut self, device: &mut dyn VirtioDevice, guest: &mut Guest, script: &mut Script) {
        let kind = script.byte();
        if kind == 255 {
            let device: &mut dyn Any = device;
            let handle = device.downcast_mut::<Mem>().unwrap().handle();
            let _ = handle.resize(0, u64::from(script.byte()) * MEM_BLOCK, Duration::ZERO);
            return;
        }
        let address = self.start + u64::from(script.byte()) * MEM_BLOCK;
        let mut request = [0; 24];
        request[0] = kind % 5;
        request[8..16].copy_from_slice(&address.to_le_bytes());
        request[16] = script.byte();
        guest.request(0, &[(&request, 24)], &[10]);
        guest.kick(0);
    }
}

/// A balloon with statistics and reporting.
#[derive(Default)]
pub(super) struct Pages;

impl Subject for Pages {
    fn build(&mut self) -> Box<dyn VirtioDevice> {
        let (windows, _memory, _slots) = windows(1, 0);
        let config = BalloonConfig {
            id: "balloon".to_owned(),
            deflate_on_oom: true,
            reporting: true,
            statistics_interval_s: 1,
        };
        Box::new(Balloon::new(&config, &windows))
    }

    /// Page numbers to inflate or deflate, ranges to report, or another target.
    fn act(&mut self, device: &mut dyn VirtioDevice, guest: &mut Guest, script: &mut Script) {
        let device: &mut dyn Any = device;
        let balloon = device.downcast_mut::<Balloon>().unwrap();
        match script.byte() % 4 {
            0 => {
                let _ = balloon.set_target(u64::from(script.u32()));
                let _ = (balloon.status(), balloon.statistics());
            }
            1 => guest.request(3, &[], &[script.size(), script.size()]),
            what => {
                let count = script.byte() % 32;
                let first = script.u16();
                let pages: Vec<u8> = (0..count)
                    .flat_map(|index| (u32::from(first) + u32::from(index)).to_le_bytes())
                    .collect();
                guest.request(usize::from(what - 2), &[(&pages, pages.len() as u32)], &[]);
            }
        }
        (0..5).for_each(|queue| guest.kick(queue));
    }
}
