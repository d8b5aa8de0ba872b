use std::fs;
use std::time::Duration;

use oci_spec::runtime::HookBuilder;

use super::*;

/// Nothing here may take so long; it only ends a test that hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// A hook that runs `text`. Not a file written here: another test's fork may hold it open for writing for a moment, and
/// then it cannot be executed.
fn shell(text: &str) -> Hook {
    let args = ["hook-shell", "-c", text, "zero", "one"].map(str::to_owned);
    HookBuilder::default().path("/bin/sh").args(args).build().unwrap()
}

async fn outcome(hook: &Hook, folder: &Path, state: &[u8]) -> Result<()> {
    let running = run(hook, folder, state);
    let ended = tokio::time::timeout(LIMIT, running).await;
    ended.expect("the hook has not ended").map_err(Error::from)
}

#[tokio::test]
async fn hook_when_run_gets_state_arguments_environment_and_folder() {
    let folder = tempfile::tempdir().unwrap();
    let mut hook =
        shell("cat > state; echo \"$0|$1|$A|$HOME|$PWD\" > words; head -c 10 /proc/$$/cmdline > name");
    hook.set_env(Some(vec!["A=b=c".into(), "PATH=/usr/bin:/bin".into()]));

    outcome(&hook, folder.path(), b"{}").await.unwrap();

    let read = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap();
    assert_eq!(read("state"), "{}");
    let expected = format!("zero|one|b=c||{}\n", folder.path().display());
    assert_eq!(read("words"), expected, "no environment but its own");
    assert_eq!(read("name"), "hook-shell");
}

#[tokio::test]
async fn hook_when_it_has_no_environment_gets_the_shims() {
    let folder = tempfile::tempdir().unwrap();
    let hook = shell("echo \"$PATH\" > path");

    outcome(&hook, folder.path(), b"").await.unwrap();

    let path = fs::read_to_string(folder.path().join("path")).unwrap();
    assert_eq!(path.trim_end(), std::env::var("PATH").unwrap());
}

#[tokio::test]
async fn state_when_larger_than_a_pipe_arrives_or_is_left_unread() {
    let folder = tempfile::tempdir().unwrap();
    let state = vec![b'x'; 1 << 20];

    outcome(&shell("wc -c > count"), folder.path(), &state)
        .await
        .unwrap();
    let count = fs::read_to_string(folder.path().join("count")).unwrap();
    assert_eq!(count.trim(), "1048576");

    outcome(&shell("exit 0"), folder.path(), &state).await.unwrap();
}

#[tokio::test]
async fn hook_when_it_fails_is_quoted() {
    let folder = tempfile::tempdir().unwrap();
    let hook = shell("echo to stdout; echo no such bridge >&2; exit 3");

    let error = outcome(&hook, folder.path(), b"").await.unwrap_err();

    assert_eq!(error.kind, ErrorKind::Internal);
    assert_eq!(
        error.message,
        "exit status: 3, stderr: no such bridge, stdout: to stdout"
    );
}

#[tokio::test]
async fn hook_when_it_says_more_than_pipes_hold_ends_all_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let hook = shell("head -c 1000000 /dev/zero | tr '\\0' x >&2; exit 1");

    let error = outcome(&hook, folder.path(), b"").await.unwrap_err();

    let said = error.message.len();
    assert!((8 << 10..9 << 10).contains(&said), "{said} bytes");
}

