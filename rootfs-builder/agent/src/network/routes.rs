//! Routes of the main table.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures::TryStreamExt;
use protocols::agent::Routes;
use protocols::types::{self, IPFamily};
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteNextHop,
    RouteNextHopFlags, RouteProtocol, RouteScope, RouteType, RouteVia,
};

use super::NetworkError;
use super::addresses::longest_prefix;
use super::netlink::{Link, Netlink, failed};

/// What the kernel gives an IPv6 route without a metric (`IP6_RT_PRIO_USER`).
const DEFAULT_IPV6_METRIC: u32 = 1024;

/// Names of the interfaces, by their numbers.
type Names = BTreeMap<u32, String>;

/// What tells routes apart: destination, length of its prefix, metric.
type Key = (IpAddr, u8, u32);

/// A route with all its next hops.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Route {
    key: Key,
    /// `RT_SCOPE_*`. IPv6 has none.
    scope: u8,
    source: Option<IpAddr>,
    mtu: u32,
    /// In order, without doubles.
    hops: BTreeSet<Hop>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Hop {
    link: u32,
    gateway: Option<IpAddr>,
    on_link: bool,
}

/// A route as the kernel has it.
struct Present {
    route: Route,
    /// Made by the kernel, from an address or a router's advertisement.
    by_kernel: bool,
    message: RouteMessage,
}

/// Gives the interfaces `pods`, and those that occur in `wanted`, exactly these routes, beside those the kernel made.
///
/// # Errors
/// A value makes no sense (nothing is changed), or the kernel refuses a route.
pub async fn update(
    netlink: &Netlink,
    wanted: &[types::Route],
    pods: &BTreeSet<u32>,
) -> Result<(), NetworkError> {
    let names = names(netlink.links().await?);
    let mut wanted = merge(wanted, &names)?;
    let listed = wanted.iter().flat_map(Route::links);
    let links: BTreeSet<u32> = listed.chain(pods.iter().copied()).collect();
    let present = present(netlink).await?;
    let theirs = present
        .iter()
        .filter(|present| !present.by_kernel && present.route.links().any(|link| links.contains(&link)));
    for present in theirs {
        let kept = wanted.iter().position(|route| *route == present.route);
        if let Some(kept) = kept {
            wanted.remove(kept);
            continue;
        }
        tracing::debug!("the {} goes", present.route.describe(&names));
        let request = netlink.handle.route().del(present.message.clone());
        let what = format!("remove the {}", present.route.describe(&names));
        request.execute().await.map_err(failed(what))?;
    }
    // Gateways are reached by routes without one.
    wanted.sort_by_key(Route::has_gateway);
    for route in wanted {
        let what = format!("add the {}", route.describe(&names));
        // Takes the place of the kernel's route to the same network, as it did in the pod's namespace.
        let request = netlink.handle.route().add(route.message()).replace();
        request.execute().await.map_err(failed(what))?;
    }
    Ok(())
}

/// All routes, in the host's words.
///
/// # Errors
/// The kernel refuses.
pub async fn list(netlink: &Netlink) -> Result<Routes, NetworkError> {
    let names = names(netlink.links().await?);
    let present = present(netlink).await?;
    Ok(Routes {
        Routes: present
            .iter()
            .flat_map(|present| present.route.to_wire(&names))
            .collect(),
        ..Default::default()
    })
}

fn names(links: Vec<Link>) -> Names {
    links.into_iter().map(|link| (link.index, link.name)).collect()
}

/// One route for the messages of each destination and metric.
fn merge(wanted: &[types::Route], names: &Names) -> Result<Vec<Route>, NetworkError> {
    let mut routes: Vec<Route> = Vec::with_capacity(wanted.len());
    for message in wanted {
        let route = Route::from_wire(message, names)?;
        let Some(same) = routes.iter_mut().find(|other| other.key == route.key) else {
            routes.push(route);
            continue;
        };
        let hops = &same.hops | &route.hops;
        if *same
            != (Route {
                hops: same.hops.clone(),
                ..route.clone()
            })
        {
            return Err(bad(
                "route",
                &route.describe(names),
                "another route to the same destination with the same metric differs in more than the gateway",
            ));
        }
        same.hops = hops;
    }
    Ok(routes)
}

