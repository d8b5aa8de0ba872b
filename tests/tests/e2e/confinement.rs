//! What the threads of a shim may do: nothing that they need not.

use std::fs;
use std::io;
use std::path::PathBuf;

use tests::case::skipped_under_runc;
use tests::events::{Event, Events, position};
use tests::leftovers::{Host, added};
use tests::{Case, Container, hijack};

/// CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP.
const OF_FILE_SERVERS: &str = "00000000880000df";
/// CAP_DAC_OVERRIDE, for sockets of others.
const OF_CONNECTOR: &str = "0000000000000002";
const NONE: &str = "0000000000000000";
/// They do what only privileged threads can (`dragonball::confinement`).
const PRIVILEGED: [&str; 2] = ["vmm-starter", "vmm-reaper"];

/// Folder and name of each thread of a process.
fn threads(pid: i32) -> Vec<(PathBuf, String)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let thread = |task: io::Result<fs::DirEntry>| {
        let path = task.unwrap().path();
        // It may have ended.
        let name = fs::read_to_string(path.join("comm")).ok()?;
        Some((path, name.trim().to_owned()))
    };
    tasks.filter_map(thread).collect()
}

/// The values of `names` in a thread's status.
fn status<const N: usize>(task: &std::path::Path, names: [&str; N]) -> [String; N] {
    let status = fs::read_to_string(task.join("status")).unwrap();
    names.map(|name| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("{name} in {status}"))
            .trim()
            .to_owned()
    })
}

#[test]
fn threads_when_a_pod_runs_have_given_up_what_they_do_not_need() {
    if skipped_under_runc("its shim has no such threads") {
        return;
    }
    let case = Case::begin("confined");
    let container = case.container();
    container.sleeping();
    let mut seen = Vec::new();
    for (task, name) in threads(container.shim()) {
        let is = |prefix: &str| name.starts_with(prefix);
        if !(is("vcpu") || is("vmm-") || is("fs-") || is("blk")) || PRIVILEGED.contains(&&*name) {
            continue;
        }
        let kept = match () {
            () if is("fs-") => OF_FILE_SERVERS,
            () if is("vmm-connector") => OF_CONNECTOR,
            () => NONE,
        };
        let names = [
            "Seccomp:",
            "NoNewPrivs:",
            "CapEff:",
            "CapPrm:",
            "CapBnd:",
            "CapInh:",
            "CapAmb:",
        ];
        assert_eq!(
            status(&task, names),
            ["2", "1", kept, kept, kept, NONE, NONE],
            "{name}"
        );
        seen.push(name);
    }
    for expected in ["vcpu0", "vmm-io", "vmm-connector", "fs-"] {
        assert!(
            seen.iter().any(|name| name.starts_with(expected)),
            "{expected}: {seen:?}"
        );
    }
}

#[test]
fn pod_when_a_thread_of_its_shim_opens_a_file_ends_and_says_so() {
    let path = c"/etc/shadow";
    ends_after(
        "opens",
        "vcpu0",
        "openat",
        |at| {
            (
                libc::SYS_openat,
                [libc::AT_FDCWD as u64, at, libc::O_RDWR as u64, 0],
            )
        },
        path,
    );
}

#[test]
fn pod_when_a_thread_of_its_shim_executes_a_program_ends_and_says_so() {
    ends_after(
        "executes",
        "vmm-io",
        "execve",
        |at| (libc::SYS_execve, [at, 0, 0, 0]),
        c"/bin/sh",
    );
}

/// A thread of a shim that makes a forbidden call ends its pod, with a line in the log. Nothing is left behind, and others go on.
fn ends_after(
    name: &'static str,
    thread: &str,
    call: &str,
    make: impl Fn(u64) -> hijack::Call,
    text: &std::ffi::CStr,
) {
    if skipped_under_runc("its shim has no such threads") {
        return;
    }
    let case = Case::begin_alone(name);
    case.expect_violations();
    let events = Events::subscribe(case.daemon()).unwrap();
    let before = Host::look(case.daemon());
    let container: Container<'_> = case.container();
    let id = container.id();
    container.sleeping();
    let (task, _) = threads(container.shim())
        .into_iter()
        .find(|(_, name)| name == thread)
        .unwrap_or_else(|| panic!("no thread {thread}"));
    let tid = task.file_name().unwrap().to_str().unwrap().parse().unwrap();

    let hijacked = tests::command::eventually(case.limit(), || hijack::inject(tid, text, &make).unwrap());
    assert!(hijacked, "{thread} is never in a system call");

    let exited = |e: &[Event]| position(e, "/tasks/exit", id).is_some();
    let seen = events.wait(id, "the exit event", case.limit(), exited).unwrap();
    let exit = seen.iter().find(|e| e.topic == "/tasks/exit").unwrap();
    assert_eq!(exit.exit_status(), 137);
    container.wait_state(None);
    let told = || case.violations();
    assert!(tests::command::eventually(case.limit(), || !told().is_empty()));
    let told = told();
    assert_eq!(told.len(), 1, "{told:#?}");
    for part in [format!("thread={thread} "), format!("syscall={call} ")] {
        assert!(told[0].contains(&part), "{told:?}");
    }
    case.ctr(["containers", "rm", id]).expect_code(0);
    assert_eq!(added(case.daemon(), &before), [""; 0]);
    case.container()
        .run(&["true"])
        .flag("--rm")
        .output()
        .expect_code(0);
}
