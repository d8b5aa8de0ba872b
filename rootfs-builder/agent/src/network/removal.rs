//! Taking a virtio network device from its driver, so that the host can unplug it: Linux does not let go of a virtio-mmio
//! device because the host asks for it (docs/decisions.md, 8).
//!
//! The interface is known by netlink, the device by sysfs, and the two can be of different network namespaces: a sysfs shows
//! the namespace it was mounted in. There the name may be another interface's, whose device is the machine's own. So nothing
//! is written unless index and hardware address are the same in both.

use std::io;
use std::path::{Path, PathBuf};

use super::NetworkError;
use super::interfaces::hardware_address;
use super::netlink::Link;

const DRIVER: &str = "virtio_net";

/// The virtio device of an interface.
#[derive(Debug)]
pub struct Device {
    /// Its name on the virtio bus.
    name: String,
    unbind: PathBuf,
}

impl Device {
    /// The device of `link`, by the tree `sysfs`.
    ///
    /// # Errors
    /// sysfs does not know the interface or means another one, or its device is not driven by virtio_net.
    pub fn of(sysfs: &Path, link: &Link) -> Result<Self, NetworkError> {
        let folder = sysfs.join("class/net").join(&link.name);
        same(link, folder.join("ifindex"), &link.index.to_string())?;
        same(link, folder.join("address"), &hardware_address(&link.address))?;
        let driver = target_name(&folder.join("device/driver"))?;
        if driver != DRIVER {
            return Err(NetworkError::Mismatch {
                name: link.name.clone(),
                path: folder.join("device/driver"),
                found: driver,
                expected: format!("a device of {DRIVER}"),
            });
        }
        Ok(Self {
            name: target_name(&folder.join("device"))?,
            unbind: sysfs.join("bus/virtio/drivers").join(DRIVER).join("unbind"),
        })
    }

    /// Takes the driver off. The interface has gone when this returns; blocks until then.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn unbind(self) -> Result<(), NetworkError> {
        let Self { name, unbind } = self;
        std::fs::write(&unbind, name).map_err(|source| NetworkError::File { path: unbind, source })
    }
}

fn same(link: &Link, path: PathBuf, expected: &str) -> Result<(), NetworkError> {
    let found = match std::fs::read_to_string(&path) {
        Ok(found) => found,
        Err(source) => return Err(NetworkError::File { path, source }),
    };
    if found.trim() == expected {
        return Ok(());
    }
    Err(NetworkError::Mismatch {
        name: link.name.clone(),
        path,
        found: found.trim().to_owned(),
        expected: expected.to_owned(),
    })
}

/// Last name of what the link at `path` leads to.
fn target_name(path: &Path) -> Result<String, NetworkError> {
    let failed = |source| NetworkError::File {
        path: path.to_owned(),
        source,
    };
    let target = std::fs::read_link(path).map_err(failed)?;
    let name = target.file_name().and_then(|name| name.to_str());
    name.map(str::to_owned)
        .ok_or_else(|| failed(io::ErrorKind::InvalidData.into()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use rtnetlink::packet_route::link::LinkFlags;

    use super::*;

    /// A sysfs of files with one interface, `eth0`, of `virtio3`.
    struct Tree(PathBuf);

    impl Tree {
        fn new(name: &str, driver: &str) -> Self {
            let tree = Self(std::env::temp_dir().join(format!("agent-sysfs-{name}-{}", std::process::id())));
            let device = tree.0.join("devices/virtio3");
            fs::create_dir_all(device.join("net/eth0")).unwrap();
            fs::write(device.join("net/eth0/ifindex"), "7\n").unwrap();
            fs::write(device.join("net/eth0/address"), "02:00:00:00:00:01\n").unwrap();
            symlink("../../../virtio3", device.join("net/eth0/device")).unwrap();
            let driver = tree.0.join("bus/virtio/drivers").join(driver);
            fs::create_dir_all(&driver).unwrap();
            fs::write(driver.join("unbind"), "").unwrap();
            symlink(&driver, device.join("driver")).unwrap();
            fs::create_dir_all(tree.0.join("class/net")).unwrap();
            symlink("../../devices/virtio3/net/eth0", tree.0.join("class/net/eth0")).unwrap();
            tree
        }

        fn unbound(&self) -> String {
            fs::read_to_string(self.0.join("bus/virtio/drivers/virtio_net/unbind")).unwrap()
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn link() -> Link {
        Link {
            index: 7,
            name: "eth0".into(),
            address: vec![2, 0, 0, 0, 0, 1],
            permanent_address: vec![2, 0, 0, 0, 0, 1],
            mtu: 1500,
            flags: LinkFlags::empty(),
            kind: String::new(),
        }
    }

    #[test]
    fn device_when_both_name_the_same_interface_is_taken_from_its_driver() {
        let tree = Tree::new("same", DRIVER);

        Device::of(&tree.0, &link()).unwrap().unbind().unwrap();

        assert_eq!(tree.unbound(), "virtio3");
    }

    #[test]
    fn device_when_sysfs_means_another_interface_is_left_alone() {
        let tree = Tree::new("other", DRIVER);
        let other_index = Link { index: 8, ..link() };
        let other_address = Link {
            address: vec![2, 0, 0, 0, 0, 2],
            ..link()
        };
        for other in [other_index, other_address] {
            let error = Device::of(&tree.0, &other).unwrap_err();
            assert!(matches!(error, NetworkError::Mismatch { .. }), "{error}");
        }
        let unknown = Link {
            name: "eth9".into(),
            ..link()
        };
        let error = Device::of(&tree.0, &unknown).unwrap_err().to_string();
        assert!(error.contains("class/net/eth9/ifindex"), "{error}");
        assert_eq!(tree.unbound(), "");
    }

    #[test]
    fn device_when_another_drivers_is_left_alone() {
        let tree = Tree::new("driver", "e1000");

        let error = Device::of(&tree.0, &link()).unwrap_err().to_string();

        assert!(error.contains("device/driver is e1000"), "{error}");
    }
}
