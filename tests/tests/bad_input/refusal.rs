//! What every refusal has in common.

use std::path::{Path, PathBuf};

use tests::case::skipped_under_runc;
use tests::diagnosis::say;
use tests::leftovers::{Host, added};
use tests::{Case, Finished, Settings};
use toml::{Table, Value};

/// The shipped configuration, or the one given with `E2E_CONFIG`, as a table to change.
pub fn configuration() -> Table {
    let settings = Settings::from_env();
    let path = settings
        .config
        .unwrap_or_else(|| "/etc/kata-containers/configuration.toml".into());
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.parse().unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The shipped configuration with one hypervisor key changed.
pub fn with_hypervisor_key(key: &str, value: impl Into<Value>) -> String {
    let mut table = configuration();
    let hypervisor = table.get_mut("hypervisor").and_then(|t| t.get_mut("dragonball"));
    hypervisor
        .and_then(Value::as_table_mut)
        .unwrap()
        .insert(key.to_owned(), value.into());
    table.to_string()
}

/// The path that a hypervisor key of the shipped configuration names.
pub fn file_of(key: &str) -> PathBuf {
    let table = configuration();
    let value = table
        .get("hypervisor")
        .and_then(|t| t.get("dragonball"))
        .and_then(|t| t.get(key));
    value
        .and_then(Value::as_str)
        .unwrap_or_else(|| panic!("no hypervisor.dragonball.{key}"))
        .into()
}

/// A test of a refusal, unless it does not apply to the runtime under test.
pub fn begin(name: &str) -> Option<Case> {
    (!skipped_under_runc("the input is this runtime's")).then(|| Case::begin_alone(name))
}

/// As [`begin`], for what is found only after the host was: the contents of the kernel file, and a guest that runs.
pub fn begin_with_linux_guests(name: &str) -> Option<Case> {
    if !Settings::from_env().linux_guests {
        say("skipped: KVM cannot run Linux here, which is found first; the lab covers this");
        return None;
    }
    begin(name)
}

/// Writes a configuration into the test's folder.
pub fn write(case: &Case, text: &str) -> PathBuf {
    let path = case.daemon().dir().join("bad.toml");
    std::fs::write(&path, text).unwrap();
    path
}

/// Runs a container with this configuration and asserts that it is refused: see [`assert_refusal`].
#[track_caller]
pub fn assert_refused_with(case: &Case, config: &Path, code: &str, words: &[&str]) {
    let before = Host::look(case.daemon());
    let container = case.container();
    let run = container.run(&["true"]).flag("--rm");
    let done = run
        .option("--runtime-config-path", &config.display().to_string())
        .output();
    drop(container);
    assert_refusal(&done, code, words);
    assert_eq!(added(case.daemon(), &before), [""; 0]);
    assert_no_panic(case);
}

/// Asserts that `ctr` failed with one line holding all of `words` and ending in the gRPC code's text.
#[track_caller]
pub fn assert_refusal(done: &Finished, code: &str, words: &[&str]) {
    assert_ne!(done.code, 0, "{}", done.describe());
    let err = done.err();
    let lines = err
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect::<Vec<_>>();
    assert_eq!(lines.len(), 1, "not one line: {}", done.describe());
    for word in words {
        assert!(err.contains(word), "{word:?} is not named: {}", done.describe());
    }
    assert!(
        err.trim_end().ends_with(&format!(": {code}")),
        "code is not {code:?}: {}",
        done.describe()
    );
    for word in ["panicked", "RUST_BACKTRACE", "unwrap"] {
        assert!(!err.contains(word), "{}", done.describe());
    }
}

/// Asserts that no shim of this containerd has panicked.
#[track_caller]
pub fn assert_no_panic(case: &Case) {
    let log = std::fs::read(case.daemon().log()).unwrap();
    let log = String::from_utf8_lossy(&log);
    let line = log.lines().find(|line| line.contains("panicked at"));
    assert_eq!(line, None);
}
