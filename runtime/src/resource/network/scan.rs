//! What is in a network namespace: links with their addresses and sysctls, routes, neighbours.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use futures::TryStreamExt;
use rtnetlink::Handle;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{
    InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteNextHop,
    RouteNextHopFlags, RouteProtocol, RouteType, RouteVia,
};

use super::error::NetworkError;
use super::sysctl;
use crate::host::link::io_error;

/// A namespace at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scan {
    /// Its links, by index, without those that were made for a guest.
    pub links: Vec<Link>,
    /// The names of those that were.
    pub taken: Vec<String>,
    /// Its main routing table.
    pub routes: Vec<Route>,
    /// Neighbours that somebody entered.
    pub neighbours: Vec<Neighbour>,
}

/// A link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Index in the namespace.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Kind; `None` for what is no virtual link.
    pub kind: Option<InfoKind>,
    /// Whether it carries Ethernet frames.
    pub ethernet: bool,
    /// Whether it is the loopback.
    pub loopback: bool,
    /// Whether it is in use.
    pub up: bool,
    /// Whether somebody is at its other end, and it is in use.
    pub running: bool,
    /// Whether it does without address resolution.
    pub no_arp: bool,
    /// Hardware address.
    pub mac: Option<[u8; 6]>,
    /// Largest packet.
    pub mtu: u32,
    /// Index of the link it is part of: a bridge, a bond.
    pub master: Option<u32>,
    /// Index of the link below it, if that is in the same namespace.
    pub below: Option<u32>,
    /// The hardware behind it.
    pub hardware: Option<String>,
    /// Addresses, in the kernel's order.
    pub addresses: Vec<Address>,
    /// Whether its kernel gives it an IPv6 address made of the hardware address.
    pub makes_link_local: bool,
    /// Values below `net.*.conf`, where they are not the kernel's defaults.
    pub sysctls: BTreeMap<String, String>,
}

/// An address of a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Its own.
    pub ip: IpAddr,
    /// Bits of its network.
    pub prefix: u8,
    /// The other end, where there is only one.
    pub peer: Option<IpAddr>,
    /// Broadcast address.
    pub broadcast: Option<Ipv4Addr>,
    /// `RT_SCOPE_*`.
    pub scope: u8,
    /// Those of `IFA_F_*` that are constants here.
    pub flags: u32,
}

/// `IFA_F_SECONDARY`: in the network of another address.
pub const SECONDARY: u32 = 0x01;
/// `IFA_F_NODAD`: used without asking whether somebody else has it.
pub const NODAD: u32 = 0x02;
/// `IFA_F_DADFAILED`: somebody else has it.
pub const DADFAILED: u32 = 0x08;
/// `IFA_F_PERMANENT`: entered by somebody, not learned from a router.
pub const PERMANENT: u32 = 0x80;
/// `IFA_F_NOPREFIXROUTE`: without a route to its network.
pub const NOPREFIXROUTE: u32 = 0x200;
/// The others come and go by themselves.
const LASTING: u32 = SECONDARY | NODAD | DADFAILED | PERMANENT | NOPREFIXROUTE;

impl Address {
    /// Whether it is an IPv6 address of the link alone.
    pub fn is_link_local(&self) -> bool {
        matches!(self.ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
    }
}

/// One next hop of a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Index of the link it leaves by; 0 for none.
    pub link: u32,
    /// Whether it is for IPv6.
    pub v6: bool,
    /// Where to; `None` for everywhere.
    pub destination: Option<(IpAddr, u8)>,
    /// Through whom; `None` for neighbours.
    pub gateway: Option<IpAddr>,
    /// From which of the own addresses.
    pub source: Option<IpAddr>,
    /// `RT_SCOPE_*`.
    pub scope: u8,
    /// Preference among the same destinations, least first.
    pub metric: u32,
    /// Largest packet; 0 for the link's.
    pub mtu: u32,
    /// Whether the gateway is a neighbour whatever its address.
    pub onlink: bool,
    /// Who entered it.
    pub protocol: RouteProtocol,
    /// What is in it that a guest cannot be told.
    pub beyond: Option<&'static str>,
}

