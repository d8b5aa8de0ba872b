//! Addresses of an interface.

use std::net::{IpAddr, Ipv4Addr};

use futures::TryStreamExt;
use protocols::types::{IPAddress, IPFamily};
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};

use super::NetworkError;
use super::netlink::{Link, Netlink, failed};

/// Flags that are a choice; the others say how the address fares.
const CHOICES: AddressFlags = AddressFlags::Nodad.union(AddressFlags::Noprefixroute);

/// An address of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    ip: IpAddr,
    prefix: u8,
    /// IPv4 only.
    broadcast: Option<Ipv4Addr>,
    /// `RT_SCOPE_*`. The kernel decides for IPv6.
    scope: u8,
    flags: AddressFlags,
}

impl Address {
    /// Understands the host's message.
    ///
    /// # Errors
    /// It is not an address.
    pub fn from_wire(wire: &IPAddress) -> Result<Self, NetworkError> {
        let bad = |what, value: &str, reason| NetworkError::Argument {
            what,
            value: value.to_owned(),
            reason,
        };
        let ip: IpAddr = wire
            .address
            .parse()
            .map_err(|_| bad("address", &wire.address, "not an IP address"))?;
        let prefix = wire
            .mask
            .parse()
            .ok()
            .filter(|prefix| *prefix <= longest_prefix(ip));
        let prefix = prefix.ok_or_else(|| bad("mask", &wire.mask, "not the length of a prefix"))?;
        let broadcast = match (wire.broadcast.as_str(), ip) {
            ("", _) => None,
            (text, IpAddr::V4(_)) => Some(
                text.parse()
                    .map_err(|_| bad("broadcast", text, "not an IPv4 address"))?,
            ),
            (text, IpAddr::V6(_)) => return Err(bad("broadcast", text, "IPv6 has none")),
        };
        let scope =
            u8::try_from(wire.scope).map_err(|_| bad("scope", &wire.scope.to_string(), "larger than 255"))?;
        Ok(Self {
            ip,
            prefix,
            broadcast,
            scope: if ip.is_ipv4() { scope } else { 0 },
            flags: AddressFlags::from_bits_retain(wire.flags) & CHOICES,
        })
    }

    /// In the host's words.
    pub fn to_wire(&self) -> IPAddress {
        let family = if self.ip.is_ipv4() {
            IPFamily::v4
        } else {
            IPFamily::v6
        };
        IPAddress {
            family: family.into(),
            address: self.ip.to_string(),
            mask: self.prefix.to_string(),
            broadcast: self
                .broadcast
                .map(|broadcast| broadcast.to_string())
                .unwrap_or_default(),
            scope: self.scope.into(),
            flags: self.flags.bits(),
            ..Default::default()
        }
    }

    fn from_message(message: &AddressMessage) -> Option<Self> {
        let (mut local, mut peer, mut broadcast) = (None, None, None);
        let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
        for attribute in &message.attributes {
            match attribute {
                // The same as the other, but where the link has a peer.
                AddressAttribute::Local(ip) => local = Some(*ip),
                AddressAttribute::Address(ip) => peer = Some(*ip),
                AddressAttribute::Broadcast(ip) => broadcast = Some(*ip),
                AddressAttribute::Flags(all) => flags = *all,
                _ => {}
            }
        }
        let ip = local.or(peer)?;
        Some(Self {
            ip,
            prefix: message.header.prefix_len,
            broadcast,
            scope: if ip.is_ipv4() {
                message.header.scope.into()
            } else {
                0
            },
            flags: flags & CHOICES,
        })
    }

    fn message(&self, index: u32) -> AddressMessage {
        let mut message = AddressMessage::default();
        message.header.family = if self.ip.is_ipv4() {
            AddressFamily::Inet
        } else {
            AddressFamily::Inet6
        };
        message.header.prefix_len = self.prefix;
        message.header.scope = AddressScope::from(self.scope);
        message.header.index = index;
        message.attributes = vec![
            AddressAttribute::Local(self.ip),
            AddressAttribute::Address(self.ip),
            AddressAttribute::Flags(self.flags),
        ];
        let broadcast = self.broadcast.map(AddressAttribute::Broadcast);
        message.attributes.extend(broadcast);
        message
    }

