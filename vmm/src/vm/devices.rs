//! From a device's configuration to the device.

use crate::config::{BalloonConfig, DeviceConfig};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::block::Block;
use crate::devices::virtio::fs::Fs;
use crate::devices::virtio::net::Net;
use crate::devices::virtio::pmem::{Pmem, PmemFile};
use crate::devices::virtio::rng::Rng;
use crate::memory::window::Windows;

/// A device that has what it needs from the host, and maybe not yet what it needs from the machine.
pub enum Opened {
    /// Complete.
    Device(Box<dyn VirtioDevice>),
    /// Must know where the guest's memory is.
    Balloon(BalloonConfig),
    /// Must get its place in guest memory.
    Pmem(PmemFile),
}

/// Opens what the device needs from the host.
///
/// # Errors
/// What is wrong, for an error that already names the device.
pub fn open(config: &DeviceConfig) -> Result<Opened, String> {
    let device: Box<dyn VirtioDevice> = match config {
        DeviceConfig::Block(config) => Box::new(Block::new(config).map_err(|e| e.to_string())?),
        DeviceConfig::Rng(config) => Box::new(Rng::new(config).map_err(|e| e.to_string())?),
        DeviceConfig::Net(config) => Box::new(Net::new(config).map_err(|e| e.to_string())?),
        DeviceConfig::Fs(config) => Box::new(Fs::new(config).map_err(|e| e.to_string())?),
        DeviceConfig::Balloon(config) => return Ok(Opened::Balloon(config.clone())),
        DeviceConfig::Pmem(config) => {
            let file = PmemFile::open(config).map_err(|e| e.to_string())?;
            return Ok(Opened::Pmem(file));
        }
    };
    Ok(Opened::Device(device))
}

impl Opened {
    /// The device's id.
    pub fn id(&self) -> &str {
        match self {
            Self::Device(device) => device.id(),
            Self::Balloon(config) => &config.id,
            Self::Pmem(file) => file.id(),
        }
    }

    /// What the device takes of the pmem window, in bytes.
    pub fn pmem_bytes(&self) -> u64 {
        match self {
            Self::Pmem(file) => file.window_bytes(),
            Self::Device(_) | Self::Balloon(_) => 0,
        }
    }

    /// Completes the device with its part of the machine's memory.
    ///
    /// # Errors
    /// What is wrong, for an error that already names the device.
    pub fn connect(self, windows: &Windows) -> Result<Box<dyn VirtioDevice>, String> {
        Ok(match self {
            Self::Device(device) => device,
            Self::Balloon(config) => Box::new(Balloon::new(&config, windows)),
            Self::Pmem(file) => Box::new(Pmem::new(file, windows).map_err(|e| e.to_string())?),
        })
    }

    /// As [`connect`](Self::connect), for a device that gave `state` when it was saved: one that has a place in guest memory
    /// is to be where it was.
    ///
    /// # Errors
    /// What is wrong, for an error that already names the device.
    pub fn connect_again(self, windows: &Windows, state: &[u8]) -> Result<Box<dyn VirtioDevice>, String> {
        match self {
            Self::Pmem(file) => {
                let device = Pmem::at_saved_place(file, windows, state).map_err(|e| e.to_string())?;
                Ok(Box::new(device))
            }
            other => other.connect(windows),
        }
    }
}
