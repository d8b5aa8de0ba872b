//! What a guest is told is what the namespace has: a second namespace that is set up from it becomes the same.

use protocols::types::{IPFamily, Interface, Route};

use super::*;
use crate::resource::network::guest::{Guest, describe};

fn described(world: &World) -> (Guest, Vec<String>) {
    let scan = world.scan();
    let links = endpoint::select(&scan).unwrap();
    let links: Vec<_> = links.iter().collect();
    describe(&scan, &links)
}

/// Does in `netns` what an agent does with an interface, by iproute2: the link of this name is there.
fn update_interface(netns: &Netns, interface: &Interface) {
    let name = &interface.name;
    ip(
        netns,
        &format!(
            "link set {name} address {} mtu {}",
            interface.hwAddr, interface.mtu
        ),
    );
    let sysctls = interface.sysctls.clone();
    let of = name.clone();
    let set = move || {
        for (key, value) in sysctls {
            let path = format!("/proc/sys/{}", key.replace('.', "/").replace("IFNAME", &of));
            std::fs::write(path, value).unwrap();
        }
    };
    netns.run(set).unwrap();
    ip(netns, &format!("link set {name} up"));
    for address in &interface.IPAddresses {
        let (ip_address, prefix) = (&address.address, &address.mask);
        let mut words = format!(
            "addr add {ip_address}/{prefix} dev {name} scope {}",
            address.scope
        );
        if !address.broadcast.is_empty() {
            words += &format!(" broadcast {}", address.broadcast);
        }
        if address.flags & scan::NOPREFIXROUTE != 0 {
            words += " noprefixroute";
        }
        ip(netns, &words);
    }
}

/// Enters a route as an agent does: as it stands, in the order it came.
fn add_route(netns: &Netns, route: &Route) -> Result<String, String> {
    let v6 = route.family.enum_value() == Ok(IPFamily::v6);
    let destination = if route.dest.is_empty() {
        "default"
    } else {
        &route.dest
    };
    let mut words = format!(
        "{} route append {destination} dev {}",
        if v6 { "-6" } else { "-4" },
        route.device
    );
    for (word, value) in [("via", &route.gateway), ("src", &route.source)] {
        if !value.is_empty() {
            words += &format!(" {word} {value}");
        }
    }
    for (word, value) in [("metric", route.metric), ("mtu", route.mtu)] {
        if value != 0 {
            words += &format!(" {word} {value}");
        }
    }
    if !v6 {
        words += &format!(" scope {}", route.scope);
    }
    if route.flags & 4 != 0 {
        words += " onlink";
    }
    run(netns, "ip", &words).map_err(|error| format!("ip {words}: {error}"))
}

/// What people compare: without indexes, and without what only a link that frames come through has.
fn shown(netns: &Netns) -> String {
    let addresses = ip(netns, "-o addr show dev eth0");
    let without_index: String = addresses
        .lines()
        .filter_map(|line| line.split_once(": "))
        // Who made an address is the kernel's note, and it takes a moment to use one.
        .map(|(_, rest)| {
            format!(
                "{}\n",
                rest.replace(" proto kernel_ll", "").replace(" tentative", "")
            )
        })
        .collect();
    let routes = ip(netns, "-4 route show") + &ip(netns, "-6 route show");
    let neighbours = ip(netns, "neigh show nud permanent");
    let link = ip(netns, "-o link show dev eth0");
    let (mtu, ether) = (
        link.split_once("mtu ").unwrap().1,
        link.split_once("link/ether ").unwrap().1,
    );
    let word = |text: &str| text.split_whitespace().next().unwrap().to_owned();
    format!(
        "{}\n{}\n{without_index}{routes}{neighbours}",
        word(mtu),
        word(ether)
    )
}

