//! Every virtio device a configuration can have.

use serde::{Deserialize, Serialize};

use super::{BalloonConfig, BlockConfig, ConfigError, FsConfig, Knobs, NetConfig, PmemConfig, RngConfig};

/// A virtio device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceConfig {
    /// A disk.
    Block(BlockConfig),
    /// A shared directory.
    Fs(FsConfig),
    /// An entropy source.
    Rng(RngConfig),
    /// A network interface.
    Net(NetConfig),
    /// A balloon; at most one.
    Balloon(BalloonConfig),
    /// A file as persistent memory.
    Pmem(PmemConfig),
}

impl DeviceConfig {
    /// What the device's folder says about it: the one place where its kind matters to the machine.
    pub fn knobs(&self) -> &dyn Knobs {
        match self {
            Self::Block(config) => config,
            Self::Fs(config) => config,
            Self::Rng(config) => config,
            Self::Net(config) => config,
            Self::Balloon(config) => config,
            Self::Pmem(config) => config,
        }
    }

    /// The device's id, unique in its VM.
    pub fn id(&self) -> &str {
        self.knobs().id()
    }

    /// Checks one device, at boot or before it is added to a running VM.
    ///
    /// # Errors
    /// The first [`ConfigError`] found.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let id = self.id();
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if id.is_empty() || id.len() > 64 || !id.chars().all(allowed) {
            return Err(ConfigError::DeviceId(id.to_owned()));
        }
        Ok(self.knobs().validate()?)
    }
}
