//! From a device's configuration to the device.

use crate::config::DeviceConfig;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::block::Block;
use crate::devices::virtio::fs::Fs;
use crate::devices::virtio::net::Net;
use crate::devices::virtio::rng::Rng;

/// Makes the device, opening what it needs from the host.
///
/// # Errors
/// What is wrong, for an error that already names the device.
pub fn create(config: &DeviceConfig) -> Result<Box<dyn VirtioDevice>, String> {
    Ok(match config {
        DeviceConfig::Block(config) => Box::new(Block::new(config).map_err(|e| e.to_string())?),
        DeviceConfig::Rng(config) => Box::new(Rng::new(config).map_err(|e| e.to_string())?),
        DeviceConfig::Net(config) => Box::new(Net::new(config).map_err(|e| e.to_string())?),
        DeviceConfig::Fs(config) => Box::new(Fs::new(config).map_err(|e| e.to_string())?),
    })
}
