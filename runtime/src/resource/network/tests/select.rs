//! Which links a guest gets.

use super::*;
use crate::error::{Error, ErrorKind};
use crate::resource::network::NetworkError;

fn selected(world: &World) -> Result<Vec<String>, NetworkError> {
    let links = endpoint::select(&world.scan())?;
    Ok(links.into_iter().map(|link| link.name).collect())
}

#[test]
fn links_when_they_carry_nothing_are_not_the_guests() {
    let world = World::with_eth0();
    let pod = world.pod();
    ip(pod, "link set lo up");
    // As tunl0 and sit0 are in every namespace of some hosts: there, and down.
    ip(pod, "link add dev unused type veth peer name unused-peer");
    ip(pod, "tuntap add dev tun0 mode tun");
    if ip_link(pod, "dev ifb7 type ifb") {
        ip(pod, "link set ifb7 up");
    }

    assert_eq!(selected(&world).unwrap(), ["eth0"]);
}

#[test]
fn links_when_they_lead_somewhere_are_the_guests_whatever_their_kind() {
    let world = World::with_eth0();
    let pod = world.pod();
    let mut expected = vec!["eth0".to_owned()];
    for (index, kind) in [
        "macvlan mode bridge",
        "ipvlan mode l2",
        "vlan id 7",
        "macvtap mode bridge",
    ]
    .iter()
    .enumerate()
    {
        // On a link of the other namespace, as CNI makes them.
        let (below, name) = (format!("below{index}"), format!("net{index}"));
        ip(
            world.peer(),
            &format!("link add dev {below} type veth peer name {below}-peer"),
        );
        if !ip_link(world.peer(), &format!("link {below} name {name} type {kind}")) {
            continue;
        }
        ip(
            world.peer(),
            &format!("link set {name} netns {}", pod.path().display()),
        );
        ip(pod, &format!("link set {name} up"));
        ip(pod, &format!("addr add 10.2.{index}.2/24 dev {name}"));
        expected.push(name);
    }
    for (name, kind) in [("dummy7", "dummy"), ("ifb7", "ifb"), ("br7", "bridge")] {
        if ip_link(pod, &format!("dev {name} type {kind}")) {
            ip(pod, &format!("link set {name} up"));
            ip(pod, &format!("addr add 10.3.0.{}/32 dev {name}", expected.len()));
            expected.push(name.to_owned());
        }
    }
    ip(pod, "tuntap add dev tap7 mode tap");
    ip(pod, "link set tap7 up");
    ip(pod, "addr add 10.4.0.2/24 dev tap7");
    expected.push("tap7".to_owned());

    let mut found = selected(&world).unwrap();

    found.sort();
    expected.sort();
    assert_eq!(found, expected);
    assert_eq!(endpoint::kind(&world.link("eth0")), "veth");
    assert_eq!(endpoint::kind(&world.link("tap7")), "tun");
}

#[test]
fn link_when_it_carries_an_address_and_cannot_be_attached_is_refused_by_name() {
    let world = World::with_eth0();
    let pod = world.pod();
    ip(pod, "tuntap add dev tun0 mode tun");
    ip(pod, "link set tun0 up");
    ip(pod, "addr add 10.9.0.2/24 dev tun0");

    let error = selected(&world).unwrap_err();

    let message = error.to_string();
    assert!(
        message.contains("tun0") && message.contains("10.9.0.2") && message.contains("Ethernet"),
        "{message}"
    );
    assert_eq!(Error::from(error).kind, ErrorKind::Unimplemented);

    // Hardware has no kind, and a parent on a bus.
    let mut scan = world.scan();
    scan.links.retain(|link| link.name == "eth0");
    scan.links[0].kind = None;
    scan.links[0].hardware = Some("0000:00:03.0".into());
    let message = endpoint::select(&scan).unwrap_err().to_string();
    assert!(message.contains("eth0 (physical, 0000:00:03.0)"), "{message}");
}

#[test]
fn link_when_a_guest_could_not_have_it_is_refused_by_its_value() {
    let world = World::with_eth0();
    let scan = world.scan();
    let with = |change: fn(&mut Link)| {
        let mut scan = scan.clone();
        let link = scan.links.iter_mut().find(|link| link.name == "eth0").unwrap();
        change(link);
        let error = endpoint::select(&scan).unwrap_err();
        let message = error.to_string();
        assert_eq!(Error::from(error).kind, ErrorKind::InvalidArgument, "{message}");
        message
    };

    let message = with(|link| link.mtu = 65_535);
    assert!(
        message.contains("MTU 65535") && message.contains("65521"),
        "{message}"
    );
    let message = with(|link| link.addresses[0].flags |= scan::DADFAILED);
    assert!(message.contains("10.1.0.2 is a duplicate"), "{message}");

    let mut twice = scan.clone();
    let mut second = world.link("eth0");
    second.index += 1000;
    second.name = "net1".into();
    let mac = endpoint::hardware_address(&second.mac.unwrap());
    twice.links.push(second);
    let message = endpoint::select(&twice).unwrap_err().to_string();
    assert!(
        message.contains("eth0 and net1") && message.contains(&mac),
        "{message}"
    );
}

#[test]
fn link_when_another_is_on_top_of_it_is_not_taken_from_it() {
    let world = World::with_eth0();
    let pod = world.pod();
    if !ip_link(pod, "link eth0 name mac0 type macvlan mode bridge") {
        return;
    }
    ip(pod, "link set mac0 up");
    ip(pod, "addr add 10.5.0.2/24 dev mac0");

    let message = selected(&world).unwrap_err().to_string();
    assert!(
        message.contains("eth0") && message.contains("on top"),
        "{message}"
    );

    // Without an address of its own it only carries the other.
    ip(pod, "addr flush dev eth0 scope global");
    assert_eq!(selected(&world).unwrap(), ["mac0"]);
}

#[test]
fn links_when_they_are_ports_of_a_bridge_are_the_bridges() {
    let world = World::new();
    let pod = world.pod();
    world.veth("port0");
    ip(pod, "link add dev br0 type bridge");
    ip(pod, "link set port0 master br0");
    ip(pod, "link set br0 up");
    ip(pod, "addr add 10.6.0.2/24 dev br0");
    assert_eq!(selected(&world).unwrap(), ["br0"]);

    // A TAP cannot be one: the guest would have the address that is the bridge's own.
    ip(pod, "tuntap add dev tap7 mode tap");
    ip(pod, "link set tap7 master br0 up");
    assert_eq!(selected(&world).unwrap(), ["br0"]);
    ip(pod, "addr add 10.4.0.2/24 dev tap7");
    let message = selected(&world).unwrap_err().to_string();
    assert!(
        message.contains("tap7") && message.contains("bridge"),
        "{message}"
    );
    ip(pod, "link del tap7");

    // A port with an address of its own is an interface all the same.
    ip(pod, "addr flush dev br0");
    ip(pod, "addr add 10.6.0.2/24 dev port0");
    assert_eq!(selected(&world).unwrap(), ["port0"]);

    // A bridge whose last port has gone carries nothing, whatever its addresses.
    ip(pod, "addr add 10.6.0.3/24 dev br0");
    ip(pod, "link del port0");
    assert_eq!(selected(&world).unwrap(), [""; 0]);
}
