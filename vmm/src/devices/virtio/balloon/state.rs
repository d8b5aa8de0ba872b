//! What a saved balloon is: the size it should have and the size it has. Its pages are nobody's content.

use serde::{Deserialize, Serialize};

use crate::devices::virtio::state::{self, StateError};

/// The state in a file, in pages of 4 KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BalloonState {
    /// `num_pages` of the configuration space.
    pub(super) target: u32,
    /// `actual` of the configuration space, as the guest wrote it: any value.
    pub(super) actual: u32,
}

/// A target beyond the guest's memory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("target of {target} pages, the guest has {max}")]
struct TargetTooLarge {
    target: u32,
    max: u32,
}

impl BalloonState {
    /// Encodes it for `device`.
    ///
    /// # Errors
    /// [`StateError::Unsupported`].
    pub(super) fn save(&self, device: &str) -> Result<Vec<u8>, StateError> {
        state::encode(device, self)
    }

    /// Decodes it; `max` is the largest target in pages.
    ///
    /// # Errors
    /// [`StateError::Invalid`].
    pub(super) fn restore(device: &str, bytes: &[u8], max: u32) -> Result<Self, StateError> {
        let state: Self = state::decode(device, bytes)?;
        if state.target > max {
            let error = TargetTooLarge {
                target: state.target,
                max,
            };
            return Err(StateError::invalid(device, error));
        }
        Ok(state)
    }
}
