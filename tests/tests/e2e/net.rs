//! A container in a network namespace that somebody else made: its network is the namespace's.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};

use tests::Case;
use tests::case::skipped_under_runc;
use tests::command::{eventually, run};

/// A network namespace below /run/netns with one link to the host, both families.
struct Network {
    name: String,
    /// Third number of the IPv4 network: no two tests have the same one.
    number: u8,
}

impl Network {
    fn new(case: &Case) -> Self {
        static NEXT: AtomicU8 = AtomicU8::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let network = Self {
            name: format!("e2e-{}-{number}", std::process::id()),
            number,
        };
        network.host(case, &format!("netns add {}", network.name));
        network.host(
            case,
            &format!(
                "link add {} type veth peer name eth0 netns {}",
                network.link(),
                network.name
            ),
        );
        let accept_dad = format!("/proc/sys/net/ipv6/conf/{}/accept_dad", network.link());
        std::fs::write(accept_dad, "0").unwrap();
        network.host(
            case,
            &format!("addr add {}/24 dev {}", network.gateway(), network.link()),
        );
        network.host(
            case,
            &format!("addr add fd00:88:{number}::1/64 dev {} nodad", network.link()),
        );
        network.host(case, &format!("link set {} up", network.link()));
        network.inside(case, "link set lo up");
        network.inside(case, "link set eth0 mtu 1460 up");
        network.inside(case, &format!("addr add {}/24 brd + dev eth0", network.address()));
        network.inside(case, &format!("addr add fd00:88:{number}::2/64 dev eth0 nodad"));
        network.inside(case, &format!("route add default via {}", network.gateway()));
        network.inside(case, &format!("-6 route add default via fd00:88:{number}::1"));
        network.inside(
            case,
            &format!("route add 10.99.0.0/16 via {} metric 7", network.gateway()),
        );
        // The kernel makes sure in a moment that nobody else has its link-local address.
        let settled = || !network.inside(case, "addr").contains("tentative");
        assert!(eventually(case.limit(), settled));
        network
    }

    /// The host's end of the link.
    fn link(&self) -> String {
        format!("e2e{}-{}", self.number, std::process::id() % 100_000)
    }

    fn gateway(&self) -> String {
        format!("10.88.{}.1", self.number)
    }

    fn address(&self) -> String {
        format!("10.88.{}.2", self.number)
    }

    #[track_caller]
    fn host(&self, case: &Case, arguments: &str) -> String {
        let finished = run(Command::new("ip").args(arguments.split(' ')), case.limit()).unwrap();
        finished.expect_code(0).out()
    }

    #[track_caller]
    fn inside(&self, case: &Case, arguments: &str) -> String {
        self.host(case, &format!("-n {} {arguments}", self.name))
    }

    /// What `busybox ARGUMENTS` says in the namespace, on the host.
    #[track_caller]
    fn busybox(&self, case: &Case, arguments: &str) -> String {
        self.host(case, &format!("netns exec {} busybox {arguments}", self.name))
    }

    /// All that is in the namespace, to be compared.
    fn dump(&self, case: &Case) -> String {
        let links = self.inside(case, "-d addr");
        let qdiscs = run(Command::new("tc").args(["-n", &self.name, "qdisc"]), case.limit()).unwrap();
        let filters = ["tc", "-n", &self.name, "filter", "show", "dev", "eth0", "ingress"];
        let filters = run(Command::new(filters[0]).args(&filters[1..]), case.limit()).unwrap();
        // The other end is as it is: its state is nobody's doing.
        links + &qdiscs.expect_code(0).out() + &filters.out()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).status();
        let _ = Command::new("ip").args(["link", "delete", &self.link()]).status();
    }
}

/// Addresses as people compare them: without index, other end, queueing and state of the link.
fn addresses(text: &str) -> Vec<String> {
    text.lines()
        .filter(|line| line.contains("inet") || line.contains("link/ether"))
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect()
}

/// Routes, sorted: the kernel's order among equals is the order they were entered in.
fn routes(text: &str) -> Vec<String> {
    let mut lines: Vec<_> = text
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    lines.sort();
    lines
}

fn run_in<'a>(container: &'a tests::Container<'a>, network: &Network, script: &str) {
    let with = format!("network:/run/netns/{}", network.name);
    container
        .run(&["sh", "-c", script])
        .flag("-d")
        .flag("--null-io")
        .option("--with-ns", &with)
        .output()
        .expect_code(0);
}

const WAITING: &str = "trap 'exit 0' TERM; while :; do sleep 1 & wait $!; done";

