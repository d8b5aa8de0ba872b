//! Bytes of a file as the state of a device.

use super::devices::{Disk, Interface, Memory, Pages};
use super::fs::Share;
use super::guest::Subject;
use super::scratch::scratch;
use super::script::Script;
use super::transport::transport;
use super::vsock::Sockets;
use crate::config::PmemConfig;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::console::{Console, ConsoleLog};
use crate::devices::virtio::pmem::{Pmem, PmemFile};
use crate::devices::virtio::state;
use crate::devices::virtio::test_resume::activate_at;
use crate::devices::virtio::test_ring::TestGuest;
use crate::devices::virtio::transport::mmio::TransportState;
use crate::memory::window::fake::windows;

pub(super) fn run(data: &[u8]) {
    let mut script = Script::new(data);
    let kind = script.byte();
    let bytes = script.rest();
    match kind % 9 {
        0 => device(&mut Disk::default(), bytes),
        1 => device(&mut Interface::default(), bytes),
        2 => device(&mut Sockets::default(), bytes),
        3 => device(&mut Share::default(), bytes),
        4 => device(&mut Memory::default(), bytes),
        5 => device(&mut Pages, bytes),
        6 => {
            let (mut console, _input) = Console::new(ConsoleLog::default()).unwrap();
            check(&mut console, bytes);
        }
        7 => pmem(bytes),
        _ => registers(bytes),
    }
}

fn device(subject: &mut impl Subject, bytes: &[u8]) {
    check(&mut *subject.build(), bytes);
}

fn pmem(bytes: &[u8]) {
    let dir = scratch();
    let path = dir.as_path().join("image");
    std::fs::write(&path, [7; 4096]).unwrap();
    let (windows, _memory, _slots) = windows(0, 512 << 20);
    let config = PmemConfig {
        id: "pmem".to_owned(),
        path,
        read_only: false,
    };
    if let Ok(mut pmem) = Pmem::at_saved_place(PmemFile::open(&config).unwrap(), &windows, bytes) {
        check(&mut pmem, bytes);
    }
}

/// A device that accepts a state can save it, and runs.
fn check(device: &mut dyn VirtioDevice, bytes: &[u8]) {
    if device.restore(bytes).is_err() {
        return;
    }
    device.save().expect("a state that was accepted");
    let guest = TestGuest::new();
    let sizes = device.queue_sizes().to_vec();
    let rings: Vec<_> = (0..sizes.len())
        .map(|index| guest.ring(index, sizes[index].min(16), true))
        .collect();
    let features = device.features();
    activate_at(&guest, device, &rings, features, &[]).expect("a state that was accepted");
    guest.io.drain().expect("the loop has ended");
    device.reset();
}

fn registers(bytes: &[u8]) {
    let guest = TestGuest::new();
    let mut slot = transport(&guest);
    let Ok(saved) = state::decode::<TransportState>("rng", bytes) else {
        return;
    };
    if slot.restore(saved, &[]).is_ok() {
        // Its queues may be anywhere.
        let _ = slot.resume();
        slot.write(0x50, &[0; 4]);
        guest.io.drain().expect("the loop has ended");
        slot.suspend();
        slot.save().expect("a state that was accepted");
    }
    slot.reset();
}
