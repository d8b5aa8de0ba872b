//! Signals sent from outside.

use tests::Case;
use tests::command::Input;
use tests::task_api::{CREATED, STOPPED, TaskApi};

#[test]
fn kill_when_process_handles_the_signal_lets_it_exit_by_itself() {
    let case = Case::begin("kill-term");
    let container = case.container();
    let script = "trap 'echo bye; exit 9' TERM; echo ready; while :; do sleep 1 & wait $!; done";
    let running = container.run(&["sh", "-c", script]).start(Input::Null);
    running
        .wait_out("ready", case.limit(), |out| out == "ready\n")
        .unwrap();
    container.kill("TERM").expect_code(0);
    let done = running.finish(case.limit()).unwrap().expect_code(9);
    assert_eq!(done.out(), "ready\nbye\n");
}

#[test]
fn kill_when_signal_is_kill_ends_the_container_with_137() {
    let case = Case::begin("kill-9");
    let container = case.container();
    let running = container
        .run(&["sh", "-c", "trap '' TERM; echo ready; exec sleep 10000"])
        .start(Input::Null);
    running
        .wait_out("ready", case.limit(), |out| out == "ready\n")
        .unwrap();
    container.kill("KILL").expect_code(0);
    running.finish(case.limit()).unwrap().expect_code(137);
}

#[test]
fn kill_when_signal_has_no_name_in_ctr_is_sent_by_number() {
    let case = Case::begin("kill-number");
    let container = case.container();
    let script = "trap 'exit 12' USR1; echo ready; while :; do sleep 1 & wait $!; done";
    let running = container.run(&["sh", "-c", script]).start(Input::Null);
    running
        .wait_out("ready", case.limit(), |out| out == "ready\n")
        .unwrap();
    container.kill("10").expect_code(0);
    running.finish(case.limit()).unwrap().expect_code(12);
}

#[test]
fn kill_when_exec_is_named_ends_only_that_exec() {
    let case = Case::begin("kill-exec");
    let container = case.container();
    container.sleeping();
    let mut command = container.exec_command(
        &["--exec-id", "victim"],
        &["sh", "-c", "echo ready; exec sleep 10000"],
    );
    let exec = tests::Running::start(&mut command, Input::Null).unwrap();
    exec.wait_out("ready", case.limit(), |out| out == "ready\n")
        .unwrap();
    case.ctr([
        "tasks",
        "kill",
        "-s",
        "KILL",
        "--exec-id",
        "victim",
        container.id(),
    ])
    .expect_code(0);
    exec.finish(case.limit()).unwrap().expect_code(137);
    assert_eq!(container.state().as_deref(), Some("RUNNING"));
}

#[test]
fn kill_when_container_is_created_only_stops_it() {
    let case = Case::begin("kill-created");
    let container = case.container();
    let api = TaskApi::connect(case.daemon()).unwrap();
    container.create_only(&["awk", "BEGIN{exit 6}"]);
    api.create(container.id(), case.daemon().snapshotter()).unwrap();
    assert_eq!(api.get(container.id()).unwrap().status, CREATED);
    let waiter = api.start_wait(container.id());
    container.kill("KILL").expect_code(0);
    assert_eq!(api.join(waiter).unwrap(), 137);
    let process = api.get(container.id()).unwrap();
    assert_eq!((process.status, process.exit_status), (STOPPED, 137));
    assert_eq!(api.delete(container.id()).unwrap(), 137);
}

#[test]
fn start_when_container_was_created_before_runs_it() {
    let case = Case::begin("create-start");
    let container = case.container();
    let api = TaskApi::connect(case.daemon()).unwrap();
    container.create_only(&["awk", "BEGIN{exit 6}"]);
    api.create(container.id(), case.daemon().snapshotter()).unwrap();
    let waiter = api.start_wait(container.id());
    assert!(api.is_waiting(&waiter), "a created container has not exited");
    api.start(container.id()).unwrap();
    assert_eq!(api.join(waiter).unwrap(), 6);
    assert_eq!(api.delete(container.id()).unwrap(), 6);
}
