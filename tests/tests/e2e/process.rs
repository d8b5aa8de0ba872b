//! A container's first process: its output, exit code and surroundings.

use serde_json::json;
use tests::Case;
use tests::image::{self, TESTER};

#[test]
fn hello_when_run_prints_it() {
    let case = Case::begin("hello");
    let done = case
        .container()
        .run(&["echo", "hello", "world"])
        .flag("--rm")
        .output()
        .expect_code(0);
    assert_eq!(done.out(), "hello world\n", "{}", done.describe());
}

#[test]
fn exit_code_when_process_exits_is_passed_on() {
    let case = Case::begin("exit-code");
    for code in [0, 1, 42, 255] {
        let container = case.container();
        container
            .run(&["sh", "-c", &format!("exit {code}")])
            .flag("--rm")
            .output()
            .expect_code(code);
    }
}

#[test]
fn exit_code_when_process_dies_by_signal_is_128_plus_signal() {
    let case = Case::begin("signal-death");
    let container = case.container();
    container.sleeping();
    // The first process of a PID namespace ignores signals from inside; its death is in signals.rs.
    for (signal, code) in [("KILL", 137), ("TERM", 143), ("SEGV", 139)] {
        container
            .exec(&[], &["sh", "-c", &format!("kill -{signal} $$")])
            .expect_code(code);
    }
}

#[test]
fn environment_when_given_reaches_the_process() {
    let case = Case::begin("environment");
    let run = case.container();
    let done = run
        .run(&["env"])
        .flag("--rm")
        .option("--env", "E2E_FLAG=a b=c")
        .output()
        .expect_code(0);
    let out = done.out();
    for line in ["E2E_FLAG=a b=c", "E2E_IMAGE=busybox", "PATH=/bin:/usr/bin"] {
        assert!(out.lines().any(|l| l == line), "{line} missing from {out}");
    }
}

#[test]
fn working_directory_when_given_is_used() {
    let case = Case::begin("cwd");
    let done = case
        .container()
        .run(&["pwd"])
        .flag("--rm")
        .option("--cwd", "/var")
        .output()
        .expect_code(0);
    assert_eq!(done.out(), "/var\n");
}

#[test]
fn user_and_directory_when_set_by_the_image_are_used() {
    let case = Case::begin("user");
    let done = case
        .container()
        .run(&[
            "sh",
            "-c",
            "id -u; id -g; pwd; touch here && ls -ln here | awk '{print $3,$4}'; touch /etc/x",
        ])
        .image(TESTER)
        .flag("--rm")
        .output()
        .expect_code(1);
    assert_eq!(
        done.out(),
        "1000\n1001\n/home/tester\n1000 1001\n",
        "{}",
        done.describe()
    );
    assert!(done.err().contains("Permission denied"), "{}", done.describe());
}

#[test]
fn rootfs_when_read_only_refuses_writes() {
    let case = Case::begin("read-only");
    let container = case.container();
    let done = container
        .run(&["touch", "/etc/x"])
        .flag("--rm")
        .flag("--read-only")
        .output()
        .expect_code(1);
    assert!(
        done.err().contains("Read-only file system"),
        "{}",
        done.describe()
    );
}

#[test]
fn rootfs_when_writable_keeps_what_was_written() {
    let case = Case::begin("writable");
    let script =
        "echo data >/etc/x && mkdir /a && mv /etc/x /a/y && ln -s y /a/z && cat /a/z && stat -c %a /tmp";
    let done = case
        .container()
        .run(&["sh", "-c", script])
        .flag("--rm")
        .output()
        .expect_code(0);
    assert_eq!(done.out(), "data\n1777\n");
}

