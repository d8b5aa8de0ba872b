//! The pod's network, in a namespace with interfaces of software: what the agent makes of the host's messages, as iproute2
//! sees it.

use protocols::agent::{
    ARPNeighbors, AddARPNeighborsRequest, ListInterfacesRequest, ListRoutesRequest, RemoveInterfaceRequest,
    Routes, UpdateInterfaceRequest, UpdateRoutesRequest,
};
use protocols::types::{ARPNeighbor, IPAddress, IPFamily, Interface, Route};
use ttrpc::Code;

use crate::harness::{Agent, RpcResult, code, context, message};

const FIRST: &str = "02:00:00:00:00:01";
const SECOND: &str = "02:00:00:00:00:02";
const THIRD: &str = "02:00:00:00:00:03";

fn address(address: &str, mask: &str) -> IPAddress {
    let is_v6 = address.contains(':');
    IPAddress {
        family: if is_v6 { IPFamily::v6 } else { IPFamily::v4 }.into(),
        address: address.into(),
        mask: mask.into(),
        ..Default::default()
    }
}

fn interface(name: &str, hardware_address: &str, addresses: &[IPAddress]) -> Interface {
    Interface {
        name: name.into(),
        hwAddr: hardware_address.into(),
        IPAddresses: addresses.to_vec(),
        ..Default::default()
    }
}

fn route(dest: &str, gateway: &str, device: &str) -> Route {
    let is_v6 = [dest, gateway].concat().contains(':');
    Route {
        dest: dest.into(),
        gateway: gateway.into(),
        device: device.into(),
        family: if is_v6 { IPFamily::v6 } else { IPFamily::v4 }.into(),
        ..Default::default()
    }
}

impl Agent {
    /// Adds an interface to the agent's namespace, as a hotplug does; `NAMEp` is at the other end of its cable.
    fn plug(&self, name: &str, hardware_address: &str) {
        let add = format!("ip link add {name} address {hardware_address} type veth peer name {name}p");
        self.in_network(&add);
        self.in_network(&format!("ip link set {name}p addrgenmode none up"));
    }

    async fn update_interface(&self, interface: &Interface) -> RpcResult<Interface> {
        let request = UpdateInterfaceRequest {
            interface: Some(interface.clone()).into(),
            ..Default::default()
        };
        self.client.update_interface(context(), &request).await
    }

    async fn update_routes(&self, routes: &[Route]) -> RpcResult<Routes> {
        let list = Routes {
            Routes: routes.to_vec(),
            ..Default::default()
        };
        let request = UpdateRoutesRequest {
            routes: Some(list).into(),
            ..Default::default()
        };
        self.client.update_routes(context(), &request).await
    }

    /// Addresses of an interface as `ip` lists them: `10.0.0.1/24 brd 10.0.0.255 scope global`.
    fn addresses(&self, name: &str) -> Vec<String> {
        let text = self.in_network(&format!("ip -oneline address show dev {name}"));
        let line = |line: &str| {
            let words: Vec<&str> = line.split_whitespace().skip(3).collect();
            let end = words.iter().position(|word| *word == "scope").unwrap();
            words[..end + 2].join(" ")
        };
        text.lines().map(line).collect()
    }

    /// Routes as `ip` lists them, without those of the link-local network.
    fn routes(&self, family: &str, device: &str) -> Vec<String> {
        let text = self.in_network(&format!("ip -oneline {family} route show dev {device}"));
        let lines = text.lines().map(|line| {
            // Rests of the command's columns, and what a cache adds.
            line.replace(" pref medium", "").trim().to_owned()
        });
        lines.filter(|line| !line.starts_with("fe80::/64")).collect()
    }
}

