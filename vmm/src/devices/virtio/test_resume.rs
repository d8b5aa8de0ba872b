//! Activation of a device by a fake guest with features of the test's choice, fresh or where a suspended device stopped.

// Of tests and fuzzing.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use virtio_queue::QueueT;

use super::state::QueuePosition;
use super::test_ring::{TestGuest, TestRing, confinement};
use super::{ActivateError, Activation, VirtioDevice};

/// Activates `device` with `rings` and `features`; queues named in `positions` go on there.
pub fn activate_at(
    guest: &TestGuest,
    device: &mut dyn VirtioDevice,
    rings: &[TestRing],
    features: u64,
    positions: &[QueuePosition],
) -> Result<(), ActivateError> {
    let mut queues: Vec<_> = rings.iter().map(TestRing::active).collect();
    for position in positions {
        let queue = queues.iter_mut().find(|q| q.index == usize::from(position.index));
        let queue = &mut queue.unwrap().queue;
        queue.set_next_avail(position.next_avail);
        queue.set_next_used(position.next_used);
    }
    device.activate(Activation {
        memory: guest.memory.clone(),
        features,
        queues,
        interrupt: guest.interrupt(),
        io: guest.io.clone(),
        confinement: confinement(),
    })
}

/// Reads `N` bytes of the configuration space.
pub fn config<const N: usize>(device: &dyn VirtioDevice, offset: u64) -> [u8; N] {
    let mut bytes = [0; N];
    device.read_config(offset, &mut bytes);
    bytes
}
