//! Further processes in a running container.

use tests::Case;
use tests::command::{Input, Running};

#[test]
fn exec_when_process_exits_returns_its_own_code() {
    let case = Case::begin("exec");
    let container = case.container();
    container.sleeping();
    for code in [0, 3, 255] {
        let done = container
            .script(&[], &format!("echo in; echo on >&2; exit {code}"))
            .expect_code(code);
        assert_eq!((done.out().as_str(), done.err().as_str()), ("in\n", "on\n"));
    }
    assert_eq!(container.state().as_deref(), Some("RUNNING"));
}

#[test]
fn exec_when_run_shares_the_container() {
    let case = Case::begin("exec-shares");
    let container = case.container();
    container.detached(&["sh", "-c", "echo mark >/tmp/mark; exec sleep 10000"]);
    let seen = tests::command::eventually(case.limit(), || {
        container.script(&[], "cat /tmp/mark").out() == "mark\n"
    });
    assert!(seen, "the file written by the first process is not there");
    let done = container.script(&[], "cat /proc/1/cmdline | tr '\\0' ' '; cat /proc/1/comm");
    assert!(done.expect_code(0).out().contains("sleep"));
    let same = |ns: &str| {
        let done = container.script(
            &[],
            &format!("readlink /proc/1/ns/{ns}; readlink /proc/self/ns/{ns}"),
        );
        let out = done.expect_code(0).out();
        let links = out.lines().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!((links.len(), links.first()), (2, links.last()), "namespace {ns}");
    };
    ["mnt", "pid", "uts", "ipc", "net"].into_iter().for_each(same);
}

#[test]
fn exec_when_user_and_directory_are_given_uses_them() {
    let case = Case::begin("exec-user");
    let container = case.container();
    container.sleeping();
    let done = container.script(
        &["--user", "1000:1001", "--cwd", "/home/tester"],
        "id -u; id -g; pwd",
    );
    assert_eq!(done.expect_code(0).out(), "1000\n1001\n/home/tester\n");
}

#[test]
fn exec_when_given_stdin_reads_it_to_the_end() {
    let case = Case::begin("exec-stdin");
    let container = case.container();
    container.sleeping();
    let sent = b"line\n".repeat(200_000);
    let mut command = container.exec_command(&[], &["cat"]);
    let done = Running::start(&mut command, Input::Bytes(sent.clone()))
        .unwrap()
        .finish(case.limit())
        .unwrap();
    assert_eq!(done.code, 0, "{}", done.err());
    assert!(
        done.stdout == sent,
        "{} of {} bytes came back",
        done.stdout.len(),
        sent.len()
    );
}

/// More than the pipes in between hold, so everything is open and flowing when the process exits.
#[test]
fn exec_when_process_exits_right_after_1_mib_loses_nothing() {
    let case = Case::begin("exec-burst");
    let container = case.container();
    container.sleeping();
    let done = container.exec(&[], &["sh", "-c", "yes 0123456 | head -c 1048576; exit 9"]);
    let done = done.expect_code(9);
    assert_eq!(done.stdout.len(), 1 << 20);
    assert!(done.stdout.chunks(8).all(|chunk| chunk == b"0123456\n"));
}

#[test]
fn exec_when_command_is_missing_fails_and_leaves_the_container_alone() {
    let case = Case::begin("exec-missing");
    let container = case.container();
    container.sleeping();
    let good = container.exec(&[], &["true"]).expect_code(0);
    let done = container.exec(&[], &["no-such-command"]);
    assert_ne!(done.code, 0, "{}", done.describe());
    assert!(done.err().contains("no-such-command"), "{}", done.describe());
    let bound = good.elapsed * 10 + std::time::Duration::from_secs(60);
    let timeout = done.err().contains("deadline") || done.err().contains("timed out");
    assert!(
        done.elapsed < bound && !timeout,
        "failed by a timeout: {}",
        done.describe()
    );
    assert_eq!(container.state().as_deref(), Some("RUNNING"));
    container.exec(&[], &["true"]).expect_code(0);
}

#[test]
fn exec_when_many_run_at_once_all_answer() {
    let case = Case::begin("exec-many");
    let container = case.container();
    container.sleeping();
    let running = (0..8)
        .map(|n| {
            let script = format!("echo begin {n}; sleep 0.3; echo end {n}; exit {n}");
            Running::start(
                &mut container.exec_command(&[], &["sh", "-c", &script]),
                Input::Null,
            )
            .unwrap()
        })
        .collect::<Vec<_>>();
    for (n, running) in running.into_iter().enumerate() {
        let done = running
            .finish(case.limit())
            .unwrap()
            .expect_code(i32::try_from(n).unwrap());
        assert_eq!(done.out(), format!("begin {n}\nend {n}\n"));
    }
}
