//! OCI hooks, beside runc: which run, in which order, with what state.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::{Value, json};
use tests::case::skipped_under_runc;
use tests::command::eventually;
use tests::{Case, spec};

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
        let config = spec::write(case, &container, "cat /hook", &hooks);
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
        let config = spec::write(case, &container, "echo never", &hooks);
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

/// A logger as containerd's `binary://` and, newer, `binary-v2://` have it: the output is on descriptors 3 and 4, and a byte on 5
/// says that it is ready.
const LOGGER: &str = r#"#!/bin/sh
log="$(dirname "$0")/log"
echo >&5
exec 5>&-
sed "s/^/out $CONTAINER_ID /" <&3 >>"$log" &
sed "s/^/err $CONTAINER_ID /" <&4 >>"$log" &
wait
"#;

#[test]
fn output_when_a_program_reads_it_is_that_programs() {
    Case::like_runc("log-program", |case| {
        let program = case.folder("logger").join("logger");
        fs::write(&program, LOGGER).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        // Unknown to the shim of runc's that Debian 12 has.
        let scheme = if case.is_vm_runtime() {
            "binary-v2"
        } else {
            "binary"
        };
        let container = case.container();
        container
            .run(&["sh", "-c", "echo one; echo two >&2; echo three"])
            .flag("-d")
            .option("--log-uri", &format!("{scheme}://{}", program.display()))
            .output()
            .expect_code(0);
        container.wait_state(Some("STOPPED"));
        // runc's shim has the other ends until then.
        case.ctr(["tasks", "delete", container.id()]).expect_code(0);
        let log = program.with_file_name("log");
        let mut lines = Vec::new();
        eventually(case.limit(), || {
            lines = notes(&log);
            lines.len() == 3
        });
        lines.sort();
        let id = container.id();
        let expected = [
            format!("err {id} two"),
            format!("out {id} one"),
            format!("out {id} three"),
        ];
        assert_eq!(lines, expected);
    });
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
    let config = spec::write(&case, &container, "while :; do sleep 1; done", &hooks);
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
