//! The whole runtime over a fake VM and agent: requests in, responses and events out.

mod hooks;
mod pids;
mod races;
mod sandbox;
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

    async fn start(&self, id: ContainerProcess) -> Result<u32> {
        answer(self.manager.start_process(&id)).await
    }

    async fn exec(&self, exec_id: &str, args: &[&str]) -> Result<()> {
        let spec = serde_json::json!({"cwd": "/", "args": args, "user": {"uid": 0, "gid": 0}});
        let request = ExecProcessRequest {
            process: exec(exec_id),
            spec_json: spec.to_string().into_bytes(),
            stdio: Stdio::default(),
        };
        answer(self.manager.exec_process(request)).await
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

async fn answer<T>(call: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(LIMIT, call).await.expect("no answer")
}

fn init(id: &str) -> ContainerProcess {
    ContainerProcess {
        container_id: id.into(),
        exec_id: String::new(),
    }
}

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

#[tokio::test]
async fn container_when_deleted_leaves_nothing_behind() {
    let mut bench = bench(Boot::Announced);

    let created = bench.create("c1", &["exit", "42"]).await.unwrap();
    assert_ne!(created, std::process::id(), "a pid of its own");
    assert!(Path::new(&format!("/proc/{created}/ns/pid")).exists());
    assert_eq!(bench.status(init("c1")).await, ProcessStatus::Created);
    bench.start(init("c1")).await.unwrap();
    assert_eq!(bench.wait(init("c1")).await, 42);
    assert_eq!(bench.status(init("c1")).await, ProcessStatus::Stopped);
    assert_eq!(bench.delete(init("c1")).await.unwrap(), 42);
    assert!(bench.shutdown().await);

    assert_eq!(
        bench.events(),
        ["create c1", "start c1", "exit c1 42", "delete c1 42"]
    );
    assert_eq!(bench.leftovers(), Vec::<String>::new());
    assert!(*bench.manager.watch_end().borrow());
    let calls = bench.vm.guest.calls.lock().unwrap().clone();
    assert_eq!(
        calls,
        [
            "CreateSandbox",
            "CreateContainer c1",
            "StartContainer c1",
            "DestroySandbox"
        ]
    );
    assert!(
        bench.path("c1/rootfs/file").exists(),
        "the rootfs itself is not touched"
    );
}

#[tokio::test]
async fn container_when_created_has_share_rootfs_and_volumes() {
    let bench = bench(Boot::Silent);
    bench.create("c1", &["sleep"]).await.unwrap();

    let share = bench.path("run/kata-containers/shared/sandboxes/test@c1/shared");
    assert_eq!(
        fs::read_to_string(share.join("passthrough/c1/rootfs/file")).unwrap(),
        "c1"
    );
    fs::write(bench.path("volume/new"), "live").unwrap();
    let volume = share.join("passthrough/c1-00000001-data");
    assert_eq!(fs::read_to_string(volume.join("new")).unwrap(), "live");
    assert!(
        fs::write(volume.join("other"), "").is_err(),
        "ro is honoured on the host"
    );
    let sandbox = bench.vm.guest.sandbox.lock().unwrap().clone().unwrap();
    assert_eq!(sandbox.hostname, "guest-name");
    assert_eq!(sandbox.storages[0].driver, "virtio-fs");
    assert_eq!(sandbox.storages[0].source, "kataShared");
    let created = bench.vm.guest.created.lock().unwrap().clone().unwrap();
    assert_eq!(
        created.OCI.Root.Path,
        "/run/kata-containers/shared/containers/passthrough/c1/rootfs"
    );
    let sources: Vec<_> = created
        .OCI
        .Mounts
        .iter()
        .map(|mount| mount.source.as_str())
        .collect();
    assert_eq!(
        sources,
        [
            "proc",
            "/run/kata-containers/shared/containers/passthrough/c1-00000001-data"
        ]
    );
    assert_eq!(bench.vm.devices.lock().unwrap().len(), 1);

    bench.manager.shutdown().await;
    assert_eq!(bench.leftovers(), Vec::<String>::new());
    assert!(bench.path("volume/new").exists());
}

#[tokio::test]
async fn streams_when_closed_end_at_the_client() {
    let bench = bench(Boot::Announced);
    let stdio = Stdio {
        stdin: fifo(&bench.path("stdin")),
        stdout: fifo(&bench.path("stdout")),
        ..Default::default()
    };
    let output = bench.path("stdout");
    // The client opens its ends whenever it likes: here, reading blocks until the runtime has opened the FIFO.
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        fs::File::open(output).unwrap().read_to_string(&mut text).unwrap();
        text
    });

    bench
        .create_with(bench.create_request("c1", &["cat"], stdio.clone()))
        .await
        .unwrap();
    bench.start(init("c1")).await.unwrap();
    let mut input = fs::OpenOptions::new().write(true).open(&stdio.stdin).unwrap();
    input.write_all(b"through the guest\n").unwrap();
    drop(input);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(
        bench.status(init("c1")).await,
        ProcessStatus::Running,
        "no end of stdin before CloseIO"
    );
    answer(bench.manager.close_process_io(&init("c1"))).await.unwrap();

    assert_eq!(bench.wait(init("c1")).await, 0);
    assert_eq!(
        tokio::task::spawn_blocking(|| reader.join().unwrap())
            .await
            .unwrap(),
        "through the guest\n"
    );
    bench.delete(init("c1")).await.unwrap();
    assert!(
        bench.vm.guest.attached.lock().unwrap().is_empty(),
        "every descriptor is closed"
    );
    bench.manager.shutdown().await;
}

