//! Under Debian's containerd. Ignored by default because it needs containerd and root; the end-to-end suite has the rest.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use crate::harness::{SHIM, is_alive, run, stderr, wait_until};

/// containerd with folders of its own and our shim first in its PATH.
struct Containerd {
    folder: tempfile::TempDir,
    daemon: Child,
}

impl Containerd {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        let config = format!(
            "version = 2\nroot = \"{}\"\nstate = \"{}\"\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = \"{}\"\n",
            at("root"),
            at("state"),
            at("socket")
        );
        fs::write(at("config.toml"), config).unwrap();
        let path = format!(
            "{}:{}",
            Path::new(SHIM).parent().unwrap().display(),
            std::env::var("PATH").unwrap()
        );
        let daemon = Command::new("containerd")
            .args(["-c", &at("config.toml")])
            .env("PATH", path)
            .stdout(Stdio::null())
            .stderr(fs::File::create(at("log")).unwrap())
            .spawn()
            .unwrap();
        let containerd = Self { folder, daemon };
        wait_until("containerd answers", || {
            containerd.ctr(&["version"]).status.success()
        });
        containerd
    }

    fn ctr(&self, words: &[&str]) -> Output {
        let mut command = Command::new("ctr");
        command
            .arg("-a")
            .arg(self.folder.path().join("socket"))
            .args(words);
        run(command, b"")
    }

    /// Pids of shims this containerd started.
    fn shims(&self) -> Vec<rustix::process::Pid> {
        let address = self.folder.path().join("socket").display().to_string();
        let ours = |pid: &i32| {
            let cmdline = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words: Vec<_> = cmdline.split(|byte| *byte == 0).collect();
            words.contains(&address.as_bytes()) && words.contains(&b"-id".as_slice())
        };
        let pids = fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
        let pids = pids.filter(ours).filter_map(rustix::process::Pid::from_raw);
        pids.filter(|pid| is_alive(*pid)).collect()
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

#[test]
fn create_when_it_fails_names_the_problem_and_leaves_nothing() {
    let containerd = Containerd::start();
    let at = |name: &str| containerd.folder.path().join(name).display().to_string();
    fs::write(
        at("kata.toml"),
        "[hypervisor.dragonball]\nkernel = \"/nonexistent/vmlinux\"\n",
    )
    .unwrap();
    fs::create_dir(at("rootfs")).unwrap();
    // Others on this machine mount as they like.
    let mounts = || {
        let all = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let folder = at("");
        let ours = [&*folder, " /run/kata", "shim-smoke"];
        let ours = all
            .lines()
            .filter(|line| ours.iter().any(|part| line.contains(part)));
        ours.map(str::to_owned).collect::<Vec<_>>()
    };
    let before = mounts();

    let output = containerd.ctr(&[
        "run",
        "--rm",
        "--runtime",
        "io.containerd.kata.v2",
        "--runtime-config-path",
        &at("kata.toml"),
        "--rootfs",
        &at("rootfs"),
        "shim-smoke",
        "/bin/true",
    ]);

    assert!(!output.status.success());
    let text = stderr(&output);
    assert!(
        text.contains("/nonexistent/vmlinux") && text.trim_end().ends_with("not found"),
        "{text}"
    );
    wait_until("the shim has ended", || containerd.shims().is_empty());
    wait_until("its mounts are gone", || mounts() == before);
    wait_until("its state is gone", || {
        !Path::new("/run/kata/default@shim-smoke").exists()
    });
    let socket = shim::address::Address::of_sandbox(
        Path::new(shim::address::DEFAULT_SOCKET_DIR),
        &at("socket"),
        "default",
        "shim-smoke",
    );
    let socket = socket.unwrap();
    wait_until("its socket is gone", || !socket.path().exists());
    let bundles = containerd
        .folder
        .path()
        .join("state/io.containerd.runtime.v2.task/default");
    wait_until("its bundle is gone", || {
        fs::read_dir(&bundles).unwrap().count() == 0
    });
}
