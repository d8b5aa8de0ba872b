//! Network interfaces, each test in a network namespace of its own. They need root.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::thread::JoinHandle;

use dragonball::Vm;
use dragonball::config::{DeviceConfig, NetConfig, VcpuConfig};
use dragonball::vm::ExitReason;

use crate::guest::Scratch;
use crate::{LONG, config, start, wait_for};

/// Bytes of a bulk transfer in each direction.
const BULK: usize = 8 << 20;

/// Runs `test` in a network namespace of its own; what it makes there is gone with it.
pub fn in_namespace(test: impl FnOnce() + Send) {
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

fn host(command: &str) -> bool {
    let mut words = command.split(' ');
    let status = Command::new(words.next().unwrap()).args(words).status();
    status.unwrap().success()
}

/// Gives the TAP `10.0.0.1/24` and `mtu`.
pub fn set_up_tap(name: &str, mtu: u16) {
    assert!(host(&format!("ip address add 10.0.0.1/24 dev {name}")));
    assert!(host(&format!("ip link set {name} mtu {mtu} up")));
}

/// The guest's side.
const SET_UP: &str = "ip address add 10.0.0.2/24 dev eth0; ip link set eth0 up\n";

fn interface(config: NetConfig) -> DeviceConfig {
    DeviceConfig::Net(NetConfig {
        mac: Some([2, 0xdb, 0, 0, 0, 1]),
        ..config
    })
}

/// Bytes that show when they are lost, doubled or swapped.
fn pattern(seed: u64) -> Vec<u8> {
    let mut state = seed;
    let words = std::iter::repeat_with(|| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 32) as u8
    });
    words.take(BULK).collect()
}

/// Serves one connection on `port`.
fn serve<T: Send + 'static>(port: u16, with: impl FnOnce(TcpStream) -> T + Send + 'static) -> JoinHandle<T> {
    let listener = TcpListener::bind(("10.0.0.1", port)).unwrap();
    std::thread::spawn(move || with(listener.accept().unwrap().0))
}

fn give(port: u16, bytes: Vec<u8>) -> JoinHandle<()> {
    serve(port, move |mut stream| stream.write_all(&bytes).unwrap())
}

