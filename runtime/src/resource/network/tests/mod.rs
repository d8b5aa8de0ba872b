//! Against the kernel: namespaces, links, filters and frames are real. The guest is a [`FakeGuest`](crate::agent::fake).

mod guest;
mod models;
mod pod;
mod select;

use std::process::Command;
use std::time::{Duration, Instant};

use super::scan::{Link, Scan};
use super::{endpoint, scan};
use crate::host::netns::Netns;
use crate::host::netns::tests::TestNetns;

/// Runs `program` in the namespace.
fn run(netns: &Netns, program: &str, arguments: &str) -> Result<String, String> {
    let call = || Command::new(program).args(arguments.split_whitespace()).output();
    let output = netns.run(call).unwrap().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    match output.status.success() {
        true => Ok(text(output.stdout)),
        false => Err(text(output.stderr)),
    }
}

/// `ip ARGUMENTS` in the namespace.
fn ip(netns: &Netns, arguments: &str) -> String {
    run(netns, "ip", arguments).unwrap_or_else(|error| panic!("ip {arguments}: {error}"))
}

/// As [`ip`]; false, said on the console, when the kernel does not have the kind of link.
fn ip_link(netns: &Netns, arguments: &str) -> bool {
    match run(netns, "ip", &format!("link add {arguments}")) {
        Ok(_) => true,
        Err(error) if error.contains("Unknown device type") || error.contains("not supported") => {
            println!(
                "skipped: this kernel cannot do ip link add {arguments}: {}",
                error.trim()
            );
            false
        }
        Err(error) => panic!("ip link add {arguments}: {error}"),
    }
}

/// Waits for what the kernel does by itself.
fn eventually(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "{what} after a minute");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A namespace whose addresses are settled as soon as they are there: nothing waits for duplicates.
fn namespace() -> TestNetns {
    let test = TestNetns::new();
    let set = || {
        for of in ["all", "default"] {
            std::fs::write(format!("/proc/sys/net/ipv6/conf/{of}/accept_dad"), "0").unwrap();
        }
    };
    test.netns.run(set).unwrap();
    test
}

/// A pod's namespace, and the one that its links lead to.
struct World {
    pod: TestNetns,
    peer: TestNetns,
}

impl World {
    fn new() -> Self {
        let (pod, peer) = (namespace(), namespace());
        Self { pod, peer }
    }

    /// With `eth0`, 10.1.0.2 and fd00:1::2, and a gateway at .1 and ::1.
    fn with_eth0() -> Self {
        let world = Self::new();
        world.veth("eth0");
        let (pod, peer) = (world.pod(), world.peer());
        ip(peer, "addr add 10.1.0.1/24 dev peer-eth0");
        ip(peer, "addr add fd00:1::1/64 dev peer-eth0");
        ip(pod, "addr add 10.1.0.2/24 brd 10.1.0.255 dev eth0");
        ip(pod, "addr add fd00:1::2/64 dev eth0");
        ip(pod, "route add default via 10.1.0.1");
        ip(pod, "route add default via fd00:1::1");
        world
    }

    fn pod(&self) -> &Netns {
        &self.pod.netns
    }

    fn peer(&self) -> &Netns {
        &self.peer.netns
    }

    /// A pair of links that are up: `name` in the pod, `peer-NAME` at the other end.
    fn veth(&self, name: &str) {
        let peer = self.peer().path().display();
        ip(
            self.pod(),
            &format!("link add dev {name} type veth peer name peer-{name} netns {peer}"),
        );
        ip(self.pod(), &format!("link set {name} up"));
        ip(self.peer(), &format!("link set peer-{name} up"));
        // The kernel makes them when it has noticed that there are two ends, which takes it a moment.
        for (netns, link) in [
            (self.pod(), name.to_owned()),
            (self.peer(), format!("peer-{name}")),
        ] {
            let command = format!("-6 -o addr show dev {link} scope link");
            eventually("a link-local address", || !ip(netns, &command).is_empty());
        }
    }

    fn scan(&self) -> Scan {
        let looked = self.pod().netlink(async |handle| scan::scan(&handle).await);
        looked.unwrap()
    }

    fn link(&self, name: &str) -> Link {
        let links = self.scan().links;
        links.into_iter().find(|link| link.name == name).unwrap()
    }

    /// All there is in the pod's namespace: to be compared.
    fn dump(&self) -> (Scan, String, String) {
        let qdiscs = run(self.pod(), "tc", "qdisc show").unwrap();
        let filters = self.scan().links.into_iter().map(|link| {
            let name = link.name;
            run(self.pod(), "tc", &format!("filter show dev {name} ingress")).unwrap()
        });
        let filters = filters.collect();
        (self.scan(), qdiscs, filters)
    }
}
