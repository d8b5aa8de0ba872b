//! Containers of a pod that see each other's processes (`shareProcessNamespace`): each ends alone.

use tests::case::skipped_under_runc;
use tests::task_api::TaskApi;
use tests::{Case, Container};

#[track_caller]
fn start(container: &Container<'_>, pod: &Container<'_>, kind: &str, namespace: Option<&str>, script: &str) {
    let mut run = container
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
        );
    if let Some(path) = namespace {
        run = run.option("--with-ns", &format!("pid:{path}"));
    }
    run.output().expect_code(0);
}

#[test]
fn container_when_one_that_shares_its_pids_ends_lives_on() {
    if skipped_under_runc("its containers do not share a machine") {
        return;
    }
    let case = Case::begin("shared-pids");
    let api = TaskApi::connect(case.daemon()).unwrap();
    let (pod, ending, staying) = (case.container(), case.container(), case.container());
    let sleeper = |name: &str| {
        format!("export NAME={name}; trap 'exit 3' TERM; while :; do sleep 10000 & wait $!; done")
    };
    start(&pod, &pod, "sandbox", None, &sleeper("pod"));
    // As CRI writes it: the PID namespace of the pod's own container, whose process is one of this host.
    let namespace = format!("/proc/{}/ns/pid", api.get(pod.id()).unwrap().pid);
    start(
        &ending,
        &pod,
        "container",
        Some(&namespace),
        &format!("sleep 4242 & {}", sleeper("ending")),
    );
    start(
        &staying,
        &pod,
        "container",
        Some(&namespace),
        &format!("sleep 4243 & {}", sleeper("staying")),
    );

    // Each sees all of the others.
    let processes = |container: &Container<'_>| container.script(&[], "ps -o args").expect_code(0).out();
    for container in [&ending, &staying] {
        let seen = processes(container);
        for command in [
            "NAME=pod",
            "NAME=ending",
            "NAME=staying",
            "sleep 4242",
            "sleep 4243",
        ] {
            assert!(seen.contains(command), "{command} in {seen}");
        }
    }

    let waiter = api.start_wait(staying.id());
    let ended = api.start_wait(ending.id());
    api.kill(ending.id(), "", 15).unwrap();
    assert_eq!(api.join(ended).unwrap(), 3);
    assert_eq!(api.delete(ending.id()).unwrap(), 3);

    assert!(api.is_waiting(&waiter), "the other ended, too");
    assert_eq!(staying.state().as_deref(), Some("RUNNING"));
    let seen = processes(&staying);
    assert!(seen.contains("sleep 4243") && seen.contains("NAME=pod"), "{seen}");
    // What it left behind went with it, although the namespace's first process lives.
    assert!(!seen.contains("sleep 4242"), "{seen}");

    // And it can be started again in the same pod.
    let again = case.container();
    start(&again, &pod, "container", Some(&namespace), &sleeper("again"));
    assert!(processes(&staying).contains("NAME=again"));
    api.kill(staying.id(), "", 15).unwrap();
    assert_eq!(api.join(waiter).unwrap(), 3);
}
