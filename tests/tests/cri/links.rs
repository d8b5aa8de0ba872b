//! The kinds of links CNI's plugins make, and what they can be set to.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use tests::command::eventually;
use tests::cri::cni::{JUMBO_MTU, SLOW_RATE};
use tests::cri::config::Series;
use tests::cri::pods::{Member, Pod, Pods};
use tests::cri::private::host;
use tests::cri::traffic::{fetch_soon, meter, sink, web};
use tests::cri::view;
use tests::task_api::TaskApi;

/// A pod on a network that leads past the host: it reaches the machine beyond, and is reached from there.
fn reaches_beyond_the_host(name: &str, network: &'static str) {
    Pods::like_runc(name, Series::V1_7, |pods| {
        let pod = pods.pod(network).run();
        let server = pod.web("the pod");
        view::assert_equal(&pod, &server);
        let beyond = pods.subnets.outside(network);
        server.sh(&format!("ping -c 1 -W 60 {beyond}"));
        let url = format!("http://{}:8080/", pod.address());
        let mut answer = String::new();
        // The server may still be starting.
        eventually(pods.limit(), || {
            answer = pods.outside(&[
                "sh",
                "-c",
                &format!("{} wget -q -O - {url} || true", pod.busybox()),
            ]);
            !answer.is_empty()
        });
        assert_eq!(answer, "the pod\n");
    });
}

#[test]
fn network_when_a_macvlan_reaches_beyond_the_host() {
    reaches_beyond_the_host("macvlan", "macvlan");
}

#[test]
fn network_when_an_ipvlan_reaches_beyond_the_host() {
    reaches_beyond_the_host("ipvlan", "ipvlan");
}

#[test]
fn network_when_a_vlan_reaches_beyond_the_host() {
    reaches_beyond_the_host("vlan", "vlan");
}

/// The host's address on the pod's first default route.
fn gateway(pod: &Pod<'_>) -> IpAddr {
    let routes = pod.in_netns(&["ip", "-4", "route", "show", "default"]);
    let gateway = routes.split_whitespace().nth(2);
    gateway
        .and_then(|address| address.parse().ok())
        .unwrap_or_else(|| panic!("no default route: {routes:?}"))
}

/// Through a macvtap, where the runtime has a choice; the other networks are connected by filters.
#[test]
fn network_when_point_to_point_works_both_ways() {
    Pods::like_runc("ptp", Series::V1_7, |pods| {
        let model = "io.katacontainers.config.runtime.internetworking_model";
        let pod = pods.pod("ptp").annotation(model, "macvtap").run();
        let server = pod.web("the pod");
        view::assert_equal(&pod, &server);
        let gateway = gateway(&pod);
        let port = web(gateway, "the host\n").unwrap();
        assert_eq!(
            server.sh(&format!("wget -q -O - http://{gateway}:{port}/")),
            "the host\n"
        );
        for address in pod.addresses() {
            assert_eq!(fetch_soon((address, 8080), "/", pods.limit()), "the pod\n");
        }
    });
}

#[test]
fn packet_when_as_large_as_a_jumbo_mtu_arrives() {
    Pods::like_runc("jumbo", Series::V1_7, |pods| {
        let pod = pods.pod("jumbo").run();
        let member = pod.sleeping();
        let view = view::assert_equal(&pod, &member);
        let expected = format!("eth0 mtu {JUMBO_MTU} up true");
        assert!(view.contains(&expected), "{view:?}");
        // IPv4 and ICMP take 28 bytes: the largest that is not cut into pieces, both ways.
        let size = JUMBO_MTU - 28;
        let gateway = gateway(&pod);
        member.sh(&format!("ping -c 1 -W 60 -s {size} {gateway}"));
        let before = fragments(&member);
        host(&[
            pod.busybox(),
            "ping",
            "-c",
            "1",
            "-W",
            "60",
            "-s",
            &size.to_string(),
            &pod.address().to_string(),
        ])
        .expect_code(0);
        assert_eq!(fragments(&member), before);
    });
}

/// How many packets the pod's kernel has cut or joined.
fn fragments(member: &Member<'_>) -> Vec<String> {
    let text = member.sh("cat /proc/net/snmp");
    let mut lines = text.lines().filter(|line| line.starts_with("Ip:"));
    let names = lines.next().unwrap_or_default().split(' ');
    let values = lines.next().unwrap_or_default().split(' ');
    let of_interest = |(name, value): (&str, &str)| {
        (name.starts_with("Reasm") || name.starts_with("Frag")).then(|| format!("{name} {value}"))
    };
    names.zip(values).filter_map(of_interest).collect()
}

