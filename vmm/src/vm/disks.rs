//! Disks that change while the guest runs.

use std::convert::Infallible;

use crate::devices::virtio::block::Block;
use crate::vm::{DeviceError, Vm};

impl Vm {
    /// Gives the disk called `id` the present size of its image or block device, and tells the guest. Returns the capacity
    /// in bytes. The disk of a running guest only grows.
    ///
    /// # Errors
    /// [`DeviceError`]; with [`Refused`](DeviceError::Refused) for an image that became smaller or cannot be measured. The
    /// capacity is as before.
    pub fn resize_disk(&self, id: &str) -> Result<u64, DeviceError> {
        // The guest's requests and registers do not wait for the host's storage.
        let gauge = self.with_device(id, "disk", |disk: &mut Block| Ok::<_, Infallible>(disk.gauge()))?;
        let resize = |size| self.with_device(id, "disk", |disk: &mut Block| disk.resize(size));
        gauge
            .measure(resize)
            .map_err(|error| DeviceError::Refused(Box::new(error)))?
    }
}
