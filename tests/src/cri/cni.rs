//! Networks for pods, as CNI configurations of the plugins Debian packages. Every containerd has subnets and links of its own.

use std::fs;
use std::io;
use std::path::Path;

use serde_json::{Value, json};

/// One network: what a handler's `cni_conf_dir` holds.
#[derive(Clone, Debug)]
pub struct Network {
    /// Its name in a handler's name.
    pub name: &'static str,
    /// Its configurations; a pod has one interface for each.
    pub files: Vec<Value>,
}

/// Writes networks and knows their addresses. `instance` tells apart the containerds of one test process.
#[derive(Clone, Copy, Debug)]
pub struct Subnets {
    instance: u8,
}

/// A network's third byte in its IPv4 subnet, and its fourth group in its IPv6 subnet.
mod number {
    pub const BRIDGE: u8 = 1;
    pub const PTP: u8 = 2;
    pub const JUMBO: u8 = 3;
    pub const SLOW: u8 = 4;
    pub const SECOND: u8 = 5;
    pub const SILENT: u8 = 6;
    pub const ROUTES: u8 = 7;
    pub const HUGE: u8 = 8;
    pub const MACVLAN: u8 = 9;
    pub const IPVLAN: u8 = 10;
    pub const VLAN: u8 = 11;
    pub const TWIN: u8 = 12;
    pub const BROKEN: u8 = 13;
}

/// The VLAN that the network `vlan` is.
pub const VLAN_ID: u16 = 5;
/// Routes beyond the connected ones in the network `routes`.
pub const ROUTES: usize = 100;
/// MTU of the network `jumbo`.
pub const JUMBO_MTU: u32 = 9000;
/// MTU of the network `huge`: what a veth can, and 14 bytes more than a TAP can.
pub const HUGE_MTU: u32 = 65535;
/// Bits per second on the network `slow`, and bits that pass at once.
pub const SLOW_RATE: u64 = 2_000_000;
/// The kernel's key that the network `broken` cannot set: there is none.
pub const BROKEN_KEY: &str = "net.e2e_none";

impl Subnets {
    /// Those of the containerd with this number.
    pub fn new(instance: u8) -> Self {
        Self { instance }
    }

    /// The containerd's number.
    pub fn instance(self) -> u8 {
        self.instance
    }

    fn v4(self, network: u8, host: &str) -> String {
        format!("10.{}.{network}.{host}", 80 + self.instance)
    }

    fn v6(self, network: u8, host: &str) -> String {
        format!("fd00:{}:{network}::{host}", 80 + self.instance)
    }

    /// The host's IPv4 address on the network `bridge`.
    pub fn gateway(self) -> String {
        self.v4(number::BRIDGE, "1")
    }

    /// The host's IPv6 address on the network `bridge`.
    pub fn gateway6(self) -> String {
        self.v6(number::BRIDGE, "1")
    }

    /// The address of a machine beside the host, on the network `macvlan`, `ipvlan` or `vlan`.
    ///
    /// # Panics
    /// For any other network.
    pub fn outside(self, network: &str) -> String {
        self.v4(Self::physical(network), "1")
    }

    fn physical(network: &str) -> u8 {
        match network {
            "macvlan" => number::MACVLAN,
            "ipvlan" => number::IPVLAN,
            "vlan" => number::VLAN,
            other => panic!("network {other} has no link to the outside"),
        }
    }

    /// The host's link that the network's interfaces are made on.
    fn parent(self, network: &str) -> String {
        format!("{network}{}", self.instance)
    }

    /// A shell script that plugs the host into three networks: a veth pair each, whose other end, with an address, is in the network
    /// namespace `outside`, so that no traffic takes a short cut through the host.
    pub fn plug(self, outside: &str) -> String {
        let mut script = format!("ip netns add {outside}\n");
        for network in ["macvlan", "ipvlan", "vlan"] {
            let parent = self.parent(network);
            script.push_str(&format!(
                "ip link add {parent} type veth peer name {parent} netns {outside}\nip link set {parent} up\n\
                 ip -n {outside} link set {parent} up\n"
            ));
            let mut far = parent.clone();
            if network == "vlan" {
                far = format!("eth.{VLAN_ID}");
                script.push_str(&format!(
                    "ip -n {outside} link add link {parent} name {far} type vlan id {VLAN_ID}\nip -n {outside} link set {far} up\n"
                ));
            }
            let address = self.outside(network);
            script.push_str(&format!("ip -n {outside} addr add {address}/24 dev {far}\n"));
        }
        script
    }

