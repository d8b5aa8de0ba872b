//! Neighbour tables: who has which address on an interface.

use std::net::IpAddr;

use protocols::types::ARPNeighbor;
use rtnetlink::packet_route::neighbour::{NeighbourFlags, NeighbourState};

use super::NetworkError;
use super::interfaces::parse_hardware_address;
use super::netlink::{Netlink, failed};

/// `NUD_PERMANENT` and `NUD_NOARP` of <linux/neighbour.h>: the states that do not pass.
const PERMANENT: i32 = 0x80;
const NO_ARP: i32 = 0x40;

struct Neighbour {
    link: u32,
    device: String,
    ip: IpAddr,
    address: Vec<u8>,
    state: NeighbourState,
    flags: NeighbourFlags,
}

/// Adds `wanted`, or replaces what there is of the same addresses.
///
/// # Errors
/// A value makes no sense (nothing is changed), or the kernel refuses one.
pub async fn add(netlink: &Netlink, wanted: &[ARPNeighbor]) -> Result<(), NetworkError> {
    let links = netlink.links().await?;
    let find = |name: &str| links.iter().find(|link| link.name == name).map(|link| link.index);
    let neighbours: Vec<Neighbour> = wanted
        .iter()
        .map(|wire| Neighbour::from_wire(wire, find(&wire.device)))
        .collect::<Result<_, _>>()?;
    for neighbour in neighbours {
        let Neighbour { device, ip, .. } = &neighbour;
        let what = format!("add neighbour {ip} of network interface {device}");
        let request = netlink.handle.neighbours().add(neighbour.link, neighbour.ip);
        let request = request
            .link_layer_address(&neighbour.address)
            .state(neighbour.state)
            .flags(neighbour.flags)
            .replace();
        request.execute().await.map_err(failed(what))?;
    }
    Ok(())
}

impl Neighbour {
    fn from_wire(wire: &ARPNeighbor, link: Option<u32>) -> Result<Self, NetworkError> {
        let bad = |what, value: &str, reason| NetworkError::Argument {
            what,
            value: value.to_owned(),
            reason,
        };
        let text = wire.toIPAddress.address.as_str();
        let ip = text
            .parse()
            .map_err(|_| bad("neighbour", text, "not an IP address"))?;
        let state = match wire.state {
            0 | PERMANENT => NeighbourState::Permanent,
            NO_ARP => NeighbourState::Noarp,
            other => {
                return Err(bad(
                    "neighbour state",
                    &other.to_string(),
                    "passes: only permanent ones can be added",
                ));
            }
        };
        let flags = u8::try_from(wire.flags)
            .map_err(|_| bad("neighbour flags", &wire.flags.to_string(), "not within 0 to 255"))?;
        Ok(Self {
            link: link.ok_or_else(|| NetworkError::NoInterface(format!("{:?}", wire.device)))?,
            device: wire.device.clone(),
            ip,
            address: parse_hardware_address(&wire.lladdr)?,
            state,
            flags: NeighbourFlags::from_bits_retain(flags),
        })
    }
}

#[cfg(test)]
mod tests {
    use protocols::types::IPAddress;

    use super::*;

    #[test]
    fn neighbour_when_it_makes_no_sense_is_refused_by_its_value() {
        let good = ARPNeighbor {
            toIPAddress: Some(IPAddress {
                address: "10.0.0.1".into(),
                ..Default::default()
            })
            .into(),
            device: "eth0".into(),
            lladdr: "02:00:00:00:00:01".into(),
            state: PERMANENT,
            ..Default::default()
        };
        assert!(Neighbour::from_wire(&good, Some(2)).is_ok());
        let address = IPAddress {
            address: "gate".into(),
            ..Default::default()
        };
        for (bad, named) in [
            (
                ARPNeighbor {
                    toIPAddress: Some(address).into(),
                    ..good.clone()
                },
                "gate",
            ),
            (
                ARPNeighbor {
                    toIPAddress: None.into(),
                    ..good.clone()
                },
                "\"\"",
            ),
            (
                ARPNeighbor {
                    lladdr: "02:00".into(),
                    ..good.clone()
                },
                "02:00",
            ),
            (
                ARPNeighbor {
                    state: 2,
                    ..good.clone()
                },
                "state \"2\"",
            ),
            (
                ARPNeighbor {
                    flags: 256,
                    ..good.clone()
                },
                "256",
            ),
        ] {
            let error = Neighbour::from_wire(&bad, Some(2)).err().unwrap().to_string();
            assert!(error.contains(named), "{error}");
        }
        let error = Neighbour::from_wire(&good, None).err().unwrap().to_string();
        assert!(error.contains("eth0"), "{error}");
    }
}
