//! Which links of a namespace are its guest's, and one that is attached.

use rtnetlink::packet_route::link::InfoKind;

use super::error::NetworkError;
use super::model;
use super::scan::{Address, DADFAILED, Link, Scan};
use crate::host::journal::Undo;
use crate::hypervisor::NetworkDevice;

/// Smallest and largest MTU of a TAP (the kernel's tun.c: `ETH_MIN_MTU`, and 65,535 less an Ethernet header).
const MTU: std::ops::RangeInclusive<u32> = 68..=65_521;

/// A link of the namespace that the guest has.
#[derive(Debug)]
pub struct Endpoint {
    /// As it was when the guest was told last.
    pub link: Link,
    /// Its device.
    pub device: NetworkDevice,
    /// What was done to the namespace for it.
    pub undo: Vec<Undo>,
}

/// What becomes of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// The guest gets it.
    Attach,
    /// It carries nothing that a guest could use.
    Skip,
    /// The guest would need it and cannot have it.
    Refuse(&'static str),
}

/// The links of `scan` that the guest gets, in the namespace's order.
///
/// # Errors
/// [`NetworkError`] for the first link that carries an address and cannot be attached: a pod is not to be deaf without a
/// word.
pub fn select(scan: &Scan) -> Result<Vec<Link>, NetworkError> {
    let mut selected: Vec<Link> = Vec::new();
    for link in &scan.links {
        match verdict(link, scan) {
            Verdict::Attach => {}
            Verdict::Skip => continue,
            Verdict::Refuse(reason) => {
                return Err(NetworkError::Unsupported {
                    link: link.name.clone(),
                    kind: kind(link),
                    carries: carries(link),
                    reason,
                });
            }
        }
        check(link)?;
        let same = selected.iter().find(|other| other.mac == link.mac);
        if let (Some(other), Some(mac)) = (same, link.mac) {
            let mac = hardware_address(&mac);
            return Err(NetworkError::SameHardwareAddress(
                other.name.clone(),
                link.name.clone(),
                mac,
            ));
        }
        selected.push(link.clone());
    }
    Ok(selected)
}

fn verdict(link: &Link, scan: &Scan) -> Verdict {
    let addressed = link.addresses.iter().any(|address| !address.is_link_local());
    let used = link.up && link.master.is_none();
    let below_another = scan.links.iter().any(|other| other.below == Some(link.index));
    if link.loopback || !(addressed || used) {
        return Verdict::Skip;
    }
    if addressed && below_another {
        return Verdict::Refuse(
            "another interface of the namespace is on top of it, whose frames would all go to the guest",
        );
    }
    if !link.ethernet {
        return if addressed {
            Verdict::Refuse("it carries no Ethernet frames")
        } else {
            Verdict::Skip
        };
    }
    // A bridge loses its hardware address with its last port (net/bridge/br_stp_if.c): nothing passes until it has one again.
    if link.mac == Some([0; 6]) {
        return Verdict::Skip;
    }
    if model::is_guests(link) && link.master.is_some() {
        return Verdict::Refuse(
            "its bridge keeps frames for its hardware address, which would be the guest's, to itself",
        );
    }
    match &link.kind {
        None => {
            Verdict::Refuse("it is a physical one, which needs PCI passthrough: not provided in this release")
        }
        // What links to a network of its own is attached for its frames alone, too.
        Some(
            InfoKind::Veth
            | InfoKind::MacVlan
            | InfoKind::MacVtap
            | InfoKind::IpVlan
            | InfoKind::Vlan
            | InfoKind::Netkit
            | InfoKind::Tun,
        ) if !below_another => Verdict::Attach,
        Some(_) if addressed => Verdict::Attach,
        Some(_) => Verdict::Skip,
    }
}

fn check(link: &Link) -> Result<(), NetworkError> {
    if !MTU.contains(&link.mtu) {
        return Err(NetworkError::Mtu {
            link: link.name.clone(),
            mtu: link.mtu,
            min: *MTU.start(),
            max: *MTU.end(),
        });
    }
    // At a TAP's other end is the guest itself, which has the link-local address of their one hardware address.
    let guests = |address: &Address| link.kind == Some(InfoKind::Tun) && address.is_link_local();
    let duplicate = link
        .addresses
        .iter()
        .find(|address| address.flags & DADFAILED != 0 && !guests(address));
    match duplicate {
        Some(address) => Err(NetworkError::Duplicate {
            link: link.name.clone(),
            address: address.ip,
        }),
        None => Ok(()),
    }
}

/// Its kind, for people.
pub fn kind(link: &Link) -> String {
    match (&link.kind, &link.hardware) {
        (Some(kind), _) => kind.to_string(),
        (None, Some(hardware)) => format!("physical, {hardware}"),
        (None, None) => "physical".to_owned(),
    }
}

fn carries(link: &Link) -> String {
    let addresses: Vec<_> = link
        .addresses
        .iter()
        .map(|address| address.ip.to_string())
        .collect();
    match addresses.is_empty() {
        true => "is in use".to_owned(),
        false => format!("carries {}", addresses.join(", ")),
    }
}

/// As `ip link` writes it.
pub fn hardware_address(mac: &[u8]) -> String {
    let bytes: Vec<_> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(":")
}
