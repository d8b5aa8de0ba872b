//! Devices that the host plugs into the running machine, and takes away.
//!
//! Each is in a slot, which ACPI calls `LNRO0005` and Linux drives with virtio-mmio. When a slot is filled for the first
//! time Linux makes a platform device of it and binds the driver, and it never takes the platform device away again: a slot
//! that is used once more is not bound by anybody (docs/decisions.md, 8). There is no event for it either: the scan that finds
//! it present only changes what ACPI knows. Before that scan the driver does not match (drivers/acpi/bus.c,
//! `__acpi_match_device`), and of an empty slot it takes one look at the registers and goes (drivers/virtio/virtio_mmio.c):
//! ENODEV both times. So who waits for a device binds what has no driver, again and again.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

/// Where the kernel shows its devices and drivers.
const SYSFS: &str = "/sys";
/// What the names of slots begin with, among the platform devices.
const SLOT: &str = "LNRO0005:";
const DEVICES: &str = "bus/platform/devices";
/// The name of the driver.
const DRIVER: &str = "virtio-mmio";
/// Folder of the driver.
const DRIVER_FOLDER: &str = "bus/platform/drivers/virtio-mmio";
/// How often slots without a driver are tried; what is there already is found before the first time.
const BIND_PERIOD: Duration = Duration::from_millis(20);

/// How long a device that was plugged may take, and what helps it.
#[derive(Clone, Debug)]
pub struct Hotplug {
    patience: Duration,
    /// Absent where the agent does not own the machine: its devices are not to be touched then.
    sysfs: Option<PathBuf>,
}

impl Hotplug {
    /// Devices are waited for `patience`. In test mode (not `owns_machine`) none is touched.
    pub fn new(patience: Duration, owns_machine: bool) -> Self {
        Self {
            patience,
            sysfs: owns_machine.then(|| PathBuf::from(SYSFS)),
        }
    }

    /// How long a device may take to appear.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// The tree of devices; `None` where they are not the agent's.
    pub fn sysfs(&self) -> Option<&Path> {
        self.sysfs.as_deref()
    }

    /// Waits for `appears`, which ends when a device is there, and binds the slots that have got one. `None` when it does not
    /// come in time.
    pub async fn wait<T>(&self, appears: impl Future<Output = T>) -> Option<T> {
        let binding = async {
            match &self.sysfs {
                Some(sysfs) => keep_binding(sysfs).await,
                None => std::future::pending().await,
            }
        };
        let comes = async {
            tokio::select! {
                biased;
                value = appears => value,
                never = binding => match never {},
            }
        };
        timeout(self.patience, comes).await.ok()
    }
}

/// Binds slots without a driver whenever they take it.
async fn keep_binding(sysfs: &Path) -> Infallible {
    let mut complained = BTreeSet::new();
    loop {
        sleep(BIND_PERIOD).await;
        let slots = slots_without_driver(sysfs);
        if slots.is_empty() {
            continue;
        }
        // The driver talks with the device meanwhile.
        let bind = sysfs.join(DRIVER_FOLDER).join("bind");
        let bind_all = move || {
            let bind = |slot: String| fs::write(&bind, &slot).err().map(|error| (slot, error));
            slots.into_iter().filter_map(bind).collect::<Vec<_>>()
        };
        for (slot, error) in spawn_blocking(bind_all).await.unwrap_or_default() {
            if !is_expected(&error) && complained.insert(slot.clone()) {
                tracing::warn!("bind {slot} to {DRIVER}: {error}");
            }
        }
    }
}

/// Nothing is in the slot, or the driver was faster.
fn is_expected(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENODEV | libc::EBUSY))
}

/// Slots that have been filled once and have no driver now: empty ones, and those that were filled again.
fn slots_without_driver(sysfs: &Path) -> Vec<String> {
    // A kernel without the driver, or without platform devices, has none to bind.
    let devices = fs::read_dir(sysfs.join(DEVICES)).into_iter().flatten();
    let slots = devices.filter_map(|device| {
        let device = device.ok()?;
        let name = device.file_name().into_string().ok()?;
        let idle = name.starts_with(SLOT) && fs::symlink_metadata(device.path().join("driver")).is_err();
        idle.then_some(name)
    });
    let mut slots: Vec<_> = slots.collect();
    slots.sort();
    slots
}

