//! Interfaces: found by hardware address, then named and set up as the pod's namespace has them.

use std::collections::BTreeMap;
use std::io;

use protocols::types::Interface;
use rtnetlink::packet_route::link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute};
use rtnetlink::{LinkMessageBuilder, LinkUnspec};

use super::NetworkError;
use super::addresses::{self, Address};
use super::netlink::{Link, Netlink, is_errno};
use crate::container::sysctl_path;

/// `IFNAMSIZ` of <linux/if.h>, with its final NUL.
const MAX_NAME: usize = 16;
/// Stands for the interface's name in the names of sysctls.
const PLACEHOLDER: &str = "IFNAME";
const LOOPBACK: &str = "lo";

/// What an interface shall be.
#[derive(Debug)]
pub struct Wanted {
    address: Vec<u8>,
    /// Empty leaves it as it is.
    name: String,
    /// 0 leaves it as it is.
    mtu: u32,
    addresses: Vec<Address>,
    /// `IFF_NOARP`, `IFF_PROMISC` and `IFF_ALLMULTI`; the others are states.
    flags: u32,
    /// Path below /proc/sys after the interface's name, and before it: `(net/ipv4/conf, rp_filter)`.
    sysctls: BTreeMap<(String, String), String>,
}

impl Wanted {
    /// Understands the host's message.
    ///
    /// # Errors
    /// A value makes no sense.
    pub fn from_wire(interface: &Interface) -> Result<Self, NetworkError> {
        let name = interface.name.clone();
        if !name.is_empty() {
            check_name(&name)?;
        }
        let mtu = u32::try_from(interface.mtu).map_err(|_| NetworkError::Argument {
            what: "MTU",
            value: interface.mtu.to_string(),
            reason: "too large",
        })?;
        let addresses = interface.IPAddresses.iter().map(Address::from_wire);
        let sysctls = interface.sysctls.iter().map(|(key, value)| {
            let place = sysctl_of(key, &name)?;
            Ok((place, value.clone()))
        });
        Ok(Self {
            address: parse_hardware_address(&interface.hwAddr)?,
            mtu,
            addresses: addresses.collect::<Result<_, _>>()?,
            flags: interface.raw_flags,
            sysctls: sysctls.collect::<Result<_, NetworkError>>()?,
            name,
        })
    }

    /// Its hardware address.
    pub fn address(&self) -> &[u8] {
        &self.address
    }
}

/// Makes interface `index` what is wanted.
///
/// # Errors
/// The kernel refuses a part; those before it are made.
pub async fn update(netlink: &Netlink, index: u32, wanted: &Wanted) -> Result<(), NetworkError> {
    let mut link = netlink.link(index).await?;
    if !wanted.name.is_empty() && link.name != wanted.name {
        take_name(netlink, &link, &wanted.name).await?;
        link = netlink.link(index).await?;
    }
    set_link(netlink, &link, wanted).await?;
    set_sysctls(&link.name, &wanted.sysctls)?;
    let lists_addresses = !wanted.addresses.is_empty();
    if lists_addresses {
        make_no_addresses(netlink, &link).await?;
    }
    addresses::replace(netlink, &link, &wanted.addresses, !lists_addresses).await?;
    netlink.set_up(index, true).await
}

/// The interface in the host's words.
///
/// # Errors
/// The kernel refuses.
pub async fn describe(netlink: &Netlink, link: &Link) -> Result<Interface, NetworkError> {
    let addresses = addresses::list(netlink, link).await?;
    Ok(Interface {
        device: link.name.clone(),
        name: link.name.clone(),
        IPAddresses: addresses.iter().map(Address::to_wire).collect(),
        mtu: link.mtu.into(),
        hwAddr: hardware_address(&link.address),
        type_: link.kind.clone(),
        raw_flags: link.flags.bits(),
        ..Default::default()
    })
}

