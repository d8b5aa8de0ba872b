//! Directories of a share, while the guest runs.

use crate::config::SharedDir;
use crate::devices::virtio::fs::{Fs, FsHandle, Unmount};
use crate::vm::{DeviceError, Vm};

impl Vm {
    /// Makes the host directory `dir` appear as `name` in the root of the share `device_id`, whose root must be made of
    /// shares ([`FsRoot::Shares`](crate::config::FsRoot)). The guest sees it at once.
    ///
    /// # Errors
    /// [`DeviceError`]; [`DeviceError::Refused`] with an [`FsMountError`](crate::devices::virtio::fs::FsMountError) when
    /// the directory cannot be opened or the name is taken.
    pub fn fs_mount(&self, device_id: &str, name: &str, dir: &SharedDir) -> Result<(), DeviceError> {
        let mounted = self.fs_handle(device_id)?.mount(name, dir);
        mounted.map_err(|e| DeviceError::Refused(Box::new(e)))
    }

    /// Takes `name` out of the share `device_id` again.
    ///
    /// # Errors
    /// [`DeviceError`]; [`DeviceError::Refused`] with an [`FsMountError`](crate::devices::virtio::fs::FsMountError) when
    /// it is not mounted, or when files of it are open in the guest and `how` does not allow that.
    pub fn fs_unmount(&self, device_id: &str, name: &str, how: Unmount) -> Result<(), DeviceError> {
        let unmounted = self.fs_handle(device_id)?.unmount(name, how);
        unmounted.map_err(|e| DeviceError::Refused(Box::new(e)))
    }

    /// Opening a directory can take long; the machine is not locked meanwhile.
    fn fs_handle(&self, device_id: &str) -> Result<FsHandle, DeviceError> {
        self.with_device(device_id, "share", |fs: &mut Fs| {
            Ok::<_, std::convert::Infallible>(fs.handle())
        })
    }
}
