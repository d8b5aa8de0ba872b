//! What a container is, with runc as the reference: each scenario is played under runc, then in a virtual machine.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use serde_json::json;
use tests::case::skipped_under_runc;
use tests::command::{Input, eventually};
use tests::image::{self, TESTER, TESTER_ID};
use tests::task_api::TaskApi;
use tests::terminal::Terminal;
use tests::{Case, Container, Finished};

/// Waits for SIGTERM, with a child that has its own idea of it.
const FAMILY: &str = "trap 'got=1' TERM; \
                      sh -c 'trap \"echo child; exit 0\" TERM; echo ready; while :; do sleep 0.1; done' & \
                      while [ -z \"$got\" ]; do wait $!; done; wait; echo init; exit 3";

/// Busybox in a folder of the host's, without an image.
fn rootfs(case: &Case) -> PathBuf {
    let root = case.folder("rootfs");
    image::unpack(&case.daemon().settings.busybox, &root).unwrap();
    root
}

/// Code and output of `script` in a container that is made for it.
#[track_caller]
fn output_of(container: &Container<'_>, flags: &[&str], script: &str) -> (i32, String) {
    let run = container.run(&["sh", "-c", script]).flag("--rm");
    let done = flags.iter().fold(run, |run, flag| run.flag(flag)).output();
    (done.code, done.out() + &done.err())
}

#[test]
fn death_when_by_a_real_time_signal_is_reported() {
    let codes = Case::like_runc("rt-death", |case| {
        let container = case.container();
        container.sleeping();
        ["34", "40", "64"].map(|signal| {
            container
                .exec(&[], &["sh", "-c", &format!("kill -{signal} $$")])
                .code
        })
    });
    assert_eq!(codes, [162, 168, 192]);
}

#[test]
fn signal_when_real_time_reaches_its_handler() {
    let code = Case::like_runc("rt-signal", |case| {
        let container = case.container();
        let script = "trap 'exit 12' 37; echo ready; while :; do sleep 1 & wait $!; done";
        let running = container.run(&["sh", "-c", script]).start(Input::Null);
        running
            .wait_out("ready", case.limit(), |out| out == "ready\n")
            .unwrap();
        container.kill("37").expect_code(0);
        running.finish(case.limit()).unwrap().code
    });
    assert_eq!(code, 12);
}

/// The kernel shields process 1 from what it does not handle; SIGKILL it does not.
#[test]
fn signal_when_the_first_process_has_no_handler_changes_nothing() {
    let codes = Case::like_runc("term-dropped", |case| {
        let container = case.container();
        let api = TaskApi::connect(case.daemon()).unwrap();
        container.detached(&["sh", "-c", ">/ready; exec sleep 10000"]);
        let waiter = api.start_wait(container.id());
        // Before its program runs, runc's own process takes signals as it likes.
        container
            .script(&[], "until [ -e /ready ]; do sleep 0.1; done")
            .expect_code(0);
        api.kill(container.id(), "", 15).unwrap();
        let alive = container.exec(&[], &["true"]).code;
        // Of a signal that kills the exit code is decided as it is sent: it would be 143.
        api.kill(container.id(), "", 9).unwrap();
        (
            alive,
            api.join(waiter).unwrap(),
            api.delete(container.id()).unwrap(),
        )
    });
    assert_eq!(codes, (0, 137, 137));
}

#[test]
fn signal_when_for_all_reaches_children() {
    let seen = Case::like_runc("kill-all", |case| {
        let container = case.container();
        let running = container.run(&["sh", "-c", FAMILY]).start(Input::Null);
        running
            .wait_out("ready", case.limit(), |out| out == "ready\n")
            .unwrap();
        case.ctr(["tasks", "kill", "-a", "-s", "TERM", container.id()])
            .expect_code(0);
        let done = running.finish(case.limit()).unwrap();
        (done.code, done.out())
    });
    assert_eq!(seen, (3, "ready\nchild\ninit\n".to_owned()));
}

#[test]
fn exec_id_when_its_process_was_deleted_is_free() {
    let codes = Case::like_runc("exec-id", |case| {
        let container = case.container();
        container.sleeping();
        [1, 2, 3].map(|code| {
            container
                .exec(&["--exec-id", "same"], &["sh", "-c", &format!("exit {code}")])
                .code
        })
    });
    assert_eq!(codes, [1, 2, 3]);
}

