//! `start` and the process it leaves, as containerd sees them. Needs root, as containerd does.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;

use crate::harness::{Pod, failure, is_alive, mode, run, stderr, stdout, wait_until};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult, Extension};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use rustix::process::{Signal, kill_process};

const CONFIG: &str = r#"{"ociVersion":"1.0.2"}"#;

fn member_of(sandbox: &str) -> String {
    format!(
        r#"{{"annotations":{{"io.kubernetes.cri.container-type":"container","io.kubernetes.cri.sandbox-id":"{sandbox}"}}}}"#
    )
}

fn nothing_left(pod: &Pod, id: &str) {
    let names = fs::read_dir(pod.bundle_of(id))
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    let left: Vec<_> = names
        .filter(|name| name != "config.json" && name != "log")
        .collect();
    assert!(left.is_empty(), "left in the bundle: {left:?}");
    assert!(!pod.socket_of(id).exists());
}

#[test]
fn start_when_containerd_is_old_answers_the_bare_address() {
    let pod = Pod::new("legacy", Some(CONFIG));

    let output = pod.start();

    let address = format!("unix://{}", pod.socket().display());
    assert!(output.status.success(), "{output:?}");
    assert_eq!((stdout(&output), stderr(&output)), (address.as_str(), ""));
    assert_eq!(fs::read_to_string(pod.bundle().join("address")).unwrap(), address);
    assert_eq!((mode(&pod.sockets()), mode(&pod.socket())), (0o700, 0o600));
    assert!(shim::socket::is_served(&pod.socket()));
    assert!(is_alive(pod.pid().unwrap()));
}

#[test]
fn start_when_done_leaves_a_detached_process() {
    let pod = Pod::new("detached", Some(CONFIG));
    pod.start();
    let pid = pod.pid().unwrap().as_raw_nonzero();

    let proc = Path::new("/proc").join(pid.to_string());
    for fd in 0..3 {
        assert_eq!(
            fs::read_link(proc.join(format!("fd/{fd}"))).unwrap(),
            Path::new("/dev/null"),
            "fd {fd}"
        );
    }
    assert_eq!(fs::read_link(proc.join("cwd")).unwrap(), pod.bundle());
    assert_ne!(
        fs::read_link(proc.join("ns/mnt")).unwrap(),
        fs::read_link("/proc/self/ns/mnt").unwrap()
    );
    // Field 6 of stat is the session, counted after the name in parentheses.
    let stat = fs::read_to_string(proc.join("stat")).unwrap();
    let session = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .nth(3)
        .unwrap();
    assert_eq!(session, pid.to_string());
}

#[test]
fn oom_score_when_serving_is_one_above_containerds() {
    let read = |pid: &str| -> i32 {
        fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))
            .unwrap()
            .trim()
            .parse()
            .unwrap()
    };
    let pod = Pod::new("oom", Some(CONFIG));

    pod.start();

    assert_eq!(
        read(&pod.pid().unwrap().as_raw_nonzero().to_string()),
        (read("self") + 1).min(1000)
    );
}

#[test]
fn start_when_given_bootstrap_parameters_answers_version_3() {
    let pod = Pod::new("bootstrap", Some(CONFIG));
    let other = tempfile::tempdir().unwrap();
    let params = BootstrapParams {
        instance_id: pod.id.clone(),
        namespace: "test".into(),
        socket_dir: Some(other.path().join("sockets").to_str().unwrap().into()),
        ..Default::default()
    };

    let output = run(pod.command(&pod.id, "start"), &params.write_to_bytes().unwrap());

    assert!(output.status.success(), "{output:?}");
    let result = BootstrapResult::parse_from_bytes(&output.stdout).unwrap();
    assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
    let socket = result.address.strip_prefix("unix://").unwrap();
    assert!(socket.starts_with(other.path().to_str().unwrap()) && shim::socket::is_served(Path::new(socket)));
}

