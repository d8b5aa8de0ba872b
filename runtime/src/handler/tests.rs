//! The whole runtime over a fake VM and agent: requests in, responses and events out.

mod boot;
mod crash;
mod execs;
mod farewell;
mod hooks;
mod lifecycle;
mod neighbours;
mod pids;
mod races;
mod sandbox;
mod stdio;
mod streams;

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::hypervisor::VmExit;
use crate::hypervisor::fake::{Boot, FakeHypervisor};
use crate::types::{ContainerProcess, ExecProcessRequest, Mount, ProcessStatus, Stdio};

const LIMIT: Duration = Duration::from_secs(120);

struct Bench {
    folder: tempfile::TempDir,
    manager: RuntimeHandlerManager,
    events: mpsc::UnboundedReceiver<Event>,
    vm: Arc<FakeHypervisor>,
    streams: Arc<containers::StreamHub>,
}

fn bench(boot: Boot) -> Bench {
    let folder = tempfile::tempdir().unwrap();
    for name in ["vmlinux", "initrd"] {
        fs::write(folder.path().join(name), "x").unwrap();
    }
    let vm = Arc::new(FakeHypervisor::new(boot));
    let recipe = Recipe {
        root: folder.path().join("run"),
        make_hypervisor: {
            let vm = vm.clone();
            Box::new(move |_, _, _, _| vm.clone())
        },
        cgroups: false,
    };
    let (sender, events) = mpsc::unbounded_channel();
    let streams = Arc::default();
    let context = ShimContext {
        sandbox_id: "c1".into(),
        namespace: "test".into(),
        bundle: folder.path().join("c1"),
        debug: false,
        log_verbosely: || {},
        streams: Arc::clone(&streams),
    };
    let manager = RuntimeHandlerManager::with_recipe(context, sender, recipe);
    Bench {
        folder,
        manager,
        events,
        vm,
        streams,
    }
}

impl Bench {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What the agent was asked, in order.
    fn calls(&self) -> Vec<String> {
        self.vm.guest.calls.lock().unwrap().clone()
    }

    /// A bundle whose container runs `args`.
    fn bundle(&self, id: &str, args: &[&str]) -> PathBuf {
        let bundle = self.path(id);
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        fs::write(bundle.join("rootfs/file"), id).unwrap();
        fs::create_dir_all(self.path("volume")).unwrap();
        let spec = serde_json::json!({
            "ociVersion": "1.0.2",
            "hostname": "guest-name",
            "process": {"cwd": "/", "args": args, "user": {"uid": 0, "gid": 0}},
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/data", "type": "bind", "source": self.path("volume"), "options": ["rbind", "ro"]},
            ],
            "linux": {"cgroupsPath": "/default/x", "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "network"}]},
        });
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        bundle
    }

    fn create_request(&self, id: &str, args: &[&str], stdio: Stdio) -> CreateContainerRequest {
        let body = format!(
            "[hypervisor.dragonball]\nkernel = {:?}\ninitrd = {:?}\n",
            self.path("vmlinux"),
            self.path("initrd")
        );
        CreateContainerRequest {
            container_id: id.into(),
            bundle: self.bundle(id, args),
            rootfs: Vec::new(),
            stdio,
            options: RuntimeOptions {
                config_body: body.into_bytes(),
                ..Default::default()
            },
        }
    }

    async fn create_with(&self, request: CreateContainerRequest) -> Result<u32> {
        answer(self.manager.create_container(request)).await
    }

    async fn create(&self, id: &str, args: &[&str]) -> Result<u32> {
        self.create_with(self.create_request(id, args, Stdio::default()))
            .await
    }

    /// A container of the pod `c1` with the PID namespace at `path`, empty for one of its own.
    async fn member(&self, id: &str, path: &str) -> Result<u32> {
        let request = self.create_request(id, &["sleep"], Stdio::default());
        let kind = if id == "c1" { "sandbox" } else { "container" };
        edit_spec(&request, |spec| {
            spec["annotations"] = serde_json::json!({
                "io.kubernetes.cri.container-type": kind,
                "io.kubernetes.cri.sandbox-id": "c1",
            });
            spec["linux"]["namespaces"][0]["path"] = path.into();
        });
        self.create_with(request).await
    }

    async fn start(&self, id: ContainerProcess) -> Result<u32> {
        answer(self.manager.start_process(&id)).await
    }

    /// Adds a process to `c1`.
    async fn exec(&self, exec_id: &str, args: &[&str]) -> Result<()> {
        self.exec_with(exec(exec_id), args, Stdio::default()).await
    }