#[tokio::test]
async fn hook_when_it_leaves_a_process_behind_has_ended() {
    let folder = tempfile::tempdir().unwrap();
    // It holds the hook's outputs for as long as the test keeps this FIFO from having a writer.
    let fifo = folder.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let hook = shell("(read line < fifo; echo \"$line\" > left) & exit 0");

    outcome(&hook, folder.path(), b"").await.unwrap();

    // It is still there.
    tokio::task::spawn_blocking(move || fs::write(fifo, "go on\n"))
        .await
        .unwrap()
        .unwrap();
    let left = folder.path().join("left");
    let written = async {
        while fs::read_to_string(&left).unwrap_or_default() != "go on\n" {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LIMIT, written).await.expect("it was killed");
}

#[tokio::test]
async fn hook_when_its_time_is_over_is_killed_with_its_children() {
    let folder = tempfile::tempdir().unwrap();
    // A lock shows whether any process of the hook's lives: the kernel gives it back with the last one.
    let mut hook = shell("exec 9> lock; flock 9; sleep 100000 & wait");
    hook.set_timeout(Some(1));

    let error = outcome(&hook, folder.path(), b"").await.unwrap_err();

    assert_eq!(error.kind, ErrorKind::DeadlineExceeded);
    assert_eq!(error.message, "killed: has not ended after its timeout of 1 s");
    // On a slow machine it may not even have got so far.
    let lock = fs::File::create(folder.path().join("lock")).unwrap();
    let free = tokio::task::spawn_blocking(move || lock.lock());
    tokio::time::timeout(LIMIT, free)
        .await
        .expect("a child lives")
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn hook_when_it_cannot_be_executed_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let missing = HookBuilder::default().path("/nonexistent/hook").build().unwrap();
    let error = outcome(&missing, folder.path(), b"").await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::InvalidArgument);
    assert!(
        error.message.contains("cannot be executed: No such file"),
        "{error}"
    );

    let path = folder.path().join("plain");
    fs::write(&path, "").unwrap();
    let plain = HookBuilder::default().path(path).build().unwrap();
    let error = outcome(&plain, folder.path(), b"").await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::PermissionDenied);
}

fn spec(hooks: serde_json::Value) -> Spec {
    let spec = serde_json::json!({
        "ociVersion": "1.1.0", "annotations": {"a": "b"}, "hooks": hooks,
        "linux": {"namespaces": [{"type": "network"}]},
    });
    serde_json::from_value(spec).unwrap()
}

#[test]
fn hooks_when_they_cannot_be_run_are_refused_by_name() {
    for (hook, expected) in [
        (
            serde_json::json!({"path": "hook"}),
            "poststop hook #0 hook: its path must be absolute",
        ),
        (serde_json::json!({"path": "/h", "timeout": 0}), "timeout 0"),
        (serde_json::json!({"path": "/h", "timeout": -1}), "timeout -1"),
        (serde_json::json!({"path": "/h", "env": ["A"]}), "env \"A\""),
        (serde_json::json!({"path": "/h", "args": ["a\u{0}"]}), "NUL"),
    ] {
        let error = check(&spec(serde_json::json!({"poststop": [hook]}))).unwrap_err();
        assert_eq!(error.kind, ErrorKind::InvalidArgument);
        assert!(error.message.contains(expected), "{error}");
    }
    let good = serde_json::json!({"path": "/h", "timeout": 1, "env": ["A="], "args": []});
    check(&spec(serde_json::json!({"createRuntime": [good]}))).unwrap();
}

#[test]
fn netns_when_hooks_are_to_fill_one_without_a_place_is_made() {
    let hook = serde_json::json!([{"path": "/h"}]);
    for (hooks, made) in [
        (serde_json::json!({"createRuntime": hook}), true),
        (serde_json::json!({"prestart": hook}), true),
        (serde_json::json!({"poststop": hook}), false),
        (serde_json::json!({}), false),
    ] {
        let pid = netns_for_hooks(&spec(hooks.clone())).unwrap();
        assert_eq!(pid.is_some(), made, "{hooks}");
    }
    for (path, made) in [("/run/netns/x", false), ("", true), ("/proc/0/ns/net", true)] {
        let mut spec = spec(serde_json::json!({"createRuntime": hook}));
        let namespaces = serde_json::json!({"namespaces": [{"type": "network", "path": path}]});
        spec.set_linux(serde_json::from_value(namespaces).unwrap());
        assert_eq!(netns_for_hooks(&spec).unwrap().is_some(), made, "{path}");
    }
}

#[tokio::test]
async fn poststop_when_due_runs_once_and_goes_on_after_a_failure() {
    let folder = tempfile::tempdir().unwrap();
    let hook = shell("cat >> states; echo >> states; exit 1");
    let hooks = serde_json::json!({"poststop": [hook, hook]});
    let hooks = HostHooks::of("c", folder.path(), &spec(hooks), folder.path().join("state")).unwrap();
    let states = || fs::read_to_string(folder.path().join("states")).unwrap_or_default();

    hooks.stopped().await;
    assert_eq!(states(), "", "no hook has run: none is due");

    hooks.create(&HostPid::park(None).unwrap()).await.unwrap();
    hooks.stopped().await;
    hooks.stopped().await;

    let expected = serde_json::json!({"ociVersion": "1.1.0", "id": "c", "status": "stopped",
        "bundle": folder.path(), "annotations": {"a": "b"}});
    let seen: Vec<serde_json::Value> = states()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(seen, [expected.clone(), expected]);
}
