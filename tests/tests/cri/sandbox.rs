//! The sandbox itself: with a pause container, and as the shim's own (Sandbox API).

use rustix::process::{Pid, Signal, kill_process};
use tests::command::eventually;
use tests::cri::config::Series;
use tests::cri::pods::{Pod, Pods};
use tests::cri::wire::{ContainerState, PodSandboxState, PodSandboxStatusResponse};
use tests::leftovers::Host;
use tonic::Code;

/// Kills the pod's shim and waits until the pod is not ready.
///
/// While containerd has `delete` run for the dead shim, up to five seconds, it still asks it for the status of a sandbox of its own,
/// and answers with the error of that: `controllerLocal.Status` in plugins/sandbox/controller.go takes no note of
/// `ttrpc.ErrClosed` (2.1.9). kubelet asks again.
fn loses_its_shim(pods: &Pods, pod: &Pod<'_>) {
    let shim = i32::try_from(pod.shim()).ok().and_then(Pid::from_raw).unwrap();
    kill_process(shim, Signal::KILL).unwrap();
    let mut answer = Ok(PodSandboxStatusResponse::default());
    let unready = eventually(pods.limit(), || {
        answer = pods.client().pod_status(pod.id());
        let status = answer.as_ref().ok().and_then(|answer| answer.status.as_ref());
        status.is_some_and(|status| status.state() == PodSandboxState::Notready)
    });
    assert!(unready, "{answer:?}");
}

fn is_not_ready_once_its_shim_is_dead(pods: &Pods) -> i32 {
    let daemon = pods.case().daemon();
    let before = Host::look(daemon);
    let pod = pods.pod("bridge").run();
    let member = pod.sleeping();
    // Other tests' pods come and go.
    let left = || {
        let mut things = Host::look(daemon).added_since(&before);
        things.retain(|thing| [pod.id(), member.id()].iter().any(|id| thing.contains(id)));
        things
    };
    assert!(
        left().iter().any(|thing| thing.starts_with("bundle")),
        "{:?}",
        left()
    );
    loses_its_shim(pods, &pod);
    let code = member.wait().exit_code;
    pod.stop();
    pod.remove();
    // runc's cgroups stay.
    let clean = !pods.vm() || eventually(pods.limit(), || left().is_empty());
    assert!(clean, "{:#?}", left());
    // Its place is free.
    pods.pod("bridge").run().sleeping().sh("true");
    code
}

#[test]
fn sandbox_when_its_shim_dies_is_not_ready_and_can_be_removed() {
    Pods::like_runc("dead", Series::V1_7, is_not_ready_once_its_shim_is_dead);
}

#[test]
fn sandbox_of_the_shims_own_when_its_shim_dies_is_not_ready_and_can_be_removed() {
    Pods::like_runc_sandbox_api("dead-api", is_not_ready_once_its_shim_is_dead);
}

/// As the end of a pause container for want of memory: its pod is not ready any more, and nothing else of it ends.
fn goes_on_without_its_own_container(pods: &Pods) {
    let pod = pods.pod("bridge").run();
    let member = pod.sleeping();
    let other = pod.sleeping();
    let shim = pod.shim();
    pods.case()
        .ctr(["tasks", "kill", "-s", "KILL", pod.id()])
        .expect_code(0);
    // CRI deletes its task first.
    assert!(
        eventually(pods.limit(), || !pod.ready()),
        "still ready: {:?}",
        pod.status()
    );
    let tasks = pods.case().ctr(["tasks", "ls", "-q"]).expect_code(0).out();
    assert!(!tasks.lines().any(|id| id == pod.id()), "{tasks}");

    assert_eq!(member.status().state(), ContainerState::Running);
    member.sh(&format!("ping -c 1 -W 60 {}", pods.subnets.gateway()));
    other.stop();
    assert_eq!(other.status().exit_code, 0);
    member.sh("true");
    assert_eq!(pod.shim(), shim);
    member.stop();
    assert_eq!(member.status().exit_code, 0);
    // Nothing is left that the machine would be for; a containerd that has sandboxes leaves runc's shim there.
    let ended = !pods.vm() || eventually(pods.limit(), || !is_alive(shim));
    assert!(ended, "the shim serves on");
    pod.stop();
    pod.remove();
    // Its place is free.
    pods.pod("bridge").run().sleeping().sh("true");
}

fn is_alive(process: u32) -> bool {
    std::path::Path::new(&format!("/proc/{process}")).exists()
}

#[test]
fn containers_when_their_sandboxs_own_has_ended_go_on() {
    Pods::like_runc("orphaned", Series::V1_7, goes_on_without_its_own_container);
}

#[test]
fn containers_when_their_sandboxs_own_has_ended_go_on_under_containerd_2() {
    Pods::like_runc("orphaned-2", Series::V2_1, goes_on_without_its_own_container);
}

fn may_be_stopped_twice(pods: &Pods) {
    let pod = pods.pod("bridge").run();
    let member = pod.sleeping();
    pod.stop();
    pod.stop();
    assert!(!pod.ready());
    assert_eq!(member.wait().exit_code, 137);
    // Some containerds create it, and none starts it.
    let refused = pod
        .container(&["true"])
        .try_create()
        .and_then(|late| pods.client().start(late.id()));
    assert!(refused.is_err(), "a container in a stopped pod");
    pod.remove();
    pod.remove();
    let gone = pods.client().pod_status(pod.id()).unwrap_err();
    assert_eq!(gone.code(), Code::NotFound, "{gone}");
}

#[test]
fn sandbox_when_stopped_twice_is_stopped() {
    Pods::like_runc("twice", Series::V2_1, may_be_stopped_twice);
}

#[test]
fn sandbox_of_the_shims_own_when_stopped_twice_is_stopped() {
    Pods::like_runc_sandbox_api("twice-api", may_be_stopped_twice);
}

#[test]
fn sandbox_of_the_shims_own_when_run_has_no_pause_container() {
    Pods::like_runc_sandbox_api("no-pause", |pods| {
        let pod = pods.pod("bridge").run();
        let _member = pod.sleeping();
        let tasks = pods.case().ctr(["tasks", "ls", "-q"]).expect_code(0).out();
        let has = tasks.lines().any(|id| id == pod.id());
        // runc has no sandboxes of its own.
        assert_eq!(has, !pods.vm(), "{tasks}");
        assert!(pod.ready());
        let status = pod.status().status.unwrap_or_default();
        assert!(status.created_at > 0, "{status:?}");
    });
}

#[test]
fn pod_when_containerd_restarts_goes_on() {
    // Its own containerd: the others' pods must not see the restart.
    let pods = Pods::on_its_own("recover", tests::Settings::from_env(), Series::V2_1);
    let pod = pods.pod("bridge").run();
    let member = pod.sleeping();
    let shim = pod.shim();
    pods.case().daemon().stop();
    pods.case().daemon().launch().unwrap();
    assert!(
        eventually(pods.limit(), || pods
            .client()
            .unready()
            .is_ok_and(|list| list.is_empty())),
        "{:?}",
        pods.client().unready()
    );
    assert!(pod.ready());
    assert_eq!(pod.shim(), shim);
    member.sh(&format!("ping -c 1 -W 60 {}", pods.subnets.gateway()));
    member.stop();
    assert_eq!(member.status().exit_code, 0);
    pod.sleeping().sh("true");
    pod.stop();
    pod.remove();
}
