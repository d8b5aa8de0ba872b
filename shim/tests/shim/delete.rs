//! `delete` behind shims that live, died or never were. Needs root, as containerd does.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::harness::{Pod, is_alive, run, stderr, wait_until};
use containerd_shim_protos::api::DeleteResponse;
use protobuf::Message;
use rustix::process::{Signal, kill_process};

const CONFIG: &str = r#"{"ociVersion":"1.0.2"}"#;

fn response(output: &std::process::Output) -> DeleteResponse {
    assert!(output.status.success(), "{output:?}");
    assert_eq!(stderr(output), "");
    DeleteResponse::parse_from_bytes(&output.stdout).unwrap()
}

#[test]
fn delete_when_the_shim_crashed_removes_everything() {
    let pod = Pod::new("crashed", Some(CONFIG));
    pod.start();
    let pid = pod.pid().unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    wait_until("the shim is dead", || !is_alive(pid));
    assert!(pod.socket().exists(), "a killed shim cannot remove its socket");

    let answer = response(&pod.delete());

    assert_eq!(answer.exit_status, 137);
    assert_eq!(i64::from(answer.pid), i64::from(pid.as_raw_nonzero().get()));
    assert!(answer.exited_at.seconds > 1_700_000_000);
    assert!(!pod.socket().exists());
    assert_eq!(
        fs::read_dir(pod.bundle()).unwrap().count(),
        1,
        "only config.json is left"
    );

    assert_eq!(response(&pod.delete()).exit_status, 137);
}

#[test]
fn delete_when_start_was_killed_early_removes_its_socket() {
    let pod = Pod::new("early", Some(CONFIG));
    pod.start();
    let (pid, socket) = (pod.pid().unwrap(), pod.socket());
    kill_process(pid, Signal::KILL).unwrap();
    wait_until("the shim is dead", || !is_alive(pid));
    // As when `start` had not come further than binding the socket.
    for name in ["address", "shim.pid"] {
        fs::remove_file(pod.bundle().join(name)).unwrap();
    }

    response(&pod.delete());

    assert!(!socket.exists());
}

#[test]
fn delete_when_the_shim_lives_ends_it() {
    let pod = Pod::new("alive", Some(CONFIG));
    pod.start();
    let pid = pod.pid().unwrap();

    response(&pod.delete());

    assert!(!is_alive(pid));
    assert!(!pod.socket().exists());
}

#[test]
fn delete_when_the_pid_is_reused_leaves_it_alone() {
    let pod = Pod::new("reused", Some(CONFIG));
    let mut bystander = Command::new("sleep")
        .arg("3600")
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    fs::write(pod.bundle().join("shim.pid"), bystander.id().to_string()).unwrap();

    response(&pod.delete());

    let survived = bystander.try_wait().unwrap().is_none();
    bystander.kill().unwrap();
    bystander.wait().unwrap();
    // Pod's Drop must not act on the pid either.
    assert!(survived && !pod.bundle().join("shim.pid").exists());
}

#[test]
fn delete_when_of_a_member_leaves_its_sandbox_alone() {
    let pod = Pod::new("sandbox", Some(CONFIG));
    pod.start();
    let config = r#"{"annotations":{"io.kubernetes.cri.container-type":"container","io.kubernetes.cri.sandbox-id":"sandbox"}}"#;
    pod.add_bundle("member", Some(config));
    run(pod.command("member", "start"), b"");

    response(&run(pod.command("member", "delete"), b""));

    assert!(is_alive(pod.pid().unwrap()));
    assert!(shim::socket::is_served(&pod.socket()));
}

/// What a shim notes of a sandbox: `id` of the namespace `test`. It goes with this.
struct State(PathBuf);

impl State {
    fn new(id: &str) -> Self {
        let folder = PathBuf::from("/run/kata").join(format!("test@{id}"));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("orphaned"), "").unwrap();
        Self(folder)
    }
}

impl Drop for State {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn delete_when_others_go_on_without_the_sandboxs_container_leaves_them_until_their_shim_dies() {
    let id = format!("orphaned{}", std::process::id());
    let pod = Pod::new(&id, Some(CONFIG));
    pod.start();
    let (pid, socket) = (pod.pid().unwrap(), pod.socket());
    let config = format!(
        r#"{{"annotations":{{"io.kubernetes.cri.container-type":"container","io.kubernetes.cri.sandbox-id":"{id}"}}}}"#
    );
    pod.add_bundle("member", Some(&config));
    run(pod.command("member", "start"), b"");
    let state = State::new(&id);
    // As a shim with a VM holds it.
    let journal = fs::File::create(state.0.join("journal")).unwrap();
    journal.lock().unwrap();

    response(&pod.delete());
    response(&run(pod.command("member", "delete"), b""));

    assert!(is_alive(pid));
    assert!(shim::socket::is_served(&socket) && state.0.join("orphaned").exists());

    kill_process(pid, Signal::KILL).unwrap();
    wait_until("the shim is dead", || !is_alive(pid));
    drop(journal);
    fs::remove_dir_all(pod.bundle()).unwrap();
    response(&run(pod.command("member", "delete"), b""));

    assert!(!state.0.exists() && !socket.exists());
}

#[test]
fn delete_when_a_bundle_is_named_takes_that() {
    let pod = Pod::new("missing", Some(CONFIG));
    let mut command = pod.command(&pod.id, "");
    command = {
        let mut again = Command::new(command.get_program());
        again.args(command.get_args().take_while(|word| !word.is_empty()));
        again
            .args(["-bundle", "/nonexistent/bundle", "delete"])
            .current_dir("/");
        again
    };

    assert_eq!(response(&run(command, b"")).exit_status, 137);
}

#[test]
fn delete_when_the_rootfs_is_mounted_unmounts_it_recursively() {
    let pod = Pod::new("mounts", Some(CONFIG));
    let rootfs = pod.bundle().join("rootfs");
    fs::create_dir(&rootfs).unwrap();
    // unshare: the mounts are nobody else's business; delete runs inside the same namespace.
    let script = r#"
        set -e
        mount -t tmpfs t "$0/rootfs"; mkdir "$0/rootfs/a b"; mount -t tmpfs t "$0/rootfs/a b"
        "$@" > /dev/null
        ! grep -q "$0/rootfs" /proc/self/mountinfo
    "#;
    let delete = pod.command(&pod.id, "delete");
    let mut command = Command::new("unshare");
    command
        .args(["-m", "sh", "-c", script])
        .arg(pod.bundle())
        .arg(delete.get_program())
        .args(delete.get_args());
    command.current_dir(pod.bundle());

    let output = run(command, b"");

    assert!(output.status.success(), "{output:?}");
}
