//! An agent in test mode: on this host, as root, in namespaces of its own (also of the network), driven through the ttrpc
//! client.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use oci_spec::runtime::{Process, Spec};
use protocols::agent::{
    CreateContainerRequest, CreateSandboxRequest, ExecProcessRequest, ReadStreamRequest,
    RemoveContainerRequest, SignalProcessRequest, StartContainerRequest, WaitProcessRequest,
    WriteStreamRequest,
};
use protocols::agent_ttrpc::AgentServiceClient;
use protocols::health_ttrpc::HealthClient;
use protocols::oci_convert::{process_to_wire, spec_to_wire};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use ttrpc::asynchronous::Client;
use ttrpc::context::{Context, with_timeout};

/// Ten times what a busy machine needs.
pub const PATIENCE: Duration = Duration::from_secs(60);
const APPLETS: [&str; 20] = [
    "sh", "cat", "cut", "echo", "grep", "sleep", "true", "kill", "head", "mknod", "pwd", "stty", "hostname",
    "id", "ls", "printf", "readlink", "test", "touch", "yes",
];

/// The agent's script: a root shell that becomes the agent, in a mount namespace where cgroup v2 is where a guest has
/// it and /run is empty.
const SCRIPT: &str = "set -e
mount -t tmpfs none /run
mount -t cgroup2 none /sys/fs/cgroup
exec \"$@\"";

pub type RpcResult<T> = ttrpc::Result<T>;

pub struct Agent {
    pub client: AgentServiceClient,
    pub health: HealthClient,
    folder: PathBuf,
    cgroup: PathBuf,
    child: Child,
}

/// What `Agent::run` saw.
#[derive(Debug, PartialEq, Eq)]
pub struct Output {
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Agent {
    /// With stdio by calls.
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// With stdio by connections.
    pub async fn start_with_ports() -> Self {
        Self::start_with(&["agent.passfd_listener_port=unix://FOLDER/stdio.sock"]).await
    }

    pub async fn start_with(options: &[&str]) -> Self {
        Self::start_as(options, &[]).await
    }

    /// In an image with `hooks` of its own: path below `guest_hook_path`, and script.
    pub async fn start_with_hooks(hooks: &[(&str, &str)]) -> Self {
        Self::start_as(&[], hooks).await
    }

    async fn start_as(options: &[&str], hooks: &[(&str, &str)]) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "agent-test-{}-{}",
            std::process::id(),
            NUMBER.fetch_add(1, Ordering::Relaxed)
        );
        let folder = std::env::temp_dir().join(&name);
        make_rootfs(&folder.join("rootfs"));
        for (path, script) in hooks {
            make_program(&folder.join("hooks").join(path), script);
        }
        let cgroup = cgroup_v2().join(&name);
        std::fs::create_dir(&cgroup).unwrap();

