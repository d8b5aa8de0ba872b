//! The devices of a sandbox's VM: each is added once, shared by those who ask for the same, and removed with the last.
//!
//! Before the VM starts a device is queued, afterwards it is plugged: the hypervisor knows. Who asks for a device while
//! another task adds or removes the same one waits for that, and for nothing else.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, ErrorKind, Result};
use crate::hypervisor::{DeviceType, Hypervisor, NetworkDevice};

/// What makes two requests one device.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Key {
    /// A disk by its file and whether it refuses writes: who may not write must not get a disk that others may write.
    Block(PathBuf, bool),
    /// A share by its tag.
    ShareFs(String),
    /// A network interface by its TAP, which nobody else can have.
    Network(String),
}

/// A device as the hypervisor has it; `None` while it is not there. Locked across its adding and its removing.
type Slot = Arc<tokio::sync::Mutex<Option<DeviceType>>>;

#[derive(Default)]
struct Table {
    /// Every device somebody uses or waits for, with their number.
    slots: HashMap<Key, (usize, Slot)>,
    /// Devices by the hypervisor's id.
    keys: HashMap<String, Key>,
    /// Disks so far; their ids are not used again.
    disks: u64,
    /// Network interfaces so far.
    interfaces: u64,
    /// One of the disks so far may be written.
    writable_disk: bool,
}

/// The devices of one VM.
pub struct DeviceManager {
    hypervisor: Arc<dyn Hypervisor>,
    table: Mutex<Table>,
}

impl DeviceManager {
    /// A manager without devices.
    pub fn new(hypervisor: Arc<dyn Hypervisor>) -> Self {
        Self {
            hypervisor,
            table: Mutex::default(),
        }
    }

    /// Gives the VM `device`, or one more user to a device that is the same. Returns it as the VM has it: a disk's and an
    /// interface's id is the manager's choice; the guest reads the disk's as its serial.
    ///
    /// # Errors
    /// Those of [`Hypervisor::add_device`]; nothing is kept then.
    pub async fn attach(&self, device: DeviceType) -> Result<DeviceType> {
        let key = key(&device);
        let slot = self.enter(&key);
        let mut slot = slot.lock().await;
        if let Some(device) = &*slot {
            return Ok(device.clone());
        }
        match self.hypervisor.add_device(self.named(device)).await {
            Ok(device) => {
                self.table().keys.insert(device.id().to_owned(), key);
                Ok(slot.insert(device).clone())
            }
            Err(error) => {
                self.leave(&key);
                Err(error)
            }
        }
    }

    /// One user of device `id` less; the last one takes it from the VM.
    ///
    /// # Errors
    /// `NotFound` for a device that is not attached; those of [`Hypervisor::remove_device`], and then it stays.
    pub async fn detach(&self, id: &str) -> Result<()> {
        let unknown = || Error::new(ErrorKind::NotFound, format!("device {id} is not attached"));
        let (key, slot) = self.find(id).ok_or_else(unknown)?;
        let mut slot = slot.lock().await;
        if slot.as_ref().is_none_or(|device| device.id() != id) {
            // Its last user was faster.
            return Err(unknown());
        }
        if self.users(&key) == 1 {
            self.hypervisor.remove_device(id).await?;
            slot.take();
            self.table().keys.remove(id);
        }
        self.leave(&key);
        Ok(())
    }

    /// Puts other limits on an interface that is attached.
    ///
    /// # Errors
    /// Those of [`Hypervisor::update_device`].
    pub async fn limit(&self, device: NetworkDevice) -> Result<()> {
        self.hypervisor.update_device(DeviceType::Network(device)).await
    }

    /// Ids of the devices that are attached, sorted.
    pub fn attached(&self) -> Vec<String> {
        let mut ids: Vec<_> = self.table().keys.keys().cloned().collect();
        ids.sort();
        ids
    }

    /// Whether the VM has, or had, a disk that it may write.
    pub fn has_had_writable_disk(&self) -> bool {
        self.table().writable_disk
    }

    /// Disks are numbered: an id of at most 20 bytes is their serial (VIRTIO_BLK_ID_BYTES), by which the guest finds them.
    fn named(&self, mut device: DeviceType) -> DeviceType {
        let mut table = self.table();
        match &mut device {
            DeviceType::Block(disk) => {
                disk.id = format!("disk{}", table.disks);
                table.disks += 1;
                table.writable_disk |= !disk.read_only;
            }
            DeviceType::Network(interface) => {
                interface.id = format!("net{}", table.interfaces);
                table.interfaces += 1;
            }
            DeviceType::ShareFs(_) => {}
        }
        device
    }