/// A neighbour that somebody entered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// Index of its link.
    pub link: u32,
    /// Its address.
    pub ip: IpAddr,
    /// Its hardware address.
    pub mac: Vec<u8>,
    /// `NTF_*`.
    pub flags: u8,
}

/// Looks at the namespace of the calling thread, to which `handle` is connected.
///
/// # Errors
/// [`NetworkError::Dump`].
pub async fn scan(handle: &Handle) -> Result<Scan, NetworkError> {
    let dump = |what| {
        move |error| NetworkError::Dump {
            what,
            source: io_error(error),
        }
    };
    let links: Vec<_> = handle
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(dump("links"))?;
    let addresses: Vec<_> = handle
        .address()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(dump("addresses"))?;
    let mut routes = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = RouteMessage::default();
        request.header.address_family = family;
        let found = handle
            .route()
            .get(request)
            .execute()
            .try_collect::<Vec<_>>()
            .await;
        match found.map_err(dump("routes")) {
            Ok(found) => routes.extend(found),
            // A kernel without IPv6.
            Err(NetworkError::Dump { source, .. })
                if family == AddressFamily::Inet6
                    && matches!(source.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EAFNOSUPPORT)) => {}
            Err(error) => return Err(error),
        }
    }
    let neighbours: Vec<_> = handle
        .neighbours()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(dump("neighbours"))?;

    let (ours, mut links): (Vec<_>, Vec<_>) = links
        .into_iter()
        .map(link)
        .partition(|link| is_made_for_guest(&link.name));
    for message in addresses {
        let owner = links.iter_mut().find(|link| link.index == message.header.index);
        if let (Some(owner), Some(address)) = (owner, address(message)) {
            owner.addresses.push(address);
        }
    }
    for link in links.iter_mut().filter(|link| !link.loopback) {
        link.sysctls = sysctl::read(&link.name);
        link.makes_link_local = sysctl::makes_link_local(&link.name);
    }
    Ok(Scan {
        links,
        taken: ours.into_iter().map(|link| link.name).collect(),
        routes: routes.into_iter().flat_map(hops).collect(),
        neighbours: neighbours.into_iter().filter_map(neighbour).collect(),
    })
}

/// Whether a link has a name as the TAPs of guests have: `tap0_kata`.
fn is_made_for_guest(name: &str) -> bool {
    let number = name
        .strip_prefix("tap")
        .and_then(|rest| rest.strip_suffix("_kata"));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|digit| digit.is_ascii_digit()))
}

fn link(message: LinkMessage) -> Link {
    let flags = message.header.flags;
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: None,
        ethernet: message.header.link_layer_type == LinkLayerType::Ether,
        loopback: message.header.link_layer_type == LinkLayerType::Loopback,
        up: flags.contains(LinkFlags::Up),
        running: flags.contains(LinkFlags::LowerUp),
        no_arp: flags.contains(LinkFlags::Noarp),
        mac: None,
        mtu: 0,
        master: None,
        below: None,
        hardware: None,
        addresses: Vec::new(),
        makes_link_local: false,
        sysctls: BTreeMap::new(),
    };
    let mut elsewhere = false;
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Address(mac) => link.mac = mac.try_into().ok(),
            LinkAttribute::Controller(index) => link.master = Some(index),
            LinkAttribute::Link(index) => link.below = Some(index).filter(|below| *below != 0),
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            LinkAttribute::ParentDevName(name) => link.hardware = Some(name),
            LinkAttribute::LinkInfo(infos) => {
                link.kind = infos.into_iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    // A veth's other end is beside it, not below it.
    if elsewhere || link.kind == Some(InfoKind::Veth) {
        link.below = None;
    }
    link
}

