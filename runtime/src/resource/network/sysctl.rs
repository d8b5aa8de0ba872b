//! Sysctls of an interface that change what its guest has to do.

use std::collections::BTreeMap;
use std::fs;

/// Names below `net`, with `IFNAME` for the interface, and the kernel's defaults. A guest's kernel has the same ones.
const VALUES: &[(&str, &str)] = &[
    ("ipv4.conf.IFNAME.accept_redirects", "1"),
    ("ipv4.conf.IFNAME.arp_accept", "0"),
    ("ipv4.conf.IFNAME.arp_announce", "0"),
    ("ipv4.conf.IFNAME.arp_filter", "0"),
    ("ipv4.conf.IFNAME.arp_ignore", "0"),
    ("ipv4.conf.IFNAME.arp_notify", "0"),
    ("ipv4.conf.IFNAME.forwarding", "0"),
    ("ipv4.conf.IFNAME.proxy_arp", "0"),
    ("ipv4.conf.IFNAME.route_localnet", "0"),
    ("ipv4.conf.IFNAME.rp_filter", "0"),
    ("ipv4.conf.IFNAME.send_redirects", "1"),
    ("ipv6.conf.IFNAME.accept_dad", "1"),
    ("ipv6.conf.IFNAME.accept_ra", "1"),
    ("ipv6.conf.IFNAME.accept_redirects", "1"),
    ("ipv6.conf.IFNAME.addr_gen_mode", "0"),
    ("ipv6.conf.IFNAME.autoconf", "1"),
    ("ipv6.conf.IFNAME.dad_transmits", "1"),
    ("ipv6.conf.IFNAME.disable_ipv6", "0"),
    ("ipv6.conf.IFNAME.forwarding", "0"),
    ("ipv6.conf.IFNAME.use_tempaddr", "0"),
];

/// Those of the interface `name` of the calling thread's namespace that are not the kernel's defaults: what the agent
/// has to set, with `IFNAME` in place of the name.
pub fn read(name: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for (key, default) in VALUES {
        // Names of interfaces may have dots: the path is made of the key, never the other way round.
        let path = format!("/proc/sys/net/{}", key.replace('.', "/").replace("IFNAME", name));
        // Not there: a kernel without IPv6, or an interface that has just gone.
        let Ok(value) = fs::read_to_string(path) else {
            continue;
        };
        let value = value.trim();
        if value != *default {
            found.insert(format!("net.{key}"), value.to_owned());
        }
    }
    found
}

/// Keeps the kernel from giving the interface `name` of the calling thread's namespace an IPv6 address, from which it
/// would speak to the guest.
pub fn disable_ipv6(name: &str) {
    // Not there: a kernel without IPv6.
    let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
}

/// Whether the kernel gives the interface `name` of the calling thread's namespace a link-local address that is made of
/// its hardware address.
pub fn makes_link_local(name: &str) -> bool {
    let is_zero = |key| {
        let value = fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{name}/{key}"));
        value.is_ok_and(|value| value.trim() == "0")
    };
    is_zero("disable_ipv6") && is_zero("addr_gen_mode")
}
