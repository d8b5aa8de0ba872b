//! What outlives the process: not the connections (their host ends do not), only what keeps new ones apart from them.

use serde::{Deserialize, Serialize};

use crate::devices::virtio::state::StateError;

/// The device's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct VsockState {
    /// The guest's context id: its sockets are bound to it.
    pub(super) guest_cid: u64,
    /// The driver was up, so the guest may have connections that it has to be told the end of.
    pub(super) driver_up: bool,
    /// The host port of the next connection the host opens. A port the guest still knows from before would meet the old
    /// socket until its owner closes it, and the guest answers that REQUEST with RST or not at all.
    pub(super) next_port: u32,
}

/// A state that is none of this device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum VsockStateError {
    #[error(
        "it is of a guest with CID {saved}, the configuration says {configured}: configure the saved CID"
    )]
    Cid { saved: u64, configured: u64 },
    #[error("host port {0} is not one the host opens")]
    Port(u32),
}

impl VsockState {
    /// # Errors
    /// [`StateError::Invalid`] when the state is of a guest with another context id.
    pub(super) fn check_cid(&self, device: &str, guest_cid: u64) -> Result<(), StateError> {
        if self.guest_cid == guest_cid {
            return Ok(());
        }
        let error = VsockStateError::Cid {
            saved: self.guest_cid,
            configured: guest_cid,
        };
        Err(StateError::invalid(device, error))
    }
}
