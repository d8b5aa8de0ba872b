//! What the containers of a pod share, and what they do not; the pod's own settings.

use std::path::Path;

use tests::cri::config::Series;
use tests::cri::pods::{Pods, map};
use tests::cri::wire::{DnsConfig, NamespaceMode};

const NAMESPACES: [&str; 6] = ["net", "ipc", "uts", "pid", "mnt", "cgroup"];

#[test]
fn namespaces_when_two_containers_are_compared_are_shared_as_asked() {
    let shared = Pods::like_runc("shared", Series::V2_1, |pods| {
        [NamespaceMode::Container, NamespaceMode::Pod].map(|pid| {
            let pod = pods
                .pod("bridge")
                .namespaces(|options| options.pid = pid.into())
                .run();
            let (one, other) = (pod.sleeping(), pod.sleeping());
            let script = NAMESPACES
                .map(|name| format!("readlink /proc/self/ns/{name}"))
                .join(";");
            let (ones, others) = (one.sh(&script), other.sh(&script));
            let pairs = ones.lines().zip(others.lines());
            pairs.map(|(one, other)| one == other).collect::<Vec<_>>()
        })
    });
    // containerd asks for cgroup namespaces where the host has cgroup v2.
    let groups = !Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let apart = vec![true, true, true, false, false, groups];
    let together = vec![true, true, true, true, false, groups];
    assert_eq!(shared, [apart, together], "{NAMESPACES:?}");
}

#[test]
fn processes_when_the_namespace_is_shared_see_each_other_and_are_reaped() {
    Pods::like_runc("share-pid", Series::V2_1, |pods| {
        let pod = pods
            .pod("bridge")
            .namespaces(|options| options.pid = NamespaceMode::Pod.into())
            .run();
        let (one, other) = (pod.container(&["sleep", "4242"]).start(), pod.sleeping());
        let processes = other.sh("ps -o args");
        assert!(processes.lines().any(|line| line == "sleep 4242"), "{processes}");
        // The pod's first process is nobody's container, and takes the orphans.
        let first = other.sh("tr '\\0' ' ' </proc/1/cmdline");
        assert!(!first.contains("sleep") && !first.contains("trap"), "{first:?}");
        other.sh("(sleep 0 & exec true); (sleep 0 & exec true)");
        let mut zombies = String::new();
        let reaped = tests::command::eventually(pods.limit(), || {
            zombies = other.sh("ps -o stat,args");
            !zombies.lines().any(|line| line.starts_with('Z'))
        });
        assert!(reaped, "{zombies}");
        // A signal from the neighbour.
        other.sh("kill -KILL $(ps -o pid,args | awk '$2 == \"sleep\" && $3 == 4242 { print $1 }')");
        assert_eq!(one.wait().exit_code, 137);
        other.sh("true");
    });
}

#[test]
fn memory_when_shared_is_the_pods() {
    Pods::like_runc("shm", Series::V1_7, |pods| {
        let pod = pods.pod("bridge").run();
        let (one, other) = (pod.sleeping(), pod.sleeping());
        one.sh("echo from one >/dev/shm/word");
        assert_eq!(other.sh("cat /dev/shm/word"), "from one\n");
        // 64 MiB, as containerd sets it.
        assert_eq!(
            other.sh("df -k /dev/shm | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2"),
            "65536\n"
        );
        // What one leaves stays for the next.
        one.stop();
        one.remove();
        assert_eq!(pod.sleeping().sh("cat /dev/shm/word"), "from one\n");
    });
}

#[test]
fn settings_when_given_to_the_pod_hold_in_its_containers() {
    let seen = Pods::like_runc("settings", Series::V1_7, |pods| {
        let pod = pods
            .pod("bridge")
            .with(|config| {
                config.hostname = "some-host".to_owned();
                config.dns_config = Some(DnsConfig {
                    servers: vec!["10.96.0.10".to_owned()],
                    searches: vec!["e2e.svc.cluster.local".to_owned(), "svc.cluster.local".to_owned()],
                    options: vec!["ndots:5".to_owned()],
                });
                config.linux.get_or_insert_default().sysctls = map(&[
                    ("net.core.somaxconn", "777"),
                    ("net.ipv4.ip_local_port_range", "20000 20999"),
                    ("net.ipv4.conf.all.arp_ignore", "1"),
                    ("kernel.shm_rmid_forced", "1"),
                ]);
            })
            .run();
        // Kubelet's, with the pod's name in it.
        let folder = pods.case().folder("etc");
        let hosts = folder.join("hosts");
        std::fs::write(&hosts, format!("127.0.0.1 localhost\n{} some-host\n", "10.1.2.3")).unwrap();
        let member = pod
            .container(&["sleep", "10000"])
            .mount(text(&hosts), "/etc/hosts")
            .start();
        [
            "hostname",
            "uname -n",
            "cat /etc/hostname",
            "cat /etc/resolv.conf",
            "cat /etc/hosts",
            "cat /proc/sys/net/core/somaxconn",
            "cat /proc/sys/net/ipv4/ip_local_port_range",
            "cat /proc/sys/net/ipv4/conf/all/arp_ignore",
            "cat /proc/sys/net/ipv4/ip_unprivileged_port_start",
            "cat /proc/sys/kernel/shm_rmid_forced",
        ]
        .map(|script| member.sh(script))
    });
    assert_eq!(seen[0], "some-host\n");
    assert!(
        seen[3].contains("nameserver 10.96.0.10") && seen[3].contains("ndots:5"),
        "{seen:?}"
    );
    assert_eq!(&seen[5..7], ["777\n", "20000\t20999\n"]);
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