    /// The network most tests use.
    pub fn common(self) -> Vec<Network> {
        vec![self.bridge()]
    }

    /// Every network.
    pub fn all(self) -> Vec<Network> {
        let mut networks = self.common();
        networks.extend([
            self.ptp(),
            self.jumbo(),
            self.slow(),
            self.two(),
            self.twins(),
            self.silent(),
            self.routes(),
            self.huge(),
            self.macvlan(),
            self.ipvlan(),
            self.vlan(),
            self.broken(),
        ]);
        networks
    }

    /// Both families, port mappings, a firewall.
    fn bridge(self) -> Network {
        let bridge = self.bridge_plugin(
            "cri",
            number::BRIDGE,
            json!({"ipMasq": true, "hairpinMode": true}),
        );
        let portmap = json!({"type": "portmap", "snat": true, "capabilities": {"portMappings": true}});
        Network {
            name: "bridge",
            files: vec![list("bridge", vec![bridge, portmap, json!({"type": "firewall"})])],
        }
    }

    fn ptp(self) -> Network {
        Network {
            name: "ptp",
            files: vec![list("ptp", vec![self.ptp_plugin(number::PTP, json!({}))])],
        }
    }

    fn jumbo(self) -> Network {
        let bridge = self.bridge_plugin("jumbo", number::JUMBO, json!({"mtu": JUMBO_MTU}));
        Network {
            name: "jumbo",
            files: vec![list("jumbo", vec![bridge])],
        }
    }

    /// With a limit of its own: to the one that annotations ask for, containerd adds a burst of 268 MB, which no test outlasts.
    fn slow(self) -> Network {
        let bridge = self.bridge_plugin("slow", number::SLOW, json!({}));
        let bandwidth = json!({
            "type": "bandwidth", "ingressRate": SLOW_RATE, "ingressBurst": SLOW_RATE, "egressRate": SLOW_RATE,
            "egressBurst": SLOW_RATE,
        });
        Network {
            name: "slow",
            files: vec![list("slow", vec![bridge, bandwidth])],
        }
    }

    /// Two interfaces.
    fn two(self) -> Network {
        let mut second = self.ptp_plugin(number::SECOND, json!({}));
        // One default route is enough.
        second["ipam"]["routes"] = json!([{"dst": "10.199.0.0/16"}]);
        let mut files = self.bridge().files;
        files.push(list("second", vec![second]));
        Network { name: "two", files }
    }

    /// Two interfaces with one address.
    fn twins(self) -> Network {
        let address = format!("{}/24", self.v4(number::TWIN, "5"));
        let plugin = |name: &str| {
            let mut plugin = self.bridge_plugin(name, number::TWIN, json!({"isGateway": false}));
            plugin["ipam"] = json!({"type": "static", "addresses": [{"address": address}]});
            plugin
        };
        Network {
            name: "twins",
            files: vec![
                list("twin1", vec![plugin("twin")]),
                list("twin2", vec![plugin("twin")]),
            ],
        }
    }

    /// An address and nothing else: no gateway, no routes.
    fn silent(self) -> Network {
        let mut bridge = self.bridge_plugin("silent", number::SILENT, json!({"isGateway": false}));
        bridge["ipam"]["routes"] = json!([]);
        Network {
            name: "silent",
            files: vec![list("silent", vec![bridge])],
        }
    }

    fn routes(self) -> Network {
        let mut bridge = self.bridge_plugin("routes", number::ROUTES, json!({}));
        let mut routes = vec![json!({"dst": "0.0.0.0/0"}), json!({"dst": "::/0"})];
        routes.extend((0..ROUTES).map(|i| json!({"dst": format!("10.200.{i}.0/24")})));
        bridge["ipam"]["routes"] = routes.into();
        Network {
            name: "routes",
            files: vec![list("routes", vec![bridge])],
        }
    }

