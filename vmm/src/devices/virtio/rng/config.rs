//! The knobs of an entropy source.

use serde::{Deserialize, Serialize};

use super::Rng;
use crate::devices::virtio::config::{Complete, KnobError, Knobs, OpenError, Opened};

/// An entropy source fed from the host's `/dev/urandom`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngConfig {
    /// Device id.
    pub id: String,
}

impl Knobs for RngConfig {
    fn id(&self) -> &str {
        &self.id
    }

    fn validate(&self) -> Result<(), KnobError> {
        Ok(())
    }

    fn open(&self) -> Result<Box<dyn Opened>, OpenError> {
        let Ok(rng) = Rng::new(self);
        Ok(Complete::opened(rng))
    }
}
