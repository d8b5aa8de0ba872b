//! The pod's network, which is the guest's own: interfaces, addresses, routes and neighbours as the host found them in the
//! pod's namespace. The kernel is asked through rtnetlink (rtnetlink(7)); nothing is kept here.

mod addresses;
mod interfaces;
mod localhost;
mod neighbours;
mod netlink;
mod removal;
mod routes;

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use protocols::agent::{ARPNeighbors, Interfaces, Routes};
use protocols::types::Interface;
use tokio::sync::Mutex;

use netlink::Netlink;
use rtnetlink::MulticastGroup;

use crate::hotplug::Hotplug;

pub use localhost::serve as serve_localhost;

/// A change of the network that failed.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A value of the request that makes no sense.
    #[error("{what} {value:?}: {reason}")]
    Argument {
        /// Of what.
        what: &'static str,
        /// The value.
        value: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// An interface that is not there.
    #[error("no network interface {0}")]
    NoInterface(String),
    /// A plugged interface did not come.
    #[error("no network interface with the hardware address {address} after {} ms: was its device plugged?", waited.as_millis())]
    Timeout {
        /// Its hardware address.
        address: String,
        /// How long it was waited for.
        waited: Duration,
    },
    /// More than one interface has the hardware address.
    #[error("hardware address {address}: several network interfaces have it: {names}")]
    Ambiguous {
        /// The address.
        address: String,
        /// Their names.
        names: String,
    },
    /// The kernel refused.
    #[error("{what}: {source}")]
    Kernel {
        /// What was asked for.
        what: String,
        /// Why not.
        source: io::Error,
    },
    /// A file of the kernel could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What sysfs calls so is another interface than netlink does.
    #[error("network interface {name}: {path} is {found}, netlink says {expected}; its device is left alone")]
    Mismatch {
        /// Its name.
        name: String,
        /// Where sysfs says so.
        path: PathBuf,
        /// What it says.
        found: String,
        /// What netlink says.
        expected: String,
    },
    /// The agent does not own the machine.
    #[error("network interface {0}: only an agent that is PID 1 of a guest takes drivers off devices")]
    NotAGuest(String),
}

/// The network of the machine, changed by one call at a time.
pub struct Network {
    hotplug: Hotplug,
    /// Numbers of the interfaces that the host has set up; locked by who changes anything.
    pods: Mutex<BTreeSet<u32>>,
}

impl Network {
    /// The network of the namespace the agent runs in, whose devices come and go by `hotplug`.
    pub fn new(hotplug: Hotplug) -> Self {
        Self {
            hotplug,
            pods: Mutex::default(),
        }
    }

    /// `UpdateInterface`: gives the interface with the hardware address of `wanted` its name, MTU, sysctls and exactly the
    /// listed addresses, and brings it up. Waits for one that is still being plugged. Returns what it is then.
    ///
    /// # Errors
    /// A value makes no sense (nothing is changed), the interface does not come, or the kernel refuses.
    pub async fn update_interface(&self, wanted: &Interface) -> Result<Interface, NetworkError> {
        let wanted = interfaces::Wanted::from_wire(wanted)?;
        let mut netlink = Netlink::open(&[MulticastGroup::Link])?;
        let plugged = self.hotplug.wait(netlink.appearing(wanted.address())).await;
        let index = plugged.unwrap_or_else(|| {
            Err(NetworkError::Timeout {
                address: interfaces::hardware_address(wanted.address()),
                waited: self.hotplug.patience(),
            })
        })?;
        let mut pods = self.pods.lock().await;
        pods.insert(index);
        interfaces::update(&netlink, index, &wanted).await?;
        interfaces::describe(&netlink, &netlink.link(index).await?).await
    }

    /// `ListInterfaces`: all of them, the loopback too.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn list_interfaces(&self) -> Result<Interfaces, NetworkError> {
        let netlink = Netlink::open(&[])?;
        let mut list = Interfaces::new();
        for link in netlink.links().await? {
            list.Interfaces.push(interfaces::describe(&netlink, &link).await?);
        }
        Ok(list)
    }

    /// `UpdateRoutes`: the interfaces that the host has set up, or that occur in `wanted`, get exactly these routes, beside
    /// those the kernel makes by itself. What containers made for themselves on others stays. Returns all routes there are
    /// then.
    ///
    /// # Errors
    /// A value makes no sense (nothing is changed), or the kernel refuses.
    pub async fn update_routes(&self, wanted: &Routes) -> Result<Routes, NetworkError> {
        let pods = self.pods.lock().await;
        let netlink = Netlink::open(&[])?;
        routes::update(&netlink, &wanted.Routes, &pods).await?;
        routes::list(&netlink).await
    }

    /// `ListRoutes`: unicast routes of the main table, one message for each next hop.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn list_routes(&self) -> Result<Routes, NetworkError> {
        routes::list(&Netlink::open(&[])?).await
    }

    /// `AddARPNeighbors`: entries of the neighbour tables that do not age. One that exists is replaced.
    ///
    /// # Errors
    /// A value makes no sense (nothing is changed), or the kernel refuses.
    pub async fn add_neighbours(&self, wanted: &ARPNeighbors) -> Result<(), NetworkError> {
        let _turn = self.pods.lock().await;
        neighbours::add(&Netlink::open(&[])?, &wanted.ARPNeighbors).await
    }

    /// `RemoveInterface`: takes the interface with `address` down and the driver off its device, so that the host can
    /// unplug it. Without such an interface that has been done.
    ///
    /// # Errors
    /// It is not a virtio device's, sysfs shows another interface under its name, or this is not a guest.
    pub async fn remove_interface(&self, address: &str) -> Result<(), NetworkError> {
        let address = interfaces::parse_hardware_address(address)?;
        let mut pods = self.pods.lock().await;
        let netlink = Netlink::open(&[])?;
        let Some(link) = netlink.find(&address).await? else {
            return Ok(());
        };
        let Some(sysfs) = self.hotplug.sysfs() else {
            return Err(NetworkError::NotAGuest(link.name));
        };
        let device = removal::Device::of(sysfs, &link)?;
        netlink.set_up(link.index, false).await?;
        pods.remove(&link.index);
        let unbound = tokio::task::spawn_blocking(move || device.unbind()).await;
        unbound.unwrap_or_else(|error| {
            Err(NetworkError::Kernel {
                what: format!("network interface {}", link.name),
                source: io::Error::other(error),
            })
        })
    }
}
