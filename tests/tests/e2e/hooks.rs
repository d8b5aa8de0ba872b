//! OCI hooks, beside runc: which run, in which order, with what state.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tests::case::skipped_under_runc;
use tests::command::eventually;
use tests::image;
use tests::{Case, Container};

/// A hook of the host's that notes its name and the status in its state, and whether the state's pid leads to another
/// network namespace than the host's; then runs `then`.
fn hook(name: &str, notes: &Path, then: &str) -> Value {
    let script = format!(
        r#"state=$(cat)
status=$(echo "$state" | sed -n 's/.*"status": *"\([a-z]*\)".*/\1/p')
pid=$(echo "$state" | sed -n 's/.*"pid": *\([0-9]*\).*/\1/p')
net=none
if [ -n "$pid" ]; then
    net=own
    [ "$(readlink /proc/$pid/ns/net)" != "$(readlink /proc/self/ns/net)" ] || net=host
fi
echo "{name} $status $net" >> {}
{then}"#,
        notes.display()
    );
    json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"], "timeout": 60})
}

/// A busybox container with `hooks` that runs `script`, as a file for `ctr run --config`.
fn configuration(case: &Case, container: &Container<'_>, script: &str, hooks: &Value) -> PathBuf {
    let folder = case.folder(container.id());
    let root = folder.join("rootfs");
    fs::create_dir_all(&root).unwrap();
    image::unpack(&case.daemon().settings.busybox, &root).unwrap();
    let namespaces = ["pid", "ipc", "uts", "mount", "network"].map(|kind| json!({"type": kind}));
    let mount = |kind: &str, at: &str| json!({"destination": at, "type": kind, "source": kind});
    let config = json!({
        "ociVersion": "1.0.2",
        "root": {"path": root},
        "process": {
            "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}, "args": ["sh", "-c", script],
        },
        "hooks": hooks,
        "mounts": [mount("proc", "/proc"), mount("tmpfs", "/dev")],
        "linux": {
            "namespaces": namespaces.to_vec(),
            "cgroupsPath": format!("/{}/{}", case.daemon().namespace(), container.id()),
        },
    });
    let path = folder.join("config.json");
    fs::write(&path, config.to_string()).unwrap();
    path
}

fn notes(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

#[test]
fn hooks_when_a_container_lives_run_in_order() {
    let seen = Case::like_runc("hooks-order", |case| {
        let container = case.container();
        let path = case.folder("notes").join("notes");
        let hooks = json!({
            "prestart": [hook("prestart", &path, "")],
            "createRuntime": [hook("first", &path, ""), hook("second", &path, "")],
            "startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", "echo from the hook > /hook"]}],
            "poststop": [hook("poststop", &path, "")],
        });
        let config = configuration(case, &container, "cat /hook", &hooks);
        let done = container
            .run(&[])
            .without_image()
            .flag("--rm")
            .option("--config", &config.display().to_string())
            .output()
            .expect_code(0);
        (notes(&path), done.out())
    });
    let expected = [
        "prestart creating own",
        "first creating own",
        "second creating own",
        "poststop stopped none",
    ];
    assert_eq!(seen.0, expected);
    assert_eq!(seen.1, "from the hook\n");
}

#[test]
fn run_when_a_create_runtime_hook_fails_runs_nothing_but_poststop() {
    let seen = Case::like_runc("hooks-fail", |case| {
        let container = case.container();
        let path = case.folder("notes").join("notes");
        let hooks = json!({
            "createRuntime": [hook("fails", &path, "echo no bridge >&2; exit 4"), hook("never", &path, "")],
            "poststop": [hook("poststop", &path, "")],
        });
        let config = configuration(case, &container, "echo never", &hooks);
        let done = container
            .run(&[])
            .without_image()
            .flag("--rm")
            .option("--config", &config.display().to_string())
            .output();
        assert_ne!(done.code, 0);
        (
            notes(&path),
            done.out(),
            done.err().contains("no bridge"),
            container.state(),
        )
    });
    assert_eq!(seen.0, ["fails creating own", "poststop stopped none"]);
    assert_eq!((seen.1.as_str(), seen.2, seen.3), ("", true, None));
}

#[test]
fn output_when_it_goes_to_a_file_is_appended() {
    let seen = Case::like_runc("log-file", |case| {
        let log = case.folder("logs").join("below/log");
        let uri = format!("file://{}", log.display());
        for words in ["one", "two"] {
            let container = case.container();
            container
                .run(&["sh", "-c", &format!("echo {words}; echo error >&2")])
                .flag("-d")
                .option("--log-uri", &uri)
                .output()
                .expect_code(0);
            container.wait_state(Some("STOPPED"));
            case.ctr(["tasks", "delete", container.id()]).expect_code(0);
        }
        let mut lines = notes(&log);
        lines.sort();
        lines
    });
    assert_eq!(seen, ["error", "error", "one", "two"]);
}

#[test]
fn poststop_when_the_shim_is_killed_runs_once() {
    if skipped_under_runc("its shim is not the container") {
        return;
    }
    let case = Case::begin("hooks-killed");
    let container = case.container();
    let path = case.folder("notes").join("notes");
    let hooks = json!({"poststop": [hook("poststop", &path, "")]});
    let config = configuration(&case, &container, "while :; do sleep 1; done", &hooks);
    container
        .run(&[])
        .without_image()
        .flag("-d")
        .flag("--null-io")
        .option("--config", &config.display().to_string())
        .output()
        .expect_code(0);
    assert_eq!(notes(&path), Vec::<String>::new());

    let shim = rustix::process::Pid::from_raw(container.shim()).unwrap();
    rustix::process::kill_process(shim, rustix::process::Signal::KILL).unwrap();

    assert!(eventually(case.limit(), || !notes(&path).is_empty()));
    container.wait_state(None);
    assert_eq!(notes(&path), ["poststop stopped none"]);
}
