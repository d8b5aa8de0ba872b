//! The shim's own command line, as containerd and a curious user call it.

use std::path::PathBuf;
use std::process::Command;

use tests::case::skipped_under_runc;
use tests::command::run;
use tests::{Finished, Settings};

/// A folder that is removed in the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("e2e-cli-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs the shim in a folder; `None` when the suite runs against runc.
fn shim(folder: &Folder, args: &[&str]) -> Option<Finished> {
    if skipped_under_runc("the command line is this runtime's") {
        return None;
    }
    let settings = Settings::from_env();
    let mut command = Command::new(settings.shim_dir.join(settings.shim_name()));
    Some(run(command.args(args).current_dir(&folder.0), settings.call_limit).unwrap())
}

#[track_caller]
fn assert_one_line(done: &Finished, words: &[&str]) {
    assert!(done.code != 0 && done.code < 128, "{}", done.describe());
    let err = done.err();
    assert_eq!(
        err.lines().filter(|line| !line.trim().is_empty()).count(),
        1,
        "{}",
        done.describe()
    );
    for word in words {
        assert!(err.contains(word), "{word:?} is not named: {}", done.describe());
    }
    assert!(!err.contains("panicked"), "{}", done.describe());
    assert_eq!(done.out(), "", "nothing belongs on standard output");
}

const START: [&str; 6] = [
    "-namespace",
    "e2e-cli",
    "-address",
    "/nowhere/containerd.sock",
    "-id",
    "e2e-cli-box",
];

/// A sandbox of the Sandbox API has no container of its own, so its bundle has no config.json.
#[test]
fn start_when_bundle_has_no_config_json_serves_a_sandbox_until_delete() {
    let folder = Folder::new("no-config");
    let bundle = folder.0.display().to_string();
    // Not the id of the other tests, whose `delete` would take it away.
    let id = [
        "-namespace",
        "e2e-cli",
        "-address",
        "/nowhere/containerd.sock",
        "-id",
        "e2e-cli-sandbox",
    ];
    let Some(done) = shim(&folder, &[id.as_slice(), &["start"]].concat()) else {
        return;
    };
    let address = done.expect_code(0).out();
    let socket = PathBuf::from(address.trim().strip_prefix("unix://").unwrap());
    let served = socket.exists();

    let deleted = shim(
        &folder,
        &[id.as_slice(), &["-bundle", &bundle, "delete"]].concat(),
    )
    .unwrap();

    deleted.expect_code(0);
    assert!(served, "{}", socket.display());
    assert!(!socket.exists(), "{}", socket.display());
    assert!(!folder.0.join("address").exists());
}

#[test]
fn start_when_config_json_is_malformed_names_it() {
    let folder = Folder::new("bad-config");
    std::fs::write(folder.0.join("config.json"), "{\"ociVersion\": ").unwrap();
    let args = [START.as_slice(), &["start"]].concat();
    let Some(done) = shim(&folder, &args) else { return };
    assert_one_line(&done, &["config.json"]);
    assert!(!folder.0.join("address").exists());
}

#[test]
fn start_when_id_is_missing_says_so() {
    let folder = Folder::new("no-id");
    let Some(done) = shim(
        &folder,
        &["-namespace", "e2e-cli", "-address", "/nowhere/c.sock", "start"],
    ) else {
        return;
    };
    assert_one_line(&done, &["-id"]);
}

#[test]
fn action_when_unknown_is_named() {
    let folder = Folder::new("action");
    let args = [START.as_slice(), &["dance"]].concat();
    let Some(done) = shim(&folder, &args) else { return };
    assert_one_line(&done, &["dance"]);
}

#[test]
fn version_when_asked_is_printed() {
    let folder = Folder::new("version");
    for flag in ["-v", "-version", "--version"] {
        let Some(done) = shim(&folder, &[flag]) else {
            return;
        };
        let done = done.expect_code(0);
        assert!(
            done.out().contains("containerd-shim-kata-v2"),
            "{}",
            done.describe()
        );
    }
}

/// containerd calls `delete` for a bundle whose shim is gone, maybe more than once, maybe before anything was made.
#[test]
fn delete_when_nothing_is_there_succeeds() {
    let folder = Folder::new("delete");
    let bundle = folder.0.display().to_string();
    let args = [START.as_slice(), &["-bundle", &bundle, "delete"]].concat();
    for _ in 0..2 {
        let Some(done) = shim(&folder, &args) else { return };
        let done = done.expect_code(0);
        assert!(
            !done.stdout.is_empty(),
            "a DeleteResponse is expected on standard output"
        );
        assert!(!done.err().contains("panicked"), "{}", done.describe());
    }
}
