//! Networks of a pod. Not provided in this release: the traits are here, the one implementation says so.

use std::path::PathBuf;

use async_trait::async_trait;
use protocols::types::{ARPNeighbor, Interface, Route};

use crate::error::{Error, Result};
use crate::host::netns;
use crate::hypervisor::Hypervisor;

/// The network of a pod.
#[async_trait]
pub trait Network: Send + Sync {
    /// Connects the VM to the pod's network.
    async fn setup(&self, hypervisor: &dyn Hypervisor) -> Result<()>;
    /// Interfaces of the guest.
    async fn interfaces(&self) -> Result<Vec<Interface>>;
    /// Routes of the guest.
    async fn routes(&self) -> Result<Vec<Route>>;
    /// Permanent neighbours of the guest.
    async fn neighs(&self) -> Result<Vec<ARPNeighbor>>;
    /// State to undo the network from.
    async fn save(&self) -> Option<Vec<String>>;
    /// Disconnects the VM.
    async fn remove(&self, hypervisor: &dyn Hypervisor) -> Result<()>;
    /// The endpoints.
    fn endpoints(&self) -> Vec<&dyn Endpoint>;
}

/// One interface of a pod's network.
#[async_trait]
pub trait Endpoint: Send + Sync {
    /// Name on the host.
    fn name(&self) -> String;
    /// MAC address.
    fn hardware_addr(&self) -> String;
    /// Connects it to the VM.
    async fn attach(&self, hypervisor: &dyn Hypervisor) -> Result<()>;
    /// Disconnects it.
    async fn detach(&self, hypervisor: &dyn Hypervisor) -> Result<()>;
    /// State to undo it from.
    async fn save(&self) -> Option<String>;
    /// PCI path in the guest.
    fn guest_pci_path(&self) -> Option<String> {
        None
    }
    /// Notes the PCI path in the guest.
    fn set_guest_pci_path(&mut self, _path: String) -> Result<()> {
        Err(Error::unsupported("Endpoint::set_guest_pci_path"))
    }
    /// VFIO device behind it.
    fn vfio_hostdev_id(&self) -> Option<String> {
        None
    }
    /// PCI address on the host.
    fn host_bdf(&self) -> Option<String> {
        None
    }
}

/// How host and guest sides of an interface are joined.
#[async_trait]
pub trait NetworkModel: Send + Sync {
    /// Name in the configuration.
    fn model_type(&self) -> &'static str;
    /// Joins.
    async fn add(&self) -> Result<()>;
    /// Separates.
    async fn del(&self) -> Result<()>;
}

/// What the guest is told about an interface.
#[async_trait]
pub trait NetworkInfo: Send + Sync {
    /// The interface.
    async fn interface(&self) -> Result<Interface>;
    /// Its routes.
    async fn routes(&self) -> Result<Vec<Route>>;
    /// Its neighbours.
    async fn neighs(&self) -> Result<Vec<ARPNeighbor>>;
    /// Notes its device path in the guest.
    async fn set_device_path(&mut self, _path: String) -> Result<()> {
        Err(Error::unsupported("NetworkInfo::set_device_path"))
    }
}

/// The guest has its loopback interface and nothing else.
#[derive(Debug)]
pub struct NoNetwork {
    netns: Option<PathBuf>,
}

impl NoNetwork {
    /// For a pod whose spec names `netns`.
    pub fn new(netns: Option<PathBuf>) -> Self {
        Self { netns }
    }
}

#[async_trait]
impl Network for NoNetwork {
    async fn setup(&self, _hypervisor: &dyn Hypervisor) -> Result<()> {
        if let Some(netns) = self.netns.clone() {
            let found = netns::interfaces_in(&netns);
            if !found.is_empty() {
                let interfaces = found.join(", ");
                tracing::warn!(netns = %netns.display(), interfaces, "networking is not provided yet: the container has no network");
            }
        }
        Ok(())
    }

    async fn interfaces(&self) -> Result<Vec<Interface>> {
        Ok(Vec::new())
    }

    async fn routes(&self) -> Result<Vec<Route>> {
        Ok(Vec::new())
    }

    async fn neighs(&self) -> Result<Vec<ARPNeighbor>> {
        Ok(Vec::new())
    }

    async fn save(&self) -> Option<Vec<String>> {
        None
    }

    async fn remove(&self, _hypervisor: &dyn Hypervisor) -> Result<()> {
        Ok(())
    }

    fn endpoints(&self) -> Vec<&dyn Endpoint> {
        Vec::new()
    }
}
