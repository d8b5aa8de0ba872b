//! The control queue (5.1.6.5): the driver says how many queue pairs it uses. Everything else is answered with an error.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use virtio_queue::DescriptorChain;

use super::counters::Counters;
use crate::devices::virtio::chain::Chain;
use crate::memory::GuestMemory;

/// Commands per turn.
pub(super) const BUDGET: usize = 4;

/// Serves one command: `set_pairs` puts a number of queue pairs in force that was checked against `max_pairs`, and says
/// whether it worked. Returns the bytes written.
pub(super) fn serve(
    memory: &GuestMemory,
    chain: DescriptorChain<&GuestMemory>,
    limit: u16,
    max_pairs: usize,
    counters: &Counters,
    mut set_pairs: impl FnMut(usize) -> bool,
) -> u32 {
    let chain = match Chain::parse(memory, chain, limit) {
        Ok(chain) => chain,
        Err(error) => {
            guest_log!(DEBUG, %error, "net: control chain dropped");
            counters.control_errors.add(1);
            return 0;
        }
    };
    if chain.writable.is_empty() {
        // Nowhere to put the answer, so nothing is done either.
        counters.control_errors.add(1);
        return 0;
    }
    let done = pairs_wanted(memory, &chain)
        .is_some_and(|pairs| (1..=max_pairs).contains(&pairs) && set_pairs(pairs));
    let ack = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
    if done {
        counters.control_commands.add(1);
    } else {
        counters.control_errors.add(1);
    }
    match chain.writable.write(memory, 0, &[ack as u8]) {
        Ok(()) => 1,
        Err(error) => {
            guest_log!(DEBUG, %error, "net: answer to a command lost");
            0
        }
    }
}

/// The argument of VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET: class, command, then the number as le16.
fn pairs_wanted(memory: &GuestMemory, chain: &Chain) -> Option<usize> {
    let mut command = [0; 4];
    if chain.readable.len() != command.len() as u64 {
        return None;
    }
    chain.readable.read(memory, 0, &mut command).ok()?;
    let [class, which, low, high] = command;
    let known = u32::from(class) == VIRTIO_NET_CTRL_MQ && u32::from(which) == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET;
    known.then(|| usize::from(u16::from_le_bytes([low, high])))
}
