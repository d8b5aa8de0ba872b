//! Networks of a pod. Not provided in this release: the one implementation says so.

use std::path::PathBuf;

use async_trait::async_trait;
use protocols::types::{ARPNeighbor, Interface, Route};

use super::device_manager::DeviceManager;
use crate::error::Result;
use crate::host::{blocking, netns};

/// The network of a pod. Only `setup` has a caller: what the other methods return is for the agent, once a pod's
/// interfaces are connected to its VM.
#[async_trait]
pub trait Network: Send + Sync {
    /// Connects the VM to the pod's network.
    async fn setup(&self, devices: &DeviceManager) -> Result<()>;
    /// Interfaces of the guest.
    async fn interfaces(&self) -> Result<Vec<Interface>>;
    /// Routes of the guest.
    async fn routes(&self) -> Result<Vec<Route>>;
    /// Permanent neighbours of the guest.
    async fn neighs(&self) -> Result<Vec<ARPNeighbor>>;
    /// Disconnects the VM.
    async fn remove(&self, devices: &DeviceManager) -> Result<()>;
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
    async fn setup(&self, _devices: &DeviceManager) -> Result<()> {
        if let Some(netns) = self.netns.clone() {
            let path = netns.clone();
            let found = blocking("network namespace", move || Ok(netns::interfaces_in(&path))).await?;
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

    async fn remove(&self, _devices: &DeviceManager) -> Result<()> {
        Ok(())
    }
}
