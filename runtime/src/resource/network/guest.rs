//! What a guest is told so that its `ip address`, `ip route` and `ip neighbour` are those of the namespace.

use std::net::{IpAddr, Ipv6Addr};

use protobuf::MessageField;
use protocols::types::{ARPNeighbor, IPAddress, IPFamily, Interface, Route as WireRoute};
use rtnetlink::packet_route::neighbour::NeighbourState;
use rtnetlink::packet_route::route::{RouteFlags, RouteProtocol};

use super::endpoint::{hardware_address, kind};
use super::scan::{Address, Link, NODAD, NOPREFIXROUTE, PERMANENT, Route, SECONDARY, Scan};

/// `RT_SCOPE_LINK`.
const LINK_SCOPE: u8 = 253;

/// Everything a guest is told about its network.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Guest {
    /// Its interfaces.
    pub interfaces: Vec<Interface>,
    /// Its routes, each after those it needs.
    pub routes: Vec<WireRoute>,
    /// Its permanent neighbours.
    pub neighbours: Vec<ARPNeighbor>,
}

/// What the guest that has `links` of `scan` is told; and warnings about what it cannot have.
pub fn describe(scan: &Scan, links: &[&Link]) -> (Guest, Vec<String>) {
    let mut warnings = Vec::new();
    let mut routes = Vec::new();
    for route in &scan.routes {
        let link = links.iter().find(|link| link.index == route.link);
        match (route.beyond, link) {
            (Some(_), _) if route.protocol == RouteProtocol::Kernel => {}
            (Some(beyond), _) => warnings.push(not_carried(route, beyond)),
            // The loopback's, or of a link that carries nothing.
            (None, None) => {}
            (None, Some(link)) if made_by_guest(route, link) => {}
            (None, Some(link)) => routes.push((route, *link)),
        }
    }
    routes.sort_by_key(|(route, _)| order(route));
    let guest = Guest {
        interfaces: links.iter().map(|link| interface(link, &scan.routes)).collect(),
        routes: routes
            .into_iter()
            .map(|(route, link)| wire(route, link))
            .collect(),
        neighbours: neighbours(scan, links),
    };
    (guest, warnings)
}

fn not_carried(route: &Route, what: &str) -> String {
    let destination = match route.destination {
        Some((ip, prefix)) => format!("{ip}/{prefix}"),
        None => "default".to_owned(),
    };
    format!("route to {destination}: the guest does not get it: {what}")
}

/// The kernel takes a route through a gateway only when it knows how to reach the gateway by a route of a narrower scope
/// (fib_check_nh in fib_semantics.c, ip6_route_check_nh in route.c). So routes to neighbours come first, then those of
/// narrower scopes; the narrowest network first among them, which changes nothing but is always the same.
fn order(route: &Route) -> (bool, u8, u8, u32, bool) {
    let prefix = route.destination.map_or(0, |(_, prefix)| prefix);
    let needs_another = route.gateway.is_some() && !route.onlink;
    (
        needs_another,
        u8::MAX - route.scope,
        u8::MAX - prefix,
        route.metric,
        route.v6,
    )
}

/// Whether the guest's kernel makes this route itself: with an address, or from a router's advertisement.
fn made_by_guest(route: &Route, link: &Link) -> bool {
    match route.protocol {
        RouteProtocol::Ra | RouteProtocol::IcmpRedirect => true,
        RouteProtocol::Kernel => {
            let link_local = |ip| matches!(ip, IpAddr::V6(ip) if Ipv6Addr::is_unicast_link_local(&ip));
            let multicast = |ip: IpAddr| ip.is_multicast();
            route
                .destination
                .is_some_and(|(ip, _)| link_local(ip) || multicast(ip))
                || link.addresses.iter().any(|address| is_network_of(route, address))
        }
        _ => false,
    }
}

/// Whether `route` is what the kernel makes of `address`.
fn is_network_of(route: &Route, address: &Address) -> bool {
    let network = (network(address.ip, address.prefix), address.prefix);
    let made = match address.ip {
        IpAddr::V4(_) => route.metric == 0 && route.source == Some(address.ip) && address.prefix < 32,
        // IP6_RT_PRIO_ADDRCONF.
        IpAddr::V6(_) => route.metric == 256 && route.source.is_none(),
    };
    made && address.peer.is_none()
        && route.protocol == RouteProtocol::Kernel
        && route.gateway.is_none()
        && route.destination == Some(network)
}

fn network(ip: IpAddr, prefix: u8) -> IpAddr {
    let prefix = u32::from(prefix);
    match ip {
        IpAddr::V4(ip) => {
            let mask = u32::MAX.checked_shl(32_u32.saturating_sub(prefix)).unwrap_or(0);
            IpAddr::V4((ip.to_bits() & mask).into())
        }
        IpAddr::V6(ip) => {
            let mask = u128::MAX.checked_shl(128_u32.saturating_sub(prefix)).unwrap_or(0);
            IpAddr::V6((ip.to_bits() & mask).into())
        }
    }
}

