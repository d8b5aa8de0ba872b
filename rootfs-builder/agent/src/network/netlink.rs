//! A conversation with the kernel: one socket for one call of the host.

use std::io;

use futures::channel::mpsc::UnboundedReceiver;
use futures::{StreamExt, TryStreamExt};
use rtnetlink::packet_core::NetlinkMessage;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::sys::SocketAddr;
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, MulticastGroup, new_multicast_connection};
use tokio::task::JoinHandle;

use super::NetworkError;
use super::interfaces::hardware_address;

/// A network interface, as far as the agent wants to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its number, which stays when the name changes.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its hardware address; empty if it has none.
    pub address: Vec<u8>,
    /// The one its device came with, which nobody can change; empty if it has no device.
    pub permanent_address: Vec<u8>,
    /// Largest packet in bytes.
    pub mtu: u32,
    /// `IFF_*`.
    pub flags: LinkFlags,
    /// Which driver made it in software (`veth`, `vlan`); empty for a device.
    pub kind: String,
}

impl Link {
    fn from_message(message: LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            address: Vec::new(),
            permanent_address: Vec::new(),
            mtu: 0,
            flags: message.header.flags,
            kind: String::new(),
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Address(address) => link.address = address,
                LinkAttribute::PermAddress(address) => link.permanent_address = address,
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::LinkInfo(infos) => {
                    let kind = infos.iter().find_map(|info| match info {
                        LinkInfo::Kind(kind) => Some(kind.to_string()),
                        _ => None,
                    });
                    link.kind = kind.unwrap_or_default();
                }
                _ => {}
            }
        }
        link
    }

    /// Whether it is up, as far as its owner is concerned.
    pub fn is_up(&self) -> bool {
        self.flags.contains(LinkFlags::Up)
    }
}

/// The socket, and what arrives unasked for.
pub struct Netlink {
    /// Makes requests.
    pub handle: Handle,
    events: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
    connection: JoinHandle<()>,
}

impl Netlink {
    /// Opens a socket that hears of `groups`.
    ///
    /// # Errors
    /// There is no socket to be had.
    pub fn open(groups: &[MulticastGroup]) -> Result<Self, NetworkError> {
        let (connection, handle, events) =
            new_multicast_connection(groups).map_err(|source| NetworkError::Kernel {
                what: "open a netlink socket".to_owned(),
                source,
            })?;
        Ok(Self {
            handle,
            events,
            connection: tokio::spawn(connection),
        })
    }

    /// All interfaces.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn links(&self) -> Result<Vec<Link>, NetworkError> {
        let links = self.handle.link().get().execute();
        links
            .map_ok(Link::from_message)
            .try_collect()
            .await
            .map_err(failed("list network interfaces"))
    }

    /// The interface `index`.
    ///
    /// # Errors
    /// It has gone.
    pub async fn link(&self, index: u32) -> Result<Link, NetworkError> {
        let mut links = self.handle.link().get().match_index(index).execute();
        let link = links
            .try_next()
            .await
            .map_err(failed(format!("look at network interface {index}")))?;
        link.map(Link::from_message)
            .ok_or_else(|| NetworkError::NoInterface(index.to_string()))
    }

    /// The interface with the hardware `address`, also if a container has given it another one since.
    ///
    /// # Errors
    /// Several have it, or the kernel refuses.
    pub async fn find(&self, address: &[u8]) -> Result<Option<Link>, NetworkError> {
        choose(self.links().await?, address)
    }

    /// Waits for the interface with the hardware `address`, looking whenever one comes or changes. Returns its number.
    ///
    /// # Errors
    /// Several have the address, or the kernel refuses.
    pub async fn appearing(&mut self, address: &[u8]) -> Result<u32, NetworkError> {
        loop {
            if let Some(link) = self.find(address).await? {
                return Ok(link.index);
            }
            tracing::debug!(
                address = hardware_address(address),
                "waits for a network interface"
            );
            // Also after the kernel had to drop notifications: that is one.
            if self.events.next().await.is_none() {
                return Err(NetworkError::Kernel {
                    what: "wait for a network interface".to_owned(),
                    source: io::ErrorKind::BrokenPipe.into(),
                });
            }
        }
    }

    /// Changes the interface; `what` says it in an error's words.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn set(
        &self,
        change: LinkMessageBuilder<LinkUnspec>,
        what: impl Into<String>,
    ) -> Result<(), NetworkError> {
        let request = self.handle.link().set(change.build());
        request.execute().await.map_err(failed(what))
    }

    /// Brings the interface up, or takes it down.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn set_up(&self, index: u32, up: bool) -> Result<(), NetworkError> {
        let change = LinkUnspec::new_with_index(index);
        if up {
            let what = format!("bring network interface {index} up");
            self.set(change.up(), what).await
        } else {
            let what = format!("take network interface {index} down");
            self.set(change.down(), what).await
        }
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// A device comes before what was made on it: a VLAN of a container has its device's address.
fn choose(mut links: Vec<Link>, address: &[u8]) -> Result<Option<Link>, NetworkError> {
    links.retain(|link| link.address == address || link.permanent_address == address);
    if links.iter().any(|link| link.kind.is_empty()) {
        links.retain(|link| link.kind.is_empty());
    }
    if links.len() > 1 {
        let names: Vec<&str> = links.iter().map(|link| link.name.as_str()).collect();
        return Err(NetworkError::Ambiguous {
            address: hardware_address(address),
            names: names.join(", "),
        });
    }
    Ok(links.pop())
}

/// What the kernel said to `what`.
pub fn failed(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> NetworkError {
    move |error| NetworkError::Kernel {
        what: what.into(),
        source: match error {
            rtnetlink::Error::NetlinkError(message) => message.to_io(),
            other => io::Error::other(other),
        },
    }
}

/// Whether the kernel answered `errno`.
pub fn is_errno(error: &NetworkError, errno: i32) -> bool {
    matches!(error, NetworkError::Kernel { source, .. } if source.raw_os_error() == Some(errno))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, kind: &str, address: u8, permanent: u8) -> Link {
        let bytes = |last: u8| {
            if last == 0 {
                Vec::new()
            } else {
                vec![2, 0, 0, 0, 0, last]
            }
        };
        Link {
            index,
            name: format!("eth{index}"),
            address: bytes(address),
            permanent_address: bytes(permanent),
            mtu: 1500,
            flags: LinkFlags::empty(),
            kind: kind.into(),
        }
    }

    #[test]
    fn interface_when_chosen_is_the_device() {
        let wanted = [2, 0, 0, 0, 0, 1];
        let index = |links: &[Link]| choose(links.to_vec(), &wanted).map(|link| link.map(|link| link.index));
        let (device, other) = (link(1, "", 1, 1), link(2, "", 2, 2));
        let vlan = link(3, "vlan", 1, 0);
        let readdressed = link(4, "", 9, 1);
        assert_eq!(
            index(&[other.clone(), device.clone(), vlan.clone()]).unwrap(),
            Some(1)
        );
        assert_eq!(index(&[vlan.clone(), other.clone()]).unwrap(), Some(3));
        assert_eq!(
            index(&[other.clone(), readdressed.clone(), vlan]).unwrap(),
            Some(4)
        );
        assert_eq!(index(&[other]).unwrap(), None);
        assert!(index(&[device, readdressed]).is_err());
    }
}