#[test]
fn pod_when_it_has_two_networks_uses_both() {
    Pods::like_runc("two-networks", Series::V1_7, |pods| {
        let pod = pods.pod("two").run();
        let member = pod.sleeping();
        let view = view::assert_equal(&pod, &member);
        for interface in ["eth0", "eth1"] {
            let up = format!("{interface} mtu 1500 up true");
            assert!(view.contains(&up), "{view:?}");
        }
        // The second one's gateway: the first address of its subnet.
        let second = pod.in_netns(&["ip", "-4", "-o", "addr", "show", "eth1"]);
        let address = second.split_whitespace().nth(3).unwrap_or_default();
        let (network, _) = address.rsplit_once('.').unwrap();
        member.sh(&format!("ping -c 1 -W 60 {network}.1"));
        member.sh(&format!("ping -c 1 -W 60 {}", pods.subnets.gateway()));
    });
}

/// What nerdctl, docker and people do: an interface between the sandbox and its first container, with a static neighbour and routes of
/// every kind; and its end.
#[test]
fn interface_when_added_after_the_sandbox_is_seen_by_its_containers() {
    Pods::like_runc("second-by-hand", Series::V1_7, |pods| {
        let pod = pods.pod("bridge").run();
        let netns = pod.netns();
        let netns = netns.file_name().unwrap().to_str().unwrap();
        let pair = if pods.vm() { "handv" } else { "handr" };
        host(&[
            "ip", "link", "add", pair, "type", "veth", "peer", "name", "eth1", "netns", netns,
        ])
        .expect_code(0);
        host(&["ip", "addr", "add", "10.79.1.1/24", "dev", pair]).expect_code(0);
        host(&["ip", "link", "set", pair, "up"]).expect_code(0);
        for command in [
            "link set eth1 mtu 1400 up",
            "addr add 10.79.1.2/24 brd + dev eth1",
            "addr add fd00:79::2/64 dev eth1 nodad",
            "neigh add 10.79.1.77 lladdr 02:00:00:00:00:77 dev eth1 nud permanent",
            "route add 10.98.0.0/16 via 10.79.1.1 metric 77 src 10.79.1.2",
            "route add 10.97.1.1/32 dev eth1 scope link",
            "route add 10.96.0.0/16 via 10.99.99.1 dev eth1 onlink",
        ] {
            let words = [&["ip"][..], &command.split(' ').collect::<Vec<_>>()].concat();
            pod.in_netns(&words);
        }

        let member = pod.sleeping();
        let view = view::assert_equal(&pod, &member);
        assert!(view.contains(&"eth1 mtu 1400 up true".to_owned()), "{view:?}");
        member.sh("ping -c 1 -W 60 10.79.1.1");
        bridge_is_usable(pods, &pod, &member);
        host(&["ip", "link", "del", pair]).expect_code(0);
        member.sh(&format!("ping -c 1 -W 60 {}", pods.subnets.gateway()));
        pod.sleeping()
            .sh(&format!("ping -c 1 -W 60 {}", pods.subnets.gateway()));
    });
}

/// What CNI's plugins do not put into a pod: a bridge with an address and a port that leads to the host.
#[track_caller]
fn bridge_is_usable(pods: &Pods, pod: &Pod<'_>, member: &Member<'_>) {
    let netns = pod.netns();
    let netns = netns.file_name().unwrap().to_str().unwrap();
    let pair = if pods.vm() { "portv" } else { "portr" };
    host(&[
        "ip", "link", "add", pair, "type", "veth", "peer", "name", "port0", "netns", netns,
    ])
    .expect_code(0);
    host(&["ip", "addr", "add", "10.79.3.1/24", "dev", pair]).expect_code(0);
    host(&["ip", "link", "set", pair, "up"]).expect_code(0);
    for command in [
        "link add br0 type bridge",
        "link set port0 master br0 up",
        "link set br0 up",
        "addr add 10.79.3.2/24 dev br0",
    ] {
        let words = [&["ip"][..], &command.split(' ').collect::<Vec<_>>()].concat();
        pod.in_netns(&words);
    }

    let outside = pod.in_netns(&["ip", "addr", "show", "br0"]);
    let mut words = outside
        .split_whitespace()
        .skip_while(|word| *word != "link/ether");
    let mac = words.nth(1).unwrap();
    let mut inside = String::new();
    let equal = eventually(pods.limit(), || {
        inside = member.exec(&["ip", "addr", "show", "br0"]).out;
        inside.contains(mac) && inside.contains("10.79.3.2/24")
    });
    assert!(equal, "{inside}\nis not\n{outside}");
    member.sh("ping -c 1 -W 60 10.79.3.1");
    host(&["ip", "link", "del", pair]).expect_code(0);
}