/// Sets a second namespace up from what the guest of `world` would be told, and compares the two.
fn same_in_guest(world: &World) -> Guest {
    let (guest, warnings) = described(world);
    assert_eq!(warnings, Vec::<String>::new());
    let other = World::new();
    other.veth("eth0");
    ip(other.pod(), "link set eth0 addrgenmode none");
    ip(other.pod(), "addr flush dev eth0");
    for interface in &guest.interfaces {
        update_interface(other.pod(), interface);
    }
    for route in &guest.routes {
        add_route(other.pod(), route).unwrap();
    }
    for neighbour in &guest.neighbours {
        let to = &neighbour.toIPAddress.address;
        let words = format!(
            "neigh replace {to} lladdr {} dev {} nud permanent",
            neighbour.lladdr, neighbour.device
        );
        ip(other.pod(), &words);
    }
    assert_eq!(shown(other.pod()), shown(world.pod()));
    guest
}

#[test]
fn guest_when_told_of_an_ordinary_pod_has_its_network() {
    let world = World::with_eth0();
    let guest = same_in_guest(&world);
    let eth0 = &guest.interfaces[0];
    assert_eq!(
        (eth0.name.as_str(), eth0.mtu, guest.routes.len()),
        ("eth0", 1500, 2)
    );
    // Two addresses, and that of the link.
    assert_eq!(eth0.IPAddresses.len(), 3);
}

#[test]
fn guest_when_told_of_everything_a_namespace_can_have_has_it() {
    let world = World::with_eth0();
    let pod = world.pod();
    for words in [
        "link set eth0 mtu 9000",
        "addr add 10.1.0.3/24 dev eth0",
        "addr add 10.8.0.2/32 dev eth0 scope link",
        "addr add 10.8.1.2/24 dev eth0 noprefixroute",
        "addr add fd00:2::2/128 dev eth0",
        "addr add fd00:3::2/64 dev eth0 noprefixroute",
        // A gateway outside of every network, in both ways: by a route to it, and said to be there.
        "route add 169.254.1.1 dev eth0 scope link",
        "route add 10.20.0.0/16 via 169.254.1.1",
        "route add 10.21.0.0/16 via 192.0.2.1 dev eth0 onlink",
        // Several defaults, one of them smaller.
        "route add default via 10.1.0.254 metric 50 mtu 1400",
        "route add 10.22.0.0/16 via 10.1.0.1 src 10.1.0.3 metric 7",
        "route add 10.22.0.0/16 dev eth0 metric 8",
        "-6 route add fd00:20::/32 via fd00:1::9 metric 30",
        "-6 route add default via fe80::1 dev eth0 metric 2000 mtu 1300",
        "neigh add 10.1.0.77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent",
        "neigh add fd00:1::77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent",
        "neigh add 10.1.0.78 lladdr 02:00:00:00:00:78 dev eth0 nud stale",
    ] {
        ip(pod, words);
    }
    let guest = same_in_guest(&world);
    assert_eq!(guest.neighbours.len(), 2);
}

#[test]
fn guest_when_the_plugin_took_the_networks_route_away_has_none_either() {
    // As CNI's ptp does: everything goes through the gateway.
    let world = World::with_eth0();
    let pod = world.pod();
    ip(pod, "route del default");
    ip(pod, "route del 10.1.0.0/24");
    ip(pod, "route add 10.1.0.1 dev eth0 scope link src 10.1.0.2");
    ip(pod, "route add 10.1.0.0/24 via 10.1.0.1 src 10.1.0.2");
    ip(pod, "route add default via 10.1.0.1");

    let (guest, _) = described(&world);

    let address = guest.interfaces[0]
        .IPAddresses
        .iter()
        .find(|address| address.address == "10.1.0.2")
        .unwrap();
    assert_eq!(address.flags, scan::NOPREFIXROUTE);
    let order: Vec<_> = guest
        .routes
        .iter()
        .filter(|route| route.family.enum_value() == Ok(IPFamily::v4))
        .map(|route| route.dest.as_str())
        .collect();
    assert_eq!(order, ["10.1.0.1/32", "10.1.0.0/24", ""]);
}

