//! A pod on a bridge, as most are: both families, port mappings, a firewall, masquerading.

use std::net::IpAddr;

use tests::cri::config::Series;
use tests::cri::pods::{Member, Pod, Pods};
use tests::cri::traffic::{fetch_soon, flood, pattern, sha256, sink, source, web};
use tests::cri::view;

/// Large enough for windows to open, rings to wrap and offloads to be used.
const BIG: usize = 16 << 20;
/// More than every queue between host and guest holds.
const FLOOD: usize = 20_000;

fn gateways(pods: &Pods) -> [IpAddr; 2] {
    [pods.subnets.gateway(), pods.subnets.gateway6()].map(|address| address.parse().unwrap())
}

/// An address as part of a URL.
fn host(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    }
}

#[test]
fn network_when_on_a_bridge_works_both_ways_in_both_families() {
    Pods::like_runc("bridge", Series::V1_7, |pods| {
        let pod = pods.pod("bridge").port(8180, 8080).run();
        let server = pod.web("the pod");
        assert_eq!(pod.addresses().len(), 2, "IPv4 and IPv6: {:?}", pod.addresses());
        view::assert_equal(&pod, &server);

        for gateway in gateways(pods) {
            let port = web(gateway, "the host\n").unwrap();
            let url = format!("http://{}:{port}/", host(gateway));
            assert_eq!(server.sh(&format!("wget -q -O - {url}")), "the host\n");
        }
        for address in pod.addresses() {
            assert_eq!(fetch_soon((address, 8080), "/", pods.limit()), "the pod\n");
        }
        // From another address of the host's, and from its loopback.
        for address in [gateways(pods)[0], [127, 0, 0, 1].into()] {
            assert_eq!(fetch_soon((address, 8180), "/", pods.limit()), "the pod\n");
        }
    });
}

/// One stream in each direction.
fn carries_every_byte(pod: &Pod<'_>, member: &Member<'_>, gateway: IpAddr) {
    let target = format!("nc {gateway}");
    let received = sink(gateway).unwrap();
    let script = format!(
        "head -c {BIG} /dev/urandom >/tmp/big; sha256sum </tmp/big; {target} {} </tmp/big",
        received.port()
    );
    let out = member.sh(&script);
    let sums = out.lines().map(|line| line.split(' ').next().unwrap_or_default());
    let sum = received.result().unwrap();
    assert_eq!(sums.collect::<Vec<_>>(), [&sum, &sum], "pod {} to host", pod.id());

    let bytes = pattern(BIG, 12);
    let expected = sha256(&bytes);
    let sent = source(gateway, bytes).unwrap();
    let out = member.sh(&format!("{target} {} </dev/null | sha256sum", sent.port()));
    sent.result().unwrap();
    assert_eq!(out, format!("{expected}  -\n"), "host to pod {}", pod.id());
}

#[test]
fn stream_when_long_arrives_whole_both_ways() {
    Pods::like_runc("big-tcp", Series::V1_7, |pods| {
        let pod = pods.pod("bridge").run();
        let member = pod.sleeping();
        for gateway in gateways(pods) {
            carries_every_byte(&pod, &member, gateway);
        }
    });
}

/// Stops what runs the pod: the whole virtual machine, or the container.
fn freeze(pods: &Pods, pod: &Pod<'_>, member: &Member<'_>) {
    if pods.vm() {
        signal(pod, rustix::process::Signal::STOP);
    } else {
        pods.case().ctr(["tasks", "pause", member.id()]).expect_code(0);
    }
}

fn thaw(pods: &Pods, pod: &Pod<'_>, member: &Member<'_>) {
    if pods.vm() {
        signal(pod, rustix::process::Signal::CONT);
    } else {
        pods.case().ctr(["tasks", "resume", member.id()]).expect_code(0);
    }
}

fn signal(pod: &Pod<'_>, signal: rustix::process::Signal) {
    let shim = i32::try_from(pod.shim())
        .ok()
        .and_then(rustix::process::Pid::from_raw);
    rustix::process::kill_process(shim.unwrap(), signal).unwrap();
}

#[test]
fn network_when_flooded_while_nothing_reads_recovers() {
    Pods::like_runc("flood", Series::V1_7, |pods| {
        let pod = pods.pod("bridge").run();
        let server = pod.web("after the flood");
        let address = pod.address();
        assert_eq!(
            fetch_soon((address, 8080), "/", pods.limit()),
            "after the flood\n"
        );
        // To a port where nothing listens, and awake: every datagram is answered with an ICMP message.
        flood((address, 9), FLOOD).unwrap();

        freeze(pods, &pod, &server);
        flood((address, 9), FLOOD).unwrap();
        thaw(pods, &pod, &server);
        for address in pod.addresses() {
            assert_eq!(
                fetch_soon((address, 8080), "/", pods.limit()),
                "after the flood\n"
            );
        }
        carries_every_byte(&pod, &server, gateways(pods)[0]);
    });
}