    fn huge(self) -> Network {
        let ptp = self.ptp_plugin(number::HUGE, json!({"mtu": HUGE_MTU}));
        Network {
            name: "huge",
            files: vec![list("huge", vec![ptp])],
        }
    }

    /// A plugin that works, then one that fails: a missing one would fail at the end of the pod, too.
    fn broken(self) -> Network {
        let bridge = self.bridge_plugin("broken", number::BROKEN, json!({}));
        let tuning = json!({"type": "tuning", "sysctl": {BROKEN_KEY: "1"}});
        Network {
            name: "broken",
            files: vec![list("broken", vec![bridge, tuning])],
        }
    }

    fn macvlan(self) -> Network {
        self.on_parent("macvlan", json!({"mode": "bridge"}))
    }

    fn ipvlan(self) -> Network {
        self.on_parent("ipvlan", json!({"mode": "l2"}))
    }

    fn vlan(self) -> Network {
        self.on_parent("vlan", json!({"vlanId": VLAN_ID}))
    }

    fn on_parent(self, name: &'static str, extra: Value) -> Network {
        let number = Self::physical(name);
        let subnet = json!([[{"subnet": format!("{}/24", self.v4(number, "0")), "rangeStart": self.v4(number, "10"),
            "gateway": self.v4(number, "1")}]]);
        let plugin = json!({
            "type": name, "master": self.parent(name),
            "ipam": {"type": "host-local", "ranges": subnet, "routes": [{"dst": "0.0.0.0/0"}]},
        });
        Network {
            name,
            files: vec![list(name, vec![merged(plugin, extra)])],
        }
    }

    fn bridge_plugin(self, name: &str, number: u8, extra: Value) -> Value {
        let plugin = json!({
            "type": "bridge", "bridge": self.parent(name), "isGateway": true, "ipam": self.host_local(number),
        });
        merged(plugin, extra)
    }

    fn ptp_plugin(self, number: u8, extra: Value) -> Value {
        merged(json!({"type": "ptp", "ipam": self.host_local(number)}), extra)
    }

    fn host_local(self, number: u8) -> Value {
        json!({
            "type": "host-local",
            "ranges": [
                [{"subnet": format!("{}/24", self.v4(number, "0"))}],
                [{"subnet": format!("{}/64", self.v6(number, ""))}],
            ],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
        })
    }
}

fn list(name: &str, plugins: Vec<Value>) -> Value {
    json!({"cniVersion": "1.0.0", "name": name, "plugins": plugins})
}

fn merged(mut plugin: Value, extra: Value) -> Value {
    for (key, value) in extra.as_object().into_iter().flatten() {
        plugin[key] = value.clone();
    }
    plugin
}

/// Writes the networks below `dir`, with the record of their addresses in it.
///
/// # Errors
/// When a file cannot be written.
pub fn write(networks: &[Network], dir: &Path) -> io::Result<()> {
    for network in networks {
        let folder = dir.join("cni").join(network.name);
        fs::create_dir_all(&folder)?;
        for (number, file) in network.files.iter().enumerate() {
            let mut file = file.clone();
            for plugin in file["plugins"].as_array_mut().into_iter().flatten() {
                if plugin["ipam"]["type"] == "host-local" {
                    plugin["ipam"]["dataDir"] = json!(dir.join("ipam"));
                }
            }
            fs::write(folder.join(format!("{number:02}.conflist")), format!("{file:#}"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_names_when_for_the_last_instance_fit_into_the_kernels_15_bytes() {
        let subnets = Subnets::new(u8::MAX - 80);
        for network in subnets.all() {
            for plugin in network
                .files
                .iter()
                .flat_map(|file| file["plugins"].as_array().unwrap())
            {
                for key in ["bridge", "master"] {
                    let name = plugin[key].as_str().unwrap_or_default();
                    assert!(name.len() <= 15, "{name}");
                }
            }
        }
    }
}
