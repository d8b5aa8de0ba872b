//! Real TAPs, in network namespaces made for the purpose. These tests need root, like the TAPs.

#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use super::rig::{MERGE, Rig, eventually, frame, net_config};
use crate::config::{NetConfig, TapConfig};
use crate::devices::virtio::config::Knobs;
use crate::devices::virtio::config::OpenErrorKind;
use crate::devices::virtio::net::tap::{Backend, Tap, TapError, open};
use crate::devices::virtio::net::{Net, NetError};
use crate::devices::virtio::test_ring::Buf;

/// Runs `test` in a network namespace of its own.
fn in_namespace(test: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: changes this thread only.
            let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
            assert_eq!(result, 0, "a network namespace (is this root?)");
            test();
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

fn ip(arguments: &str) -> bool {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    output.status.success()
}

fn tap(name: &str) -> TapConfig {
    TapConfig {
        name: name.to_owned(),
        netns: None,
    }
}

#[test]
fn open_when_there_is_no_tap_makes_one_that_goes_and_when_there_is_leaves_it() {
    in_namespace(|| {
        let made = open(&tap("made"), 1).unwrap();
        assert!(ip("link show made"));
        drop(made);
        assert!(!ip("link show made"));
        assert!(ip("tuntap add kept mode tap"));
        drop(open(&tap("kept"), 1).unwrap());
        assert!(ip("link show kept"));
    });
}

#[test]
fn open_when_a_namespace_is_given_works_there_and_leaves_the_thread_where_it_is() {
    in_namespace(|| {
        let outside = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let (send, receive) = std::sync::mpsc::channel();
        let (done, finished) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                in_namespace(move || {
                    // SAFETY: no arguments.
                    let tid = unsafe { libc::gettid() };
                    send.send(PathBuf::from(format!("/proc/self/task/{tid}/ns/net")))
                        .unwrap();
                    finished.recv().unwrap();
                    assert!(ip("link show there"));
                });
            });
            let config = TapConfig {
                name: "there".to_owned(),
                netns: Some(receive.recv().unwrap()),
            };
            let taps = open(&config, 2).unwrap();
            assert!(!ip("link show there"));
            assert_eq!(std::fs::read_link("/proc/thread-self/ns/net").unwrap(), outside);
            done.send(()).unwrap();
            assert_eq!(taps.len(), 2);
            // Kept until the other thread has looked.
            taps
        });
    });
}

#[test]
fn open_when_it_cannot_says_why() {
    in_namespace(|| {
        assert!(ip("tuntap add single mode tap"));
        assert!(ip("tuntap add tun mode tun"));
        assert!(ip("link add dummy type bridge"));
        let missing = TapConfig {
            netns: Some("/nonexistent/ns".into()),
            ..tap("x")
        };
        let not_a_namespace = TapConfig {
            netns: Some("/dev/null".into()),
            ..tap("x")
        };
        assert!(matches!(open(&missing, 1), Err(TapError::Namespace { .. })));
        assert!(matches!(
            open(&not_a_namespace, 1),
            Err(TapError::Namespace { .. })
        ));
        assert!(matches!(
            open(&tap("single"), 2),
            Err(TapError::NotMultiQueue { pairs: 2, .. })
        ));
        for other in ["tun", "dummy"] {
            for pairs in [1, 2] {
                let result = open(&tap(other), pairs);
                assert!(
                    matches!(result, Err(TapError::NotATap { .. })),
                    "{other} {pairs}: {result:?}"
                );
            }
        }
        let _first = open(&tap("single"), 1).unwrap();
        let busy = open(&tap("single"), 1).unwrap_err();
        assert!(matches!(busy, TapError::Busy { .. }), "{busy:?}");
        let kinds = [busy.kind(), open(&missing, 1).unwrap_err().kind()];
        assert_eq!(kinds, [OpenErrorKind::Busy, OpenErrorKind::Missing]);
        assert!(busy.to_string().contains("single"));
    });
}

#[test]
fn open_when_the_tap_is_multi_queue_takes_one_or_several() {
    in_namespace(|| {
        assert!(ip("tuntap add multi mode tap multi_queue"));
        drop(open(&tap("multi"), 1).unwrap());
        let taps = open(&tap("multi"), 4).unwrap();
        for tap in &taps[1..] {
            tap.set_enabled(false).unwrap();
            tap.set_enabled(false).unwrap();
        }
        taps[3].set_enabled(true).unwrap();
        taps[0].set_offload(7).unwrap();
    });
}

#[test]
fn with_fds_when_they_are_taps_takes_them_and_refuses_others() {
    in_namespace(|| {
        let config = NetConfig {
            queue_pairs: 2,
            ..NetConfig::new("net0", "handed")
        };
        let fds = || -> Vec<OwnedFd> {
            let taps = open(&config.tap, 2).unwrap();
            taps.into_iter().map(Tap::into_fd).collect()
        };
        assert!(Net::with_fds(&config, fds()).is_ok());
        let one = fds().into_iter().take(1).collect();
        assert!(matches!(
            Net::with_fds(&config, one),
            Err(NetError::Tap {
                source: TapError::DescriptorCount {
                    given: 1,
                    wanted: 2,
                    ..
                },
                ..
            })
        ));
        let files = (0..2)
            .map(|_| std::fs::File::open("/dev/null").unwrap().into())
            .collect();
        let error = Net::with_fds(&config, files).unwrap_err().to_string();
        assert!(error.contains("file descriptor 0: no TAP"), "{error}");
    });
}

