//! The task API's contract: waiting, states and codes.

use tests::Case;
use tests::task_api::{RUNNING, STOPPED, TaskApi};
use tonic::Code;

#[test]
fn wait_when_many_clients_ask_before_and_after_exit_answers_all() {
    let case = Case::begin("wait-many");
    let container = case.container();
    let clients = (0..5)
        .map(|_| TaskApi::connect(case.daemon()).unwrap())
        .collect::<Vec<_>>();
    container.detached(&[
        "sh",
        "-c",
        "trap 'exit 21' TERM; >/ready; while :; do sleep 1 & wait $!; done",
    ]);
    let api = clients.first().unwrap();
    assert_eq!(api.get(container.id()).unwrap().status, RUNNING);
    let waiters = clients
        .iter()
        .flat_map(|client| [client; 4])
        .map(|client| (client, client.start_wait(container.id())));
    let waiters = waiters.collect::<Vec<_>>();
    // Before its handler is there SIGTERM changes nothing: the shell is process 1.
    container
        .script(&[], "until [ -e /ready ]; do sleep 0.1; done")
        .expect_code(0);
    let gone = tests::command::eventually(case.limit(), || {
        let _ = api.kill(container.id(), "", 15);
        api.get(container.id())
            .is_ok_and(|process| process.status == STOPPED)
    });
    assert!(gone, "{:?}", api.get(container.id()));
    for (client, waiter) in waiters {
        assert_eq!(client.join(waiter).unwrap(), 21);
    }
    for client in &clients {
        assert_eq!(client.wait(container.id()).unwrap(), 21, "asked after the exit");
    }
    let process = api.get(container.id()).unwrap();
    assert_eq!((process.status, process.exit_status), (STOPPED, 21));
    assert_eq!(api.delete(container.id()).unwrap(), 21);
    assert_eq!(api.wait(container.id()).unwrap_err().code(), Code::NotFound);
}

#[test]
fn delete_when_task_is_running_is_refused() {
    let case = Case::begin("delete-running");
    let container = case.container();
    container.sleeping();
    let api = TaskApi::connect(case.daemon()).unwrap();
    let refused = api.delete(container.id()).unwrap_err();
    // runc's shim has no code for it.
    let code = if case.daemon().settings.is_vm_runtime() {
        Code::FailedPrecondition
    } else {
        Code::Unknown
    };
    assert_eq!(refused.code(), code, "{refused}");
    assert_eq!(container.state().as_deref(), Some("RUNNING"));
    container.exec(&[], &["true"]).expect_code(0);
}

#[test]
fn kill_when_process_is_gone_is_not_found() {
    let case = Case::begin("kill-gone");
    let container = case.container();
    container.detached(&["true"]);
    let api = TaskApi::connect(case.daemon()).unwrap();
    assert_eq!(api.wait(container.id()).unwrap(), 0);
    assert_eq!(
        api.kill(container.id(), "", 15).unwrap_err().code(),
        Code::NotFound
    );
    assert_eq!(
        api.kill(container.id(), "nobody", 15).unwrap_err().code(),
        Code::NotFound
    );
}

#[test]
fn exec_when_id_is_taken_is_refused() {
    let case = Case::begin("exec-twice");
    let container = case.container();
    container.sleeping();
    container
        .exec(&["-d", "--exec-id", "same"], &["sleep", "10000"])
        .expect_code(0);
    let done = container.exec(&["--exec-id", "same"], &["true"]);
    assert_ne!(done.code, 0, "{}", done.describe());
    assert!(done.err().contains("already exists"), "{}", done.describe());
}

#[test]
fn task_when_started_twice_is_refused() {
    let case = Case::begin("start-twice");
    let container = case.container();
    container.sleeping();
    let done = case.ctr(["tasks", "start", "-d", container.id()]);
    assert_ne!(done.code, 0, "{}", done.describe());
    assert!(done.err().contains("already exists"), "{}", done.describe());
    assert_eq!(container.state().as_deref(), Some("RUNNING"));
}

#[test]
fn processes_when_listed_include_the_first() {
    let case = Case::begin("ps");
    let container = case.container();
    container.sleeping();
    let out = case.ctr(["tasks", "ps", container.id()]).expect_code(0).out();
    let pids = out
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next()?.parse::<u32>().ok());
    let pids = pids.collect::<Vec<_>>();
    let api = TaskApi::connect(case.daemon()).unwrap();
    assert!(pids.contains(&api.get(container.id()).unwrap().pid), "{out}");
}

/// `ctr run --cni` and CRI read `/proc/<pid>/ns/net`: the task's pid is a live process of the host.
#[test]
fn pid_when_task_runs_is_a_process_of_the_host() {
    let case = Case::begin("host-pid");
    let container = case.container();
    container.sleeping();
    let pid = TaskApi::connect(case.daemon())
        .unwrap()
        .get(container.id())
        .unwrap()
        .pid;
    assert!(
        std::path::Path::new(&format!("/proc/{pid}/ns/net")).exists(),
        "task pid {pid}"
    );
}
