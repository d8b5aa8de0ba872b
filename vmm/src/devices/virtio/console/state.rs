//! What outlives the process: input the guest has not taken yet. What it said is the log's.

use serde::{Deserialize, Serialize};

use super::input::INPUT_CAPACITY;
use crate::devices::virtio::state::{self, StateError};

/// The device's state.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ConsoleState {
    /// At most [`INPUT_CAPACITY`] bytes.
    pub(super) input: Vec<u8>,
}

/// More input than a console keeps.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0} bytes of input, at most {INPUT_CAPACITY}")]
struct TooMuchInput(usize);

impl ConsoleState {
    /// # Errors
    /// [`StateError::Invalid`].
    pub(super) fn decode(device: &str, bytes: &[u8]) -> Result<Self, StateError> {
        let state: Self = state::decode(device, bytes)?;
        if state.input.len() > INPUT_CAPACITY {
            return Err(StateError::invalid(device, TooMuchInput(state.input.len())));
        }
        Ok(state)
    }
}
