//! Nothing of a pod stays behind, whatever its end.

use rustix::process::{Pid, Signal, kill_process};
use tests::command::eventually;
use tests::cri::config::Series;
use tests::cri::pods::{Pod, Pods};
use tests::cri::private::Traces;
use tests::leftovers::{Host, added};

fn look(pods: &Pods) -> (Host, Traces) {
    let daemon = pods.case().daemon();
    (Host::look(daemon), Traces::look(daemon.dir()))
}

#[track_caller]
fn assert_as_before(pods: &Pods, before: &(Host, Traces)) {
    let daemon = pods.case().daemon();
    let mut things = added(daemon, &before.0);
    if !pods.vm() {
        // Nobody removes the socket of a shim of runc's that was killed.
        things.retain(|thing| !thing.starts_with("file /run/containerd/s/"));
    }
    assert_eq!(things, [""; 0]);
    let mut traces = Vec::new();
    // The kernel notices in its own time that a bridge has no port any more.
    eventually(pods.limit(), || {
        traces = Traces::look(daemon.dir()).added_since(&before.1);
        traces.is_empty()
    });
    assert_eq!(traces, [""; 0]);
}

/// A pod with everything that leaves traces.
fn busy(pods: &Pods) -> Pod<'_> {
    let pod = pods.pod("bridge").port(8280, 8080).run();
    pod.web("up").sh("true");
    pod
}

#[test]
fn host_when_a_pod_was_removed_is_as_before() {
    Pods::like_runc_alone("pod-leftovers", Series::V1_7, |pods| {
        // The first pod makes what is made once: the bridge, the chains all pods share.
        busy(pods).remove();
        let before = look(pods);
        let pod = busy(pods);
        let during = look(pods);
        let (things, traces) = (during.0.added_since(&before.0), during.1.added_since(&before.1));
        for kind in ["network namespace", "interface", "process"] {
            assert!(
                things.iter().any(|item| item.starts_with(kind)),
                "no {kind}: {things:#?}"
            );
        }
        for kind in ["iptables", "reserved"] {
            assert!(
                traces.iter().any(|item| item.starts_with(kind)),
                "no {kind}: {traces:#?}"
            );
        }
        pod.stop();
        pod.remove();
        assert_as_before(pods, &before);
    });
}

/// The namespace as the host sees it: links and what filters their packets.
fn namespace(pod: &Pod<'_>) -> Vec<String> {
    let mut lines = Vec::new();
    for words in [
        &["ip", "-o", "-br", "link"][..],
        &["ip", "-o", "-br", "addr"],
        &["tc", "qdisc", "show"],
        &["nft", "list", "ruleset"],
        &["ip", "rule"],
        &["ip", "route", "show", "table", "all"],
    ] {
        lines.extend(pod.in_netns(words).lines().map(str::to_owned));
    }
    lines
}

#[test]
fn namespace_when_the_shim_was_killed_is_as_the_plugins_made_it() {
    Pods::like_runc_alone("killed-leftovers", Series::V1_7, |pods| {
        busy(pods).remove();
        let before = look(pods);
        let pod = busy(pods);
        let shim = i32::try_from(pod.shim()).ok().and_then(Pid::from_raw).unwrap();
        kill_process(shim, Signal::KILL).unwrap();
        let mut left = Vec::new();
        let clean = eventually(pods.limit(), || {
            left = namespace(&pod);
            let ours = |line: &String| {
                ["tap", "ingress", "clsact", "redirect", "kata", "dragonball"]
                    .iter()
                    .any(|word| line.contains(word))
            };
            !left.iter().any(ours)
        });
        assert!(clean, "{left:#?}");
        let (loopback, uplink) = (
            left.iter().any(|line| line.starts_with("lo ")),
            left.iter().any(|line| line.starts_with("eth0")),
        );
        assert!(loopback && uplink, "{left:#?}");
        // The plugins' own DEL works now.
        pod.stop();
        // containerd hears from an event that the container of a dead shim has ended: kubelet, too, asks until it has.
        let mut removed = Ok(());
        eventually(pods.limit(), || {
            removed = pods.client().remove_pod(pod.id());
            removed.is_ok()
        });
        removed.unwrap();
        assert_as_before(pods, &before);
    });
}

#[test]
fn host_when_the_network_could_not_be_made_is_as_before() {
    Pods::like_runc_alone("broken-network", Series::V1_7, |pods| {
        let refused = pods.pod("broken").try_run().err().expect("a plugin fails");
        assert!(refused.message().contains("e2e_none"), "{refused}");
        let before = look(pods);
        let refused = pods.pod("broken").try_run().err().expect("a plugin fails");
        assert!(refused.message().contains("e2e_none"), "{refused}");
        assert_as_before(pods, &before);
    });
}
