//! What a saved virtio-mem device is: the requested size and the plugged blocks. Their content is guest memory.

use serde::{Deserialize, Serialize};

use super::BLOCK_SIZE;
use super::region::Region;
use crate::devices::virtio::state::{self, StateError};

/// The state in a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct MemState {
    /// Address and size of the region, so that it is not restored into another one.
    start: u64,
    size: u64,
    requested: u64,
    /// First block and count, ascending.
    runs: Vec<(u64, u64)>,
}

/// Encodes `region` of `device`.
///
/// # Errors
/// [`StateError::Unsupported`].
pub(super) fn save(device: &str, region: &Region) -> Result<Vec<u8>, StateError> {
    let state = MemState {
        start: region.start(),
        size: region.size(),
        requested: region.requested(),
        runs: region.runs(),
    };
    state::encode(device, &state)
}

/// Puts a saved state into a fresh `region` of `device`; memslots appear.
///
/// # Errors
/// [`StateError::Invalid`] for another region, impossible blocks, or blocks that cannot be plugged.
pub(super) fn restore(device: &str, region: &mut Region, bytes: &[u8]) -> Result<(), StateError> {
    let state: MemState = state::decode(device, bytes)?;
    let invalid = |reason: String| StateError::Invalid {
        device: device.to_owned(),
        reason,
    };
    if (state.start, state.size) != (region.start(), region.size()) {
        return Err(invalid(format!(
            "region of {:#x} bytes at {:#x}, this machine's has {:#x} at {:#x}",
            state.size,
            state.start,
            region.size(),
            region.start()
        )));
    }
    if state.requested > region.limit() || !state.requested.is_multiple_of(BLOCK_SIZE) {
        return Err(invalid(format!("requested size {:#x}", state.requested)));
    }
    let blocks = region.size() / BLOCK_SIZE;
    let mut end = 0u64;
    for (first, count) in &state.runs {
        let next = first.checked_add(*count).filter(|next| *next <= blocks);
        end = next
            .filter(|_| *first >= end && *count > 0)
            .ok_or_else(|| invalid(format!("{count} blocks from {first} on")))?;
    }
    region.restore(&state.runs).map_err(|e| invalid(e.to_string()))?;
    region.request(state.requested);
    Ok(())
}