/// Names `link` so. Who has the name gets the old one of `link` for it.
async fn take_name(netlink: &Netlink, link: &Link, name: &str) -> Result<(), NetworkError> {
    let links = netlink.links().await?;
    let Some(holder) = links.iter().find(|other| other.name == name) else {
        return rename(netlink, link, name).await;
    };
    // Nobody's: an index is given once.
    let aside = format!("aside{}", link.index);
    rename(netlink, link, &aside).await?;
    rename(netlink, holder, &link.name).await?;
    let moved = Link {
        name: aside,
        ..link.clone()
    };
    rename(netlink, &moved, name).await
}

async fn rename(netlink: &Netlink, link: &Link, name: &str) -> Result<(), NetworkError> {
    let change = || LinkUnspec::new_with_index(link.index).name(name);
    let what = format!("rename network interface {} to {name}", link.name);
    match netlink.set(change(), what.as_str()).await {
        // Linux before 6.2 renames only what is down, and its IPv6 addresses and routes are lost on the way.
        Err(error) if is_errno(&error, libc::EBUSY) && link.is_up() => {
            netlink.set_up(link.index, false).await?;
            netlink.set(change(), what).await?;
            netlink.set_up(link.index, true).await
        }
        outcome => outcome,
    }
}

async fn set_link(netlink: &Netlink, link: &Link, wanted: &Wanted) -> Result<(), NetworkError> {
    let has = |flag: libc::c_int| wanted.flags & flag.cast_unsigned() != 0;
    let mut change = LinkUnspec::new_with_index(link.index)
        .arp(!has(libc::IFF_NOARP))
        .promiscuous(has(libc::IFF_PROMISC))
        .allmulticast(has(libc::IFF_ALLMULTI));
    if wanted.mtu != 0 && wanted.mtu != link.mtu {
        change = change.mtu(wanted.mtu);
    }
    let what = format!(
        "set MTU {} and flags {:#x} of network interface {}",
        wanted.mtu, wanted.flags, link.name
    );
    netlink.set(change, what).await
}

/// The kernel makes no link-local address: those of the pod's namespace are in the list.
async fn make_no_addresses(netlink: &Netlink, link: &Link) -> Result<(), NetworkError> {
    let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    let attribute = LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![mode])]);
    let change: LinkMessageBuilder<LinkUnspec> =
        LinkUnspec::new_with_index(link.index).append_extra_attribute(attribute);
    let what = format!("set the IPv6 address mode of network interface {}", link.name);
    match netlink.set(change, what).await {
        // No IPv6 in the kernel, or none on this interface: no addresses to be made either.
        Err(error) if is_errno(&error, libc::EAFNOSUPPORT) => Ok(()),
        outcome => outcome,
    }
}

fn set_sysctls(name: &str, sysctls: &BTreeMap<(String, String), String>) -> Result<(), NetworkError> {
    for ((before, after), value) in sysctls {
        let key = format!("{before}/{name}/{after}");
        let path = sysctl_path(&key).map_err(|_| NetworkError::Argument {
            what: "sysctl",
            value: key.clone(),
            reason: "not a valid name",
        })?;
        match std::fs::write(&path, value) {
            // Other versions of the kernel, other sysctls.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                tracing::warn!(
                    "{}: this kernel has no such sysctl, {value:?} is not set",
                    path.display()
                );
            }
            outcome => outcome.map_err(|source| NetworkError::File { path, source })?,
        }
    }
    Ok(())
}

/// Splits `net.ipv4.conf.IFNAME.rp_filter` at the interface, which may also have its own `name` (with dots, too).
fn sysctl_of(key: &str, name: &str) -> Result<(String, String), NetworkError> {
    let refused = || NetworkError::Argument {
        what: "sysctl",
        value: key.to_owned(),
        reason: "not one of this interface (net.*.conf.IFNAME.* or net.*.neigh.IFNAME.*)",
    };
    let separator = if key.contains('/') { '/' } else { '.' };
    let mut words = key.splitn(4, separator);
    let mut word = || words.next().ok_or_else(refused);
    let (net, protocol, table, rest) = (word()?, word()?, word()?, word()?);
    let (interface, leaf) = rest.rsplit_once(separator).ok_or_else(refused)?;
    let known = net == "net"
        && ["ipv4", "ipv6"].contains(&protocol)
        && ["conf", "neigh"].contains(&table)
        && (interface == PLACEHOLDER || (interface == name && !name.is_empty()));
    if !known || leaf.is_empty() || leaf.contains('.') {
        return Err(refused());
    }
    Ok((format!("{net}/{protocol}/{table}"), leaf.to_owned()))
}