#[tokio::test]
async fn output_when_unread_delays_neither_exit_nor_kill() {
    let bench = bench(Boot::Announced);
    let stdio = Stdio {
        stdout: fifo(&bench.path("stdout")),
        ..Default::default()
    };
    bench
        .create_with(bench.create_request("c1", &["sleep"], stdio))
        .await
        .unwrap();
    bench.start(init("c1")).await.unwrap();

    let begin = Instant::now();
    bench.kill(init("c1"), 9).await.unwrap();
    assert_eq!(bench.wait(init("c1")).await, 137);
    assert!(begin.elapsed() < LIMIT);
    bench.manager.shutdown().await;
}

#[tokio::test]
async fn execs_when_init_ends_exit_before_it() {
    let mut bench = bench(Boot::Announced);
    bench.create("c1", &["sleep"]).await.unwrap();
    bench.start(init("c1")).await.unwrap();
    bench.exec("e1", &["exit", "7"]).await.unwrap();
    assert_eq!(
        bench.exec("e1", &["exit", "7"]).await.unwrap_err().kind,
        ErrorKind::AlreadyExists
    );
    bench.start(exec("e1")).await.unwrap();
    assert_eq!(bench.wait(exec("e1")).await, 7);
    bench.delete(exec("e1")).await.unwrap();
    bench.exec("e2", &["sleep"]).await.unwrap();
    bench.start(exec("e2")).await.unwrap();
    bench.exec("e3", &["sleep"]).await.unwrap();
    bench.kill(init("c1"), 15).await.unwrap();
    assert_eq!(bench.wait(init("c1")).await, 143);
    assert_eq!(
        bench.wait(exec("e3")).await,
        137,
        "never started, yet nobody waits for ever"
    );

    let events = bench.events();
    let expected = [
        "create c1",
        "start c1",
        "exec-added e1",
        "exec-started e1",
        "exit e1 7",
        "delete e1 7",
        "exec-added e2",
        "exec-started e2",
        "exec-added e3",
        "exit e2 143",
        "exit c1 143",
    ];
    assert_eq!(events, expected);
    assert_eq!(
        bench.exec("e4", &["sleep"]).await.unwrap_err().kind,
        ErrorKind::FailedPrecondition
    );
    assert_eq!(
        bench.start(exec("e3")).await.unwrap_err().kind,
        ErrorKind::FailedPrecondition
    );
    bench.manager.shutdown().await;
}