impl Route {
    fn from_wire(wire: &types::Route, names: &Names) -> Result<Self, NetworkError> {
        let is_v4 = wire.family.enum_value_or_default() == IPFamily::v4;
        let (destination, prefix) = parse_destination(&wire.dest, is_v4)?;
        let is_v4 = destination.is_ipv4();
        let gateway = parse_optional("gateway", &wire.gateway)?;
        if gateway.is_some_and(|gateway| gateway.is_ipv4() && !is_v4) {
            return Err(bad("gateway", &wire.gateway, "IPv4, of an IPv6 route"));
        }
        let source = parse_optional("source", &wire.source)?;
        if source.is_some_and(|source| source.is_ipv4() != is_v4) {
            return Err(bad("source", &wire.source, "not of the route's family"));
        }
        let link = names.iter().find(|(_, name)| **name == wire.device);
        let (link, _) = link.ok_or_else(|| NetworkError::NoInterface(format!("{:?}", wire.device)))?;
        let scope =
            u8::try_from(wire.scope).map_err(|_| bad("scope", &wire.scope.to_string(), "larger than 255"))?;
        let on_link = RouteFlags::from_bits_retain(wire.flags).contains(RouteFlags::Onlink);
        let hop = Hop {
            link: *link,
            gateway,
            on_link,
        };
        Ok(Self {
            key: (destination, prefix, metric(wire.metric, is_v4)),
            scope: if is_v4 { scope } else { 0 },
            source,
            mtu: wire.mtu,
            hops: BTreeSet::from([hop]),
        })
    }

    fn to_wire(&self, names: &Names) -> Vec<types::Route> {
        let (destination, prefix, metric) = self.key;
        let family = if destination.is_ipv4() {
            IPFamily::v4
        } else {
            IPFamily::v6
        };
        let text = |ip: Option<IpAddr>| ip.map(|ip| ip.to_string()).unwrap_or_default();
        let of_hop = |hop: &Hop| types::Route {
            dest: if prefix == 0 {
                String::new()
            } else {
                format!("{destination}/{prefix}")
            },
            gateway: text(hop.gateway),
            device: names.get(&hop.link).cloned().unwrap_or_default(),
            source: text(self.source),
            scope: self.scope.into(),
            family: family.into(),
            flags: if hop.on_link { RouteFlags::Onlink.bits() } else { 0 },
            mtu: self.mtu,
            metric,
            ..Default::default()
        };
        self.hops.iter().map(of_hop).collect()
    }