#[test]
fn guest_when_the_link_has_another_end_is_told_of_the_way_to_it() {
    let world = World::new();
    world.veth("eth0");
    ip(world.pod(), "addr add 10.3.0.2 peer 10.3.0.1/32 dev eth0");

    let (guest, _) = described(&world);

    let address = &guest.interfaces[0].IPAddresses[0];
    assert_eq!(
        (address.address.as_str(), address.mask.as_str()),
        ("10.3.0.2", "32")
    );
    let route = &guest.routes[0];
    assert_eq!(
        (route.dest.as_str(), route.source.as_str()),
        ("10.3.0.1/32", "10.3.0.2")
    );
}

#[test]
fn guest_when_the_namespace_differs_from_a_kernels_defaults_is_told_the_sysctls() {
    let world = World::with_eth0();
    let set = || {
        for (key, value) in [
            ("ipv4/conf/eth0/rp_filter", "2"),
            ("ipv6/conf/eth0/accept_ra", "0"),
            ("ipv6/conf/eth0/accept_dad", "0"),
        ] {
            std::fs::write(format!("/proc/sys/net/{key}"), value).unwrap();
        }
    };
    world.pod().run(set).unwrap();

    let sysctls = described(&world).0.interfaces[0].sysctls.clone();

    assert_eq!(sysctls["net.ipv4.conf.IFNAME.rp_filter"], "2");
    assert_eq!(sysctls["net.ipv6.conf.IFNAME.accept_ra"], "0");
    assert_eq!(sysctls["net.ipv6.conf.IFNAME.accept_dad"], "0");

    let off = || std::fs::write("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", "1").unwrap();
    world.pod().run(off).unwrap();
    let (guest, _) = described(&world);
    assert_eq!(
        guest.interfaces[0].sysctls["net.ipv6.conf.IFNAME.disable_ipv6"],
        "1"
    );
    assert!(
        guest.interfaces[0]
            .IPAddresses
            .iter()
            .all(|address| !address.address.contains(':'))
    );
}

#[test]
fn routes_when_a_guest_cannot_have_them_are_named() {
    let world = World::with_eth0();
    let pod = world.pod();
    ip(pod, "route add blackhole 10.66.0.0/16");
    ip(pod, "route add unreachable 10.67.0.0/16");
    ip(pod, "link set lo up");
    ip(pod, "route add 10.68.0.0/16 dev lo");

    let (guest, warnings) = described(&world);

    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert!(
        warnings[0].contains("10.66.0.0/16") && warnings[1].contains("10.67.0.0/16"),
        "{warnings:?}"
    );
    assert_eq!(guest.routes.len(), 2);
}

/// A generator of numbers that are always the same (Knuth's, MMIX).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

#[test]
fn routes_when_there_are_many_are_in_an_order_that_the_kernel_takes() {
    for seed in 0..4 {
        let world = World::with_eth0();
        let mut numbers = Numbers(seed);
        let mut gateways = vec!["10.1.0.1".to_owned(), "10.1.0.254".to_owned()];
        while ip(world.pod(), "-4 route show").lines().count() < 100 {
            let number = numbers.below(250);
            let gateway = &gateways[numbers.below(gateways.len() as u64) as usize];
            let words = match numbers.below(4) {
                // Neighbours beyond the network become gateways of others.
                0 => {
                    gateways.push(format!("172.16.0.{number}"));
                    format!("172.16.0.{number}/32 dev eth0 scope link")
                }
                1 => format!("10.{number}.0.0/16 via {gateway}"),
                2 => format!("10.{number}.7.0/24 via {gateway} metric {}", numbers.below(9)),
                _ => format!("192.0.{number}.0/24 via 203.0.113.{number} dev eth0 onlink"),
            };
            // The same twice is refused.
            let _ = run(world.pod(), "ip", &format!("route add {words}"));
        }
        let guest = same_in_guest(&world);
        assert!(guest.routes.len() >= 100, "{}", guest.routes.len());
    }
}
