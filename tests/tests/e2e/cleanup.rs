//! Nothing stays behind.

use tests::Case;
use tests::command::Input;
use tests::leftovers::{Host, added};

#[test]
fn host_when_container_was_removed_is_as_before() {
    let case = Case::begin_alone("leftovers");
    // The first container makes what is made once, such as the namespace's cgroup.
    case.container()
        .run(&["true"])
        .flag("--rm")
        .output()
        .expect_code(0);
    let before = Host::look(case.daemon());
    let container = case.container();
    let running = container
        .run(&["sh", "-c", "echo up; read -r go; exit 4"])
        .flag("--rm")
        .start(Input::Open);
    let mut running = running;
    running.wait_out("up", case.limit(), |out| out == "up\n").unwrap();
    container.exec(&[], &["true"]).expect_code(0);
    let during = Host::look(case.daemon()).added_since(&before);
    // Mounts and cgroups of a container are the guest's when there is one.
    let vm = case.daemon().settings.is_vm_runtime();
    let hosts = if vm { &[][..] } else { &["mount", "cgroup"][..] };
    for kind in ["process", "file", "bundle"].iter().chain(hosts) {
        let seen = during.iter().any(|item| item.starts_with(kind));
        assert!(
            seen,
            "the comparison does not see a running container's {kind}: {during:#?}"
        );
    }
    running.write(b"go\n").unwrap();
    running.finish(case.limit()).unwrap().expect_code(4);
    assert_eq!(added(case.daemon(), &before), [""; 0]);
}

#[test]
fn host_when_container_was_killed_and_removed_is_as_before() {
    let case = Case::begin_alone("leftovers-kill");
    let before = Host::look(case.daemon());
    let container = case.container();
    container.sleeping();
    container
        .exec(&["-d", "--exec-id", "still"], &["sleep", "10000"])
        .expect_code(0);
    container.kill("KILL").expect_code(0);
    container.wait_state(Some("STOPPED"));
    case.ctr(["tasks", "rm", container.id()]).expect_code(0);
    case.ctr(["containers", "rm", container.id()]).expect_code(0);
    assert_eq!(added(case.daemon(), &before), [""; 0]);
}

#[test]
fn host_when_command_was_not_found_is_as_before() {
    let case = Case::begin_alone("not-found");
    let good = case
        .container()
        .run(&["true"])
        .flag("--rm")
        .output()
        .expect_code(0);
    let before = Host::look(case.daemon());
    let done = case.container().run(&["no-such-command"]).flag("--rm").output();
    assert_ne!(done.code, 0, "{}", done.describe());
    assert!(done.err().contains("no-such-command"), "{}", done.describe());
    let bound = good.elapsed * 10 + std::time::Duration::from_secs(60);
    let timeout = done.err().contains("deadline") || done.err().contains("timed out");
    assert!(
        done.elapsed < bound && !timeout,
        "failed by a timeout: {}",
        done.describe()
    );
    assert_eq!(added(case.daemon(), &before), [""; 0]);
}
