//! What containers use, what they may, and what happens beyond.

use tests::command::eventually;
use tests::cri::config::Series;
use tests::cri::pods::{Member, Pods};
use tests::cri::wire::{ContainerState, UInt64Value};

const MIB: i64 = 1 << 20;

fn value(number: Option<UInt64Value>) -> u64 {
    number.map(|number| number.value).unwrap_or_default()
}

/// The container's limit of memory as it sees it: cgroup v2, or v1 where the host has that.
fn limit_inside(member: &Member<'_>) -> String {
    member.sh("cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes")
}

#[test]
fn stats_when_a_container_works_tell_what_it_uses() {
    Pods::like_runc("stats", Series::V1_7, |pods| {
        let pod = pods.pod("bridge").run();
        let member = pod.container(&["sh", "-c", "while :; do :; done"]).start();
        let used = |member: &Member<'_>| {
            let stats = pods.client().stats(member.id()).unwrap();
            let (cpu, memory) = (stats.cpu.unwrap_or_default(), stats.memory.unwrap_or_default());
            (
                value(cpu.usage_core_nano_seconds),
                value(memory.working_set_bytes),
            )
        };
        let first = used(&member).0;
        let mut last = (0, 0);
        assert!(
            eventually(pods.limit(), || {
                last = used(&member);
                last.0 > first && last.1 > 0
            }),
            "{first} ns first, then {last:?}"
        );
    });
}

#[test]
fn stats_when_asked_of_a_pod_have_its_containers_and_its_network() {
    Pods::like_runc("pod-stats", Series::V2_1, |pods| {
        let parent = format!("/e2e-cri-{}-{}", std::process::id(), pods.vm());
        let _group = Group::make(&parent);
        let pod = pods
            .pod("bridge")
            .with(|config| config.linux.get_or_insert_default().cgroup_parent = parent)
            .run();
        let member = pod.container(&["sh", "-c", "while :; do :; done"]).start();
        member.sh(&format!("ping -c 3 -s 1000 -W 60 {}", pods.subnets.gateway()));
        let mut stats = Default::default();
        let complete = eventually(pods.limit(), || {
            stats = pods.client().pod_stats(pod.id()).unwrap();
            let interface = stats
                .network
                .clone()
                .and_then(|network| network.default_interface)
                .unwrap_or_default();
            let member = stats
                .containers
                .iter()
                .find(|one| one.attributes.as_ref().is_some_and(|one| one.id == member.id()));
            let cpu = member.and_then(|one| one.cpu.clone()).unwrap_or_default();
            interface.name == "eth0"
                && value(interface.rx_bytes) > 3000
                && value(interface.tx_bytes) > 3000
                && value(cpu.usage_core_nano_seconds) > 0
                && value(stats.memory.clone().unwrap_or_default().usage_bytes) > 0
        });
        assert!(complete, "{stats:#?}");
    });
}

/// A pod's parent cgroup, which is kubelet's to make, on cgroup v2.
struct Group(std::path::PathBuf);

impl Group {
    fn make(name: &str) -> Self {
        let path = std::path::PathBuf::from(format!("/sys/fs/cgroup{name}"));
        if std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
            std::fs::create_dir_all(&path).unwrap();
            let controllers = std::fs::read_to_string(path.join("cgroup.controllers")).unwrap();
            let all = controllers.split_whitespace().map(|name| format!("+{name}"));
            let all = all.collect::<Vec<_>>().join(" ");
            std::fs::write(path.join("cgroup.subtree_control"), all).unwrap();
        }
        Self(path)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Empty once the pod is gone.
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[test]
fn limit_when_updated_holds_in_the_container() {
    Pods::like_runc("update", Series::V2_1, |pods| {
        let pod = pods.pod("bridge").run();
        let member = pod
            .container(&["sleep", "10000"])
            .limits(|limits| limits.memory_limit_in_bytes = 64 * MIB)
            .start();
        assert_eq!(limit_inside(&member), format!("{}\n", 64 * MIB));
        let mut resources = tests::cri::wire::LinuxContainerResources {
            memory_limit_in_bytes: 96 * MIB,
            cpu_shares: 512,
            cpu_period: 100_000,
            cpu_quota: 50_000,
            ..Default::default()
        };
        pods.client().update(member.id(), resources.clone()).unwrap();
        assert_eq!(limit_inside(&member), format!("{}\n", 96 * MIB));
        let told = member.status().resources.and_then(|all| all.linux).unwrap();
        assert_eq!((told.memory_limit_in_bytes, told.cpu_quota), (96 * MIB, 50_000));
        let quota =
            member.sh("cat /sys/fs/cgroup/cpu.max 2>/dev/null || cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us");
        assert!(quota.starts_with("50000"), "{quota}");

        resources.memory_limit_in_bytes = 48 * MIB;
        pods.client().update(member.id(), resources).unwrap();
        assert_eq!(limit_inside(&member), format!("{}\n", 48 * MIB));
    });
}

/// What the memory of a hog is limited to.
const HOG: i64 = 32 * MIB;

/// Two hogs that wait for a word: runc's shim begins to watch a container's memory after its start, and never hears of a kill
/// that came before (containerd-shim-runc-v2, `service.Start`). One is its container's init, the other a child of it.
#[test]
fn container_when_over_its_memory_is_killed_and_named_so() {
    Pods::like_runc("oom", Series::V2_1, |pods| {
        let words = pods.case().folder("words");
        let say = |word: &str| std::fs::write(words.join(word), "").unwrap();
        let pod = pods.pod("bridge").run();
        let hog = |script: &str| {
            let script = format!("hear() {{ until [ -e /words/$1 ]; do sleep 0.1; done; }}; {script}");
            pod.container(&["sh", "-c", &script])
                .mount(words.to_str().unwrap(), "/words")
                .limits(|limits| limits.memory_limit_in_bytes = HOG)
                .start()
        };
        let init = hog("hear init; exec tail /dev/zero");
        let parent = hog("hear child; tail /dev/zero; code=$?; hear end; exit $code");
        let named = |member: &Member<'_>| {
            let mut status = Default::default();
            // containerd hears of the kill and of the end in two events.
            eventually(pods.limit(), || {
                status = member.status();
                status.reason == "OOMKilled"
            });
            assert_eq!(status.reason, "OOMKilled", "{status:?}");
        };

        say("init");
        assert_eq!(init.wait().exit_code, 137);
        // runc's shim reads the count of kills when it is told of a change: too late once containerd has had the cgroup removed.
        if pods.vm() {
            named(&init);
        }

        say("child");
        named(&parent);
        assert_eq!(parent.status().state(), ContainerState::Running);
        parent.sh("true");
        say("end");
        assert_eq!(parent.wait().exit_code, 137);
        named(&parent);
    });
}