/// As the kernel's `dev_valid_name`.
fn check_name(name: &str) -> Result<(), NetworkError> {
    let bad = |reason| {
        Err(NetworkError::Argument {
            what: "interface name",
            value: name.to_owned(),
            reason,
        })
    };
    if name == LOOPBACK {
        return bad("the loopback's");
    }
    if name.len() >= MAX_NAME {
        return bad("longer than 15 bytes");
    }
    let forbidden = |character: char| matches!(character, '/' | ':' | '\0') || character.is_whitespace();
    if name == "." || name == ".." || name.contains(forbidden) {
        return bad("not a valid name");
    }
    Ok(())
}

/// `aa:bb:cc:dd:ee:ff` as bytes.
///
/// # Errors
/// It is not six of them.
pub fn parse_hardware_address(text: &str) -> Result<Vec<u8>, NetworkError> {
    // `from_str_radix` alone takes a sign, too.
    let is_byte = |byte: &str| byte.len() == 2 && byte.bytes().all(|digit| digit.is_ascii_hexdigit());
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|byte| is_byte(byte).then(|| u8::from_str_radix(byte, 16).ok())?)
        .collect();
    bytes
        .filter(|bytes| bytes.len() == 6)
        .ok_or_else(|| NetworkError::Argument {
            what: "hardware address",
            value: text.to_owned(),
            reason: "not six bytes like 02:00:00:00:00:01",
        })
}

/// Bytes as `aa:bb:cc:dd:ee:ff`.
pub fn hardware_address(bytes: &[u8]) -> String {
    let bytes: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctl_when_of_another_interface_is_refused() {
        let place = |before: &str, after: &str| (before.to_owned(), after.to_owned());
        for (key, expected) in [
            (
                "net.ipv4.conf.IFNAME.rp_filter",
                place("net/ipv4/conf", "rp_filter"),
            ),
            (
                "net.ipv6.conf.eth0.1.accept_ra",
                place("net/ipv6/conf", "accept_ra"),
            ),
            (
                "net/ipv4/neigh/eth0.1/proxy_qlen",
                place("net/ipv4/neigh", "proxy_qlen"),
            ),
        ] {
            assert_eq!(sysctl_of(key, "eth0.1").unwrap(), expected, "{key}");
        }
        for key in [
            "net.ipv4.conf.all.rp_filter",
            "net.ipv4.conf.eth1.rp_filter",
            "net.ipv4.ip_forward",
            "kernel.conf.x.IFNAME.y",
            "net/ipv4/conf/IFNAME/../x",
            "net/ipv4/conf/IFNAME/..",
            "net.ipv4.conf.IFNAME.",
            "",
        ] {
            assert!(sysctl_of(key, "eth0.1").is_err(), "{key}");
        }
        assert!(sysctl_of("net.ipv4.conf..rp_filter", "").is_err());
    }

    #[test]
    fn name_when_the_kernel_would_not_take_it_is_refused() {
        for bad in ["lo", ".", "..", "a/b", "a:b", "a b", "0123456789abcdef"] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        for good in ["eth0", "eth0.100", "0123456789abcde"] {
            assert!(check_name(good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn hardware_address_when_it_is_not_six_bytes_is_refused() {
        assert_eq!(
            parse_hardware_address("02:00:0A:00:00:ff").unwrap(),
            [2, 0, 10, 0, 0, 255]
        );
        assert_eq!(hardware_address(&[2, 0, 10, 0, 0, 255]), "02:00:0a:00:00:ff");
        for bad in [
            "",
            "02",
            "02:00:0a:00:00",
            "02:00:0a:00:00:1",
            "02:00:0a:00:00:gg",
            "02:00:0a:00:00:+1",
        ] {
            assert!(parse_hardware_address(bad).is_err(), "{bad:?}");
        }
    }
}
