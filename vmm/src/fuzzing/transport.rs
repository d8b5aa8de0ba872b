//! A driver at the registers of a slot with an entropy device behind them.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::script::Script;
use crate::config::RngConfig;
use crate::devices::virtio::CHAIN_FEATURES;
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::test_ring::{RINGS, TestGuest, confinement};
use crate::devices::virtio::transport::mmio::{Host, MmioTransport};

const MAX_ACTIONS: usize = 512;

/// The slot with a device nobody has touched.
pub(super) fn transport(guest: &TestGuest) -> MmioTransport {
    let device = Rng::new(&RngConfig { id: "rng".to_owned() }).unwrap();
    let host = Host {
        memory: guest.memory.clone(),
        io: guest.io.clone(),
        confinement: confinement(),
    };
    let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    MmioTransport::new(Box::new(device), host, guest.slot(), vec![kick])
}

pub(super) fn run(data: &[u8]) {
    let guest = TestGuest::new();
    let mut slot = transport(&guest);
    let mut script = Script::new(data);
    for _ in 0..MAX_ACTIONS {
        if script.is_over() {
            break;
        }
        act(&guest, &mut slot, &mut script);
    }
    slot.reset();
    guest.io.drain().expect("the loop has ended");
}

fn act(guest: &TestGuest, slot: &mut MmioTransport, script: &mut Script) {
    match script.byte() % 10 {
        0 | 1 => {
            let offset = 4 * u64::from(script.byte());
            slot.write(offset, &script.size().to_le_bytes());
        }
        2 => {
            let (offset, len) = (script.u64(), script.byte() % 16);
            slot.write(offset, script.bytes(len.into()));
        }
        3 => {
            let (offset, len) = (u64::from(script.u16()), usize::from(script.byte() % 16));
            slot.read(offset, &mut [0; 16][..len]);
        }
        4 => bring_up(slot, script),
        5 => {
            let (address, len) = (script.address(), script.byte());
            // Outside of memory there is nothing to write to.
            let _ = guest
                .memory
                .write_slice(script.bytes(len.into()), GuestAddress(address));
            slot.write(0x50, &[0; 4]);
        }
        6 => guest.io.drain().expect("the loop has ended"),
        7 => {
            slot.suspend();
            // A driver that broke its queues is told so.
            let _ = slot.resume();
        }
        8 => {
            slot.suspend();
            let (state, device) = slot.save().unwrap();
            slot.reset();
            *slot = transport(guest);
            slot.restore(state.clone(), &device).expect("a state just saved");
            assert_eq!(slot.save().unwrap().0, state);
            let _ = slot.resume();
        }
        _ => {
            slot.write(0x70, &u32::from(script.byte()).to_le_bytes());
        }
    }
}

/// What a driver does, with what it may get wrong taken from the script.
fn bring_up(slot: &mut MmioTransport, script: &mut Script) {
    let change = script.byte();
    let mut write = |offset, value: u64| slot.write(offset, &(value as u32).to_le_bytes());
    for status in [0, 1, 3] {
        write(0x70, status);
    }
    for select in [0, 1] {
        write(0x24, select);
        write(0x20, (CHAIN_FEATURES ^ u64::from(change >> 6)) >> (32 * select));
    }
    write(0x70, 11);
    let size = if change & 1 == 0 { 16 } else { script.u32() };
    let table = if change & 2 == 0 { RINGS } else { script.address() };
    let used = if change & 4 == 0 {
        RINGS + 0xc000
    } else {
        script.address()
    };
    for (offset, value) in [
        (0x30, 0),
        (0x38, size.into()),
        (0x80, table),
        (0x84, table >> 32),
        (0x90, RINGS + 0x8000),
        (0xa0, used),
        (0xa4, used >> 32),
        (0x44, 1),
        (0x70, 15),
    ] {
        write(offset, value);
    }
}