#[test]
fn start_when_options_are_on_stdin_is_legacy() {
    let pod = Pod::new("options", Some(CONFIG));
    let any = b"\x0a\x19runtimeoptions.v1.Options\x12\x04\x12\x02/c";

    let output = run(pod.command(&pod.id, "start"), any);

    assert_eq!(stdout(&output), format!("unix://{}", pod.socket().display()));
    // A request for a sandbox comes without them.
    assert_eq!(fs::read(pod.bundle().join("options.pb")).unwrap(), any);
}

#[test]
fn start_when_options_are_in_the_parameters_keeps_them() {
    let pod = Pod::new("extension", None);
    let options = Any {
        type_url: "runtimeoptions.v1.Options".into(),
        value: b"\x12\x02/c".to_vec(),
        ..Default::default()
    };
    let of_others = Any {
        type_url: "containerd.io/nri.v1.PluginConfig".into(),
        ..Default::default()
    };
    let extension = |value: Any| Extension {
        value: MessageField::some(value),
        ..Default::default()
    };
    let params = BootstrapParams {
        instance_id: pod.id.clone(),
        namespace: "test".into(),
        extensions: vec![extension(of_others), extension(options.clone())],
        socket_dir: Some(pod.sockets().to_str().unwrap().into()),
        ..Default::default()
    };

    let output = run(pod.command(&pod.id, "start"), &params.write_to_bytes().unwrap());

    assert!(output.status.success(), "{output:?}");
    let kept = fs::read(pod.bundle().join("options.pb")).unwrap();
    assert_eq!(Any::parse_from_bytes(&kept).unwrap(), options);
}

#[test]
fn start_when_flags_are_unknown_answers_all_the_same() {
    let pod = Pod::new("future", Some(CONFIG));
    let mut command = pod.command(&pod.id, "");
    command = {
        let mut again = std::process::Command::new(command.get_program());
        again
            .arg("-future=1")
            .args(command.get_args().take_while(|word| !word.is_empty()))
            .arg("start");
        again
            .current_dir(pod.bundle())
            .env("SHIM_SOCKET_DIR", pod.sockets())
            .env_remove("TTRPC_ADDRESS");
        again
    };

    let output = run(command, b"");

    assert_eq!(
        (stdout(&output), stderr(&output)),
        (format!("unix://{}", pod.socket().display()).as_str(), "")
    );
}

#[test]
fn start_when_the_socket_is_stale_replaces_it() {
    let pod = Pod::new("stale", Some(CONFIG));
    fs::create_dir(pod.sockets()).unwrap();
    drop(UnixListener::bind(pod.socket()).unwrap());
    assert!(pod.socket().exists());

    let output = pod.start();

    assert!(output.status.success(), "{output:?}");
    assert!(shim::socket::is_served(&pod.socket()));
}

#[test]
fn start_when_the_id_is_served_is_refused() {
    let pod = Pod::new("twice", Some(CONFIG));
    pod.start();
    let first = pod.pid();

    let output = pod.start();

    let line = failure(&output);
    assert!(
        line.contains(&format!("a shim already serves {}", pod.socket().display())),
        "{line}"
    );
    assert_eq!(pod.pid(), first, "the first shim is untouched");
    assert!(shim::socket::is_served(&pod.socket()));
}

