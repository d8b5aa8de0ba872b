//! Containers beside each other.

use std::collections::BTreeSet;

use tests::Case;
use tests::case::skipped_under_runc;
use tests::command::Input;

const COUNT: usize = 10;

#[test]
fn containers_when_ten_run_at_once_do_not_mix() {
    let case = Case::begin("ten");
    let containers = (0..COUNT).map(|_| case.container()).collect::<Vec<_>>();
    let script = |n: usize| {
        format!("echo up {n}; cat /proc/sys/kernel/random/boot_id; read -r go; echo $go; exit {n}")
    };
    let mut running = containers
        .iter()
        .enumerate()
        .map(|(n, container)| container.run(&["sh", "-c", &script(n)]).start(Input::Open))
        .collect::<Vec<_>>();
    for running in &running {
        running
            .wait_out("two lines", case.limit(), |out| out.lines().count() == 2)
            .unwrap();
    }
    let boots = running
        .iter()
        .map(|r| r.out().lines().nth(1).unwrap().to_owned())
        .collect::<BTreeSet<_>>();
    let shims = containers
        .iter()
        .map(tests::Container::shim)
        .collect::<BTreeSet<_>>();
    if case.daemon().settings.is_vm_runtime() {
        assert_eq!(shims.len(), COUNT, "one shim per container");
        assert_eq!(boots.len(), COUNT, "one kernel per container: {boots:?}");
        for shim in &shims {
            assert!(
                has_open(*shim, "anon_inode:kvm-vm"),
                "shim {shim} runs no virtual machine"
            );
        }
    }
    for (n, running) in running.iter_mut().enumerate() {
        running.write(format!("go {n}\n").as_bytes()).unwrap();
    }
    for (n, running) in running.into_iter().enumerate() {
        let done = running
            .finish(case.limit())
            .unwrap()
            .expect_code(i32::try_from(n).unwrap());
        let lines = done.out();
        assert_eq!(lines.lines().next(), Some(format!("up {n}").as_str()));
        assert_eq!(lines.lines().last(), Some(format!("go {n}").as_str()));
    }
}

#[test]
fn kernel_when_container_runs_is_not_the_hosts() {
    if skipped_under_runc("its containers share the host's kernel") {
        return;
    }
    let case = Case::begin("own-kernel");
    let script = "cat /proc/sys/kernel/random/boot_id; cat /proc/version";
    let done = case
        .container()
        .run(&["sh", "-c", script])
        .flag("--rm")
        .output()
        .expect_code(0);
    let out = done.out();
    let host = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    assert_ne!(
        out.lines().next(),
        host.lines().next(),
        "the same boot id as the host"
    );
    assert_eq!(out.lines().count(), 2, "{out}");
}

/// What CRI does with annotations: the first container is the pod's sandbox, the others join its machine.
#[test]
fn containers_when_they_name_a_sandbox_share_its_machine() {
    let case = Case::begin("pod");
    let (sandbox, app) = (case.container(), case.container());
    let pod = format!("io.kubernetes.cri.sandbox-id={}", sandbox.id());
    let annotated = |container: &tests::Container<'_>, kind: &str, command: &[&str]| {
        let kind = format!("io.kubernetes.cri.container-type={kind}");
        let run = container.run(command).flag("-d").flag("--null-io");
        run.option("--annotation", &kind)
            .option("--annotation", &pod)
            .output()
            .expect_code(0);
    };
    let script = "trap 'exit 0' TERM; while :; do sleep 1 & wait $!; done";
    annotated(&sandbox, "sandbox", &["sh", "-c", script]);
    annotated(&app, "container", &["sh", "-c", script]);
    let boot = |container: &tests::Container<'_>| {
        container
            .script(&[], "cat /proc/sys/kernel/random/boot_id")
            .expect_code(0)
            .out()
    };
    assert_eq!(boot(&sandbox), boot(&app), "one machine");
    sandbox.shim();
    let own = format!("-id {} ", app.id());
    let shims = tests::diagnosis::processes_mentioning(&case.daemon().settings.shim_name());
    assert!(
        !shims.iter().any(|line| line.contains(&own)),
        "a second shim: {shims:#?}"
    );

    app.kill("KILL").expect_code(0);
    app.wait_state(Some("STOPPED"));
    case.ctr(["tasks", "rm", app.id()]);
    case.ctr(["containers", "rm", app.id()]).expect_code(0);
    assert_eq!(sandbox.state().as_deref(), Some("RUNNING"));
    sandbox.exec(&[], &["true"]).expect_code(0);
}

#[test]
fn device_nodes_when_made_in_a_volume_are_of_no_use_on_the_host() {
    if skipped_under_runc("its device cgroup keeps containers from opening nodes, not the host's users") {
        return;
    }
    let case = Case::begin("device-nodes");
    let volume = case.daemon().dir().join("device-nodes");
    std::fs::create_dir_all(&volume).unwrap();
    let mount = format!("type=bind,src={},dst=/volume,options=rbind:rw", volume.display());
    let script = "cd /volume && mknod disk b 8 0 && chmod 666 disk && mknod -m 666 null c 1 3 && \
        mknod memory c 1 1 && ! chown 1000 memory && stat -c '%n %a %u' disk null memory";
    let done = case
        .container()
        .run(&["sh", "-c", script])
        .flag("--rm")
        .option("--mount", &mount)
        .output()
        .expect_code(0);
    assert_eq!(done.out(), "disk 600 0\nnull 666 0\nmemory 600 0\n");
    let on_host = |name: &str| {
        use std::os::unix::fs::MetadataExt;
        let node = std::fs::metadata(volume.join(name)).unwrap();
        (node.mode() & 0o7777, node.uid())
    };
    assert_eq!(on_host("disk"), (0o600, 0));
    assert_eq!(on_host("null"), (0o666, 0));
    assert_eq!(on_host("memory"), (0o600, 0));
}

/// Whether a process has this file open, by the target of its link in /proc.
fn has_open(pid: i32, file: &str) -> bool {
    let folder = format!("/proc/{pid}/fd");
    let files = tests::diagnosis::entries(std::path::Path::new(&folder));
    files
        .iter()
        .any(|fd| std::fs::read_link(fd).is_ok_and(|target| target.as_os_str() == file))
}