    fn find(&self, id: &str) -> Option<(Key, Slot)> {
        let table = self.table();
        let key = table.keys.get(id)?;
        table.slots.get(key).map(|(_, slot)| (key.clone(), slot.clone()))
    }

    fn users(&self, key: &Key) -> usize {
        self.table().slots.get(key).map_or(0, |(users, _)| *users)
    }

    /// One user more.
    fn enter(&self, key: &Key) -> Slot {
        let mut table = self.table();
        let (users, slot) = table.slots.entry(key.clone()).or_default();
        *users += 1;
        slot.clone()
    }

    /// One user less; a slot nobody uses goes.
    fn leave(&self, key: &Key) {
        let mut table = self.table();
        if let Some((users, _)) = table.slots.get_mut(key) {
            *users = users.saturating_sub(1);
            if *users == 0 {
                table.slots.remove(key);
            }
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key(device: &DeviceType) -> Key {
    match device {
        DeviceType::Block(disk) => Key::Block(disk.path.clone(), disk.read_only),
        DeviceType::ShareFs(share) => Key::ShareFs(share.tag.clone()),
        DeviceType::Network(interface) => Key::Network(interface.tap.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::BlockDevice;
    use crate::hypervisor::fake::{Boot, FakeHypervisor};

    fn manager() -> (Arc<FakeHypervisor>, DeviceManager) {
        let vm = Arc::new(FakeHypervisor::new(Boot::Announced));
        (vm.clone(), DeviceManager::new(vm))
    }

    fn disk(path: &str, read_only: bool) -> DeviceType {
        DeviceType::Block(BlockDevice {
            id: String::new(),
            path: path.into(),
            read_only,
        })
    }

    fn devices(vm: &FakeHypervisor) -> usize {
        vm.devices.lock().unwrap().len()
    }

    #[tokio::test]
    async fn device_when_wanted_twice_is_added_once() {
        let (vm, manager) = manager();
        let (one, two) = tokio::join!(
            manager.attach(disk("/dev/x", true)),
            manager.attach(disk("/dev/x", true))
        );
        let id = one.unwrap().id().to_owned();
        assert_eq!(two.unwrap().id(), id);
        assert_eq!(devices(&vm), 1);
        assert!(!manager.has_had_writable_disk());

        manager.detach(&id).await.unwrap();
        assert_eq!(devices(&vm), 1, "one user is left");
        manager.detach(&id).await.unwrap();
        assert_eq!(devices(&vm), 0);
        assert_eq!(manager.detach(&id).await.unwrap_err().kind, ErrorKind::NotFound);
        assert_eq!(manager.attached(), Vec::<String>::new());
    }

    #[tokio::test]
    async fn disks_when_one_may_be_written_are_two() {
        let (vm, manager) = manager();
        let writable = manager.attach(disk("/dev/x", false)).await.unwrap();
        assert!(manager.has_had_writable_disk());
        let read_only = manager.attach(disk("/dev/x", true)).await.unwrap();
        assert_ne!(writable.id(), read_only.id());
        assert_eq!(devices(&vm), 2);
        assert_eq!(manager.attached(), ["disk0", "disk1"]);
    }

    #[tokio::test]
    async fn device_when_it_cannot_be_added_leaves_nothing() {
        let (vm, manager) = manager();
        vm.refuse_devices(true);
        assert!(manager.attach(disk("/dev/x", false)).await.is_err());
        assert!(manager.table().slots.is_empty());

        vm.refuse_devices(false);
        let id = manager
            .attach(disk("/dev/x", false))
            .await
            .unwrap()
            .id()
            .to_owned();
        vm.refuse_devices(true);
        assert!(manager.detach(&id).await.is_err());
        assert_eq!(
            manager.attached(),
            std::slice::from_ref(&id),
            "the guest still has it"
        );
        vm.refuse_devices(false);
        manager.detach(&id).await.unwrap();
        assert_eq!(devices(&vm), 0);
    }

    #[tokio::test]
    async fn device_when_wanted_while_removed_is_added_anew() {
        let (vm, manager) = manager();
        let id = manager
            .attach(disk("/dev/x", false))
            .await
            .unwrap()
            .id()
            .to_owned();
        let (detached, again) = tokio::join!(manager.detach(&id), manager.attach(disk("/dev/x", false)));
        detached.unwrap();
        let again = again.unwrap();
        assert_eq!(devices(&vm), 1);
        assert_eq!(manager.attached(), [again.id()]);
    }
}