#[test]
fn working_directory_when_missing_is_made_for_the_first_process() {
    let (first, exec) = Case::like_runc("cwd-missing", |case| {
        let first = output_of(&case.container(), &["--cwd", "/no/such"], "pwd; stat -c %a /no");
        let container = case.container();
        container.sleeping();
        let exec = container.exec(&["--cwd", "/nor/this"], &["pwd"]).code == 0;
        (first, exec)
    });
    assert_eq!((first.0, first.1.as_str(), exec), (0, "/no/such\n755\n", false));
}

#[test]
fn mount_when_its_destination_leads_through_links_is_inside_the_root() {
    let seen = Case::like_runc("mount-links", |case| {
        let root = rootfs(case);
        std::fs::create_dir_all(root.join("real")).unwrap();
        for (link, target) in [
            ("one", "two"),
            ("two", "/real"),
            ("etc/localtime", "/nowhere/zone"),
        ] {
            symlink(target, root.join(link)).unwrap();
        }
        let shared = case.folder("shared");
        std::fs::write(shared.join("file"), "text\n").unwrap();
        let mount = |source: &Path, to: &str| {
            let source = source.display();
            format!("--mount=type=bind,src={source},dst={to},options=rbind:ro")
        };
        let container = case.container();
        let run = container
            .run(&[
                "/bin/sh",
                "-c",
                "cat /real/below/file /nowhere/zone; readlink /one; readlink /etc/localtime",
            ])
            .image(&root.display().to_string())
            .flag("--rootfs")
            .flag("--rm")
            .flag(&mount(&shared, "/one/below"))
            .flag(&mount(&shared.join("file"), "/etc/localtime"));
        let done = run.output();
        (done.code, done.out(), done.err())
    });
    assert_eq!(
        seen,
        (0, "text\ntext\ntwo\n/nowhere/zone\n".to_owned(), String::new())
    );
}

#[test]
fn mount_when_defaults_are_left_out_is_made() {
    let seen = Case::like_runc("mount-defaults", |case| {
        let script =
            "for at in /t /u; do grep \" $at \" /proc/mounts | cut -d' ' -f3; done; stat -f -c %b /u";
        let flags = [
            "--mount=type=tmpfs,dst=/t",
            "--mount=type=tmpfs,dst=/u,options=size=1m",
        ];
        output_of(&case.container(), &flags, script)
    });
    // A mebibyte of pages.
    assert_eq!(seen, (0, "tmpfs\ntmpfs\n256\n".to_owned()));
}

/// Reading a node that was made by hand: the guest's disk, its memory, and something harmless.
#[test]
fn device_when_its_node_is_made_by_hand_is_refused() {
    let seen = Case::like_runc("mknod", |case| {
        let script = "cd /dev; mknod a b 254 0; mknod b c 1 1; mknod c c 1 3; \
                      for node in a b c; do head -c 1 $node; echo $?; echo >$node; echo $?; done 2>&1";
        output_of(&case.container(), &[], script)
    });
    assert_eq!(seen.1.matches("Operation not permitted").count(), 4, "{seen:?}");
    assert!(seen.1.ends_with("0\n0\n"), "{seen:?}");
}

/// Nodes that came with the image, or were made on the root filesystem from outside.
#[test]
fn device_when_its_node_is_on_the_root_filesystem_is_refused() {
    let seen = Case::like_runc("image-node", |case| {
        // Where the host keeps device nodes usable, as it does below containerd's root: /tmp may be mounted nodev.
        let mounted = case.folder("rootfs");
        rustix::mount::mount(
            "tmpfs",
            &mounted,
            c"tmpfs",
            rustix::mount::MountFlags::empty(),
            None,
        )
        .unwrap();
        let root = rootfs(case);
        for (name, kind, major, minor) in [
            ("null", "c", "1", "3"),
            ("memory", "c", "1", "1"),
            ("disk", "b", "254", "0"),
        ] {
            let made = std::process::Command::new("mknod")
                .arg(root.join(name))
                .args([kind, major, minor])
                .status()
                .unwrap();
            assert!(made.success());
        }
        let script = "cat /null && echo fine; cat /memory | head -c 1; cat /disk | head -c 1";
        let container = case.container();
        let run = container
            .run(&["/bin/sh", "-c", script])
            .flag("--rm")
            .flag("--rootfs");
        let done = run.image(&root.display().to_string()).output();
        rustix::mount::unmount(&mounted, rustix::mount::UnmountFlags::DETACH).unwrap();
        (done.out(), done.err())
    });
    assert_eq!(seen.0, "fine\n", "{seen:?}");
    assert_eq!(seen.1.matches("Operation not permitted").count(), 2, "{seen:?}");
}

