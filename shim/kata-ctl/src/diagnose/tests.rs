//! A host made of files: what a person needs to see is there, by name.

use std::fs;
use std::os::unix::fs::symlink;

use super::*;

/// A host with a shim (7) of sandbox `web` and a folder that the shim of `gone` left.
fn host() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let write = |path: &str, content: &str| {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    };
    let shim = "/usr/local/bin/containerd-shim-kata-v2";
    write(
        "proc/7/cmdline",
        &format!("{shim}\0-namespace\0k8s.io\0-id\0web\0-address\0/c.sock\0"),
    );
    write(
        "proc/7/status",
        "Name:\tshim\nState:\tS (sleeping)\nThreads:\t9\n",
    );
    write("proc/7/task/8/comm", "vcpu0\n");
    write("proc/7/task/8/stat", "8 (vcpu0) R 1 7 7 0 -1 0 0 0 0 0 41 42 0 0");
    write(
        "proc/7/task/8/stack",
        "[<0>] kvm_vcpu_block+0x1\n[<0>] kvm_vcpu_ioctl+0x2\n",
    );
    symlink("/run/bundles/web", root.path().join("proc/7/cwd")).unwrap();
    write(
        "proc/9/cmdline",
        &format!("{shim}\0-namespace\0k8s.io\0-id\0other\0start\0"),
    );
    write("proc/self/cmdline", "x");
    write("sys/kernel/debug/kvm/7-11/vcpu0/exits", "815\n");
    write("sys/kernel/debug/kvm/7-11/vcpu0/halt_exits", "0\n");
    write("run/kata/web/console.log", "Kernel panic - not syncing: VFS\n");
    write("run/kata/web/journal", "first\nsecond\n");
    write(
        "run/kata/gone/journal",
        "{\"undo\":\"unmount\",\"path\":\"/x\"}\n",
    );
    root
}

#[test]
fn report_when_shim_lives_shows_threads_counters_console_and_journal() {
    let root = host();

    let report = report(root.path(), Some("web"));

    assert!(report.found);
    for expected in [
        "sandbox web of namespace k8s.io: shim 7, bundle /run/bundles/web",
        "State: S (sleeping)",
        "vcpu0 8: R user 41 system 42 kvm_vcpu_block+0x1 < kvm_vcpu_ioctl+0x2",
        "vcpu0 exits: 815",
        "Kernel panic - not syncing: VFS",
        "2 entries, last first\nsecond\nfirst\n",
    ] {
        assert!(report.text.contains(expected), "{expected}: {}", report.text);
    }
    assert!(
        !report.text.contains("halt_exits") && !report.text.contains("gone"),
        "{}",
        report.text
    );
}

#[test]
fn report_when_two_namespaces_use_one_id_keeps_them_apart() {
    let root = host();
    let write = |path: &str, content: &str| {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    };
    write(
        "proc/12/cmdline",
        "/bin/containerd-shim-kata-v2\0-namespace\0default\0-id\0web\0-address\0/c.sock\0",
    );
    write("run/kata/default@web/console.log", "the other console\n");
    write("run/kata/moby@web/journal", "left\n");

    let text = report(root.path(), Some("web")).text;

    let (kubernetes, other) = text.split_once("of namespace default").unwrap();
    assert!(
        kubernetes.contains("not syncing: VFS") && !kubernetes.contains("the other console"),
        "{text}"
    );
    assert!(other.contains("the other console"), "{text}");
    assert!(other.contains("sandbox moby@web: LEFT BEHIND"), "{text}");
}

#[test]
fn report_when_folder_has_no_shim_says_that_it_was_left_behind() {
    let root = host();

    let report = report(root.path(), None);

    assert!(
        report.text.contains("sandbox gone: LEFT BEHIND"),
        "{}",
        report.text
    );
    assert!(
        !report.text.contains("sandbox web: LEFT BEHIND"),
        "{}",
        report.text
    );
    // A starter serves nothing.
    assert!(!report.text.contains("sandbox other"), "{}", report.text);
}

#[test]
fn report_when_sandbox_is_unknown_is_a_failure_that_says_where_to_look() {
    let root = host();

    let report = report(root.path(), Some("nobody"));

    assert!(
        !report.found && report.text.contains("sandbox nobody") && report.text.contains("containerd's log")
    );
}

#[test]
fn report_when_nothing_runs_says_so() {
    let root = tempfile::tempdir().unwrap();

    let report = report(root.path(), None);

    assert!(report.found && report.text.starts_with("No sandboxes"));
}

#[test]
fn report_when_a_process_is_watched_shows_every_thread() {
    let text = process::activity(Path::new("/"), std::process::id());

    assert!(text.contains(": S ") || text.contains(": R "), "{text}");
}
