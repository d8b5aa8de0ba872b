//! What serving a request takes from the heap: nothing, once the device has served some.

use std::collections::VecDeque;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::*;
use crate::confinement::Confinement;
use crate::devices::virtio::block::disk::Disk;
use crate::devices::virtio::block::target::Target;
use crate::devices::virtio::block::worker::Surroundings;
use crate::devices::virtio::block::worker::intake::{Intake, Taken};
use crate::devices::virtio::test_allocations::allocations;

/// Serves all that is offered, as the engines do, on this thread.
fn serve(intake: &mut Intake) -> usize {
    let mut served = 0;
    intake.begin_turn();
    while let Taken::Request(mut request) = intake.take() {
        while let Some(step) = request.step() {
            let result = step.perform(&intake.target.disk);
            request.step_done(&intake.target.disk, result);
        }
        intake.answer(request);
        served += 1;
    }
    intake.end_turn(false);
    served
}

#[test]
fn request_when_others_were_served_before_allocates_nothing() {
    let (_dir, path) = image();
    let guest = TestGuest::new();
    let mut ring = guest.ring(0, 64, true);
    let disk = Disk::open(&config(&path, false)).unwrap();
    let around = Surroundings {
        target: Arc::new(Target::new("d".to_owned(), disk, "d", None)),
        memory: guest.memory.clone(),
        interrupt: guest.interrupt(),
        io: guest.io.clone(),
        confinement: Confinement::default(),
    };
    let mut intake = Intake::new(&around, ring.active(), VecDeque::new());
    let kinds = [
        VIRTIO_BLK_T_IN,
        VIRTIO_BLK_T_OUT,
        VIRTIO_BLK_T_FLUSH,
        VIRTIO_BLK_T_WRITE_ZEROES,
    ];
    guest.write(DATA, &range(0, 8, 1));
    let mut round = || {
        for (number, kind) in (0u64..).zip(kinds) {
            let at = slot_address(number);
            let mut header = [0; 16];
            header[..4].copy_from_slice(&kind.to_le_bytes());
            guest.write(at, &header);
            let chain = match kind {
                VIRTIO_BLK_T_IN => [
                    Buf::Read(at, 16),
                    Buf::Write(at + 0x1000, 8192),
                    Buf::Write(at + 16, 1),
                ],
                VIRTIO_BLK_T_OUT => [
                    Buf::Read(at, 16),
                    Buf::Read(at + 0x1000, 8192),
                    Buf::Write(at + 16, 1),
                ],
                VIRTIO_BLK_T_FLUSH => [Buf::Read(at, 8), Buf::Read(at + 8, 8), Buf::Write(at + 16, 1)],
                _ => [Buf::Read(at, 16), Buf::Read(DATA, 16), Buf::Write(at + 16, 1)],
            };
            ring.submit(&chain);
        }
        assert_eq!(serve(&mut intake), kinds.len());
        while ring.try_used().is_some() {}
        for number in 0..kinds.len() as u64 {
            let mut status = [0xee];
            let at = vm_memory::GuestAddress(slot_address(number) + 16);
            vm_memory::Bytes::read_slice(&*guest.memory, &mut status, at).unwrap();
            assert_eq!(status, [OK]);
        }
    };
    round();
    assert_eq!(allocations(|| (0..50).for_each(|_| round())), 0);
}
