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

impl VsockState {
    /// # Errors
    /// [`StateError::Invalid`] when the state is of a guest with another context id.
    pub(super) fn check_cid(&self, device: &str, guest_cid: u64) -> Result<(), StateError> {
        if self.guest_cid == guest_cid {
            return Ok(());
        }
        Err(StateError::Invalid {
            device: device.to_owned(),
            reason: format!(
                "it is of a guest with CID {}, the configuration says {guest_cid}: configure the saved CID",
                self.guest_cid
            ),
        })
    }
}