#[tokio::test]
async fn interface_when_updated_is_what_the_message_says() {
    let agent = Agent::start().await;
    agent.plug("plug0", FIRST);
    let wanted = Interface {
        mtu: 1400,
        sysctls: [
            ("net.ipv4.conf.IFNAME.arp_notify".to_owned(), "1".to_owned()),
            ("net.ipv6.conf.eth0.accept_ra".to_owned(), "0".to_owned()),
            (
                "net.ipv6.conf.IFNAME.of_another_kernel".to_owned(),
                "7".to_owned(),
            ),
        ]
        .into(),
        ..interface(
            "eth0",
            FIRST,
            &[
                IPAddress {
                    scope: 253,
                    ..address("169.254.7.7", "32")
                },
                IPAddress {
                    broadcast: "10.0.0.255".into(),
                    ..address("10.0.0.2", "24")
                },
                address("10.0.0.3", "24"),
                address("fd00::2", "64"),
                address("fd00::3", "64"),
                address("fe80::42", "64"),
            ],
        )
    };

    // The second time nothing is left to do.
    for _ in 0..2 {
        let answer = agent.update_interface(&wanted).await.unwrap();

        assert_eq!((answer.name.as_str(), answer.mtu), ("eth0", 1400));
        assert_eq!(answer.IPAddresses.len(), 6);
        assert!(answer.IPAddresses.iter().all(|address| address.flags == 0));
        assert_eq!(
            agent.addresses("eth0"),
            [
                "169.254.7.7/32 scope link",
                "10.0.0.2/24 brd 10.0.0.255 scope global",
                "10.0.0.3/24 scope global",
                "fd00::3/64 scope global",
                "fd00::2/64 scope global",
                "fe80::42/64 scope link",
            ]
        );
    }
    assert!(!agent.log().contains(" goes"), "{}", agent.log());
    let link = agent.in_network("ip -oneline address show dev eth0 tentative");
    assert_eq!(link, "", "no address waits for duplicates");
    let link = agent.in_network("ip -oneline link show dev eth0");
    assert!(link.contains("mtu 1400") && link.contains(",UP,"), "{link}");
    let sysctl = |name: &str| agent.in_network(&format!("cat /proc/sys/net/{name}"));
    assert_eq!(sysctl("ipv4/conf/eth0/arp_notify"), "1\n");
    assert_eq!(sysctl("ipv6/conf/eth0/accept_ra"), "0\n");
    assert!(
        agent
            .log()
            .contains("of_another_kernel: this kernel has no such sysctl")
    );

    // What is not listed any more goes; another first address takes its place.
    let wanted = Interface {
        mtu: 0,
        ..interface(
            "eth0",
            FIRST,
            &[address("10.0.0.3", "24"), address("fd00::3", "64")],
        )
    };
    agent.update_interface(&wanted).await.unwrap();
    assert_eq!(
        agent.addresses("eth0"),
        ["10.0.0.3/24 scope global", "fd00::3/64 scope global"]
    );
    assert!(agent.in_network("ip link show dev eth0").contains("mtu 1400"));
    assert_eq!(
        agent.routes("-4", "eth0"),
        ["10.0.0.0/24 proto kernel scope link src 10.0.0.3"]
    );
}

#[tokio::test]
async fn interface_when_without_prefix_route_or_arp_has_none() {
    let agent = Agent::start().await;
    agent.plug("plug0", FIRST);
    let wanted = Interface {
        raw_flags: libc::IFF_NOARP as u32 | libc::IFF_UP as u32,
        ..interface(
            "eth0",
            FIRST,
            &[
                IPAddress {
                    flags: 0x200,
                    ..address("10.0.0.2", "24")
                },
                IPAddress {
                    flags: 0x202,
                    ..address("fd00::2", "64")
                },
            ],
        )
    };

    let answer = agent.update_interface(&wanted).await.unwrap();

    assert_eq!(answer.IPAddresses, wanted.IPAddresses);
    assert!(answer.raw_flags & libc::IFF_NOARP as u32 != 0);
    assert_eq!(agent.routes("-4", "eth0"), [""; 0]);
    assert_eq!(agent.routes("-6", "eth0"), [""; 0]);
}

