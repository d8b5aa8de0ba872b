//! Parts that die.

use tests::case::skipped_under_runc;
use tests::command::Input;
use tests::events::{Events, position};
use tests::leftovers::{Host, added};
use tests::{Case, Settings};

#[test]
fn container_when_containerd_restarts_keeps_running() {
    let case = Case::begin_with("restart", Settings::from_env());
    let container = case.container();
    container.detached(&[
        "sh",
        "-c",
        "echo kept >/tmp/mark; trap 'exit 11' TERM; while :; do sleep 1 & wait $!; done",
    ]);
    let seen = || container.script(&[], "cat /tmp/mark").out() == "kept\n";
    assert!(tests::command::eventually(case.limit(), seen));
    let shim = container.shim();
    case.daemon().stop();
    case.daemon().launch().unwrap();
    assert_eq!(container.state().as_deref(), Some("RUNNING"));
    assert_eq!(container.shim(), shim, "the same shim serves the container");
    assert_eq!(
        container.script(&[], "cat /tmp/mark").expect_code(0).out(),
        "kept\n"
    );
    let events = Events::subscribe(case.daemon()).unwrap();
    container.kill("TERM").expect_code(0);
    let id = container.id();
    let exited = |e: &[tests::events::Event]| position(e, "/tasks/exit", id).is_some();
    let seen = events.wait(id, "the exit event", case.limit(), exited).unwrap();
    assert_eq!(
        seen.iter()
            .find(|e| e.topic == "/tasks/exit")
            .unwrap()
            .exit_status(),
        11
    );
    container.wait_state(Some("STOPPED"));
    case.ctr(["tasks", "rm", id]);
    case.ctr(["containers", "rm", id]).expect_code(0);
    case.container()
        .run(&["echo", "again"])
        .flag("--rm")
        .output()
        .expect_code(0);
}

#[test]
fn container_when_it_exits_while_containerd_is_down_is_stopped_afterwards() {
    let case = Case::begin_with("exit-while-down", Settings::from_env());
    let shared = case.daemon().dir().join("flag");
    std::fs::create_dir_all(&shared).unwrap();
    let mount = format!("type=bind,src={},dst=/mnt,options=rbind:rw", shared.display());
    let container = case.container();
    let script = "echo $$ >/mnt/up; while [ ! -e /mnt/go ]; do sleep 0.2; done; echo $$ >/mnt/done; exit 13";
    let run = container
        .run(&["sh", "-c", script])
        .flag("-d")
        .flag("--null-io")
        .option("--mount", &mount);
    run.output().expect_code(0);
    let appears = |name: &str| tests::command::eventually(case.limit(), || shared.join(name).exists());
    assert!(appears("up"));
    case.daemon().stop();
    std::fs::write(shared.join("go"), "").unwrap();
    assert!(appears("done"));
    case.daemon().launch().unwrap();
    container.wait_state(Some("STOPPED"));
    let api = tests::task_api::TaskApi::connect(case.daemon()).unwrap();
    assert_eq!(api.wait(container.id()).unwrap(), 13);
    assert_eq!(api.delete(container.id()).unwrap(), 13);
}

#[test]
fn host_when_shim_was_killed_is_cleaned_by_delete() {
    is_cleaned_after("shim-killed", rustix::process::Signal::KILL);
}

/// What a panic in any thread of the shim comes to: its hook logs it and aborts (`shim/tests/shim/panic.rs`).
#[test]
fn host_when_shim_aborted_is_cleaned_by_delete() {
    is_cleaned_after("shim-aborted", rustix::process::Signal::ABORT);
}

/// A shim that dies of `signal` leaves nothing behind; containerd says that its container has exited.
fn is_cleaned_after(name: &'static str, signal: rustix::process::Signal) {
    let case = Case::begin_alone(name);
    let events = Events::subscribe(case.daemon()).unwrap();
    let before = Host::look(case.daemon());
    let container = case.container();
    let id = container.id();
    container.sleeping();
    container
        .exec(&["-d", "--exec-id", "second"], &["sleep", "10000"])
        .expect_code(0);
    let shim = rustix::process::Pid::from_raw(container.shim()).unwrap();
    rustix::process::kill_process(shim, signal).unwrap();
    let exited = |e: &[tests::events::Event]| position(e, "/tasks/exit", id).is_some();
    let seen = events.wait(id, "the exit event", case.limit(), exited).unwrap();
    assert_eq!(
        seen.iter()
            .find(|e| e.topic == "/tasks/exit")
            .unwrap()
            .exit_status(),
        137
    );
    container.wait_state(None);
    case.ctr(["containers", "rm", id]).expect_code(0);
    let mut left = added(case.daemon(), &before);
    if !case.daemon().settings.is_vm_runtime() {
        // A known flaw of runc's shim.
        left.retain(|item| !item.starts_with("file /run/containerd/s/"));
    }
    assert_eq!(left, [""; 0]);
    case.container()
        .run(&["true"])
        .flag("--rm")
        .output()
        .expect_code(0);
}