    fn is_link_local(&self) -> bool {
        matches!(self.ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
    }
}

/// Length of the prefix that is a whole address.
pub fn longest_prefix(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}

/// The addresses of `link`, in the kernel's order: of IPv4 the first of each network as they were added, narrow scopes before
/// wide ones, then the others; of IPv6 wide scopes before narrow ones, and the newest first.
///
/// # Errors
/// The kernel refuses.
pub async fn list(netlink: &Netlink, link: &Link) -> Result<Vec<Address>, NetworkError> {
    let present = present(netlink, link).await?;
    Ok(present.into_iter().map(|(address, _)| address).collect())
}

/// Gives `link` exactly the addresses `wanted`, added in this order, which makes a difference (see [`list`]); with `keep_link_local` beside those the kernel made.
///
/// # Errors
/// The kernel refuses one.
pub async fn replace(
    netlink: &Netlink,
    link: &Link,
    wanted: &[Address],
    keep_link_local: bool,
) -> Result<(), NetworkError> {
    let (wanted_v4, wanted_v6): (Vec<_>, Vec<_>) = wanted.iter().partition(|address| address.ip.is_ipv4());
    let (present_v4, present_v6): (Vec<_>, Vec<_>) = present(netlink, link)
        .await?
        .into_iter()
        .partition(|(address, _)| address.ip.is_ipv4());

    // The first IPv4 address of a network is the one that packets leave with: what comes after a difference goes, and
    // the last before the first, which would take those after it with it.
    let alike = wanted_v4.iter().zip(&present_v4);
    let alike = alike
        .take_while(|(wanted, (present, _))| **wanted == present)
        .count();
    for (address, message) in present_v4.iter().skip(alike).rev() {
        delete(netlink, link, address, message).await?;
    }
    for (address, message) in &present_v6 {
        let kept = keep_link_local && address.is_link_local();
        if !kept && !wanted_v6.contains(&address) {
            delete(netlink, link, address, message).await?;
        }
    }
    for address in wanted_v4.iter().skip(alike) {
        add(netlink, link, address).await?;
    }
    for address in wanted_v6 {
        if !present_v6.iter().any(|(present, _)| present == address) {
            add(netlink, link, address).await?;
        }
    }
    Ok(())
}

async fn present(netlink: &Netlink, link: &Link) -> Result<Vec<(Address, AddressMessage)>, NetworkError> {
    let request = netlink.handle.address().get().set_link_index_filter(link.index);
    let messages: Vec<AddressMessage> = request.execute().try_collect().await.map_err(failed(format!(
        "list the addresses of network interface {}",
        link.name
    )))?;
    let addresses = messages
        .into_iter()
        .filter_map(|message| Some((Address::from_message(&message)?, message)));
    Ok(addresses.collect())
}

async fn add(netlink: &Netlink, link: &Link, address: &Address) -> Result<(), NetworkError> {
    if address.ip.is_ipv4() {
        return put(netlink, link, address).await;
    }
    // The pod's namespace has asked for duplicates on the same network; to ask again would leave the pod without the
    // address for a second or two. An address that did not have to ask does not when it gets its own flags either.
    let settled = Address {
        flags: address.flags | AddressFlags::Nodad,
        ..address.clone()
    };
    put(netlink, link, &settled).await?;
    if settled != *address {
        put(netlink, link, address).await?;
    }
    Ok(())
}

/// Adds the address, or gives it other flags.
async fn put(netlink: &Netlink, link: &Link, address: &Address) -> Result<(), NetworkError> {
    let Address { ip, prefix, .. } = address;
    let mut request = netlink.handle.address().add(link.index, *ip, *prefix).replace();
    *request.message_mut() = address.message(link.index);
    let what = format!("add address {ip}/{prefix} to network interface {}", link.name);
    request.execute().await.map_err(failed(what))
}

async fn delete(
    netlink: &Netlink,
    link: &Link,
    address: &Address,
    message: &AddressMessage,
) -> Result<(), NetworkError> {
    let Address { ip, prefix, .. } = address;
    tracing::debug!("network interface {}: address {ip}/{prefix} goes", link.name);
    let request = netlink.handle.address().del(message.clone());
    request.execute().await.map_err(failed(format!(
        "remove address {ip}/{prefix} from network interface {}",
        link.name
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire(address: &str, mask: &str) -> IPAddress {
        IPAddress {
            address: address.into(),
            mask: mask.into(),
            ..Default::default()
        }
    }

    #[test]
    fn address_when_it_makes_no_sense_is_refused_by_its_value() {
        for (bad, named) in [
            (wire("10.0.0", "8"), "10.0.0"),
            (wire("10.0.0.1", "33"), "33"),
            (wire("fd00::1", "129"), "129"),
            (wire("fd00::1", ""), "mask"),
            (
                IPAddress {
                    broadcast: "fd00::".into(),
                    ..wire("10.0.0.1", "8")
                },
                "fd00::",
            ),
            (
                IPAddress {
                    broadcast: "10.0.0.0".into(),
                    ..wire("fd00::1", "8")
                },
                "IPv6 has none",
            ),
            (
                IPAddress {
                    scope: 256,
                    ..wire("10.0.0.1", "8")
                },
                "256",
            ),
        ] {
            let error = Address::from_wire(&bad).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn address_when_there_and_back_is_the_same() {
        let v4 = IPAddress {
            broadcast: "10.0.0.255".into(),
            scope: 253,
            flags: 0x200,
            ..wire("10.0.0.1", "24")
        };
        assert_eq!(Address::from_wire(&v4).unwrap().to_wire(), v4);
    }

    #[test]
    fn flags_when_they_are_states_are_left_out() {
        let flags = IPAddress {
            flags: 0x2 | 0x80 | 0x40,
            ..wire("fd00::1", "64")
        };
        assert_eq!(Address::from_wire(&flags).unwrap().to_wire().flags, 0x2);
    }
}