    /// None of a route of another kind or table.
    fn from_message(message: &RouteMessage) -> Option<Self> {
        let header = &message.header;
        let unspecified: IpAddr = match header.address_family {
            AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
            AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
            _ => return None,
        };
        let is_v4 = unspecified.is_ipv4();
        let (mut destination, mut metric, mut table) = (unspecified, 0, u32::from(header.table));
        let mut route_mtu = 0;
        let mut source = None;
        let mut hops = BTreeSet::new();
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(address) => destination = ip_of(address)?,
                RouteAttribute::PrefSource(address) => source = Some(ip_of(address)?),
                RouteAttribute::Priority(priority) => metric = *priority,
                RouteAttribute::Table(number) => table = *number,
                RouteAttribute::Metrics(metrics) => route_mtu = mtu_of(metrics),
                RouteAttribute::MultiPath(paths) => hops.extend(paths.iter().map(Hop::from_path)),
                _ => {}
            }
        }
        let ours = header.kind == RouteType::Unicast
            && table == u32::from(RouteHeader::RT_TABLE_MAIN)
            && !header.flags.contains(RouteFlags::Cloned);
        if !ours {
            return None;
        }
        if hops.is_empty() {
            let on_link = header.flags.contains(RouteFlags::Onlink);
            hops.insert(Hop::from_attributes(&message.attributes, None, on_link));
        }
        Some(Self {
            key: (destination, header.destination_prefix_length, metric),
            scope: if is_v4 { header.scope.into() } else { 0 },
            source,
            mtu: route_mtu,
            hops,
        })
    }

    fn message(&self) -> RouteMessage {
        let (destination, prefix, metric) = self.key;
        let mut message = RouteMessage::default();
        message.header = RouteHeader {
            address_family: if destination.is_ipv4() {
                AddressFamily::Inet
            } else {
                AddressFamily::Inet6
            },
            destination_prefix_length: prefix,
            table: RouteHeader::RT_TABLE_MAIN,
            // What `ip route` and network plugins give their routes.
            protocol: RouteProtocol::Boot,
            scope: RouteScope::from(self.scope),
            kind: RouteType::Unicast,
            ..Default::default()
        };
        let attributes = &mut message.attributes;
        if prefix != 0 {
            attributes.push(RouteAttribute::Destination(destination.into()));
        }
        if metric != 0 {
            attributes.push(RouteAttribute::Priority(metric));
        }
        attributes.extend(
            self.source
                .map(|source| RouteAttribute::PrefSource(source.into())),
        );
        if self.mtu != 0 {
            attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(self.mtu)]));
        }
        let is_v4 = destination.is_ipv4();
        if let (Some(hop), 1) = (self.hops.first(), self.hops.len()) {
            attributes.push(RouteAttribute::Oif(hop.link));
            attributes.extend(hop.gateway_attribute(is_v4));
            message.header.flags.set(RouteFlags::Onlink, hop.on_link);
        } else {
            let paths = self.hops.iter().map(|hop| hop.path(is_v4));
            attributes.push(RouteAttribute::MultiPath(paths.collect()));
        }
        message
    }

    fn links(&self) -> impl Iterator<Item = u32> + '_ {
        self.hops.iter().map(|hop| hop.link)
    }

    fn has_gateway(&self) -> bool {
        self.hops.iter().any(|hop| hop.gateway.is_some())
    }

    fn describe(&self, names: &Names) -> String {
        let (destination, prefix, metric) = self.key;
        let mut text = format!("route to {destination}/{prefix}");
        for Hop { link, gateway, .. } in &self.hops {
            if let Some(gateway) = gateway {
                text += &format!(" via {gateway}");
            }
            text += &format!(" dev {}", names.get(link).map_or("?", String::as_str));
        }
        if metric != 0 {
            text += &format!(" metric {metric}");
        }
        if let Some(source) = self.source {
            text += &format!(" src {source}");
        }
        text
    }
}

impl Hop {
    fn from_path(path: &RouteNextHop) -> Self {
        let on_link = path.flags.contains(RouteNextHopFlags::Onlink);
        Self::from_attributes(&path.attributes, Some(path.interface_index), on_link)
    }

    fn from_attributes(attributes: &[RouteAttribute], link: Option<u32>, on_link: bool) -> Self {
        let mut hop = Self {
            link: link.unwrap_or_default(),
            gateway: None,
            on_link,
        };
        for attribute in attributes {
            match attribute {
                RouteAttribute::Oif(index) => hop.link = *index,
                RouteAttribute::Gateway(address) => hop.gateway = ip_of(address),
                RouteAttribute::Via(RouteVia::Inet6(ip)) => hop.gateway = Some((*ip).into()),
                _ => {}
            }
        }
        hop
    }

    fn path(&self, is_v4: bool) -> RouteNextHop {
        let mut path = RouteNextHop::default();
        path.interface_index = self.link;
        path.flags.set(RouteNextHopFlags::Onlink, self.on_link);
        path.attributes.extend(self.gateway_attribute(is_v4));
        path
    }

    fn gateway_attribute(&self, is_v4: bool) -> Option<RouteAttribute> {
        self.gateway.map(|gateway| match gateway {
            IpAddr::V6(gateway) if is_v4 => RouteAttribute::Via(RouteVia::Inet6(gateway)),
            gateway => RouteAttribute::Gateway(gateway.into()),
        })
    }
}

async fn present(netlink: &Netlink) -> Result<Vec<Present>, NetworkError> {
    let mut all = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = RouteMessage::default();
        request.header.address_family = family;
        let routes = netlink.handle.route().get(request).execute();
        let messages: Vec<RouteMessage> = routes.try_collect().await.map_err(failed("list routes"))?;
        all.extend(messages.into_iter().filter_map(|message| {
            let protocol = message.header.protocol;
            Some(Present {
                route: Route::from_message(&message)?,
                by_kernel: matches!(
                    protocol,
                    RouteProtocol::Kernel | RouteProtocol::Ra | RouteProtocol::IcmpRedirect
                ),
                message,
            })
        }));
    }
    Ok(all)
}