#[test]
fn start_when_a_pods_container_joins_its_sandbox() {
    let pod = Pod::new(
        "sandbox",
        Some(r#"{"annotations":{"io.kubernetes.cri.container-type":"sandbox"}}"#),
    );
    pod.start();
    let bundle = pod.add_bundle("member", Some(&member_of("sandbox")));

    let output = run(pod.command("member", "start"), b"");

    let address = format!("unix://{}", pod.socket().display());
    assert_eq!((stdout(&output), stderr(&output)), (address.as_str(), ""));
    assert_eq!(fs::read_to_string(bundle.join("address")).unwrap(), address);
    assert!(!bundle.join("shim.pid").exists() && !pod.socket_of("member").exists());
}

#[test]
fn start_when_its_sandbox_is_dead_is_refused() {
    let pod = Pod::new("orphan", Some(&member_of("gone")));

    let output = pod.start();

    let line = failure(&output);
    assert!(
        line.contains("sandbox gone of container orphan is not served at"),
        "{line}"
    );
    nothing_left(&pod, "orphan");
}

#[test]
fn start_when_there_is_no_config_serves_a_sandbox() {
    let pod = Pod::new("sandbox-api", None);

    let output = pod.start();

    let address = format!("unix://{}", pod.socket().display());
    assert_eq!((stdout(&output), stderr(&output)), (address.as_str(), ""));
    assert!(is_alive(pod.pid().unwrap()));
}

#[test]
fn start_when_config_is_broken_names_it() {
    let pod = Pod::new("broken", Some("{"));

    let line = pod.start();

    assert!(failure(&line).contains("config.json: EOF"), "{line:?}");
}

#[test]
fn start_when_the_socket_folder_is_unusable_names_it() {
    let pod = Pod::new("nodir", Some(CONFIG));
    let file = pod.bundle().join("config.json");
    let mut command = pod.command(&pod.id, "start");
    command.env("SHIM_SOCKET_DIR", file.join("s"));

    let output = run(command, b"");

    let line = failure(&output);
    assert!(
        line.contains(&format!("creating socket folder {}/s", file.display())),
        "{line}"
    );
    nothing_left(&pod, "nodir");
}

#[test]
fn start_when_the_socket_folder_is_too_long_names_it() {
    let pod = Pod::new("long", Some(CONFIG));
    let mut command = pod.command(&pod.id, "start");
    command.env("SHIM_SOCKET_DIR", format!("/tmp/{}", "d".repeat(60)));

    let output = run(command, b"");

    assert!(
        failure(&output).contains("Unix sockets take at most 107"),
        "{output:?}"
    );
}

#[test]
fn start_when_the_child_cannot_serve_fails() {
    let pod = Pod::new("refused", Some(CONFIG));
    // The child cannot record its pid: something that is not a file is in the way.
    fs::create_dir(pod.bundle().join("shim.pid")).unwrap();

    let output = pod.start();

    let line = failure(&output);
    assert!(line.contains("shim.pid: Is a directory"), "{line}");
    assert!(!pod.socket().exists() && !pod.bundle().join("address").exists());
}

#[test]
fn shim_when_terminated_removes_its_socket() {
    let pod = Pod::new("term", Some(CONFIG));
    pod.start();
    let pid = pod.pid().unwrap();

    kill_process(pid, Signal::TERM).unwrap();

    wait_until("the shim ends", || !is_alive(pid));
    assert!(!pod.socket().exists());
}

#[test]
fn logs_when_nobody_reads_block_nothing() {
    let pod = Pod::new("logs", Some(CONFIG));
    let fifo = pod.bundle().join("log");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).unwrap();
    let flags = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap();
    let mut reader = fs::File::options()
        .read(true)
        .custom_flags(flags)
        .open(&fifo)
        .unwrap();
    assert!(reader.metadata().unwrap().file_type().is_fifo());
    let output = pod.start();
    assert!(output.status.success(), "{output:?}");
    let mut text = String::new();
    wait_until("a log line comes", || {
        let mut bytes = [0; 4096];
        if let Ok(count) = reader.read(&mut bytes) {
            text.push_str(std::str::from_utf8(&bytes[..count]).unwrap());
        }
        text.contains("msg=serving")
    });
    assert!(text.starts_with("time=\"2"), "{text}");
    assert!(
        text.contains("level=info") && text.contains("sandbox=logs") && text.contains("namespace=test"),
        "{text}"
    );

    // containerd is gone: the shim must still end when told to.
    drop(reader);
    let pid = pod.pid().unwrap();
    kill_process(pid, Signal::TERM).unwrap();

    wait_until("the shim ends", || !is_alive(pid));
}
