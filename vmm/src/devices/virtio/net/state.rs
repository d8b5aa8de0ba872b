//! What an interface knows beyond its configuration and queues.

use serde::{Deserialize, Serialize};

use crate::devices::virtio::state::{self, StateError};
use crate::rate_limiter::RateLimiterState;

/// Saved with the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NetState {
    /// The address the driver has read; a restored machine may have another TAP, from which another would follow.
    pub(super) mac: [u8; 6],
    /// Queue pairs the driver has switched on; 1 after a reset (5.1.6.5.5).
    pub(super) pairs: u16,
    pub(super) link_up: bool,
    /// `None` before the first activation: full.
    pub(super) limits: Option<Limits>,
}

/// A state that is none of this interface.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum NetStateError {
    #[error(
        "{in_use} queue pairs in use, the configuration has {configured}: restore with the configuration it was saved with"
    )]
    Pairs { in_use: u16, configured: usize },
    #[error("{0:02x?} is not the address of one interface")]
    Mac([u8; 6]),
}

/// What is left in the rate limiters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Limits {
    pub(super) rx: RateLimiterState,
    pub(super) tx: RateLimiterState,
}

impl NetState {
    /// Decodes and checks the state of `device`, which has `pairs` queue pairs.
    pub(super) fn decode(device: &str, bytes: &[u8], pairs: usize) -> Result<Self, StateError> {
        let state: Self = state::decode(device, bytes)?;
        let invalid = |error| Err(StateError::invalid(device, error));
        if state.pairs == 0 || usize::from(state.pairs) > pairs {
            return invalid(NetStateError::Pairs {
                in_use: state.pairs,
                configured: pairs,
            });
        }
        if state.mac.first().is_none_or(|first| first & 1 != 0) {
            return invalid(NetStateError::Mac(state.mac));
        }
        Ok(state)
    }
}
