//! What a saved virtio-pmem device is: where its file was, so that it is found there again. The content is in the file; what
//! a guest wrote to a read-only one is guest memory.

use serde::{Deserialize, Serialize};

use crate::devices::virtio::state::{self, StateError};
use crate::memory::window::FileMapping;

/// The state in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct PmemState {
    /// Guest physical address.
    start: u64,
    /// Size in bytes.
    size: u64,
}

/// A state that is none of this device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum PmemStateError {
    #[error("{saved:#x} bytes, the file has {present:#x} now")]
    Size { saved: u64, present: u64 },
    #[error("saved at {saved:#x}, is at {present:#x}")]
    Place { saved: u64, present: u64 },
}

/// Encodes where `mapping` is.
///
/// # Errors
/// [`StateError::Unsupported`].
pub(super) fn save(device: &str, mapping: &FileMapping) -> Result<Vec<u8>, StateError> {
    let state = PmemState {
        start: mapping.start(),
        size: mapping.size(),
    };
    state::encode(device, &state)
}

/// Where the saved device was, which must have had `wanted` bytes.
///
/// # Errors
/// [`StateError::Invalid`].
pub(super) fn saved_start(device: &str, wanted: u64, bytes: &[u8]) -> Result<u64, StateError> {
    let PmemState { start, size } = state::decode(device, bytes)?;
    if size == wanted {
        return Ok(start);
    }
    let error = PmemStateError::Size {
        saved: size,
        present: wanted,
    };
    Err(StateError::invalid(device, error))
}