#[tokio::test]
async fn interface_when_plugged_late_is_waited_for() {
    let agent = Agent::start_with(&["agent.hotplug_timeout=60"]).await;
    let wanted = interface("eth0", FIRST, &[address("10.0.0.2", "24")]);
    let plug = async {
        agent.logs("waits for a network interface").await;
        agent.plug("other0", SECOND);
        agent.plug("plug0", FIRST);
    };

    let (answer, ()) = tokio::join!(agent.update_interface(&wanted), plug);

    assert_eq!(answer.unwrap().name, "eth0");
    assert_eq!(agent.addresses("eth0"), ["10.0.0.2/24 scope global"]);
}

#[tokio::test]
async fn interface_when_it_does_not_come_is_an_error_that_names_it() {
    let agent = Agent::start_with(&["agent.hotplug_timeout=0"]).await;
    agent.plug("other0", SECOND);

    let error = agent
        .update_interface(&interface("eth0", FIRST, &[]))
        .await
        .unwrap_err();

    assert_eq!(code(&error), Code::DEADLINE_EXCEEDED);
    assert_eq!(
        message(&error),
        "no network interface with the hardware address 02:00:00:00:00:01 after 0 ms: was its device plugged?"
    );
}

#[tokio::test]
async fn name_when_taken_is_swapped() {
    let agent = Agent::start().await;
    agent.plug("eth0", SECOND);
    agent.plug("eth1", FIRST);
    agent
        .update_interface(&interface("eth0", SECOND, &[address("10.2.0.1", "24")]))
        .await
        .unwrap();

    agent
        .update_interface(&interface("eth0", FIRST, &[address("10.1.0.1", "24")]))
        .await
        .unwrap();

    assert_eq!(agent.addresses("eth0"), ["10.1.0.1/24 scope global"]);
    assert_eq!(agent.addresses("eth1"), ["10.2.0.1/24 scope global"]);
    let request = ListInterfacesRequest::new();
    let list = agent
        .client
        .list_interfaces(context(), &request)
        .await
        .unwrap()
        .Interfaces;
    let mut names: Vec<_> = list
        .iter()
        .filter(|link| !link.name.ends_with('p'))
        .map(|link| (link.name.as_str(), link.hwAddr.as_str()))
        .collect();
    names.sort_unstable();
    assert_eq!(
        names,
        [("eth0", FIRST), ("eth1", SECOND), ("lo", "00:00:00:00:00:00")]
    );
}

#[tokio::test]
async fn interface_when_a_value_makes_no_sense_is_left_alone() {
    let agent = Agent::start().await;
    agent.plug("plug0", FIRST);
    let good = interface("eth0", FIRST, &[]);
    let sysctls = |name: &str| [(name.to_owned(), "1".to_owned())].into();
    for (bad, named) in [
        (interface("eth0", "02:00", &[]), "hardware address \"02:00\""),
        (interface("lo", FIRST, &[]), "interface name \"lo\""),
        (interface("eth0/..", FIRST, &[]), "interface name"),
        (
            interface("eth0", FIRST, &[address("10.0.0.2", "64")]),
            "mask \"64\"",
        ),
        (
            Interface {
                mtu: 1 << 32,
                ..good.clone()
            },
            "MTU \"4294967296\"",
        ),
        (
            Interface {
                sysctls: sysctls("net.ipv4.conf.all.forwarding"),
                ..good.clone()
            },
            "conf.all",
        ),
        (
            Interface {
                sysctls: sysctls("kernel.core_pattern"),
                ..good.clone()
            },
            "core_pattern",
        ),
    ] {
        let error = agent.update_interface(&bad).await.unwrap_err();
        assert_eq!(code(&error), Code::INVALID_ARGUMENT, "{error}");
        assert!(message(&error).contains(named), "{error}");
    }
    assert!(agent.in_network("ip link show dev plug0").contains("state DOWN"));

    // The kernel's own refusal.
    let error = agent
        .update_interface(&Interface { mtu: 1, ..good })
        .await
        .unwrap_err();
    assert_eq!(code(&error), Code::INTERNAL);
    assert!(message(&error).contains("set MTU 1"), "{error}");
}