        let socket = folder.join("agent.sock");
        let log = std::fs::File::create(folder.join("log")).unwrap();
        let join_cgroup = format!("echo $$ > {}/cgroup.procs; exec \"$@\"", cgroup.display());
        let mut command = Command::new("sh");
        command
            .args(["-c", &join_cgroup, "sh"])
            .args([
                "unshare",
                "--pid",
                "--mount",
                "--net",
                "--ipc",
                "--uts",
                "--cgroup",
                "--fork",
                "--kill-child",
                "--mount-proc",
            ])
            .args([
                "sh",
                "-c",
                SCRIPT,
                "sh",
                env!("CARGO_BIN_EXE_kata-agent"),
                "--no-init",
            ])
            .args([
                "--listen",
                &format!("unix://{}", socket.display()),
                "agent.log=trace",
            ]);
        for option in options {
            command.arg(option.replace("FOLDER", folder.to_str().unwrap()));
        }
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();

        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(&socket).await.is_err() {
            assert!(
                Instant::now() < deadline,
                "agent did not listen: {}",
                read_log(&folder)
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let client = Client::connect(&format!("unix://{}", socket.display()))
            .await
            .unwrap();
        let agent = Self {
            client: AgentServiceClient::new(client.clone()),
            health: HealthClient::new(client),
            folder: folder.clone(),
            cgroup,
            child,
        };
        let sandbox = CreateSandboxRequest {
            sandbox_id: name,
            hostname: "pod-name".into(),
            dns: vec!["nameserver 192.0.2.1".into()],
            guest_hook_path: if hooks.is_empty() {
                String::new()
            } else {
                folder.join("hooks").display().to_string()
            },
            ..Default::default()
        };
        agent.client.create_sandbox(context(), &sandbox).await.unwrap();
        agent
    }

    /// A specification that runs `script` in a busybox root.
    pub fn spec(&self, script: &str) -> Spec {
        let mut spec = Spec::default();
        spec.root_mut()
            .as_mut()
            .unwrap()
            .set_path(self.rootfs())
            .set_readonly(Some(false));
        spec.set_process(Some(process(&["sh", "-c", script])));
        spec
    }

    pub fn rootfs(&self) -> PathBuf {
        self.folder.join("rootfs")
    }

    /// What a program of the test's has left in the folder of this agent.
    pub fn left(&self, name: &str) -> String {
        std::fs::read_to_string(self.folder.join(name)).unwrap_or_default()
    }

    pub fn log(&self) -> String {
        read_log(&self.folder)
    }

    pub async fn create(&self, id: &str, spec: &Spec) -> RpcResult<()> {
        self.create_with_ports(id, spec, [0; 3]).await
    }

    pub async fn create_with_ports(&self, id: &str, spec: &Spec, ports: [u32; 3]) -> RpcResult<()> {
        let request = CreateContainerRequest {
            container_id: id.into(),
            OCI: Some(spec_to_wire(spec)).into(),
            stdin_port: ports[0],
            stdout_port: ports[1],
            stderr_port: ports[2],
            ..Default::default()
        };
        self.client.create_container(context(), &request).await.map(drop)
    }

    /// A container that shares its PID namespace with the others of the pod.
    pub async fn create_in_pod(&self, id: &str, spec: &Spec) -> RpcResult<()> {
        let request = CreateContainerRequest {
            container_id: id.into(),
            OCI: Some(spec_to_wire(spec)).into(),
            sandbox_pidns: true,
            ..Default::default()
        };
        self.client.create_container(context(), &request).await?;
        self.start_container(id).await
    }

    pub async fn start_container(&self, id: &str) -> RpcResult<()> {
        let request = StartContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.client.start_container(context(), &request).await.map(drop)
    }

    pub async fn exec(&self, id: &str, exec_id: &str, process: &Process, ports: [u32; 3]) -> RpcResult<()> {
        let request = ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            process: Some(process_to_wire(process)).into(),
            stdin_port: ports[0],
            stdout_port: ports[1],
            stderr_port: ports[2],
            ..Default::default()
        };
        self.client.exec_process(context(), &request).await.map(drop)
    }

    pub async fn wait(&self, id: &str, exec_id: &str) -> RpcResult<i32> {
        let request = WaitProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.client
            .wait_process(context(), &request)
            .await
            .map(|answer| answer.status)
    }

