//! The knobs of a balloon.

use serde::{Deserialize, Serialize};

use super::Balloon;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::config::{KnobError, Knobs, OpenError, Opened};
use crate::memory::window::Windows;

/// A way for the guest to give memory back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonConfig {
    /// Device id.
    pub id: String,
    /// Let the guest take pages out of the balloon instead of killing processes.
    pub deflate_on_oom: bool,
    /// Let the guest report memory it does not use, which is freed at once (VIRTIO_BALLOON_F_REPORTING).
    pub reporting: bool,
    /// Seconds between two statistics of the guest; 0 is none.
    pub statistics_interval_s: u16,
}

impl Knobs for BalloonConfig {
    fn id(&self) -> &str {
        &self.id
    }

    fn validate(&self) -> Result<(), KnobError> {
        Ok(())
    }

    fn open(&self) -> Result<Box<dyn Opened>, OpenError> {
        Ok(Box::new(self.clone()))
    }
}

impl Opened for BalloonConfig {
    fn id(&self) -> &str {
        &self.id
    }

    /// The device must know where the guest's memory is.
    fn connect(self: Box<Self>, windows: &Windows) -> Result<Box<dyn VirtioDevice>, OpenError> {
        Ok(Box::new(Balloon::new(&self, windows)))
    }
}