fn take(port: u16) -> JoinHandle<Vec<u8>> {
    serve(port, |mut stream| {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

fn counter(vm: &Vm, id: &str, name: &str) -> u64 {
    let metrics = vm.metrics();
    let device = metrics.devices.iter().find(|device| device.id == id).unwrap();
    device.counters[name]
}

/// Downloads from 5000 and uploads to 5001; the upload is what was downloaded.
const BOTH_WAYS: &str = "nc 10.0.0.1 5000 < /dev/null > /big; ls -l /big; nc 10.0.0.1 5001 < /big\n";

/// Waits until the test calls [`go`].
const GO: &str = "until nc 10.0.0.1 4999 < /dev/null; do sleep 0.1; done\n";

fn go() {
    serve(4999, drop).join().unwrap();
}

#[test]
fn interface_when_present_at_boot_pings_and_moves_data_both_ways() {
    in_namespace(|| {
        let scratch = Scratch::new();
        let script = format!(
            "{SET_UP}cd /sys/class/net/eth0; echo \"mac $(cat address) mtu $(cat mtu) carrier $(cat carrier)\"\n\
             ping -c 3 10.0.0.1; echo waiting; {GO}{BOTH_WAYS}{GO}"
        );
        let mut config = config(&scratch, &script);
        config.devices = vec![interface(NetConfig {
            mtu: Some(1400),
            ..NetConfig::new("net0", "tap0")
        })];
        let vm = Vm::new(config).unwrap();
        set_up_tap("tap0", 1400);
        vm.start().unwrap();
        wait_for(&vm, "waiting");
        let console = vm.console().tail(100).join("\n");
        assert!(
            console.contains("mac 02:db:00:00:00:01 mtu 1400 carrier 1"),
            "{console}"
        );
        assert!(
            console.contains("3 packets transmitted, 3 packets received"),
            "{console}"
        );
        assert!(host("busybox ping -c 3 -w 60 10.0.0.2"));

        let sent = pattern(1);
        let (download, upload) = (give(5000, sent.clone()), take(5001));
        go();
        download.join().unwrap();
        let received = upload.join().unwrap();
        assert!(
            received == sent,
            "{} bytes came back, not the {BULK} sent",
            received.len()
        );
        // Frames far larger than the MTU: segmentation is left to the kernels.
        for (bytes, frames) in [("rx_bytes", "rx_frames"), ("tx_bytes", "tx_frames")] {
            let (bytes, frames) = (counter(&vm, "net0", bytes), counter(&vm, "net0", frames));
            println!("{bytes} bytes in {frames} frames");
            assert!(bytes as usize > BULK);
        }
        let average = counter(&vm, "net0", "rx_bytes") / counter(&vm, "net0", "rx_frames");
        assert!(
            average > 2 * 1400,
            "{average} bytes a frame to the guest: no large segments"
        );
        for name in ["rx_dropped", "rx_errors", "tx_malformed", "tx_errors"] {
            assert_eq!(counter(&vm, "net0", name), 0, "{name}");
        }
        go();
        assert_eq!(vm.wait_timeout(LONG), Some(ExitReason::PowerOff));
    });
}

#[test]
fn interface_when_it_has_two_queue_pairs_uses_both() {
    in_namespace(|| {
        let scratch = Scratch::new();
        let fetch = "for i in 0 1 2 3; do nc 10.0.0.1 500$i < /dev/null > /got$i & done; wait; sha256sum /got* | cut -c1-64 | uniq -c\n";
        let queues = "echo queues $(ls /sys/class/net/eth0/queues)\n";
        let mut config = config(&scratch, &format!("{SET_UP}{queues}{fetch}{GO}"));
        config.vcpus = VcpuConfig { boot: 2, max: 2 };
        config.devices = vec![interface(NetConfig {
            queue_pairs: 2,
            ..NetConfig::new("net0", "tap0")
        })];
        let vm = Vm::new(config).unwrap();
        set_up_tap("tap0", 1500);
        let sent = pattern(2);
        let servers: Vec<_> = (5000..5004).map(|port| give(port, sent.clone())).collect();
        vm.start().unwrap();
        for server in servers {
            server.join().unwrap();
        }
        wait_for(&vm, "      4 ");
        assert_eq!(counter(&vm, "net0", "control_commands"), 1);
        go();
        assert_eq!(vm.wait_timeout(LONG), Some(ExitReason::PowerOff));
        let console = vm.console().tail(100).join("\n");
        assert!(console.contains("queues rx-0 rx-1 tx-0 tx-1"), "{console}");
        let mut hash = Command::new("sha256sum");
        let path = scratch.write("sent", &sent);
        let output = hash.arg(path).output().unwrap().stdout;
        let expected = String::from_utf8_lossy(&output[..64]).into_owned();
        assert!(console.contains(&format!("4 {expected}")), "{console}");
    });
}

#[test]
fn interface_when_added_while_running_works_and_its_link_can_be_pulled() {
    in_namespace(|| {
        let scratch = Scratch::new();
        let script = format!(
            "echo waiting; until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done\n{SET_UP}\
             until ping -c 1 -W 1 10.0.0.1; do :; done; echo reachable\n\
             cd /sys/class/net/eth0; until [ $(cat carrier) = 0 ]; do sleep 0.1; done; echo pulled\n\
             until [ $(cat carrier) = 1 ]; do sleep 0.1; done; echo plugged\n\
             until ping -c 1 -W 1 10.0.0.1; do :; done; echo reachable again"
        );
        let mut config = config(&scratch, &script);
        config.hotplug_slots = 1;
        let vm = start(config);
        wait_for(&vm, "waiting");
        assert!(host("ip tuntap add tap7 mode tap"));
        set_up_tap("tap7", 1500);
        let (info, handle) = vm.add_net(NetConfig::new("nic", "tap7"), Vec::new()).unwrap();
        assert!(!info.needs_bind);
        wait_for(&vm, "reachable");
        handle.set_link(false);
        wait_for(&vm, "pulled");
        handle.set_link(true);
        wait_for(&vm, "plugged");
        wait_for(&vm, "reachable again");
        assert_eq!(vm.wait_timeout(LONG), Some(ExitReason::PowerOff));
        drop(vm);
        assert!(host("ip link show tap7"), "an existing TAP stays");
    });
}