    /// Adds a process to any container.
    async fn exec_with(&self, process: ContainerProcess, args: &[&str], stdio: Stdio) -> Result<()> {
        let spec = serde_json::json!({"cwd": "/", "args": args, "user": {"uid": 0, "gid": 0}});
        let request = ExecProcessRequest {
            process,
            spec_json: spec.to_string().into_bytes(),
            stdio,
        };
        answer(self.manager.exec_process(request)).await
    }

    /// A process of container `id` that does nothing but end with `status`. It is left to be deleted.
    async fn exec_to_its_end(&self, id: &str, status: u32) -> (ContainerProcess, u32) {
        let process = ContainerProcess {
            container_id: id.into(),
            exec_id: "e".into(),
        };
        let args = ["exit", &status.to_string()];
        self.exec_with(process.clone(), &args, Stdio::default())
            .await
            .unwrap();
        let pid = self.start(process.clone()).await.unwrap();
        assert_eq!(self.wait(process.clone()).await, status);
        (process, pid)
    }

    async fn wait(&self, id: ContainerProcess) -> u32 {
        answer(self.manager.wait_process(&id)).await.unwrap().status
    }

    async fn delete(&self, id: ContainerProcess) -> Result<u32> {
        answer(self.manager.delete_process(&id))
            .await
            .map(|deleted| deleted.exit.status)
    }

    async fn kill(&self, id: ContainerProcess, signal: u32) -> Result<()> {
        answer(self.manager.kill_process(&id, signal, false)).await
    }

    async fn status(&self, id: ContainerProcess) -> ProcessStatus {
        answer(self.manager.state_process(&id)).await.unwrap().status
    }

    async fn resize(&self, width: u32, height: u32) -> Result<()> {
        answer(self.manager.resize_process_pty(&init("c1"), width, height)).await
    }

    async fn shutdown(&self) -> bool {
        answer(self.manager.shutdown_container("c1", false))
            .await
            .unwrap()
    }

    /// Events so far, shortened.
    fn events(&mut self) -> Vec<String> {
        let mut events = Vec::new();
        while let Ok(event) = self.events.try_recv() {
            events.push(match event {
                Event::TaskCreate { container_id, .. } => format!("create {container_id}"),
                Event::TaskStart { container_id, .. } => format!("start {container_id}"),
                Event::TaskExecAdded { process } => format!("exec-added {}", process.exec_id),
                Event::TaskExecStarted { process, .. } => format!("exec-started {}", process.exec_id),
                Event::TaskExit { process, exit, .. } => format!("exit {} {}", name(&process), exit.status),
                Event::TaskDelete { process, exit, .. } => {
                    format!("delete {} {}", name(&process), exit.status)
                }
                Event::TaskPaused { container_id } => format!("paused {container_id}"),
                Event::TaskResumed { container_id } => format!("resumed {container_id}"),
                Event::TaskOom { container_id } => format!("oom {container_id}"),
            });
        }
        events
    }

    /// Waits until the container's rootfs and volume are where the guest will look for them.
    async fn prepared(&self) {
        let share = self.path("run/kata-containers/shared/sandboxes/test@c1/shared/passthrough");
        let begin = Instant::now();
        while !share.join("c1/rootfs/file").exists() || !share.join("c1-00000001-data").exists() {
            assert!(begin.elapsed() < LIMIT, "rootfs and volume wait for the guest");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Mounts and state below the bench's folder.
    fn leftovers(&self) -> Vec<String> {
        let root = self.folder.path().display().to_string();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mut left: Vec<String> = mounts
            .lines()
            .filter(|line| line.contains(&root))
            .map(Into::into)
            .collect();
        for folder in ["run/kata", "run/kata-containers/shared/sandboxes"] {
            let entries = fs::read_dir(self.path(folder)).into_iter().flatten();
            left.extend(entries.map(|entry| entry.unwrap().path().display().to_string()));
        }
        left
    }
}

/// Changes the `config.json` of a bundle.
fn edit_spec(request: &CreateContainerRequest, edit: impl FnOnce(&mut serde_json::Value)) {
    let config = request.bundle.join("config.json");
    let mut spec = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    edit(&mut spec);
    fs::write(&config, spec.to_string()).unwrap();
}

async fn answer<T>(call: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(LIMIT, call).await.expect("no answer")
}

fn init(id: &str) -> ContainerProcess {
    ContainerProcess {
        container_id: id.into(),
        exec_id: String::new(),
    }
}

/// A further process of `c1`.
fn exec(exec_id: &str) -> ContainerProcess {
    ContainerProcess {
        container_id: "c1".into(),
        exec_id: exec_id.into(),
    }
}

fn name(process: &ContainerProcess) -> &str {
    if process.exec_id.is_empty() {
        &process.container_id
    } else {
        &process.exec_id
    }
}

fn fifo(path: &Path) -> String {
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    path.display().to_string()
}