/// The slot that a device on the virtio bus, at `device` in sysfs, is in: its name, and the file that takes the driver off it.
/// `None` when it came another way (PCI).
///
/// # Errors
/// There is no such device.
pub fn slot_of(sysfs: &Path, device: &Path) -> io::Result<Option<(String, PathBuf)>> {
    let device = fs::canonicalize(device)?;
    let Some(parent) = device.parent() else {
        return Ok(None);
    };
    let driver = match fs::read_link(parent.join("driver")) {
        Ok(driver) => driver,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let name = parent.file_name().and_then(|name| name.to_str());
    let is_slot = driver.file_name().is_some_and(|name| name == DRIVER);
    Ok(name
        .filter(|_| is_slot)
        .map(|name| (name.to_owned(), sysfs.join(DRIVER_FOLDER).join("unbind"))))
}

#[cfg(test)]
pub mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A sysfs of files; it goes with this.
    pub struct Tree(pub PathBuf);

    impl Tree {
        pub fn new(name: &str) -> Self {
            let root = std::env::temp_dir().join(format!("agent-sysfs-{name}-{}", std::process::id()));
            let tree = Self(root);
            tree.driver("platform", DRIVER);
            fs::create_dir_all(tree.0.join(DEVICES)).unwrap();
            tree
        }

        /// A driver that takes orders.
        pub fn driver(&self, bus: &str, name: &str) -> PathBuf {
            let folder = self.0.join("bus").join(bus).join("drivers").join(name);
            fs::create_dir_all(&folder).unwrap();
            for order in ["bind", "unbind"] {
                fs::write(folder.join(order), "").unwrap();
            }
            folder
        }

        /// A platform device; with or without its driver.
        pub fn slot(&self, name: &str, bound: bool) -> PathBuf {
            let folder = self.0.join("devices/pci0000:00/ACPI0004:00").join(name);
            fs::create_dir_all(&folder).unwrap();
            if bound {
                symlink(self.0.join(DRIVER_FOLDER), folder.join("driver")).unwrap();
            }
            symlink(&folder, self.0.join(DEVICES).join(name)).unwrap();
            folder
        }

        /// What virtio-mmio was told last.
        pub fn ordered(&self, order: &str) -> String {
            fs::read_to_string(self.0.join(DRIVER_FOLDER).join(order)).unwrap()
        }

        fn hotplug(&self, patience: Duration) -> Hotplug {
            Hotplug {
                patience,
                sysfs: Some(self.0.clone()),
            }
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    const LONG: Duration = Duration::from_secs(60);

    async fn is_ordered(tree: &Tree, slot: &str) {
        while tree.ordered("bind") != slot {
            sleep(Duration::from_millis(1)).await;
        }
    }

    #[test]
    fn slots_when_filled_before_and_without_driver_are_those_to_bind() {
        let tree = Tree::new("idle");
        tree.slot("LNRO0005:03", false);
        tree.slot("LNRO0005:01", true);
        tree.slot("LNRO0005:00", false);
        tree.slot("PNP0501:00", false);

        assert_eq!(slots_without_driver(&tree.0), ["LNRO0005:00", "LNRO0005:03"]);
        assert_eq!(
            slots_without_driver(Path::new("/nonexistent")),
            Vec::<String>::new()
        );
    }

    #[tokio::test]
    async fn wait_when_a_slot_is_used_again_binds_it() {
        let tree = Tree::new("again");
        tree.slot("LNRO0005:00", true);
        tree.slot("LNRO0005:02", false);

        let seen = tree.hotplug(LONG).wait(is_ordered(&tree, "LNRO0005:02")).await;

        assert_eq!(seen, Some(()));
    }

    #[tokio::test]
    async fn wait_when_a_slot_loses_its_driver_meanwhile_binds_it() {
        let tree = Tree::new("meanwhile");
        let slot = tree.slot("LNRO0005:00", true);
        let hotplug = tree.hotplug(LONG);
        let comes = async {
            // Long enough for a look that finds nothing to do.
            sleep(BIND_PERIOD * 2).await;
            assert_eq!(tree.ordered("bind"), "");
            fs::remove_file(slot.join("driver")).unwrap();
            is_ordered(&tree, "LNRO0005:00").await;
        };

        assert_eq!(hotplug.wait(comes).await, Some(()));
    }

    #[tokio::test]
    async fn wait_when_the_device_is_there_binds_nothing() {
        let tree = Tree::new("there");
        tree.slot("LNRO0005:00", false);

        assert_eq!(tree.hotplug(LONG).wait(async { 1 }).await, Some(1));

        assert_eq!(tree.ordered("bind"), "");
    }

    #[tokio::test]
    async fn wait_when_nothing_comes_ends() {
        let tree = Tree::new("nothing");
        let never = std::future::pending::<()>();
        assert_eq!(tree.hotplug(Duration::from_millis(5)).wait(never).await, None);

        let never = std::future::pending::<()>();
        let elsewhere = Hotplug::new(Duration::from_millis(5), false);
        assert_eq!(elsewhere.wait(never).await, None);
    }

    #[test]
    fn slot_when_asked_by_its_device_is_the_one_it_hangs_on() {
        let tree = Tree::new("slot-of");
        let device = tree.slot("LNRO0005:05", true).join("virtio3");
        fs::create_dir(&device).unwrap();
        let pci = tree.0.join("devices/pci0000:00/0000:00:03.0");
        fs::create_dir_all(pci.join("virtio4")).unwrap();
        symlink(tree.driver("pci", "virtio-pci"), pci.join("driver")).unwrap();

        let (slot, unbind) = slot_of(&tree.0, &device).unwrap().unwrap();

        assert_eq!(slot, "LNRO0005:05");
        assert_eq!(unbind, tree.0.join("bus/platform/drivers/virtio-mmio/unbind"));
        assert_eq!(slot_of(&tree.0, &pci.join("virtio4")).unwrap(), None);
        assert!(slot_of(&tree.0, &pci.join("virtio9")).is_err());
    }
}
