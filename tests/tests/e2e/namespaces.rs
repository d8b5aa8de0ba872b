//! containerd's namespaces: an id means nothing outside of its own.

use tests::Case;
use tests::command::{Finished, run};

const SLEEPING: [&str; 3] = [
    "sh",
    "-c",
    "trap 'exit 0' TERM; while :; do sleep 1 & wait $!; done",
];

#[test]
fn containers_when_two_namespaces_use_one_id_live_side_by_side() {
    let case = Case::begin("namespaces");
    let daemon = case.daemon();
    let other = format!("{}-other", daemon.namespace());
    let ctr = |args: &[&str]| -> Finished {
        let mut command = daemon.ctr_command();
        run(command.args(["-n", &other]).args(args), case.limit()).unwrap()
    };
    let archive = daemon.dir().join("image.tar").display().to_string();
    ctr(&[
        "images",
        "import",
        "--snapshotter",
        daemon.snapshotter(),
        &archive,
    ])
    .expect_code(0);
    let first = case.container();
    first.detached(&SLEEPING);
    let mark = first.script(&[], "echo first >/mark; cat /proc/sys/kernel/random/boot_id");
    mark.expect_code(0);

    let second = first
        .run(&SLEEPING)
        .namespace(&other)
        .flag("-d")
        .flag("--null-io");
    second.output().expect_code(0);

    let id = first.id();
    let seen = first.script(&[], "cat /mark").expect_code(0);
    assert_eq!(seen.out(), "first\n");
    let absent = ctr(&["tasks", "exec", "--exec-id", "look", id, "cat", "/mark"]);
    assert_ne!(
        absent.code,
        0,
        "the second has a root of its own: {}",
        absent.describe()
    );
    ctr(&["tasks", "kill", "-s", "KILL", id]).expect_code(0);
    let stopped = tests::command::eventually(case.limit(), || {
        ctr(&["tasks", "ls"])
            .out()
            .lines()
            .any(|line| line.contains("STOPPED"))
    });
    assert!(stopped, "{}", ctr(&["tasks", "ls"]).out());
    ctr(&["tasks", "rm", id]).expect_code(0);
    ctr(&["containers", "rm", id]).expect_code(0);
    assert_eq!(
        first.state().as_deref(),
        Some("RUNNING"),
        "the end of the second is not the first's"
    );
    assert_eq!(first.script(&[], "cat /mark").expect_code(0).out(), "first\n");
}