#[test]
fn user_data_when_shim_is_killed_at_any_step_is_intact() {
    let case = Case::begin_alone("shim-killed-data");
    let data = case.daemon().dir().join("data");
    std::fs::create_dir_all(data.join("folder")).unwrap();
    for name in ["file", "folder/deep"] {
        std::fs::write(data.join(name), name).unwrap();
    }
    let intact = || {
        ["file", "folder/deep"]
            .iter()
            .all(|name| std::fs::read_to_string(data.join(name)).is_ok_and(|text| text == *name))
    };
    let mount = format!("type=bind,src={},dst=/mnt,options=rbind:rw", data.display());
    let before = Host::look(case.daemon());
    let kill = |container: &tests::Container<'_>| {
        let shim = rustix::process::Pid::from_raw(container.shim()).unwrap();
        rustix::process::kill_process(shim, rustix::process::Signal::KILL).unwrap();
    };
    let script = "trap 'exit 0' TERM; while :; do sleep 1 & wait $!; done";
    for step in ["create", "start", "exec"] {
        let container = case.container();
        let run = container
            .run(&["sh", "-c", script])
            .flag("-d")
            .flag("--null-io")
            .option("--mount", &mount);
        if step == "create" {
            let client = run.start(Input::Null);
            let begun = || container.find_shim().is_some();
            assert!(tests::command::eventually(case.limit(), begun));
            kill(&container);
            let done = client.finish(case.limit()).unwrap();
            assert_ne!(done.code, 0, "{}", done.describe());
        } else {
            run.output().expect_code(0);
            let exec = (step == "exec").then(|| {
                let mut command = container.exec_command(&[], &["sleep", "10000"]);
                tests::Running::start(&mut command, Input::Null).unwrap()
            });
            kill(&container);
            container.wait_state(None);
            drop(exec);
        }
        drop(container);
        assert!(intact(), "killed at {step}");
    }
    let mut left = added(case.daemon(), &before);
    if !case.daemon().settings.is_vm_runtime() {
        // A known flaw of runc's shim.
        left.retain(|item| !item.starts_with("file /run/containerd/s/"));
    }
    assert_eq!(left, [""; 0]);
    assert!(intact());
}

#[test]
fn container_when_run_is_full_can_be_deleted() {
    let case = Case::begin_alone("run-full");
    let before = Host::look(case.daemon());
    let container = case.container();
    container.sleeping();
    let full = FullRun::new();

    container.kill("KILL").expect_code(0);
    container.wait_state(Some("STOPPED"));
    case.ctr(["tasks", "rm", container.id()]).expect_code(0);
    case.ctr(["containers", "rm", container.id()]).expect_code(0);
    full.fill();
    let next = case.container();
    let refused = next.run(&["true"]).flag("-d").flag("--null-io").output();
    drop(next);
    drop(full);

    if case.daemon().settings.is_vm_runtime() {
        let told = refused.err().contains("No space left on device");
        assert!(refused.code != 0 && told, "{}", refused.describe());
    }
    assert_eq!(added(case.daemon(), &before), [""; 0]);
}

/// A /run without space: as big as what is in it.
struct FullRun {
    bytes: u64,
    filler: std::path::PathBuf,
}

impl FullRun {
    fn new() -> Self {
        let stat = rustix::fs::statvfs("/run").unwrap();
        let (bytes, used) = (
            stat.f_blocks * stat.f_frsize,
            (stat.f_blocks - stat.f_bfree) * stat.f_frsize,
        );
        let full = Self {
            bytes,
            filler: "/run/e2e-filler".into(),
        };
        Self::resize(used + (64 << 10));
        full.fill();
        full
    }

    /// Takes what is free, also what somebody has given back since.
    fn fill(&self) {
        let file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(&self.filler);
        let file = file.unwrap();
        while std::io::Write::write_all(&mut &file, &[0; 4096]).is_ok() {}
    }

    fn resize(bytes: u64) {
        let size = format!("remount,size={bytes}");
        let mount = std::process::Command::new("mount")
            .args(["-o", &size, "/run"])
            .status();
        assert!(mount.unwrap().success(), "{size}");
    }
}

impl Drop for FullRun {
    fn drop(&mut self) {
        Self::resize(self.bytes);
        let _ = std::fs::remove_file(&self.filler);
    }
}

#[test]
fn container_when_guest_kernel_panics_exits_with_an_event() {
    // Under runc this would be the host's kernel.
    if skipped_under_runc("a panic of the guest kernel needs a guest kernel") {
        return;
    }
    let case = Case::begin_alone("guest-panic");
    let events = Events::subscribe(case.daemon()).unwrap();
    let before = Host::look(case.daemon());
    let container = case.container();
    let id = container.id();
    let script = "echo up; read -r go; echo c >/proc/sysrq-trigger; sleep 10000";
    let mut running = container
        .run(&["sh", "-c", script])
        .flag("--privileged")
        .start(Input::Open);
    running.wait_out("up", case.limit(), |out| out == "up\n").unwrap();
    running.write(b"go\n").unwrap();
    let exited = |e: &[tests::events::Event]| position(e, "/tasks/exit", id).is_some();
    let seen = events.wait(id, "the exit event", case.limit(), exited).unwrap();
    let exits = seen
        .iter()
        .filter(|e| e.topic == "/tasks/exit")
        .collect::<Vec<_>>();
    assert_eq!(exits.len(), 1, "{seen:#?}");
    assert_ne!(exits.first().unwrap().exit_status(), 0);
    let done = running.finish(case.limit()).unwrap();
    assert_ne!(done.code, 0, "{}", done.describe());
    // What is left is containerd's record, not a virtual machine.
    drop(container);
    drop(events);
    let left = added(case.daemon(), &before);
    assert_eq!(
        left.iter()
            .filter(|item| !item.contains("events"))
            .collect::<Vec<_>>(),
        [""; 0]
    );
}