#[tokio::test]
async fn calls_when_wrong_have_their_codes() {
    let mut bench = bench(Boot::Announced);
    assert_eq!(
        bench.start(init("c1")).await.unwrap_err().kind,
        ErrorKind::NotFound
    );
    bench.create("c1", &["sleep"]).await.unwrap();
    assert_eq!(
        bench.create("c1", &["sleep"]).await.unwrap_err().kind,
        ErrorKind::AlreadyExists
    );
    assert_eq!(
        bench.start(init("other")).await.unwrap_err().kind,
        ErrorKind::NotFound
    );
    assert_eq!(
        bench.start(exec("none")).await.unwrap_err().kind,
        ErrorKind::NotFound
    );
    bench.start(init("c1")).await.unwrap();
    assert_eq!(
        bench.start(init("c1")).await.unwrap_err().kind,
        ErrorKind::FailedPrecondition
    );
    let error = bench.delete(init("c1")).await.unwrap_err();
    assert_eq!(
        (error.kind, error.message.as_str()),
        (
            ErrorKind::FailedPrecondition,
            "cannot delete container c1: it is running"
        )
    );
    assert!(!bench.shutdown().await, "a container is left");
    answer(bench.manager.pause_container("c1")).await.unwrap();
    assert_eq!(bench.status(init("c1")).await, ProcessStatus::Paused);
    answer(bench.manager.resume_container("c1")).await.unwrap();
    bench.kill(init("c1"), 9).await.unwrap();
    bench.wait(init("c1")).await;
    assert_eq!(
        bench.kill(init("c1"), 9).await.unwrap_err().kind,
        ErrorKind::NotFound
    );
    bench.delete(init("c1")).await.unwrap();
    assert_eq!(
        bench.delete(init("c1")).await.unwrap_err().kind,
        ErrorKind::NotFound
    );
    assert!(bench.shutdown().await);
    assert_eq!(
        bench.events(),
        [
            "create c1",
            "start c1",
            "paused c1",
            "resumed c1",
            "exit c1 137",
            "delete c1 137"
        ]
    );
}

#[tokio::test]
async fn clients_when_many_wait_before_start_and_after_exit() {
    let bench = Arc::new(bench(Boot::Announced));
    bench.create("c1", &["exit", "255"]).await.unwrap();
    let waiters: Vec<_> = (0..50)
        .map(|_| {
            let bench = bench.clone();
            tokio::spawn(async move { bench.wait(init("c1")).await })
        })
        .collect();
    tokio::task::yield_now().await;
    bench.start(init("c1")).await.unwrap();
    for waiter in waiters {
        assert_eq!(waiter.await.unwrap(), 255);
    }
    assert_eq!(bench.wait(init("c1")).await, 255);
    bench.manager.shutdown().await;
}

#[tokio::test]
async fn container_when_only_created_can_be_killed_and_deleted() {
    let mut bench = bench(Boot::Announced);
    bench.create("c1", &["sleep"]).await.unwrap();
    for signal in [0, 10, 37] {
        bench.kill(init("c1"), signal).await.unwrap();
        assert_eq!(
            bench.status(init("c1")).await,
            ProcessStatus::Created,
            "signal {signal}"
        );
    }
    let error = bench.kill(init("c1"), 65).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::InvalidArgument);
    bench.kill(init("c1"), 15).await.unwrap();
    assert_eq!(bench.wait(init("c1")).await, 143);
    bench.delete(init("c1")).await.unwrap();
    assert_eq!(bench.events(), ["create c1", "exit c1 143", "delete c1 143"]);
    bench.manager.shutdown().await;
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn command_when_not_found_is_named() {
    let mut bench = bench(Boot::Announced);
    bench.create("c1", &["missing"]).await.unwrap();
    let error = bench.start(init("c1")).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::NotFound);
    assert!(
        error.message.contains("start container c1") && error.message.contains("missing"),
        "{error}"
    );
    assert_eq!(bench.wait(init("c1")).await, 127);
    bench.delete(init("c1")).await.unwrap();
    assert!(bench.shutdown().await);
    assert_eq!(bench.events(), ["create c1", "exit c1 127", "delete c1 127"]);
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn exec_when_it_fails_leaves_the_container_running() {
    let bench = bench(Boot::Announced);
    bench.create("c1", &["sleep"]).await.unwrap();
    bench.start(init("c1")).await.unwrap();
    bench.exec("e1", &["missing"]).await.unwrap();
    let error = bench.start(exec("e1")).await.unwrap_err();
    assert!(
        error.message.contains("process e1 of container c1") && error.message.contains("missing"),
        "{error}"
    );
    assert_eq!(bench.wait(exec("e1")).await, 127);
    bench.delete(exec("e1")).await.unwrap();
    assert_eq!(bench.status(init("c1")).await, ProcessStatus::Running);
    // One that never ran has nothing to complain of.
    bench.exec("e2", &["exit", "7"]).await.unwrap();
    assert_eq!(bench.delete(exec("e2")).await.unwrap(), 0);
    bench.manager.shutdown().await;
}

