//! What a saved virtio-mem device is: the requested size and the plugged blocks. Their content is guest memory.

use serde::{Deserialize, Serialize};

use super::BLOCK_SIZE;
use super::region::{Region, Unplugging};
use crate::devices::virtio::state::{self, StateError};
use crate::memory::window::WindowError;

/// The state in a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct MemState {
    /// Address and size of the region, so that it is not restored into another one.
    start: u64,
    size: u64,
    requested: u64,
    /// First block and count, ascending.
    runs: Vec<(u64, u64)>,
    /// An UNPLUG of which a part is done.
    unplugging: Option<Unplugging>,
}

/// A state that is none of this device, or a device without one.
#[derive(Debug, thiserror::Error)]
pub(super) enum MemStateError {
    #[error("the device has ended")]
    Ended,
    #[error(
        "region of {saved_size:#x} bytes at {saved_start:#x}, this machine's has {size:#x} at {start:#x}"
    )]
    Region {
        saved_start: u64,
        saved_size: u64,
        start: u64,
        size: u64,
    },
    #[error("requested size {0:#x}")]
    Requested(u64),
    #[error("{count} blocks from {first} on")]
    Blocks { first: u64, count: u64 },
    #[error("an UNPLUG under way of blocks that are not plugged")]
    Unplugging,
    #[error(transparent)]
    Window(#[from] WindowError),
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
        unplugging: region.unplugging(),
    };
    state::encode(device, &state)
}

/// Puts a saved state into a fresh `region` of `device`; memslots appear.
///
/// # Errors
/// [`StateError::Invalid`] for another region, impossible blocks, or blocks that cannot be plugged.
pub(super) fn restore(device: &str, region: &mut Region, bytes: &[u8]) -> Result<(), StateError> {
    let state: MemState = state::decode(device, bytes)?;
    let invalid = |error| StateError::invalid(device, error);
    if (state.start, state.size) != (region.start(), region.size()) {
        return Err(invalid(MemStateError::Region {
            saved_start: state.start,
            saved_size: state.size,
            start: region.start(),
            size: region.size(),
        }));
    }
    if state.requested > region.limit() || !state.requested.is_multiple_of(BLOCK_SIZE) {
        return Err(invalid(MemStateError::Requested(state.requested)));
    }
    let blocks = region.size() / BLOCK_SIZE;
    let mut end = 0u64;
    for (first, count) in &state.runs {
        let next = first.checked_add(*count).filter(|next| *next <= blocks);
        end = next.filter(|_| *first >= end && *count > 0).ok_or_else(|| {
            invalid(MemStateError::Blocks {
                first: *first,
                count: *count,
            })
        })?;
    }
    let begun = state.unplugging.as_ref();
    if begun.is_some_and(|begun| !begun.is_possible(&state.runs)) {
        return Err(invalid(MemStateError::Unplugging));
    }
    region
        .restore(&state.runs)
        .map_err(|error| invalid(error.into()))?;
    region.request(state.requested);
    region.go_on(state.unplugging);
    Ok(())
}