/// More often than a virtual machine has places to plug devices in: the same are used again.
#[test]
fn interface_when_plugged_again_and_again_is_usable_each_time() {
    Pods::like_runc("replugged", Series::V1_7, |pods| {
        let pod = pods.pod("bridge").run();
        let member = pod.sleeping();
        let netns = pod.netns();
        let netns = netns.file_name().unwrap().to_str().unwrap();
        let pair = if pods.vm() { "plugv" } else { "plugr" };
        let without = view::assert_equal(&pod, &member);
        // More than a guest has slots that were never used.
        let rounds = if pods.vm() { 12 } else { 2 };
        for round in 1..=rounds {
            host(&[
                "ip", "link", "add", pair, "type", "veth", "peer", "name", "eth1", "netns", netns,
            ])
            .expect_code(0);
            host(&["ip", "addr", "add", "10.79.2.1/24", "dev", pair]).expect_code(0);
            host(&["ip", "link", "set", pair, "up"]).expect_code(0);
            pod.in_netns(&["ip", "addr", "add", "10.79.2.2/24", "dev", "eth1"]);
            pod.in_netns(&["ip", "link", "set", "eth1", "up"]);

            let view = view::assert_equal(&pod, &member);
            let up = "eth1 mtu 1500 up true".to_owned();
            assert!(view.contains(&up), "round {round}: {view:?}");
            member.sh("ping -c 1 -W 60 10.79.2.1");

            host(&["ip", "link", "del", pair]).expect_code(0);
            assert_eq!(view::assert_equal(&pod, &member), without, "round {round}");
        }
        member.sh(&format!("ping -c 1 -W 60 {}", pods.subnets.gateway()));
    });
}

/// A limit makes a transfer take at least so long; how long it takes beyond that, nobody promises.
#[test]
fn bandwidth_when_limited_by_the_network_is_not_exceeded() {
    const BYTES: u64 = 1 << 20;
    Pods::like_runc("bandwidth", Series::V1_7, |pods| {
        let pod = pods.pod("slow").run();
        let member = pod.sleeping();
        let gateway = gateway(&pod);
        let received = sink(gateway).unwrap();
        let started = Instant::now();
        member.sh(&format!(
            "head -c {BYTES} /dev/zero | nc {gateway} {}",
            received.port()
        ));
        received.result().unwrap();
        // A second's worth of bytes passes at once.
        let least = Duration::from_millis((BYTES * 8 - SLOW_RATE) * 1000 / SLOW_RATE);
        assert!(
            started.elapsed() >= least,
            "{:?} for {BYTES} bytes",
            started.elapsed()
        );
        // runc knows nothing of bandwidth.
        if pods.vm() {
            bandwidth_follows_updates(pods, &member, gateway);
        }
    });
}

/// Bits per second that an Update asks for, far below [`SLOW_RATE`]; and bytes that may pass at once: one segment of 64 KiB,
/// which the limiter takes as a whole, and a tenth of a second's worth.
const UPDATED_RATE: u64 = 160_000;
const UPDATED_BURST: u64 = 80 << 10;

/// An Update with Kubernetes' annotation changes the limit of a running pod, down and up again: as many bytes pass as it allows for
/// the time that has gone by, and no more; after the second one more than the first would have allowed.
#[track_caller]
fn bandwidth_follows_updates(pods: &Pods, member: &Member<'_>, gateway: IpAddr) {
    let api = TaskApi::connect(pods.case().daemon()).unwrap();
    let limit = |rate: &str| {
        api.annotate(member.id(), "kubernetes.io/egress-bandwidth", rate)
            .unwrap();
    };
    let allowed = |since: Instant| {
        let milliseconds = u64::try_from(since.elapsed().as_millis()).unwrap();
        milliseconds * UPDATED_RATE / 8 / 1000 + UPDATED_BURST
    };
    limit(&UPDATED_RATE.to_string());
    let started = Instant::now();
    let received = meter(gateway).unwrap();
    member.sh(&format!(
        "(head -c 16777216 /dev/zero | nc {gateway} {}) >/dev/null 2>&1 </dev/null &",
        received.port()
    ));
    // Twice what passes at once.
    let flows = eventually(pods.limit(), || received.bytes() > 2 * UPDATED_BURST);
    let (bytes, most) = (received.bytes(), allowed(started));
    assert!(flows, "{bytes} bytes");
    assert!(bytes <= most, "{bytes} bytes, {most} are allowed");

    limit("1G");
    let (raised, before) = (Instant::now(), received.bytes());
    let mut since = 0;
    let rises = eventually(pods.limit(), || {
        since = received.bytes() - before;
        since > allowed(raised)
    });
    assert!(rises, "{since} bytes, the old limit allows {}", allowed(raised));
}