#[test]
fn container_when_it_is_in_a_namespace_has_its_addresses_and_routes() {
    let case = Case::begin("net-same");
    let network = Network::new(&case);
    let container = case.container();
    run_in(&container, &network, WAITING);

    for (arguments, compare) in [
        ("ip addr show dev eth0", addresses as fn(&str) -> Vec<String>),
        ("ip -4 route", routes),
        ("ip -6 route", routes),
        ("cat /sys/class/net/eth0/mtu", routes),
    ] {
        let expected = compare(&network.busybox(&case, arguments));
        let found = container.script(&[], arguments).expect_code(0).out();
        assert_eq!(compare(&found), expected, "{arguments}");
        assert!(!expected.is_empty(), "{arguments}");
    }
}

#[test]
fn host_and_container_when_they_talk_hear_each_other() {
    let case = Case::begin("net-talk");
    let network = Network::new(&case);
    let container = case.container();
    let serve = format!("mkdir /www; echo from-the-pod >/www/index.html; httpd -p 80 -h /www; {WAITING}");
    run_in(&container, &network, &serve);

    for address in [
        format!("{}:80", network.address()),
        format!("[fd00:88:{}::2]:80", network.number),
    ] {
        let mut answer = String::new();
        let answered = eventually(case.limit(), || {
            answer.clear();
            let Ok(mut stream) = TcpStream::connect(&address) else {
                return false;
            };
            let asked = stream.write_all(b"GET / HTTP/1.0\r\n\r\n");
            asked.is_ok() && stream.read_to_string(&mut answer).is_ok() && answer.contains("from-the-pod")
        });
        assert!(answered, "{address}: {answer}");
    }

    let listener = TcpListener::bind((network.gateway(), 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let host = std::thread::spawn(move || {
        let (mut stream, from) = listener.accept().unwrap();
        let mut request = [0; 512];
        let _ = stream.read(&mut request).unwrap();
        stream
            .write_all(b"HTTP/1.0 200 OK\r\n\r\nfrom-the-host\n")
            .unwrap();
        from.ip().to_string()
    });
    let fetch = format!("wget -q -O - http://{}:{port}/", network.gateway());
    let fetched = container.script(&[], &fetch).expect_code(0);
    assert_eq!(fetched.out(), "from-the-host\n");
    assert_eq!(
        host.join().unwrap(),
        network.address(),
        "no other address stands for the pod's"
    );
    let ping = format!("ping -c 3 -W 30 {}", network.gateway());
    container.script(&[], &ping).expect_code(0);
}

#[test]
fn interface_when_it_comes_or_goes_later_does_so_in_the_container() {
    let case = Case::begin("net-later");
    let network = Network::new(&case);
    let container = case.container();
    run_in(&container, &network, WAITING);
    let sees = |what: &str, wanted: bool| {
        let looked = eventually(case.limit(), || {
            let found = container.script(&[], "ip addr").expect_code(0).out();
            found.contains(what) == wanted
        });
        assert!(looked, "{what}: {wanted}");
    };

    // Twice: a slot that was used before serves as well.
    for address in ["10.98.0.2", "10.98.0.3"] {
        network.inside(&case, "link add net1 type veth peer name net1-peer");
        network.inside(&case, "link set net1 up");
        network.inside(&case, &format!("addr add {address}/24 dev net1"));
        sees(address, true);
        network.inside(&case, "link delete net1");
        sees("net1", false);
    }
    network.inside(&case, "addr add 10.97.0.2/32 dev eth0");
    sees("10.97.0.2", true);
}

#[test]
fn namespace_when_its_container_ends_or_its_shim_is_killed_is_as_it_was() {
    let case = Case::begin("net-left");
    let network = Network::new(&case);
    let before = network.dump(&case);
    for kill in [false, true] {
        let container = case.container();
        run_in(&container, &network, WAITING);
        if case.is_vm_runtime() {
            assert_ne!(network.dump(&case), before);
        }
        if kill && case.is_vm_runtime() {
            let shim = container.shim().to_string();
            let killed = run(Command::new("kill").args(["-KILL", &shim]), case.limit());
            killed.unwrap().expect_code(0);
        } else {
            container.kill("KILL").expect_code(0);
        }
        drop(container);
        let restored = eventually(case.limit(), || network.dump(&case) == before);
        assert!(restored, "{}\nwas\n{before}", network.dump(&case));
    }
}

#[test]
fn container_when_it_asks_for_the_hosts_network_is_refused_in_a_sentence() {
    if skipped_under_runc("a container of runc can have the host's network") {
        return;
    }
    let case = Case::begin("net-host");
    let container = case.container();
    let finished = container.run(&["true"]).flag("--net-host").output();
    assert_ne!(finished.code, 0);
    assert!(
        finished.err().contains("asks for the host's network"),
        "{}",
        finished.describe()
    );
}