#[test]
fn host_directory_when_bind_mounted_is_live_in_both_directions() {
    let case = Case::begin("bind-mount");
    let shared = case.daemon().dir().join("shared");
    std::fs::create_dir_all(&shared).unwrap();
    std::fs::write(shared.join("before"), "written before\n").unwrap();
    let container = case.container();
    let mount = format!("type=bind,src={},dst=/mnt,options=rbind:rw", shared.display());
    let script = "cat /mnt/before; echo from-guest >/mnt/up; \
                  while [ ! -e /mnt/down ]; do sleep 0.2; done; cat /mnt/down";
    let running = container
        .run(&["sh", "-c", script])
        .option("--mount", &mount)
        .start(tests::command::Input::Null);
    let up = shared.join("up");
    let arrived = || std::fs::read_to_string(&up).is_ok_and(|text| text == "from-guest\n");
    assert!(
        tests::command::eventually(case.limit(), arrived),
        "{} never arrived; {}",
        up.display(),
        running.out()
    );
    // Renamed into place: the container must not see a half-written file.
    std::fs::write(shared.join("down.new"), "from-host\n").unwrap();
    std::fs::rename(shared.join("down.new"), shared.join("down")).unwrap();
    let done = running.finish(case.limit()).unwrap().expect_code(0);
    assert_eq!(done.out(), "written before\nfrom-host\n");
}

#[test]
fn host_directory_when_bind_mounted_read_only_refuses_writes() {
    let case = Case::begin("bind-ro");
    let shared = case.daemon().dir().join("shared-ro");
    std::fs::create_dir_all(&shared).unwrap();
    std::fs::write(shared.join("file"), "text\n").unwrap();
    let mount = format!("type=bind,src={},dst=/mnt,options=rbind:ro", shared.display());
    let container = case.container();
    let run = container
        .run(&["sh", "-c", "cat /mnt/file; touch /mnt/new"])
        .flag("--rm");
    let done = run.option("--mount", &mount).output().expect_code(1);
    assert_eq!(done.out(), "text\n");
    assert!(
        done.err().contains("Read-only file system"),
        "{}",
        done.describe()
    );
    assert!(!shared.join("new").exists());
}

#[test]
fn host_file_when_bind_mounted_is_readable() {
    let case = Case::begin("bind-file");
    let file = case.daemon().dir().join("one-file");
    std::fs::write(&file, "a file\n").unwrap();
    let mount = format!("type=bind,src={},dst=/etc/hosts,options=rbind:ro", file.display());
    let container = case.container();
    let done = container
        .run(&["cat", "/etc/hosts"])
        .flag("--rm")
        .option("--mount", &mount)
        .output();
    assert_eq!(done.expect_code(0).out(), "a file\n");
}

/// Hostname is not a flag of `ctr` 1.6, so the whole OCI configuration is given; this is also the case of a
/// root file system that is a plain folder, not a snapshot.
#[test]
fn hostname_when_configured_is_set() {
    let case = Case::begin("hostname");
    let root = case.daemon().dir().join("plain-rootfs");
    std::fs::create_dir_all(&root).unwrap();
    image::unpack(&case.daemon().settings.busybox, &root).unwrap();
    let container = case.container();
    let namespaces = ["pid", "ipc", "uts", "mount", "network"]
        .map(|kind| json!({"type": kind}))
        .into_iter()
        .collect::<Vec<_>>();
    let mount =
        |kind: &str, destination: &str| json!({"destination": destination, "type": kind, "source": kind});
    let config = json!({
        "ociVersion": "1.0.2",
        "hostname": "box-17",
        "root": {"path": root},
        "process": {
            "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0},
            "args": ["sh", "-c", "hostname; cat /proc/sys/kernel/hostname"]
        },
        "mounts": [mount("proc", "/proc"), mount("tmpfs", "/dev")],
        "linux": {"namespaces": namespaces, "cgroupsPath": format!("/{}/{}", case.daemon().namespace(), container.id())}
    });
    let path = case.daemon().dir().join("hostname.json");
    std::fs::write(&path, config.to_string()).unwrap();
    let run = container
        .run(&[])
        .without_image()
        .flag("--rm")
        .option("--config", &path.display().to_string());
    assert_eq!(run.output().expect_code(0).out(), "box-17\nbox-17\n");
}

#[test]
fn rootfs_when_a_plain_folder_is_given_is_used() {
    let case = Case::begin("plain-rootfs");
    let root = case.daemon().dir().join("folder-rootfs");
    std::fs::create_dir_all(&root).unwrap();
    image::unpack(&case.daemon().settings.busybox, &root).unwrap();
    std::fs::write(root.join("etc/mark"), "this folder\n").unwrap();
    let container = case.container();
    let path = root.display().to_string();
    let run = container
        .run(&["/bin/cat", "/etc/mark"])
        .image(&path)
        .flag("--rm")
        .flag("--rootfs");
    assert_eq!(run.output().expect_code(0).out(), "this folder\n");
}
