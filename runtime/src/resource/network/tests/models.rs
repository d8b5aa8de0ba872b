//! Links and guests' interfaces, connected: frames pass both ways, and nothing is left afterwards.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::*;
use crate::config::InternetworkingModel;
use crate::host::journal::{Journal, Undo};
use crate::host::link;
use crate::resource::network::NetworkError;
use crate::resource::network::model::{self, Work};

/// Bytes of the header in front of each frame (`struct virtio_net_hdr`, as a TAP has it until somebody sets another).
const HEADER: usize = 10;
const TAP: &str = "tap0_kata";

struct Bench {
    world: World,
    journal: Journal,
    _folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self {
            world: World::with_eth0(),
            journal: Journal::open(&folder.path().join("journal")).unwrap(),
            _folder: folder,
        }
    }

    fn connect(
        &self,
        model: InternetworkingModel,
        link: &Link,
        queues: usize,
    ) -> Result<(Vec<OwnedFd>, Vec<Undo>), NetworkError> {
        let mut work = Work {
            netns: self.world.pod(),
            journal: &self.journal,
            link,
            tap: TAP,
            queues,
            undo: Vec::new(),
        };
        let connect = async |handle| model::connect(model, &handle, &mut work).await;
        let queues = self.world.pod().netlink(connect)?;
        Ok((queues, work.undo))
    }
}

/// Asks for the hardware address of 10.1.0.1 as a guest would; returns who answers.
/// Which queue gets an answer is the kernel's choice.
fn ask_gateway(queues: &[OwnedFd], mac: [u8; 6]) -> [u8; 6] {
    let mut frame = vec![0; HEADER];
    frame.extend([0xff; 6]);
    frame.extend(mac);
    // ARP, Ethernet, IPv4, request (RFC 826).
    frame.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1]);
    frame.extend(mac);
    frame.extend([10, 1, 0, 2]);
    frame.extend([0; 6]);
    frame.extend([10, 1, 0, 1]);
    let mut queues: Vec<_> = queues
        .iter()
        .map(|queue| File::from(queue.try_clone().unwrap()))
        .collect();
    queues[0].write_all(&frame).unwrap();
    loop {
        let mut ready: Vec<_> = queues
            .iter()
            .map(|queue| PollFd::new(queue.as_fd(), PollFlags::POLLIN))
            .collect();
        let count = poll(&mut ready, PollTimeout::from(60_000_u16)).unwrap();
        assert_ne!(count, 0, "an answer");
        let with_frames: Vec<_> = ready.iter().map(|queue| queue.any() == Some(true)).collect();
        for (queue, _) in queues.iter_mut().zip(with_frames).filter(|(_, has)| *has) {
            let mut answer = [0; 2048];
            let length = queue.read(&mut answer).unwrap();
            let frame = &answer[HEADER..length];
            // An ARP reply; other frames (IPv6 announces itself) are not looked at.
            if frame.len() >= 42 && frame[12..14] == [0x08, 0x06] && frame[20..22] == [0, 2] {
                assert_eq!(frame[28..32], [10, 1, 0, 1]);
                return frame[22..28].try_into().unwrap();
            }
        }
    }
}

fn mac_of_gateway(world: &World) -> [u8; 6] {
    let text = run(world.peer(), "ip", "-o link show peer-eth0").unwrap();
    let mac = text
        .split_whitespace()
        .skip_while(|word| *word != "link/ether")
        .nth(1)
        .unwrap();
    let bytes: Vec<_> = mac
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect();
    bytes.try_into().unwrap()
}

fn frames_pass(model: InternetworkingModel, queues: usize) {
    let bench = Bench::new();
    let before = bench.world.dump();
    let link = bench.world.link("eth0");
    let mac = link.mac.unwrap();

    let (fds, undo) = bench.connect(model, &link, queues).unwrap();

    assert_eq!(fds.len(), queues);
    let tap = ip(bench.world.pod(), &format!("-d link show {TAP}"));
    assert!(tap.contains("mtu 1500") && tap.contains("UP"), "{tap}");
    assert_eq!(ask_gateway(&fds, mac), mac_of_gateway(&bench.world));
    assert_eq!(bench.world.link("eth0"), link, "the link is as it was");
    assert_ne!(bench.world.dump(), before);

    // As the VM's end, then the sandbox's.
    drop(fds);
    bench.journal.replay().unwrap();

    assert!(!undo.is_empty());
    assert_eq!(bench.world.dump(), before);
    // Once more: as `delete` after a shim that died at the very end.
    bench.journal.replay().unwrap();
}

#[test]
fn frames_when_connected_by_filters_pass_both_ways() {
    frames_pass(InternetworkingModel::TcFilter, 1);
    frames_pass(InternetworkingModel::TcFilter, 4);
}