fn metric(metric: u32, is_v4: bool) -> u32 {
    if metric == 0 && !is_v4 {
        DEFAULT_IPV6_METRIC
    } else {
        metric
    }
}

/// `ADDRESS/PREFIX`, `ADDRESS`, or nothing or `default` for everything.
fn parse_destination(text: &str, is_v4: bool) -> Result<(IpAddr, u8), NetworkError> {
    if text.is_empty() || text == "default" {
        let all: IpAddr = if is_v4 {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            Ipv6Addr::UNSPECIFIED.into()
        };
        return Ok((all, 0));
    }
    let refused = |reason| bad("destination", text, reason);
    let (address, prefix) = text.split_once('/').map_or((text, None), |(a, p)| (a, Some(p)));
    let ip: IpAddr = address.parse().map_err(|_| refused("not an IP address"))?;
    let longest = longest_prefix(ip);
    let prefix = match prefix {
        None => longest,
        Some(prefix) => {
            let prefix = prefix.parse().ok().filter(|prefix| *prefix <= longest);
            prefix.ok_or_else(|| refused("no valid length of a prefix"))?
        }
    };
    Ok((ip, prefix))
}

fn parse_optional(what: &'static str, text: &str) -> Result<Option<IpAddr>, NetworkError> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse()
        .map(Some)
        .map_err(|_| bad(what, text, "not an IP address"))
}

fn bad(what: &'static str, value: &str, reason: &'static str) -> NetworkError {
    NetworkError::Argument {
        what,
        value: value.to_owned(),
        reason,
    }
}

fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

fn mtu_of(metrics: &[RouteMetric]) -> u32 {
    let mtu = metrics.iter().find_map(|metric| match metric {
        RouteMetric::Mtu(mtu) => Some(*mtu),
        _ => None,
    });
    mtu.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Names {
        Names::from([(2, "eth0".to_owned()), (3, "eth1".to_owned())])
    }

    fn wire(dest: &str, gateway: &str, device: &str) -> types::Route {
        types::Route {
            dest: dest.into(),
            gateway: gateway.into(),
            device: device.into(),
            ..Default::default()
        }
    }

    #[test]
    fn route_when_built_for_the_kernel_reads_back_the_same() {
        let v6 = types::Route {
            family: IPFamily::v6.into(),
            ..wire("", "fe80::1", "eth0")
        };
        let routes = [
            types::Route {
                scope: 253,
                source: "10.0.0.2".into(),
                ..wire("10.0.0.0/24", "", "eth0")
            },
            types::Route {
                metric: 7,
                flags: 4,
                mtu: 1400,
                ..wire("", "10.0.0.1", "eth0")
            },
            types::Route {
                metric: 7,
                ..wire("default", "10.0.0.9", "eth1")
            },
            wire("10.9.0.0/16", "fe80::1", "eth0"),
            v6,
            types::Route {
                metric: 3,
                ..wire("fd00:1::/64", "", "eth1")
            },
        ];
        // The second and third are next hops of one route, but for the MTU.
        assert!(merge(&routes, &names()).is_err());
        let mut routes = routes.to_vec();
        routes[2].mtu = 1400;

        let merged = merge(&routes, &names()).unwrap();

        assert_eq!(merged.len(), 5);
        assert_eq!(merged[1].hops.len(), 2);
        for route in merged {
            assert_eq!(Route::from_message(&route.message()), Some(route));
        }
    }

    #[test]
    fn route_when_it_makes_no_sense_is_refused_by_its_value() {
        for (bad, named) in [
            (wire("10.0.0.0/33", "", "eth0"), "10.0.0.0/33"),
            (wire("nowhere", "", "eth0"), "nowhere"),
            (wire("10.0.0.0/8", "gate", "eth0"), "gate"),
            (wire("fd00::/8", "10.0.0.1", "eth0"), "10.0.0.1"),
            (wire("10.0.0.0/8", "", "eth7"), "eth7"),
            (wire("10.0.0.0/8", "", ""), "no network interface \"\""),
            (
                types::Route {
                    source: "fd00::1".into(),
                    ..wire("10.0.0.0/8", "", "eth0")
                },
                "fd00::1",
            ),
            (
                types::Route {
                    scope: 256,
                    ..wire("10.0.0.0/8", "", "eth0")
                },
                "256",
            ),
        ] {
            let error = Route::from_wire(&bad, &names()).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