    pub async fn signal(&self, id: &str, exec_id: &str, signal: u32) -> RpcResult<()> {
        let request = SignalProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            signal,
            ..Default::default()
        };
        self.client.signal_process(context(), &request).await.map(drop)
    }

    /// Signals every process of a container.
    pub async fn signal_all(&self, id: &str, signal: u32) -> RpcResult<()> {
        let request = SignalProcessRequest {
            container_id: id.into(),
            signal,
            all: true,
            ..Default::default()
        };
        self.client.signal_process(context(), &request).await.map(drop)
    }

    /// Reads output by calls until it contains `text`.
    pub async fn read_until(&self, id: &str, exec_id: &str, text: &str) -> String {
        let request = ReadStreamRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            len: 1024,
            ..Default::default()
        };
        let mut seen = String::new();
        while !seen.contains(text) {
            let answer = self.client.read_stdout(context(), &request).await;
            let data = answer
                .unwrap_or_else(|error| panic!("{error} after {seen:?}"))
                .data;
            seen.push_str(std::str::from_utf8(&data).unwrap());
        }
        seen
    }

    /// The agent's process.
    pub fn pid(&self) -> u32 {
        let [agent] = children(self.child.id())[..] else {
            panic!("unshare has one child");
        };
        agent
    }

    /// The folder of the test's files.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Output of `command` (words separated by spaces), run in the agent's network namespace.
    pub fn in_network(&self, command: &str) -> String {
        let output = Command::new("nsenter")
            .args(["--net", "--target", &self.pid().to_string(), "--"])
            .args(command.split(' '))
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Waits until the agent's log has `text`.
    pub async fn logs(&self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.log().contains(text) {
            assert!(Instant::now() < deadline, "no {text:?} in {}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// The agent's open descriptors, and its children that have ended and were not waited for.
    pub fn descriptors_and_zombies(&self) -> (usize, usize) {
        let agent = self.pid();
        let descriptors = std::fs::read_dir(format!("/proc/{agent}/fd")).unwrap().count();
        let is_zombie = |pid: &u32| {
            std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
        };
        (
            descriptors,
            children(agent).iter().filter(|pid| is_zombie(pid)).count(),
        )
    }

    /// The agent's open descriptors, once those of earlier calls are closed.
    pub async fn steady_descriptors(&self) -> usize {
        let (mut count, mut seen) = (0, 0);
        while seen < 50 {
            let (now, _) = self.descriptors_and_zombies();
            seen = if now == count { seen + 1 } else { 0 };
            count = now;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        count
    }

    pub async fn remove(&self, id: &str) -> RpcResult<()> {
        let request = RemoveContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.client.remove_container(context(), &request).await.map(drop)
    }

    pub async fn write(&self, id: &str, exec_id: &str, data: &[u8]) -> RpcResult<()> {
        let request = WriteStreamRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            data: data.into(),
            ..Default::default()
        };
        self.client.write_stdin(context(), &request).await.map(drop)
    }

    /// Reads a stream by calls until its end.
    pub async fn read_all(&self, id: &str, exec_id: &str, errors: bool) -> Vec<u8> {
        let request = ReadStreamRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            len: 32 * 1024,
            ..Default::default()
        };
        let mut all = Vec::new();
        loop {
            let answer = if errors {
                self.client.read_stderr(context(), &request).await
            } else {
                self.client.read_stdout(context(), &request).await
            };
            match answer {
                Ok(answer) => all.extend(answer.data),
                Err(error) => {
                    assert_eq!(code(&error), ttrpc::Code::OUT_OF_RANGE, "{error}");
                    return all;
                }
            }
        }
    }

    /// A container from creation to removal.
    pub async fn run(&self, id: &str, spec: &Spec) -> Output {
        self.create(id, spec)
            .await
            .unwrap_or_else(|error| panic!("{error}: {}", self.log()));
        self.start_container(id).await.unwrap();
        let (stdout, stderr) = tokio::join!(self.read_all(id, "", false), self.read_all(id, "", true));
        let status = self.wait(id, "").await.unwrap();
        self.remove(id).await.unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Output {
            status,
            stdout: text(stdout),
            stderr: text(stderr),
        }
    }

    /// Connects a stdio stream as the host does from source port `port`.
    pub async fn connect(&self, port: u32) -> UnixStream {
        let mut stream = UnixStream::connect(self.folder.join("stdio.sock")).await.unwrap();
        stream.write_u32_le(port).await.unwrap();
        stream
    }

    /// Whether the agent's process ends by itself.
    pub async fn ends(&mut self) -> bool {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if self.child.try_wait().unwrap().is_some() {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        false
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // unshare dies with its child, and the PID namespace with both.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let deadline = Instant::now() + PATIENCE;
        while remove_cgroup(&self.cgroup).is_err() && Instant::now() < deadline {
            let _ = std::fs::write(self.cgroup.join("cgroup.kill"), "1");
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn children(pid: u32) -> Vec<u32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let pids = text
        .split_ascii_whitespace()
        .map(|pid| pid.parse::<u32>().unwrap());
    pids.collect()
}

pub fn process(arguments: &[&str]) -> Process {
    let mut process = Process::default();
    process
        .set_args(Some(arguments.iter().map(ToString::to_string).collect()))
        .set_env(Some(vec!["PATH=/bin".into()]))
        .set_terminal(Some(false))
        .set_cwd("/".into());
    process
}

pub fn context() -> Context {
    with_timeout(PATIENCE.as_nanos().try_into().unwrap())
}

pub fn code(error: &ttrpc::Error) -> ttrpc::Code {
    match error {
        ttrpc::Error::RpcStatus(status) => status.code(),
        other => panic!("not a status: {other}"),
    }
}

pub fn message(error: &ttrpc::Error) -> String {
    match error {
        ttrpc::Error::RpcStatus(status) => status.message.clone(),
        other => panic!("not a status: {other}"),
    }
}

/// A script that runs in `FOLDER`, the agent's. Another process writes it: a fork of this one could hold it open for writing
/// for a moment, and then it cannot be executed.
fn make_program(path: &Path, script: &str) {
    let made = Command::new("sh")
        .args([
            "-c",
            "mkdir -p \"${1%/*}\"; printf '#!/bin/sh\\n%s\\n' \"$2\" > \"$1\"; chmod 755 \"$1\"",
            "sh",
        ])
        .arg(path)
        .arg(script)
        .status();
    assert!(made.unwrap().success());
}

fn make_rootfs(root: &Path) {
    for folder in ["bin", "dev", "proc", "sys", "tmp"] {
        std::fs::create_dir_all(root.join(folder)).unwrap();
    }
    std::fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static is installed");
    for applet in APPLETS {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
}

/// The version 2 hierarchy, on hybrid and unified hosts.
fn cgroup_v2() -> PathBuf {
    let hybrid = Path::new("/sys/fs/cgroup/unified");
    if hybrid.is_dir() {
        hybrid.into()
    } else {
        "/sys/fs/cgroup".into()
    }
}

fn remove_cgroup(path: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(path)?.flatten() {
        if entry.path().is_dir() {
            remove_cgroup(&entry.path())?;
        }
    }
    std::fs::remove_dir(path)
}

fn read_log(folder: &Path) -> String {
    std::fs::read_to_string(folder.join("log")).unwrap_or_default()
}