#[test]
fn dev_when_listed_holds_what_runc_makes() {
    let seen = Case::like_runc("dev", |case| {
        let script = "ls /dev; for link in core fd stdin stdout stderr ptmx; do readlink /dev/$link; done; \
                      stat -c '%a %t:%T' /dev/null /dev/tty /dev/full";
        output_of(&case.container(), &[], script)
    });
    assert!(seen.1.contains("/proc/kcore"), "{seen:?}");
}

#[test]
fn dev_shm_when_bound_is_the_bound_folder() {
    let seen = Case::like_runc("bound-shm", |case| {
        let source = case.folder("source");
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=8m", "none"])
            .arg(&source)
            .status()
            .unwrap();
        assert!(mounted.success());
        let mount = format!(
            "--mount=type=bind,src={},dst=/dev/shm,options=rbind:rw",
            source.display()
        );
        let script = "df -m /dev/shm | tail -n 1 | awk '{print $2}'; echo text >/dev/shm/file";
        let seen = output_of(&case.container(), &[&mount], script);
        let written = std::fs::read_to_string(source.join("file")).ok();
        std::process::Command::new("umount")
            .arg(&source)
            .status()
            .unwrap();
        (seen, written)
    });
    assert_eq!(seen, ((0, "8\n".to_owned()), Some("text\n".to_owned())));
}

#[test]
fn input_when_larger_than_every_buffer_waits_for_its_reader() {
    const SIZE: usize = 50 << 20;
    let seen = Case::like_runc("slow-reader", |case| {
        let container = case.container();
        let run = container.run(&["sh", "-c", "sleep 3; wc -c"]).flag("--rm");
        let done = run.output_with(Input::Bytes(vec![b'x'; SIZE]));
        (done.code, done.out())
    });
    assert_eq!(seen, (0, format!("{SIZE}\n")));
}

/// Programs log to /dev/stdout and /proc/self/fd/2: they open again what the container was started with.
#[test]
fn streams_when_reopened_by_a_user_can_be_written() {
    const SCRIPT: &str = "echo one >/dev/stdout; echo two >/proc/self/fd/2; id -u";
    let (pipes, exec) = Case::like_runc("reopen", |case| {
        let container = case.container();
        let run = container.run(&["sh", "-c", SCRIPT]).flag("--rm");
        let done = run.image(TESTER).output();
        let sleeper = case.container();
        sleeper.sleeping();
        let exec = sleeper.script(&["--user", TESTER_ID], SCRIPT);
        (
            (done.code, done.out(), done.err()),
            (exec.code, exec.out(), exec.err()),
        )
    });
    let expected = (0, "one\n1000\n".to_owned(), "two\n".to_owned());
    assert_eq!((pipes, exec), (expected.clone(), expected));
}

#[test]
fn terminal_when_reopened_by_a_user_can_be_written() {
    let seen = Case::like_runc("reopen-tty", |case| {
        let container = case.container();
        let run = container
            .run(&[
                "sh",
                "-c",
                "echo one >/dev/stdout; echo two >/proc/self/fd/2; id -u",
            ])
            .flag("--rm")
            .flag("-t")
            .image(TESTER);
        let mut terminal = Terminal::start(&mut run.command(), 24, 80).unwrap();
        let code = terminal.wait(case.limit()).unwrap();
        terminal.wait_screen(case.limit(), |screen| screen.ends_with("1000\r\r\n"));
        (code, terminal.screen())
    });
    // Two terminals, the container's and this test's, each add a carriage return.
    assert_eq!(seen, (Some(0), "one\r\r\ntwo\r\r\n1000\r\r\n".to_owned()));
}