#[tokio::test]
async fn vm_when_it_dies_ends_every_process_in_order() {
    let mut bench = bench(Boot::Announced);
    bench.create("c1", &["sleep"]).await.unwrap();
    bench.start(init("c1")).await.unwrap();
    bench.exec("e1", &["sleep"]).await.unwrap();
    bench.start(exec("e1")).await.unwrap();
    bench.events();

    bench.vm.end(VmExit::Panic);

    assert_eq!(bench.wait(exec("e1")).await, 137);
    assert_eq!(bench.wait(init("c1")).await, 137);
    assert_eq!(bench.status(init("c1")).await, ProcessStatus::Stopped);
    bench.delete(exec("e1")).await.unwrap();
    bench.delete(init("c1")).await.unwrap();
    assert!(bench.shutdown().await);
    assert_eq!(
        bench.events(),
        ["exit e1 137", "exit c1 137", "delete e1 137", "delete c1 137"]
    );
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn boot_when_it_fails_says_why_and_leaves_nothing() {
    for (boot, kind, parts) in [
        (
            Boot::Refused,
            ErrorKind::PermissionDenied,
            ["sandbox c1", "/dev/kvm: permission denied"],
        ),
        (
            Boot::Panics,
            ErrorKind::Unavailable,
            [
                "the guest kernel panicked",
                "Kernel panic - not syncing | [0m---[",
            ],
        ),
    ] {
        let mut bench = bench(boot);
        let error = bench.create("c1", &["sleep"]).await.unwrap_err();
        assert_eq!(error.kind, kind, "{error}");
        for part in parts {
            assert!(error.message.contains(part), "{part} in {error}");
        }
        assert!(!error.message.contains('\n'));
        assert_eq!(bench.leftovers(), Vec::<String>::new());
        assert_eq!(bench.events(), Vec::<String>::new());
        assert!(bench.shutdown().await, "a shim without a sandbox may end");
    }
}

#[tokio::test]
async fn boot_when_shut_down_is_interrupted() {
    let bench = Arc::new(bench(Boot::Hangs));
    let creating = {
        let bench = bench.clone();
        tokio::spawn(async move { bench.create("c1", &["sleep"]).await })
    };
    bench.prepared().await;
    assert!(bench.shutdown().await);
    assert_eq!(creating.await.unwrap().unwrap_err().kind, ErrorKind::Unavailable);
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn container_when_its_guest_boots_is_prepared() {
    let bench = Arc::new(bench(Boot::Hangs));
    let creating = {
        let bench = bench.clone();
        tokio::spawn(async move { bench.create("c1", &["sleep"]).await })
    };
    bench.prepared().await;
    assert!(!creating.is_finished());

    bench.manager.shutdown().await;
    creating.await.unwrap().unwrap_err();
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn boot_when_a_mount_is_bad_is_interrupted() {
    let mut bench = bench(Boot::Hangs);
    let mut create = bench.create_request("c1", &["sleep"], Stdio::default());
    create.rootfs = vec![Mount {
        fs_type: "overlay".into(),
        source: "overlay".into(),
        options: vec!["lowerdir=/nonexistent-lower".into()],
        ..Default::default()
    }];

    let error = bench.create_with(create).await.unwrap_err();

    assert!(error.message.contains("/nonexistent-lower"), "{error}");
    assert_eq!(bench.leftovers(), Vec::<String>::new());
    assert_eq!(bench.events(), Vec::<String>::new());
    assert!(bench.shutdown().await);
}

#[tokio::test]
async fn bundle_when_bad_is_named_and_leaves_nothing() {
    let mut bench = bench(Boot::Announced);
    let request = |bench: &Bench| bench.create_request("c1", &["sleep"], Stdio::default());

    let create = request(&bench);
    fs::remove_file(create.bundle.join("config.json")).unwrap();
    let error = bench.create_with(create).await.unwrap_err();
    assert!(
        error.kind == ErrorKind::NotFound && error.message.contains("c1/config.json"),
        "{error}"
    );

    let create = request(&bench);
    fs::remove_dir_all(create.bundle.join("rootfs")).unwrap();
    let error = bench.create_with(create).await.unwrap_err();
    assert!(
        error.kind == ErrorKind::NotFound && error.message.contains("c1/rootfs"),
        "{error}"
    );
    assert_eq!(bench.leftovers(), Vec::<String>::new());

    let mut create = request(&bench);
    create.rootfs = vec![Mount {
        fs_type: "overlay".into(),
        source: "overlay".into(),
        ..Default::default()
    }];
    create.rootfs[0].options = vec!["lowerdir=/nonexistent-lower".into()];
    let error = bench.create_with(create).await.unwrap_err();
    assert!(
        error.message.contains("overlay") && error.message.contains("/nonexistent-lower"),
        "{error}"
    );

    let mut create = request(&bench);
    create.options.config_body = b"[hypervisor.dragonball]\nkernel = \"/nonexistent/vmlinux\"\n".to_vec();
    let error = bench.create_with(create).await.unwrap_err();
    assert!(
        error.kind == ErrorKind::NotFound && error.message.contains("/nonexistent/vmlinux"),
        "{error}"
    );

    let error = bench.create("c1", &["refused"]).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::InvalidArgument);
    assert_eq!(
        error.message,
        "create container c1: agent CreateContainer: refused by the test"
    );

    assert_eq!(bench.leftovers(), Vec::<String>::new());
    assert_eq!(bench.events(), Vec::<String>::new());
    assert!(bench.shutdown().await);
}

#[tokio::test]
async fn cleanup_when_the_shim_crashed_removes_everything() {
    let bench = bench(Boot::Announced);
    bench.create("c1", &["sleep"]).await.unwrap();
    assert_ne!(bench.leftovers(), Vec::<String>::new());
    let paths = SandboxPaths::below(&bench.path("run"), "test", "c1").unwrap();

    let before = bench.leftovers();
    let error = cleanup_paths(paths.clone(), bench.path("c1")).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::AlreadyExists, "{error}");
    assert_eq!(bench.leftovers(), before, "of a living shim nothing is touched");

    // The shim is "dead": nothing of it is asked, and nobody holds the lock of the file that is found.
    let copy = paths.state().join("copy");
    fs::copy(paths.journal(), &copy).unwrap();
    fs::rename(&copy, paths.journal()).unwrap();
    cleanup_paths(paths.clone(), bench.path("c1")).await.unwrap();
    cleanup_paths(paths.clone(), bench.path("c1")).await.unwrap();

    assert_eq!(bench.leftovers(), Vec::<String>::new());
    assert!(bench.path("c1/rootfs/file").exists() && bench.path("volume").exists());
    bench.manager.shutdown().await;
}

#[tokio::test]
async fn terminal_size_when_set_before_the_start_is_applied() {
    let bench = bench(Boot::Announced);
    bench.create("c1", &["sleep"]).await.unwrap();
    bench.resize(80, 24).await.unwrap();
    bench.start(init("c1")).await.unwrap();
    bench.resize(132, 50).await.unwrap();

    let calls = bench.vm.guest.calls.lock().unwrap().clone();
    let sizes: Vec<_> = calls
        .iter()
        .filter(|call| call.starts_with("TtyWinResize"))
        .collect();
    assert_eq!(sizes, ["TtyWinResize 80x24", "TtyWinResize 132x50"]);
    bench.manager.shutdown().await;
}

#[tokio::test]
async fn kills_for_memory_when_of_strangers_or_too_many_are_not_events() {
    let mut bench = bench(Boot::Announced);
    bench.create("c1", &["sleep"]).await.unwrap();
    bench.start(init("c1")).await.unwrap();
    bench.events();
    let claims = ["stranger", "c1", "c1", "", "../c1", "c1", "stranger"].map(str::to_owned);
    *bench.vm.guest.killed_for_memory.lock().unwrap() = claims.into();

    while !bench.vm.guest.killed_for_memory.lock().unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    bench.kill(init("c1"), 9).await.unwrap();
    bench.wait(init("c1")).await;

    // The last of its claims came seconds after the first, and so may the second have on a busy machine.
    let events = bench.events();
    let claimed = events.iter().filter(|event| *event == "oom c1").count();
    let told = bench.vm.guest.told_of_kills.lock().unwrap().clone();
    let apart = told[3] - told[1] >= Duration::from_secs(1);
    assert!((1..=2).contains(&claimed) || claimed == 3 && apart, "{events:?}");
    assert_eq!(events.len(), claimed + 1, "{events:?}");
    bench.manager.shutdown().await;
}

#[tokio::test]
async fn terminal_size_when_set_before_an_exec_starts_is_its_first() {
    let bench = bench(Boot::Announced);
    bench.create("c1", &["sleep"]).await.unwrap();
    bench.start(init("c1")).await.unwrap();
    bench.exec("e1", &["sleep"]).await.unwrap();
    answer(bench.manager.resize_process_pty(&exec("e1"), 132, 50))
        .await
        .unwrap();

    bench.start(exec("e1")).await.unwrap();

    let calls = bench.vm.guest.calls.lock().unwrap().clone();
    assert!(calls.contains(&"ExecProcess e1 132x50".to_owned()), "{calls:?}");
    assert!(
        !calls.iter().any(|call| call.starts_with("TtyWinResize")),
        "{calls:?}"
    );
    bench.manager.shutdown().await;
}
