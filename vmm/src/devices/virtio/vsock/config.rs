//! The knobs of the vsock device.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::device::ID;
use crate::devices::virtio::config::KnobError;

/// Smallest context id of a guest; the ones below are the hypervisor's, the local and the host's (linux/vm_sockets.h).
const MIN_GUEST_CID: u32 = 3;

/// The vsock device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockConfig {
    /// Guest context id, 3 or more.
    pub guest_cid: u32,
    /// Unix socket with the `CONNECT <port>` protocol for outside tools (`kata.hvsock`); guest-initiated connections
    /// to a port without an in-process listener go to `<path>_<port>`.
    pub uds_path: Option<PathBuf>,
}

impl VsockConfig {
    /// Checks everything that can be checked without touching the host.
    ///
    /// # Errors
    /// The first knob with a value it cannot have.
    pub fn validate(&self) -> Result<(), KnobError> {
        if self.guest_cid < MIN_GUEST_CID {
            let need = format!("{MIN_GUEST_CID} or more (smaller ones are reserved)");
            return Err(KnobError::new(ID, "guest_cid", &self.guest_cid, need));
        }
        Ok(())
    }
}