#[tokio::test]
async fn hardware_address_when_several_interfaces_have_it_is_refused() {
    let agent = Agent::start().await;
    agent.plug("plug0", FIRST);
    agent.plug("plug1", FIRST);

    let error = agent
        .update_interface(&interface("eth0", FIRST, &[]))
        .await
        .unwrap_err();

    assert_eq!(code(&error), Code::FAILED_PRECONDITION);
    assert!(
        message(&error).contains("several network interfaces have it: plug0, plug1"),
        "{error}"
    );
}

#[tokio::test]
async fn routes_when_updated_are_exactly_the_listed_ones() {
    let agent = Agent::start().await;
    agent.plug("eth0", FIRST);
    agent.plug("eth1", SECOND);
    let first = [address("10.0.0.2", "24"), address("fd00::2", "64")];
    agent
        .update_interface(&interface("eth0", FIRST, &first))
        .await
        .unwrap();
    agent
        .update_interface(&interface("eth1", SECOND, &[address("10.1.0.2", "24")]))
        .await
        .unwrap();
    // Of a container's own making.
    agent.plug("own", THIRD);
    agent.in_network("ip link set own up");
    agent.in_network("ip route add 10.77.0.0/16 dev own");
    agent.in_network("ip route add 10.78.0.0/16 dev eth0");
    let wanted = [
        // Before the route that reaches its gateway.
        Route {
            mtu: 1300,
            ..route("", "10.0.0.1", "eth0")
        },
        Route {
            metric: 500,
            ..route("0.0.0.0/0", "10.0.0.9", "eth0")
        },
        Route {
            scope: 253,
            source: "10.0.0.2".into(),
            ..route("192.0.2.7", "", "eth0")
        },
        Route {
            flags: 4,
            ..route("198.51.100.0/24", "172.16.0.1", "eth0")
        },
        route("203.0.113.0/24", "fd00::1", "eth0"),
        route("", "fd00::1", "eth0"),
        Route {
            metric: 77,
            source: "fd00::2".into(),
            ..route("fd01::/64", "", "eth0")
        },
        Route {
            flags: 4,
            ..route("fd02::/64", "fd99::1", "eth0")
        },
    ];
    let mut wanted = wanted.to_vec();
    wanted[4].family = IPFamily::v4.into();

    // The second time nothing is left to do.
    for _ in 0..2 {
        agent.update_routes(&wanted).await.unwrap();

        assert_eq!(
            agent.routes("-4", "eth0"),
            [
                "default via 10.0.0.1 mtu 1300",
                "default via 10.0.0.9 metric 500",
                "10.0.0.0/24 proto kernel scope link src 10.0.0.2",
                "192.0.2.7 scope link src 10.0.0.2",
                "198.51.100.0/24 via 172.16.0.1 onlink",
                "203.0.113.0/24 via inet6 fd00::1",
            ]
        );
        assert_eq!(
            agent.routes("-6", "eth0"),
            [
                "fd00::/64 proto kernel metric 256",
                "fd01::/64 src fd00::2 metric 77",
                "fd02::/64 via fd99::1 metric 1024 onlink",
                "default via fd00::1 metric 1024",
            ]
        );
        assert_eq!(
            agent.routes("-4", "eth1"),
            ["10.1.0.0/24 proto kernel scope link src 10.1.0.2"]
        );
        assert_eq!(agent.routes("-4", "own"), ["10.77.0.0/16 scope link"]);
        assert_eq!(agent.log().matches(" goes").count(), 1, "{}", agent.log());
    }

    // A network that the pod's namespace reaches through a gateway instead.
    let through = [
        route("10.0.0.0/24", "10.0.0.1", "eth0"),
        Route {
            scope: 253,
            ..route("10.0.0.1/32", "", "eth0")
        },
    ];
    let answer = agent.update_routes(&through).await.unwrap();
    assert_eq!(
        agent.routes("-4", "eth0"),
        ["10.0.0.0/24 via 10.0.0.1", "10.0.0.1 scope link"]
    );
    assert_eq!(agent.routes("-6", "eth0"), ["fd00::/64 proto kernel metric 256"]);
    let listed = agent
        .client
        .list_routes(context(), &ListRoutesRequest::new())
        .await
        .unwrap();
    assert_eq!(answer, listed);
    let through = listed
        .Routes
        .iter()
        .find(|route| route.dest == "10.0.0.0/24")
        .unwrap();
    assert_eq!(
        (through.gateway.as_str(), through.device.as_str()),
        ("10.0.0.1", "eth0")
    );

    // None is left in the pod's namespace.
    agent.update_routes(&[]).await.unwrap();
    assert_eq!(agent.routes("-4", "eth0"), [""; 0]);
    assert_eq!(
        agent.routes("-4", "eth1"),
        ["10.1.0.0/24 proto kernel scope link src 10.1.0.2"]
    );
    assert_eq!(agent.routes("-4", "own"), ["10.77.0.0/16 scope link"]);
}