#[test]
fn frames_when_connected_by_a_macvtap_pass_both_ways() {
    let probe = namespace();
    ip(&probe.netns, "link add dev probe type veth peer name probe-peer");
    if ip_link(&probe.netns, "link probe name probe0 type macvtap mode passthru") {
        frames_pass(InternetworkingModel::MacVtap, 1);
        frames_pass(InternetworkingModel::MacVtap, 2);
    }
}

#[test]
fn tap_when_nobody_connects_it_is_just_there() {
    let bench = Bench::new();
    let before = bench.world.dump();

    let link = bench.world.link("eth0");
    let (fds, _) = bench.connect(InternetworkingModel::None, &link, 1).unwrap();

    let (scan, _, filters) = bench.world.dump();
    assert_eq!((scan.taken, filters), (vec![TAP.to_owned()], String::new()));
    assert_eq!(scan.links, before.0.links);
    // A TAP without its shim is no more.
    drop(fds);
    assert_eq!(bench.world.dump(), before);
}

#[test]
fn tap_of_the_namespace_when_nobody_has_it_open_is_the_guests() {
    let bench = Bench::new();
    let pod = bench.world.pod();
    ip(pod, "tuntap add dev net1 mode tap");
    ip(pod, "link set net1 addrgenmode none");
    ip(pod, "link set net1 up");
    ip(pod, "addr add 10.7.0.2/24 dev net1");
    let before = bench.world.dump();

    let link = bench.world.link("net1");
    let (fds, undo) = bench.connect(InternetworkingModel::TcFilter, &link, 1).unwrap();

    assert_eq!((fds.len(), undo), (1, Vec::new()));
    assert!(bench.world.link("net1").running);
    drop(fds);
    assert_eq!(bench.world.dump(), before);
}

/// What [`model::connect`] does, step by step, for a shim that dies after any of them.
#[test]
fn journal_when_its_shim_dies_at_any_step_leaves_the_namespace_as_it_was() {
    let bench = Bench::new();
    let before = bench.world.dump();
    let netns = bench.world.pod().clone();
    let eth0 = bench.world.link("eth0").index;
    for died_after in 0..=6 {
        bench
            .journal
            .record(&Undo::DeleteLink {
                netns: netns.clone(),
                link: TAP.into(),
            })
            .unwrap();
        bench
            .journal
            .record(&Undo::DeleteIngress {
                netns: netns.clone(),
                link: "eth0".into(),
                index: eth0,
            })
            .unwrap();
        let steps = async |handle: rtnetlink::Handle| {
            let mut tap = Vec::new();
            let mut index = 0;
            for step in 0..died_after {
                match step {
                    0 => {
                        tap = link::open_tap(TAP, 1)?;
                        index = link::index(&handle, TAP).await?;
                    }
                    1 => link::set_up(&handle, TAP, index, 1400).await?,
                    2 => link::add_ingress(&handle, "eth0", eth0).await?,
                    3 => link::add_ingress(&handle, TAP, index).await?,
                    4 => link::redirect(&handle, TAP, index, eth0).await?,
                    _ => link::redirect(&handle, "eth0", eth0, index).await?,
                }
            }
            Ok::<_, link::LinkError>(tap)
        };
        // The TAP may be held by somebody who outlives the shim.
        let held = netns.netlink(steps).unwrap();

        bench.journal.replay().unwrap();

        drop(held);
        assert_eq!(bench.world.dump(), before, "died after step {died_after}");
    }
}

#[test]
fn journal_when_the_namespace_has_gone_has_nothing_to_undo() {
    let bench = Bench::new();
    let link = bench.world.link("eth0");
    let (fds, _) = bench.connect(InternetworkingModel::TcFilter, &link, 1).unwrap();

    bench.world.pod.delete();

    bench.journal.replay().unwrap();
    drop(fds);
}

#[test]
fn link_when_it_vanishes_while_it_is_attached_is_named() {
    let bench = Bench::new();
    let link = bench.world.link("eth0");
    ip(bench.world.pod(), "link delete eth0");
    let before = bench.world.dump();

    let error = bench
        .connect(InternetworkingModel::TcFilter, &link, 1)
        .unwrap_err();

    assert!(
        matches!(&error, NetworkError::Vanished { link, .. } if link == "eth0"),
        "{error}"
    );
    bench.journal.replay().unwrap();
    assert_eq!(bench.world.dump(), before);
}

#[test]
fn link_when_another_program_filters_it_is_left_alone() {
    let bench = Bench::new();
    run(bench.world.pod(), "tc", "qdisc add dev eth0 ingress").unwrap();
    let before = bench.world.dump();

    let link = bench.world.link("eth0");
    let error = bench
        .connect(InternetworkingModel::TcFilter, &link, 1)
        .unwrap_err();

    assert!(
        matches!(&error, NetworkError::Taken { link, qdisc } if link == "eth0" && qdisc == "ingress"),
        "{error}"
    );
    bench.journal.replay().unwrap();
    assert_eq!(bench.world.dump(), before);
}
