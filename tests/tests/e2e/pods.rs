//! Several containers in one machine, as CRI makes them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tests::case::skipped_under_runc;
use tests::task_api::TaskApi;
use tests::{Case, Container};

const SLEEPER: &str = "trap 'exit 0' TERM; while :; do sleep 1 & wait $!; done";
/// Long enough for a clock that stands still to be seen.
const PAUSE: Duration = Duration::from_secs(60);

#[track_caller]
fn start(container: &Container<'_>, pod: &Container<'_>, kind: &str, script: &str) {
    container
        .run(&["sh", "-c", script])
        .flag("-d")
        .flag("--null-io")
        .option(
            "--annotation",
            &format!("io.kubernetes.cri.container-type={kind}"),
        )
        .option(
            "--annotation",
            &format!("io.kubernetes.cri.sandbox-id={}", pod.id()),
        )
        .output()
        .expect_code(0);
}

#[test]
fn container_when_paused_can_be_killed_and_leaves_its_neighbour_alone() {
    if skipped_under_runc("its containers do not share a machine") {
        return;
    }
    let case = Case::begin("pause-one");
    let api = TaskApi::connect(case.daemon()).unwrap();
    let (pod, paused, other) = (case.container(), case.container(), case.container());
    start(&pod, &pod, "sandbox", SLEEPER);
    start(&paused, &pod, "container", SLEEPER);
    start(&other, &pod, "container", SLEEPER);

    case.ctr(["tasks", "pause", paused.id()]).expect_code(0);
    assert_eq!(paused.state().as_deref(), Some("PAUSED"));
    other.exec(&[], &["true"]).expect_code(0);
    let refused = paused.exec(&[], &["true"]);
    assert_ne!(refused.code, 0, "{}", refused.describe());
    paused.kill("KILL").expect_code(0);
    paused.wait_state(Some("STOPPED"));
    other.exec(&[], &["true"]).expect_code(0);
    assert_eq!(api.delete(paused.id()).unwrap(), 137);
}

#[test]
fn clock_when_a_container_was_paused_for_a_minute_is_the_hosts() {
    let case = Case::begin("pause-clock");
    let container = case.container();
    container.sleeping();
    case.ctr(["tasks", "pause", container.id()]).expect_code(0);
    std::thread::sleep(PAUSE);
    case.ctr(["tasks", "resume", container.id()]).expect_code(0);

    let now = || {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs_f64()
    };
    let before = now();
    let out = container.script(&[], "date +%s").expect_code(0).out();
    let after = now();
    let guest: f64 = out.trim().parse().unwrap();
    // The guest tells whole seconds, and is told the time by a call: on a busy machine that is on its way for a while.
    let late = PAUSE.as_secs_f64() / 4.0;
    assert!(
        guest >= before - late && guest <= after + 1.0,
        "guest {guest}, host {before}..{after}"
    );
}

/// A created container has nothing that could handle a signal; it dies of those that end a pod.
#[test]
fn container_when_created_only_dies_of_term_and_kill() {
    if skipped_under_runc("its waiting process handles signals in its own ways") {
        return;
    }
    let case = Case::begin("kill-created-only");
    let api = TaskApi::connect(case.daemon()).unwrap();
    for (signal, status) in [(15, 143), (9, 137)] {
        let container = case.container();
        container.create_only(&["true"]);
        api.create(container.id(), case.daemon().snapshotter()).unwrap();
        let waiter = api.start_wait(container.id());
        for other in [1, 2, 37] {
            api.kill(container.id(), "", other).unwrap();
        }
        assert!(api.is_waiting(&waiter), "dead of something else");
        api.kill(container.id(), "", signal).unwrap();
        assert_eq!(api.join(waiter).unwrap(), status);
        assert_eq!(api.delete(container.id()).unwrap(), status);
    }
}