#[tokio::test]
async fn routes_when_they_have_several_gateways_are_one() {
    let agent = Agent::start().await;
    agent.plug("eth0", FIRST);
    agent.plug("eth1", SECOND);
    let first = [address("10.0.0.2", "24"), address("fd00::2", "64")];
    agent
        .update_interface(&interface("eth0", FIRST, &first))
        .await
        .unwrap();
    agent
        .update_interface(&interface("eth1", SECOND, &[address("10.1.0.2", "24")]))
        .await
        .unwrap();
    let wanted = [
        route("", "10.0.0.1", "eth0"),
        route("", "10.1.0.1", "eth1"),
        route("fd01::/64", "fd00::1", "eth0"),
        route("fd01::/64", "fd00::9", "eth0"),
    ];

    // The second time nothing is left to do.
    for _ in 0..2 {
        let listed = agent.update_routes(&wanted).await.unwrap().Routes;

        let v4 = agent.in_network("ip -4 -oneline route show default");
        let words: Vec<&str> = v4.split_whitespace().filter(|word| *word != "\\").collect();
        assert_eq!(
            words.join(" "),
            "default nexthop via 10.0.0.1 dev eth0 weight 1 nexthop via 10.1.0.1 dev eth1 weight 1"
        );
        let of_v6: Vec<&str> = listed
            .iter()
            .filter(|route| route.dest == "fd01::/64")
            .map(|route| route.gateway.as_str())
            .collect();
        assert_eq!(of_v6, ["fd00::1", "fd00::9"]);
        assert!(!agent.log().contains(" goes"), "{}", agent.log());
    }
    agent
        .update_routes(&[route("", "10.0.0.1", "eth0"), route("10.5.0.0/16", "", "eth1")])
        .await
        .unwrap();
    assert_eq!(
        agent.in_network("ip -4 route show default"),
        "default via 10.0.0.1 dev eth0 \n"
    );
}