fn wire(route: &Route, link: &Link) -> WireRoute {
    let text = |ip: Option<IpAddr>| ip.map(|ip| ip.to_string()).unwrap_or_default();
    WireRoute {
        dest: route
            .destination
            .map(|(ip, prefix)| format!("{ip}/{prefix}"))
            .unwrap_or_default(),
        gateway: text(route.gateway),
        device: link.name.clone(),
        source: text(route.source),
        scope: u32::from(route.scope),
        family: family(route.v6).into(),
        flags: if route.onlink {
            RouteFlags::Onlink.bits()
        } else {
            0
        },
        mtu: route.mtu,
        metric: route.metric,
        ..Default::default()
    }
}

fn family(v6: bool) -> IPFamily {
    if v6 { IPFamily::v6 } else { IPFamily::v4 }
}

fn interface(link: &Link, routes: &[Route]) -> Interface {
    let mut own = link.addresses.clone();
    // Not made yet: the kernel takes its time after the link is in use.
    if link.makes_link_local && link.up && !own.iter().any(Address::is_link_local) {
        own.extend(link.mac.map(link_local_of));
    }
    // What is learned from a router is the guest's own affair.
    let (mut addresses, v6): (Vec<_>, Vec<_>) = own
        .iter()
        .filter(|address| address.flags & PERMANENT != 0)
        .partition(|address| address.ip.is_ipv4());
    // The kernel keeps IPv6 addresses with the newest first: the guest's order is to be the same.
    addresses.extend(v6.into_iter().rev());
    let addresses = addresses
        .into_iter()
        .map(|address| ip_address(address, link, routes));
    Interface {
        device: link.name.clone(),
        name: link.name.clone(),
        IPAddresses: addresses.collect(),
        mtu: u64::from(link.mtu),
        hwAddr: link.mac.map(|mac| hardware_address(&mac)).unwrap_or_default(),
        type_: kind(link),
        raw_flags: if link.no_arp {
            libc::IFF_NOARP.cast_unsigned()
        } else {
            0
        },
        sysctls: link.sysctls.clone().into_iter().collect(),
        ..Default::default()
    }
}

fn ip_address(address: &Address, link: &Link, routes: &[Route]) -> IPAddress {
    let mut flags = address.flags & (NODAD | NOPREFIXROUTE);
    let mut prefix = address.prefix;
    if address.peer.is_some() {
        // The wire has no other end of a link: the address alone, and the route to the other end by itself.
        prefix = if address.ip.is_ipv6() { 128 } else { 32 };
    }
    let expected = match address.ip {
        IpAddr::V4(_) => prefix < 32 && address.flags & SECONDARY == 0,
        IpAddr::V6(_) => !address.is_link_local(),
    };
    let has_route = routes
        .iter()
        .any(|route| route.link == link.index && is_network_of(route, address));
    // Somebody has taken the route to the network away (ptp of the CNI plugins does): the guest is not to have it either.
    if link.up && expected && !has_route {
        flags |= NOPREFIXROUTE;
    }
    IPAddress {
        family: family(address.ip.is_ipv6()).into(),
        address: address.ip.to_string(),
        mask: prefix.to_string(),
        broadcast: address.broadcast.map(|ip| ip.to_string()).unwrap_or_default(),
        scope: u32::from(address.scope),
        flags,
        ..Default::default()
    }
}

/// The link-local address that the kernel makes of a hardware address (RFC 4291, appendix A).
fn link_local_of(mac: [u8; 6]) -> Address {
    let [a, b, c, d, e, f] = mac.map(u16::from);
    let host = [((a ^ 2) << 8) | b, (c << 8) | 0xff, 0xfe00 | d, (e << 8) | f];
    Address {
        ip: Ipv6Addr::new(0xfe80, 0, 0, 0, host[0], host[1], host[2], host[3]).into(),
        prefix: 64,
        peer: None,
        broadcast: None,
        scope: LINK_SCOPE,
        flags: PERMANENT,
    }
}

fn neighbours(scan: &Scan, links: &[&Link]) -> Vec<ARPNeighbor> {
    let of_guest = scan.neighbours.iter().filter_map(|neighbour| {
        let link = links.iter().find(|link| link.index == neighbour.link)?;
        Some((neighbour, link))
    });
    of_guest
        .map(|(neighbour, link)| ARPNeighbor {
            toIPAddress: MessageField::some(IPAddress {
                family: family(neighbour.ip.is_ipv6()).into(),
                address: neighbour.ip.to_string(),
                ..Default::default()
            }),
            device: link.name.clone(),
            lladdr: hardware_address(&neighbour.mac),
            state: i32::from(u16::from(NeighbourState::Permanent)),
            flags: i32::from(neighbour.flags),
            ..Default::default()
        })
        .collect()
}
