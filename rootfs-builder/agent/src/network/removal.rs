//! Taking the driver off a virtio network device, so that the host can unplug it: Linux does not let go of a virtio-mmio
//! device because the host asks for it (docs/decisions.md, 8). It is the driver of the device's slot that goes, and the
//! device with it: while virtio-mmio stays bound Linux takes the next device in the slot for this one.
//!
//! The interface is known by netlink, the device by sysfs, and the two can be of different network namespaces: a sysfs shows
//! the namespace it was mounted in. There the name may be another interface's, whose device is the machine's own. So nothing
//! is written unless index and hardware address are the same in both.

use std::io;
use std::path::{Path, PathBuf};

use super::NetworkError;
use super::interfaces::hardware_address;
use super::netlink::Link;
use crate::hotplug;

const DRIVER: &str = "virtio_net";

/// The device of an interface.
#[derive(Debug)]
pub struct Device {
    /// Its name on the bus of the driver that is taken off: its slot's, or its own on the virtio bus.
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
        let device = folder.join("device");
        let driver = target_name(&device.join("driver"))?;
        if driver != DRIVER {
            return Err(NetworkError::Mismatch {
                name: link.name.clone(),
                path: device.join("driver"),
                found: driver,
                expected: format!("a device of {DRIVER}"),
            });
        }
        let slot = hotplug::slot_of(sysfs, &device).map_err(|source| NetworkError::File {
            path: device.clone(),
            source,
        })?;
        let (name, unbind) = match slot {
            Some(slot) => slot,
            None => {
                let unbind = sysfs.join("bus/virtio/drivers").join(DRIVER).join("unbind");
                (target_name(&device)?, unbind)
            }
        };
        Ok(Self { name, unbind })
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
    use crate::hotplug::tests::Tree;

    /// A sysfs with one interface, `eth0`, of a device on the virtio bus at `device`.
    fn plug(tree: &Tree, device: &Path, driver: &str) {
        let interface = device.join("net/eth0");
        fs::create_dir_all(&interface).unwrap();
        fs::write(interface.join("ifindex"), "7\n").unwrap();
        fs::write(interface.join("address"), "02:00:00:00:00:01\n").unwrap();
        symlink(format!("../../../{}", name_of(device)), interface.join("device")).unwrap();
        symlink(tree.driver("virtio", driver), device.join("driver")).unwrap();
        fs::create_dir_all(tree.0.join("class/net")).unwrap();
        symlink(&interface, tree.0.join("class/net/eth0")).unwrap();
    }

    fn name_of(device: &Path) -> &str {
        device.file_name().unwrap().to_str().unwrap()
    }

    /// In a slot.
    fn slotted(name: &str, driver: &str) -> Tree {
        let tree = Tree::new(name);
        let slot = tree.slot("LNRO0005:04", true);
        plug(&tree, &slot.join("virtio3"), driver);
        tree
    }

    /// What virtio_net was told.
    fn unbound(tree: &Tree) -> String {
        fs::read_to_string(tree.0.join("bus/virtio/drivers/virtio_net/unbind")).unwrap()
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
    fn device_when_both_name_the_same_interface_is_taken_out_of_its_slot() {
        let tree = slotted("same", DRIVER);

        Device::of(&tree.0, &link()).unwrap().unbind().unwrap();

        assert_eq!(tree.ordered("unbind"), "LNRO0005:04");
        assert_eq!(unbound(&tree), "");
    }

    #[test]
    fn device_when_in_no_slot_is_taken_from_its_driver() {
        let tree = Tree::new("no-slot");
        let parent = tree.0.join("devices/pci0000:00/0000:00:03.0");
        plug(&tree, &parent.join("virtio3"), DRIVER);

        Device::of(&tree.0, &link()).unwrap().unbind().unwrap();

        assert_eq!(unbound(&tree), "virtio3");
        assert_eq!(tree.ordered("unbind"), "");
    }

    #[test]
    fn device_when_sysfs_means_another_interface_is_left_alone() {
        let tree = slotted("other", DRIVER);
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
        assert_eq!((tree.ordered("unbind"), unbound(&tree)), Default::default());
    }

    #[test]
    fn device_when_another_drivers_is_left_alone() {
        let tree = slotted("driver", "e1000");

        let error = Device::of(&tree.0, &link()).unwrap_err().to_string();

        assert!(error.contains("device/driver is e1000"), "{error}");
        assert_eq!(tree.ordered("unbind"), "");
    }
}