fn address(message: AddressMessage) -> Option<Address> {
    let (mut local, mut other, mut broadcast) = (None, None, None);
    let mut flags = u32::from(message.header.flags.bits());
    for attribute in message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(ip),
            AddressAttribute::Address(ip) => other = Some(ip),
            AddressAttribute::Broadcast(ip) => broadcast = Some(ip),
            AddressAttribute::Flags(all) => flags = all.bits(),
            _ => {}
        }
    }
    // rtnetlink(7): IFA_ADDRESS is the other end of a point-to-point link, and the same as IFA_LOCAL elsewhere.
    let ip = local.or(other)?;
    Some(Address {
        ip,
        prefix: message.header.prefix_len,
        peer: other.filter(|other| *other != ip),
        broadcast,
        scope: message.header.scope.into(),
        flags: flags & LASTING,
    })
}

/// A route of the main table as its next hops; nothing of other tables.
fn hops(message: RouteMessage) -> Vec<Route> {
    let header = &message.header;
    let mut table = u32::from(header.table);
    let v6 = header.address_family == AddressFamily::Inet6;
    let mut route = Route {
        link: 0,
        v6,
        destination: None,
        gateway: None,
        source: None,
        scope: header.scope.into(),
        metric: 0,
        mtu: 0,
        onlink: header.flags.contains(RouteFlags::Onlink),
        protocol: header.protocol,
        beyond: match header.kind {
            RouteType::Unicast => None,
            RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit => {
                Some("it refuses packets instead of sending them")
            }
            _ => Some("its type"),
        },
    };
    if header.tos != 0 || header.source_prefix_length != 0 {
        route.beyond = Some("it depends on more than the destination");
    }
    let mut multipath = Vec::new();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(index) => table = *index,
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    if let RouteMetric::Mtu(mtu) = metric {
                        route.mtu = *mtu;
                    }
                }
            }
            RouteAttribute::Destination(to) => {
                route.destination = ip(to).map(|ip| (ip, header.destination_prefix_length));
            }
            RouteAttribute::PrefSource(source) => route.source = ip(source),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::MultiPath(hops) => multipath.clone_from(hops),
            hop => by(&mut route, hop),
        }
    }
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) {
        return Vec::new();
    }
    if multipath.is_empty() {
        return vec![route];
    }
    let hop = |hop: RouteNextHop| {
        let mut route = route.clone();
        route.link = hop.interface_index;
        route.onlink = hop.flags.contains(RouteNextHopFlags::Onlink);
        for attribute in &hop.attributes {
            by(&mut route, attribute);
        }
        route
    };
    multipath.into_iter().map(hop).collect()
}

/// What says how a next hop is reached.
fn by(route: &mut Route, attribute: &RouteAttribute) {
    match attribute {
        RouteAttribute::Oif(index) => route.link = *index,
        RouteAttribute::Gateway(gateway) => route.gateway = ip(gateway),
        RouteAttribute::Via(RouteVia::Inet6(_)) if !route.v6 => {
            route.beyond = Some("an IPv4 route through an IPv6 gateway");
        }
        RouteAttribute::EncapType(_) | RouteAttribute::Encap(_) => route.beyond = Some("its encapsulation"),
        _ => {}
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

fn neighbour(message: NeighbourMessage) -> Option<Neighbour> {
    let header = &message.header;
    if header.state != NeighbourState::Permanent || header.flags.contains(NeighbourFlags::Proxy) {
        return None;
    }
    let (mut destination, mut mac) = (None, None);
    for attribute in message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => destination = Some(ip.into()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => destination = Some(ip.into()),
            NeighbourAttribute::LinkLayerAddress(address) => mac = Some(address),
            _ => {}
        }
    }
    Some(Neighbour {
        link: header.ifindex,
        ip: destination?,
        mac: mac?,
        flags: header.flags.bits(),
    })
}
