//! What a disk knows beyond its configuration, its queues and its image.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::disk::{Disk, SECTOR};
use super::target::Target;
use crate::devices::virtio::state::{self, StateError};
use crate::rate_limiter::RateLimiterState;

/// The form in a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BlockState {
    /// Capacity in sectors, as the guest knows it.
    pub(super) sectors: u64,
    /// Whether writes may complete before they are durable.
    pub(super) writeback: bool,
    /// What is left in the rate limiter's buckets, if there is one.
    pub(super) limiter: Option<RateLimiterState>,
    /// By queue.
    pub(super) unfinished: Vec<Unfinished>,
}

/// Chains taken from a queue whose requests begin anew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Unfinished {
    /// Index of the queue.
    pub(super) queue: u16,
    /// Their head descriptors.
    pub(super) heads: Vec<u16>,
}

/// The state of `target`.
pub(super) fn save(target: &Target, unfinished: &[Unfinished]) -> Result<Vec<u8>, StateError> {
    let state = BlockState {
        sectors: target.disk.sectors(),
        writeback: target.writeback(),
        limiter: target.throttle.as_ref().map(|throttle| throttle.state()),
        unfinished: unfinished.to_vec(),
    };
    state::encode(&target.id, &state)
}

/// Puts what [`save`] gave into `target`, whose image was opened anew. An image that grew since keeps the saved capacity,
/// which is what the guest counts on, until a resize tells it. `queue_sizes`: most entries of each queue. Returns what is
/// unfinished.
pub(super) fn restore(
    target: &Target,
    queue_sizes: &[u16],
    bytes: &[u8],
) -> Result<Vec<Unfinished>, StateError> {
    let state: BlockState = state::decode(&target.id, bytes)?;
    let checked =
        check_capacity(&target.disk, state.sectors).and_then(|()| check_unfinished(&state, queue_sizes));
    checked.map_err(|error| StateError::invalid(&target.id, error))?;
    target.disk.set_sectors(state.sectors);
    target.set_writeback(state.writeback);
    // Without a limiter in either there is nothing to carry over: the configuration decides.
    if let (Some(throttle), Some(limiter)) = (&target.throttle, &state.limiter) {
        throttle.restore(limiter);
    }
    Ok(state.unfinished)
}

/// A state that is none of this disk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum BlockStateError {
    #[error("unfinished requests of queue {0}")]
    Unfinished(u16),
    #[error("capacity of {sectors} sectors, not a number of blocks of {block_size} bytes")]
    Blocks { sectors: u64, block_size: u32 },
    #[error(
        "the disk had {saved} sectors when it was saved, its image has {present} now: it was cut or is another one"
    )]
    Cut { saved: u64, present: u64 },
}

/// Each queue once, each head once and in the queue.
fn check_unfinished(state: &BlockState, queue_sizes: &[u16]) -> Result<(), BlockStateError> {
    let mut queues = HashSet::new();
    for Unfinished { queue, heads } in &state.unfinished {
        let size = queue_sizes.get(usize::from(*queue)).copied().unwrap_or(0);
        let mut seen = HashSet::new();
        let fits = |head: &u16| *head < size && seen.insert(*head);
        if !queues.insert(queue) || !heads.iter().all(fits) {
            return Err(BlockStateError::Unfinished(*queue));
        }
    }
    Ok(())
}

fn check_capacity(disk: &Disk, saved: u64) -> Result<(), BlockStateError> {
    let present = disk.sectors();
    let block = u64::from(disk.block_size()) / SECTOR;
    if saved == 0 || !saved.is_multiple_of(block) {
        return Err(BlockStateError::Blocks {
            sectors: saved,
            block_size: disk.block_size(),
        });
    }
    if saved > present {
        return Err(BlockStateError::Cut { saved, present });
    }
    Ok(())
}