#[test]
fn validate_when_a_network_interface_cannot_be_names_what_is_wrong() {
    let error = |change: fn(&mut NetConfig)| {
        let mut config = NetConfig::new("net0", "tap0");
        change(&mut config);
        config.validate().unwrap_err().to_string()
    };
    for name in [
        "",
        "sixteen-letters-",
        "a/b",
        "a b",
        "tap%d",
        ".",
        "..",
        "a:1",
        "täp",
    ] {
        let mut config = NetConfig::new("net0", "tap0");
        config.tap.name = name.to_owned();
        assert!(config.validate().is_err(), "{name:?}");
    }
    assert!(error(|c| c.mac = Some([1, 0, 0, 0, 0, 1])).contains("mac"));
    assert!(error(|c| c.mac = Some([0; 6])).contains("mac"));
    assert!(error(|c| c.mtu = Some(67)).contains("mtu is 67"));
    assert!(error(|c| c.queue_pairs = 0).contains("queue_pairs is 0"));
    assert!(error(|c| c.queue_pairs = 9).contains("queue_pairs is 9"));
    for size in [0, 16, 33, 2048] {
        let mut config = NetConfig::new("net0", "tap0");
        config.queue_size = size;
        assert!(config.validate().is_err(), "{size}");
    }
    assert!(NetConfig::new("net0", "fifteen-letters").validate().is_ok());
}

/// A socket that sees and sends whole frames on interface `name`.
fn packet_socket(name: &str) -> OwnedFd {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};
    let all = u16::to_be(libc::ETH_P_ALL as u16);
    let protocol = rustix::net::Protocol::from_raw(std::num::NonZero::new(u32::from(all)).unwrap());
    let fd = socket_with(
        AddressFamily::PACKET,
        SocketType::RAW,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        Some(protocol),
    )
    .unwrap();
    // SAFETY: all-zero is a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = all;
    address.sll_ifindex = netdevice::name_to_index(&fd, name).unwrap() as i32;
    // SAFETY: the address and its length are right.
    let result = unsafe {
        libc::bind(
            fd.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        )
    };
    assert_eq!(result, 0);
    fd
}

/// An Ethernet frame of an experimental type, so that no protocol answers.
fn ethernet(number: usize, len: usize) -> Vec<u8> {
    let mut bytes = frame(number, len)[12..].to_vec();
    bytes[..14].copy_from_slice(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 0x88, 0xb5]);
    bytes
}

fn real(rig_tap: &str) -> Rig {
    let taps = open(&tap(rig_tap), 1).unwrap();
    assert!(ip(&format!("link set {rig_tap} up")));
    let backends: Vec<_> = taps
        .into_iter()
        .map(|t| Arc::new(t) as Arc<dyn Backend>)
        .collect();
    let mut rig = Rig::new(MERGE);
    rig.net = Net::with_backends(&net_config(), backends).unwrap();
    let guest = &rig.guest;
    rig.rings = (0..2).map(|index| guest.ring(index, 64, false)).collect();
    rig.activate(&[]);
    rig
}

#[test]
fn frames_when_the_tap_is_real_pass_both_ways() {
    in_namespace(|| {
        let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
        let mut rig = real("dbtap");
        let host = packet_socket("dbtap");
        for number in 0..8 {
            rig.offer_rx(number, 300);
        }
        rig.rings[0].kick();
        for number in 0..8u8 {
            let sent = ethernet(number.into(), 512);
            rustix::io::write(&host, &sent).unwrap();
        }
        // Each takes two buffers.
        for number in 0..4 {
            assert_eq!(rig.rings[0].wait_used().len, 300);
            assert_eq!(rig.rings[0].wait_used().len, 212);
            let (count, bytes) = rig.received(2 * number, 300);
            assert_eq!((count, &bytes[12..]), (2, &ethernet(number as usize, 512)[..288]));
        }
        eventually("starvation", || rig.counter("rx_starved") > 0);
        for number in 0..8 {
            rig.offer_rx(number, 300);
        }
        rig.rings[0].kick();
        for _ in 0..8 {
            rig.rings[0].wait_used();
        }

        let mut sent = vec![0; 12];
        sent.extend(ethernet(42, 512));
        rig.offer_tx(0, &sent);
        rig.rings[1].kick();
        let mut seen = vec![0; 4096];
        eventually("the frame on the host", || {
            rustix::io::read(&host, &mut seen[..]).is_ok_and(|len| seen[..len] == ethernet(42, 512))
        });
    });
}

#[test]
fn tap_when_deleted_or_down_neither_blocks_nor_spins() {
    in_namespace(|| {
        let mut rig = real("dbgone");
        rig.offer_rx(0, 300);
        rig.rings[0].kick();
        let mut sent = vec![0; 12];
        sent.extend(ethernet(1, 512));
        assert!(ip("link set dbgone down"));
        rig.offer_tx(0, &sent);
        rig.rings[1].kick();
        rig.rings[1].wait_used();
        eventually("a refused frame", || rig.counter("tx_errors") == 1);
        assert!(ip("link del dbgone"));
        rig.rings[1].round_trip(&[Buf::Read(super::rig::tx_buffer(0), 500)]);
        eventually("a refused frame", || rig.counter("tx_errors") == 2);
        rig.settle();
        let before = cpu_ticks(rig.guest.io.thread_id());
        std::thread::sleep(std::time::Duration::from_millis(300));
        let spent = cpu_ticks(rig.guest.io.thread_id()) - before;
        assert!(spent < 15, "the loop spins: {spent} of 30 ticks");
    });
}

/// User and system time of a thread of this process, in 10 ms.
fn cpu_ticks(thread: i32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/self/task/{thread}/stat")).unwrap();
    let fields = stat.rsplit(')').next().unwrap().split_whitespace();
    fields
        .skip(11)
        .take(2)
        .map(|field| field.parse::<u64>().unwrap())
        .sum()
}
