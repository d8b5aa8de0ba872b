//! Plays containerd's side: a bundle, a socket folder, and the binary run as containerd runs it.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};

/// The binary under test.
pub const SHIM: &str = env!("CARGO_BIN_EXE_containerd-shim-kata-v2");

/// Bound of every wait; only a failing test takes that long.
const PATIENCE: Duration = Duration::from_secs(120);

/// What `-address` says; nothing listens there.
pub const CONTAINERD: &str = "/run/test-containerd/containerd.sock";

/// A bundle in a temporary folder, with a socket folder beside it. Dropping it ends the shim it may have.
pub struct Pod {
    folder: tempfile::TempDir,
    pub id: String,
}

impl Pod {
    /// A bundle with `config` as its config.json; `None` for one without.
    pub fn new(id: &str, config: Option<&str>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let pod = Self {
            folder,
            id: id.to_owned(),
        };
        pod.add_bundle(id, config);
        pod
    }

    /// A second bundle that shares the socket folder.
    pub fn add_bundle(&self, id: &str, config: Option<&str>) -> PathBuf {
        let bundle = self.bundle_of(id);
        fs::create_dir(&bundle).unwrap();
        if let Some(config) = config {
            fs::write(bundle.join("config.json"), config).unwrap();
        }
        bundle
    }

    pub fn bundle_of(&self, id: &str) -> PathBuf {
        self.folder.path().join(id)
    }

    pub fn bundle(&self) -> PathBuf {
        self.bundle_of(&self.id)
    }

    pub fn sockets(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    /// The command containerd would run for container `id`.
    pub fn command(&self, id: &str, action: &str) -> Command {
        let mut command = Command::new(SHIM);
        command
            .args([
                "-namespace",
                "test",
                "-address",
                CONTAINERD,
                "-publish-binary",
                "/usr/bin/containerd",
            ])
            .args(["-id", id])
            .arg(action)
            .current_dir(self.bundle_of(id))
            .env("SHIM_SOCKET_DIR", self.sockets())
            .env("TTRPC_ADDRESS", "");
        command
    }

    pub fn start(&self) -> Output {
        run(self.command(&self.id, "start"), b"")
    }

    pub fn delete(&self) -> Output {
        run(self.command(&self.id, "delete"), b"")
    }

    /// Where the shim of sandbox `id` listens.
    pub fn socket_of(&self, id: &str) -> PathBuf {
        shim::address::Address::of_sandbox(&self.sockets(), CONTAINERD, "test", id)
            .unwrap()
            .path()
            .to_owned()
    }

    pub fn socket(&self) -> PathBuf {
        self.socket_of(&self.id)
    }

    /// Pid of the serving shim.
    pub fn pid(&self) -> Option<Pid> {
        let text = fs::read_to_string(self.bundle().join("shim.pid")).ok()?;
        Pid::from_raw(text.parse().ok()?)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if let Some(pid) = self.pid() {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// Runs `command` with `stdin`, bounded in time.
pub fn run(mut command: Command, stdin: &[u8]) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A program that does not read its input may close it first.
    let _ = child.stdin.take().unwrap().write_all(stdin);
    wait_until("the command ends", || child.try_wait().unwrap().is_some());
    child.wait_with_output().unwrap()
}

/// Waits for a condition that must come true.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(
            Instant::now() < deadline,
            "still not, after {} s: {what}",
            PATIENCE.as_secs()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

pub fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

/// A failed command: exit status not 0, nothing on stdout, one line on stderr, which is returned.
pub fn failure(output: &Output) -> &str {
    assert!(!output.status.success(), "{output:?}");
    assert_eq!(stdout(output), "");
    let line = stderr(output);
    assert_eq!(line.lines().count(), 1, "{line}");
    line.trim_end()
}

pub fn is_alive(pid: Pid) -> bool {
    let state = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    let zombie = state
        .rsplit(')')
        .next()
        .is_some_and(|rest| rest.trim_start().starts_with('Z'));
    test_kill_process(pid).is_ok() && !zombie
}

pub fn mode(path: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}
