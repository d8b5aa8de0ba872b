//! The newer containerds: the same shim serves them all.
//!
//! They are Debian packages of later suites, unpacked into folders of their own; `E2E_CONTAINERD_1_7` and
//! `E2E_CONTAINERD_2_1` name the folders of their programs.

// All of it is a test; clippy.toml knows functions with an attribute for that only.
#![allow(clippy::expect_used, clippy::unwrap_used)]

use tests::events::{Event, Events, position};
use tests::{Case, Settings};

/// A test on the containerd of this version, which must be installed.
#[track_caller]
fn begin(name: &str, version: &str) -> Case {
    let folder = Settings::newer_containerd(version);
    assert!(
        folder.join("containerd").exists(),
        "no containerd {version} in {}",
        folder.display()
    );
    let case = Case::begin_with(
        name,
        Settings {
            containerd: folder,
            ..Settings::from_env()
        },
    );
    let answer = case.ctr(["version"]).expect_code(0).out();
    let versions = answer
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Version:"));
    let ours = versions
        .filter(|v| {
            v.trim_start_matches([' ', 'v'])
                .starts_with(&format!("{version}."))
        })
        .count();
    assert_eq!(ours, 2, "client and server are {version}: {answer}");
    case
}

fn runs_a_container_from_start_to_end(case: &Case) {
    let events = Events::subscribe(case.daemon()).unwrap();
    let hello = case.container();
    let done = hello
        .run(&["sh", "-c", "echo hello; exit 3"])
        .flag("--rm")
        .output()
        .expect_code(3);
    assert_eq!(done.out(), "hello\n");

    let container = case.container();
    container.sleeping();
    let done = container
        .script(&["--exec-id", "one"], "echo in; exit 5")
        .expect_code(5);
    assert_eq!(done.out(), "in\n");
    container.kill("KILL").expect_code(0);
    container.wait_state(Some("STOPPED"));
    let id = container.id();
    case.ctr(["tasks", "rm", id]);
    let mut topics = vec!["create", "start", "exec-added", "exec-started", "exit", "exit"];
    let mut last = "/tasks/exit";
    // runc's shim may shut down before its last event is out.
    if case.daemon().settings.is_vm_runtime() {
        topics.push("delete");
        last = "/tasks/delete";
    }
    let ended = |e: &[Event]| position(e, last, id).is_some();
    let seen = events.wait(id, "the last event", case.limit(), ended).unwrap();
    // Deleting the exec is an event of its own in some versions.
    let kept = |e: &&Event| e.topic != "/tasks/delete" || (e.process() == id && last == e.topic);
    let main = seen
        .iter()
        .filter(kept)
        .map(|e| e.topic.trim_start_matches("/tasks/"));
    assert_eq!(main.collect::<Vec<_>>(), topics, "{seen:#?}");
    let exits = seen
        .iter()
        .filter(|e| e.topic == "/tasks/exit")
        .map(|e| (e.process(), e.exit_status()));
    assert_eq!(exits.collect::<Vec<_>>(), [("one", 5), (id, 137)]);
}

fn survives_a_restart_of_containerd(case: &Case) {
    let container = case.container();
    container.sleeping();
    let shim = container.shim();
    case.daemon().stop();
    case.daemon().launch().unwrap();
    assert_eq!(container.state().as_deref(), Some("RUNNING"));
    assert_eq!(container.shim(), shim, "the same shim serves the container");
    container.exec(&[], &["sh", "-c", "exit 6"]).expect_code(6);
    container.kill("KILL").expect_code(0);
    container.wait_state(Some("STOPPED"));
    case.ctr(["tasks", "rm", container.id()]);
    case.ctr(["containers", "rm", container.id()]).expect_code(0);
}

fn refuses_a_missing_command(case: &Case) {
    let done = case.container().run(&["no-such-command"]).flag("--rm").output();
    assert_ne!(done.code, 0, "{}", done.describe());
    assert!(done.err().contains("no-such-command"), "{}", done.describe());
}

#[test]
fn containerd_1_7_when_container_runs_does_it_all() {
    let case = begin("c17", "1.7");
    runs_a_container_from_start_to_end(&case);
    refuses_a_missing_command(&case);
}

#[test]
fn containerd_1_7_when_restarted_keeps_the_container() {
    survives_a_restart_of_containerd(&begin("c17-restart", "1.7"));
}

#[test]
fn containerd_2_1_when_container_runs_does_it_all() {
    let case = begin("c21", "2.1");
    runs_a_container_from_start_to_end(&case);
    refuses_a_missing_command(&case);
}

#[test]
fn containerd_2_1_when_restarted_keeps_the_container() {
    survives_a_restart_of_containerd(&begin("c21-restart", "2.1"));
}
