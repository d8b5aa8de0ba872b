//! The path every pod takes, on every containerd.

use tests::cri::config::Series;
use tests::cri::pods::Pods;

fn runs_a_pod_from_start_to_end(pods: &Pods) {
    let pod = pods.pod("bridge").run();
    assert!(pod.ready());
    let member = pod.sleeping();
    let done = member.exec(&["sh", "-c", "echo out; echo err >&2; exit 3"]);
    assert_eq!(
        (done.code, done.out.as_str(), done.err.as_str()),
        (3, "out\n", "err\n")
    );
    let gateway = pods.subnets.gateway();
    member.sh(&format!("ping -c 1 -W 60 {gateway}"));

    let ending = pod
        .container(&["sh", "-c", "echo one; echo two >&2; exit 5"])
        .start();
    assert_eq!(ending.wait().exit_code, 5);
    let mut logged = ending.wait_log("two lines", |lines| lines.len() == 2);
    logged.sort_by(|a, b| a.stream.cmp(&b.stream));
    let logged = logged
        .iter()
        .map(|line| (line.stream.as_str(), line.text.as_str()));
    assert_eq!(logged.collect::<Vec<_>>(), [("stderr", "two"), ("stdout", "one")]);

    member.stop();
    assert_eq!(member.status().exit_code, 0);
    member.remove();
    pod.stop();
    assert!(!pod.ready());
    pod.remove();
}

#[test]
fn pod_when_run_by_containerd_1_6_does_it_all() {
    Pods::like_runc("smoke16", Series::V1_6, runs_a_pod_from_start_to_end);
}

#[test]
fn pod_when_run_by_containerd_1_7_does_it_all() {
    Pods::like_runc("smoke17", Series::V1_7, runs_a_pod_from_start_to_end);
}

#[test]
fn pod_when_run_by_containerd_2_1_does_it_all() {
    Pods::like_runc("smoke21", Series::V2_1, runs_a_pod_from_start_to_end);
}

#[test]
fn pod_when_its_sandbox_is_the_shims_own_does_it_all() {
    Pods::like_runc_sandbox_api("smoke-api", runs_a_pod_from_start_to_end);
}