/// Descriptors that a runtime leaves open would lead out of the container (CVE-2024-21626).
#[test]
fn exec_when_its_directory_is_a_descriptor_of_the_runtime_is_refused() {
    let seen = Case::like_runc("exec-cwd", |case| {
        let container = case.container();
        container.sleeping();
        let directories = (3..12).map(|number| format!("/proc/self/fd/{number}"));
        directories
            .map(|directory| container.exec(&["--cwd", &directory], &["true"]).code == 0)
            .collect::<Vec<_>>()
    });
    assert_eq!(seen, [false; 9]);
}

/// The configuration of a busybox container that runs `script`, beyond what `ctr` has flags for.
fn configuration(case: &Case, id: &str, script: &str) -> serde_json::Value {
    let namespaces = ["pid", "ipc", "uts", "mount", "network"].map(|kind| json!({"type": kind}));
    let mount = |kind: &str, at: &str| json!({"destination": at, "type": kind, "source": kind});
    json!({
        "ociVersion": "1.0.2",
        "root": {"path": rootfs(case)},
        "process": {
            "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}, "args": ["sh", "-c", script],
        },
        "mounts": [mount("proc", "/proc"), mount("tmpfs", "/dev")],
        "linux": {
            "namespaces": namespaces.to_vec(),
            "cgroupsPath": format!("/{}/{id}", case.daemon().namespace()),
        },
    })
}

/// Starts a container from `configuration` in the background.
#[track_caller]
fn run_configured(case: &Case, container: &Container<'_>, configuration: &serde_json::Value) {
    configured(case, container, configuration).expect_code(0);
}

/// Starts a container from `configuration` in the background, or fails to.
fn configured(case: &Case, container: &Container<'_>, configuration: &serde_json::Value) -> Finished {
    let path = case.folder("configuration").join("config.json");
    std::fs::write(&path, configuration.to_string()).unwrap();
    container
        .run(&[])
        .without_image()
        .flag("-d")
        .flag("--null-io")
        .option("--config", &path.display().to_string())
        .output()
}

#[test]
fn limits_and_sysctls_when_configured_are_exact_for_first_process_and_exec() {
    const LOOK: &str = "grep -E '^Max (open files|processes|core|locked)' /proc/self/limits | tr -s ' '; \
                        cd /proc/sys; cat kernel/msgmax kernel/shm_rmid_forced net/ipv4/ip_unprivileged_port_start";
    let (first, exec) = Case::like_runc("limits", |case| {
        let container = case.container();
        let script = format!("({LOOK}) >/seen; while :; do sleep 1; done");
        let mut config = configuration(case, container.id(), &script);
        let limit = |kind: &str, soft: u64, hard: u64| json!({"type": kind, "soft": soft, "hard": hard});
        config["process"]["rlimits"] = json!([
            // Go raises the soft limit for itself, and `runc exec` of Debian 12 now and then passes that on.
            limit("RLIMIT_NOFILE", 2345, 2345),
            limit("RLIMIT_NPROC", 321, 432),
            limit("RLIMIT_CORE", 0, u64::MAX),
            limit("RLIMIT_MEMLOCK", 65_536, 131_072),
        ]);
        config["linux"]["sysctl"] = json!({
            "kernel.msgmax": "16384", "kernel.shm_rmid_forced": "1", "net.ipv4.ip_unprivileged_port_start": "80",
        });
        run_configured(case, &container, &config);
        let mut first = String::new();
        let seen = eventually(case.limit(), || {
            first = container.script(&[], "cat /seen").out();
            first.lines().count() == 7
        });
        assert!(seen, "{first}");
        (first, container.script(&[], LOOK).out())
    });
    assert_eq!(first, exec);
    assert!(first.contains("open files 2345 2345"), "{first}");
    assert!(first.ends_with("16384\n1\n80\n"), "{first}");
}

/// Without a PID namespace of its own nothing ends with a container's first process but by the runtime's hand.
#[test]
fn host_pid_namespace_when_wanted_is_refused_by_name() {
    if skipped_under_runc("a process of the host's is none of a virtual machine's") {
        return;
    }
    let case = Case::begin("host-pid");
    let container = case.container();
    let mut config = configuration(&case, container.id(), "true");
    let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|namespace| namespace["type"] != "pid");

    let done = configured(&case, &container, &config);

    assert_ne!(done.code, 0, "{}", done.describe());
    let said = done.err();
    assert!(said.contains("no pid namespace (hostPID)"), "{}", done.describe());
}
