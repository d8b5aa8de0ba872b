//! The control queue (5.1.6.5): the driver says how many queue pairs it uses. Everything else is answered with an error.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use virtio_queue::DescriptorChain;

use super::counters::Counters;
use crate::devices::virtio::queue::chain::Chain;
use crate::devices::virtio::queue::served_queue::ServedQueue;
use crate::memory::GuestMemory;

/// Commands per turn.
pub(super) const BUDGET: usize = 4;

/// A command taken from the queue.
#[derive(Debug)]
pub(super) struct Command {
    head: u16,
    /// `None`: it cannot even be answered.
    chain: Option<Chain>,
    /// The number of queue pairs it asks for; `None` for anything else.
    pub(super) pairs: Option<usize>,
}

impl Command {
    /// Reads a command. `limit` is the queue's size.
    pub(super) fn read(memory: &GuestMemory, chain: DescriptorChain<&GuestMemory>, limit: u16) -> Self {
        let head = chain.head_index();
        let chain = match Chain::parse(memory, chain, limit) {
            // Nowhere to put the answer, so nothing is done either.
            Ok(chain) => (!chain.writable.is_empty()).then_some(chain),
            Err(error) => {
                guest_log!(DEBUG, %error, "net: control chain dropped");
                None
            }
        };
        let pairs = chain.as_ref().and_then(|chain| pairs_wanted(memory, chain));
        Self { head, chain, pairs }
    }

    /// Says whether it worked, and counts it. The driver hears of it at the queue's next `notify`.
    pub(super) fn answer(self, queue: &mut ServedQueue, done: bool, counters: &Counters) {
        let ack = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
        if done {
            counters.control_commands.add(1);
        } else {
            counters.control_errors.add(1);
        }
        let written = self.chain.is_some_and(|chain| {
            let written = chain.writable.write(queue.memory(), 0, &[ack as u8]);
            if let Err(error) = &written {
                guest_log!(DEBUG, %error, "net: answer to a command lost");
            }
            written.is_ok()
        });
        queue.complete(self.head, u32::from(written));
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