#[tokio::test]
async fn routes_when_one_makes_no_sense_are_left_alone() {
    let agent = Agent::start().await;
    agent.plug("eth0", FIRST);
    agent
        .update_interface(&interface("eth0", FIRST, &[address("10.0.0.2", "24")]))
        .await
        .unwrap();
    agent.in_network("ip route add 10.78.0.0/16 dev eth0");
    let good = route("10.5.0.0/16", "", "eth0");
    for (bad, expected, named) in [
        (
            route("10.0.0.0/8", "", "eth7"),
            Code::NOT_FOUND,
            "no network interface \"eth7\"",
        ),
        (
            route("10.0.0.0/99", "", "eth0"),
            Code::INVALID_ARGUMENT,
            "destination \"10.0.0.0/99\"",
        ),
        (
            Route {
                mtu: 7,
                ..good.clone()
            },
            Code::INVALID_ARGUMENT,
            "route to 10.5.0.0/16 dev eth0",
        ),
    ] {
        let error = agent.update_routes(&[good.clone(), bad]).await.unwrap_err();
        assert_eq!(code(&error), expected, "{error}");
        assert!(message(&error).contains(named), "{error}");
    }
    assert_eq!(
        agent.routes("-4", "eth0"),
        [
            "10.0.0.0/24 proto kernel scope link src 10.0.0.2",
            "10.78.0.0/16 scope link"
        ]
    );

    let error = agent
        .update_routes(&[route("", "192.0.2.1", "eth0")])
        .await
        .unwrap_err();
    assert_eq!(code(&error), Code::INTERNAL);
    assert!(
        message(&error)
            .starts_with("add the route to 0.0.0.0/0 via 192.0.2.1 dev eth0: Network is unreachable"),
        "{error}"
    );
}

#[tokio::test]
async fn neighbours_when_added_do_not_age() {
    let agent = Agent::start().await;
    agent.plug("eth0", FIRST);
    agent
        .update_interface(&interface("eth0", FIRST, &[address("10.0.0.2", "24")]))
        .await
        .unwrap();
    let neighbour = |ip: &str, lladdr: &str| ARPNeighbor {
        toIPAddress: Some(address(ip, "")).into(),
        device: "eth0".into(),
        lladdr: lladdr.into(),
        state: 0x80,
        ..Default::default()
    };
    let add = async |neighbours: &[ARPNeighbor]| {
        let list = ARPNeighbors {
            ARPNeighbors: neighbours.to_vec(),
            ..Default::default()
        };
        let request = AddARPNeighborsRequest {
            neighbors: Some(list).into(),
            ..Default::default()
        };
        agent.client.add_arp_neighbors(context(), &request).await
    };

    add(&[neighbour("10.0.0.1", SECOND), neighbour("fd00::1", SECOND)])
        .await
        .unwrap();
    add(&[neighbour("10.0.0.1", "02:00:00:00:00:09")]).await.unwrap();

    let show = |family: &str| agent.in_network(&format!("ip {family} neighbour show dev eth0 nud permanent"));
    assert_eq!(show("-4"), "10.0.0.1 lladdr 02:00:00:00:00:09 PERMANENT \n");
    assert_eq!(show("-6"), "fd00::1 lladdr 02:00:00:00:00:02 PERMANENT \n");

    let unknown = ARPNeighbor {
        device: "eth9".into(),
        ..neighbour("10.0.0.1", SECOND)
    };
    let error = add(&[neighbour("10.0.0.5", SECOND), unknown]).await.unwrap_err();
    assert_eq!(code(&error), Code::NOT_FOUND);
    assert!(!show("-4").contains("10.0.0.5"));
}

#[tokio::test]
async fn removal_when_the_agent_owns_no_machine_is_refused() {
    let agent = Agent::start().await;
    agent.plug("eth0", FIRST);
    agent
        .update_interface(&interface("eth0", FIRST, &[]))
        .await
        .unwrap();
    for (address, expected) in [
        (FIRST, Code::FAILED_PRECONDITION),
        ("eth0", Code::INVALID_ARGUMENT),
    ] {
        let request = RemoveInterfaceRequest {
            hwAddr: address.into(),
            ..Default::default()
        };
        let error = agent
            .client
            .remove_interface(context(), &request)
            .await
            .unwrap_err();
        assert_eq!(code(&error), expected, "{error}");
    }
    assert!(agent.in_network("ip link show dev eth0").contains(",UP,"));

    // One that has gone already.
    let request = RemoveInterfaceRequest {
        hwAddr: SECOND.into(),
        ..Default::default()
    };
    agent.client.remove_interface(context(), &request).await.unwrap();
}
