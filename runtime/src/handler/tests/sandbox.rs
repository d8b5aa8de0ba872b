//! The Sandbox API over a fake VM and agent.

use super::*;
use crate::handler::SandboxHandler;
use crate::sandbox::{Readiness, SandboxEnd, SandboxStatus};
use crate::types::{CreateSandboxRequest, PodConfig, StartedSandbox};

/// The bench's shim is that of this sandbox.
const SANDBOX: &str = "c1";

impl Bench {
    fn pod(&self) -> CreateSandboxRequest {
        let bundle = self.path(SANDBOX);
        fs::create_dir_all(&bundle).unwrap();
        CreateSandboxRequest {
            sandbox_id: SANDBOX.into(),
            bundle,
            options: self.create_request("unused", &[], Stdio::default()).options,
            pod: Some(PodConfig {
                hostname: "web".into(),
                dns: vec!["nameserver 10.0.0.1".into()],
                sysctls: [("kernel.shmmax".to_owned(), "1024".to_owned())].into(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    async fn make(&self) -> Result<()> {
        answer(self.manager.create_sandbox(self.pod())).await
    }

    async fn boot(&self) -> Result<StartedSandbox> {
        answer(self.manager.start_sandbox(SANDBOX)).await
    }

    async fn running() -> Self {
        let bench = bench(Boot::Announced);
        bench.make().await.unwrap();
        bench.boot().await.unwrap();
        bench
    }

    async fn end(&self) -> SandboxEnd {
        answer(self.manager.wait_sandbox(SANDBOX)).await.unwrap()
    }

    async fn sandbox(&self) -> SandboxStatus {
        answer(self.manager.sandbox_status(SANDBOX)).await.unwrap()
    }

    async fn stop(&self) -> Result<()> {
        answer(self.manager.stop_sandbox(SANDBOX, None)).await
    }

    /// A container of the pod.
    async fn join(&self, id: &str, args: &[&str]) -> Result<u32> {
        let request = self.create_request(id, args, Stdio::default());
        let path = request.bundle.join("config.json");
        let mut spec: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        spec["annotations"] = serde_json::json!({
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": SANDBOX,
        });
        fs::write(&path, spec.to_string()).unwrap();
        self.create_with(request).await
    }
}

fn kind<T: std::fmt::Debug>(result: Result<T>) -> ErrorKind {
    result.unwrap_err().kind
}

#[tokio::test]
async fn pod_when_run_by_the_sandbox_api_has_no_container_of_its_own() {
    let mut bench = bench(Boot::Announced);
    bench.make().await.unwrap();
    assert_eq!(
        bench.calls(),
        Vec::<String>::new(),
        "nothing runs before the start"
    );
    assert_eq!(bench.sandbox().await.state, Readiness::NotReady);
    let started = bench.boot().await.unwrap();
    assert_eq!(started.pid, std::process::id());
    let status = bench.sandbox().await;
    assert_eq!(
        (status.state, status.created_at),
        (Readiness::Ready, Some(started.created_at))
    );
    assert_eq!(status.end, None);
    answer(bench.manager.ping_sandbox(SANDBOX)).await.unwrap();
    let sandbox = bench.vm.guest.sandbox.lock().unwrap().clone().unwrap();
    assert_eq!((sandbox.hostname.as_str(), sandbox.dns.len()), ("web", 1));
    assert_eq!(
        sandbox.sysctls.get("kernel.shmmax").map(String::as_str),
        Some("1024")
    );

    bench.join("c2", &["exit", "3"]).await.unwrap();
    bench.start(init("c2")).await.unwrap();
    assert_eq!(bench.wait(init("c2")).await, 3);
    bench.delete(init("c2")).await.unwrap();
    assert!(
        !bench.shutdown().await,
        "the last container's end is not the pod's"
    );
    assert_eq!(bench.sandbox().await.state, Readiness::Ready);
    bench.join("c3", &["sleep"]).await.unwrap();

    answer(bench.manager.shutdown_sandbox(SANDBOX)).await.unwrap();

    assert!(*bench.manager.watch_end().borrow());
    assert_eq!(bench.leftovers(), Vec::<String>::new());
    let expected = [
        "CreateSandbox",
        "CreateContainer c2",
        "StartContainer c2",
        "RemoveContainer c2",
        "CreateContainer c3",
        "DestroySandbox",
    ];
    assert_eq!(bench.calls(), expected);
    let events = [
        "create c2",
        "start c2",
        "exit c2 3",
        "delete c2 3",
        "create c3",
        "exit c3 137",
    ];
    assert_eq!(bench.events(), events);
}

#[tokio::test]
async fn container_when_it_brings_no_files_has_the_pods() {
    let bench = Bench::running().await;
    bench.join("c2", &["sleep"]).await.unwrap();

    let created = bench.vm.guest.created.lock().unwrap().clone().unwrap();
    let mounts: Vec<_> = created
        .OCI
        .Mounts
        .iter()
        .map(|mount| mount.destination.as_str())
        .collect();
    let expected = [
        "/proc",
        "/data",
        "/etc/hosts",
        "/etc/resolv.conf",
        "/etc/hostname",
        "/dev/shm",
    ];
    assert_eq!(mounts, expected);
    let shared = |name: &str| {
        let share = bench.path("run/kata-containers/shared/sandboxes/test@c1/shared/passthrough");
        fs::read_to_string(share.join(name)).unwrap()
    };
    assert_eq!(shared("c2-00000003-resolv.conf"), "nameserver 10.0.0.1\n");
    assert_eq!(shared("c2-00000004-hostname"), "web\n");
    assert!(created.OCI.Mounts[5].source.ends_with("/sandbox/shm"));

    bench.stop().await.unwrap();
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn step_when_its_turn_has_not_come_is_refused() {
    let bench = bench(Boot::Announced);
    let manager = &bench.manager;
    let precondition = ErrorKind::FailedPrecondition;
    assert_eq!(kind(bench.boot().await), precondition);
    assert_eq!(kind(bench.stop().await), precondition);
    assert_eq!(kind(answer(manager.wait_sandbox(SANDBOX)).await), precondition);
    assert_eq!(kind(answer(manager.sandbox_status(SANDBOX)).await), precondition);
    assert_eq!(kind(answer(manager.ping_sandbox(SANDBOX)).await), precondition);
    assert_eq!(kind(answer(manager.stats_sandbox(SANDBOX)).await), precondition);

    bench.make().await.unwrap();
    assert_eq!(kind(answer(manager.ping_sandbox(SANDBOX)).await), precondition);
    assert_eq!(kind(bench.join("c2", &["sleep"]).await), precondition);

    bench.boot().await.unwrap();
    bench.stop().await.unwrap();
    let error = bench.boot().await.unwrap_err();
    assert_eq!(
        (error.kind, error.message.as_str()),
        (precondition, "sandbox c1 has ended")
    );
    let error = bench.join("c2", &["sleep"]).await.unwrap_err();
    assert_eq!(error.kind, precondition);
    assert!(
        error.message.contains("container c2: sandbox c1 has ended"),
        "{error}"
    );
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn step_when_done_twice_exists_already() {
    let bench = bench(Boot::Announced);
    bench.make().await.unwrap();
    assert_eq!(kind(bench.make().await), ErrorKind::AlreadyExists);
    bench.boot().await.unwrap();
    assert_eq!(kind(bench.make().await), ErrorKind::AlreadyExists);
    assert_eq!(kind(bench.boot().await), ErrorKind::AlreadyExists);
    assert_eq!(
        kind(bench.join(SANDBOX, &["sleep"]).await),
        ErrorKind::AlreadyExists
    );

    for _ in 0..3 {
        bench.stop().await.unwrap();
    }
    answer(bench.manager.shutdown_sandbox(SANDBOX)).await.unwrap();
    answer(bench.manager.shutdown_sandbox(SANDBOX)).await.unwrap();
    bench.stop().await.unwrap();
    assert_eq!(kind(bench.make().await), ErrorKind::FailedPrecondition);
    let destroyed = bench
        .calls()
        .iter()
        .filter(|call| *call == "DestroySandbox")
        .count();
    assert_eq!(destroyed, 1);
}

#[tokio::test]
async fn sandbox_when_of_another_shim_is_not_found() {
    let bench = Bench::running().await;
    let manager = &bench.manager;
    let other = CreateSandboxRequest {
        sandbox_id: "c2".into(),
        ..bench.pod()
    };
    assert_eq!(
        kind(answer(manager.create_sandbox(other)).await),
        ErrorKind::NotFound
    );
    assert_eq!(
        kind(answer(manager.start_sandbox("c2")).await),
        ErrorKind::NotFound
    );
    assert_eq!(
        kind(answer(manager.stop_sandbox("c2", None)).await),
        ErrorKind::NotFound
    );
    assert_eq!(
        kind(answer(manager.wait_sandbox("c2")).await),
        ErrorKind::NotFound
    );
    assert_eq!(
        kind(answer(manager.sandbox_status("c2")).await),
        ErrorKind::NotFound
    );
    assert_eq!(
        kind(answer(manager.shutdown_sandbox("c2")).await),
        ErrorKind::NotFound
    );
    assert_eq!(bench.sandbox().await.state, Readiness::Ready);
    manager.shutdown().await;
}

#[tokio::test]
async fn waiters_when_the_sandbox_is_stopped_are_released_with_0() {
    let bench = Arc::new(Bench::running().await);
    let waiters: Vec<_> = (0..10)
        .map(|_| {
            let bench = bench.clone();
            tokio::spawn(async move { bench.end().await })
        })
        .collect();

    bench.stop().await.unwrap();

    for waiter in waiters {
        assert_eq!(waiter.await.unwrap().status(), 0);
    }
    let status = bench.sandbox().await;
    assert_eq!(status.state, Readiness::NotReady);
    assert_eq!(status.end.unwrap(), bench.end().await, "asked afterwards");
    assert!(status.created_at.is_some());
}

#[tokio::test]
async fn sandbox_when_its_vm_dies_has_ended_with_137() {
    let mut bench = Bench::running().await;
    bench.join("c2", &["sleep"]).await.unwrap();
    bench.start(init("c2")).await.unwrap();
    let before = std::time::SystemTime::now();

    bench.vm.end(VmExit::Panic);

    let end = bench.end().await;
    assert_eq!(end.status(), 137);
    assert!(end.at >= before);
    assert_eq!(bench.wait(init("c2")).await, 137);
    let status = bench.sandbox().await;
    assert_eq!(status.state, Readiness::NotReady);
    assert!(
        status.info.get("end").is_some_and(|end| end.contains("panicked")),
        "{status:?}"
    );
    assert_eq!(
        kind(answer(bench.manager.ping_sandbox(SANDBOX)).await),
        ErrorKind::FailedPrecondition
    );
    // containerd deletes what it knows of after the pod has been stopped.
    bench.stop().await.unwrap();
    assert_eq!(bench.delete(init("c2")).await.unwrap(), 137);
    assert_eq!(
        bench.events(),
        ["create c2", "start c2", "exit c2 137", "delete c2 137"]
    );
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn sandbox_when_it_was_never_started_can_be_stopped() {
    let bench = bench(Boot::Announced);
    bench.make().await.unwrap();
    assert_ne!(bench.leftovers(), Vec::<String>::new());

    bench.stop().await.unwrap();

    assert_eq!(bench.end().await.status(), 0);
    assert_eq!(bench.leftovers(), Vec::<String>::new());
    assert_eq!(bench.calls(), Vec::<String>::new());
    assert_eq!(kind(bench.boot().await), ErrorKind::FailedPrecondition);
}

#[tokio::test]
async fn boot_of_a_sandbox_when_it_fails_says_why_and_leaves_nothing() {
    let bench = bench(Boot::Panics);
    bench.make().await.unwrap();

    let error = bench.boot().await.unwrap_err();

    assert_eq!(error.kind, ErrorKind::Unavailable);
    assert!(error.message.contains("the guest kernel panicked"), "{error}");
    assert_eq!(bench.leftovers(), Vec::<String>::new());
    assert_eq!(bench.end().await.status(), 137);
    assert_eq!(bench.sandbox().await.created_at, None);
    answer(bench.manager.shutdown_sandbox(SANDBOX)).await.unwrap();
    assert!(*bench.manager.watch_end().borrow());
}

#[tokio::test]
async fn boot_of_a_sandbox_when_it_is_stopped_is_interrupted() {
    let bench = Arc::new(bench(Boot::Hangs));
    bench.make().await.unwrap();
    let booting = {
        let bench = bench.clone();
        tokio::spawn(async move { bench.boot().await })
    };
    while !matches!(*bench.manager.instance.borrow(), Instance::Starting(_)) {
        tokio::task::yield_now().await;
    }

    bench.stop().await.unwrap();

    assert_eq!(kind(booting.await.unwrap()), ErrorKind::Unavailable);
    assert_eq!(bench.leftovers(), Vec::<String>::new());
    assert_eq!(bench.end().await.status(), 0);
}

#[tokio::test]
async fn pod_when_it_asks_for_the_hosts_processes_is_refused_before_it_is_made() {
    let bench = bench(Boot::Announced);
    let mut request = bench.pod();
    request.pod.as_mut().unwrap().host_namespaces = vec!["pid (hostPID)"];

    let error = answer(bench.manager.create_sandbox(request)).await.unwrap_err();

    assert_eq!(error.kind, ErrorKind::Unimplemented);
    assert!(error.message.contains("hostPID"), "{error}");
    assert_eq!(bench.leftovers(), Vec::<String>::new());
    bench.make().await.unwrap();
    bench.stop().await.unwrap();
}

#[tokio::test]
async fn pod_when_a_client_gives_a_spec_is_made_of_it() {
    let bench = bench(Boot::Announced);
    let request = CreateSandboxRequest {
        pod: None,
        ..bench.pod()
    };
    let spec =
        r#"{"ociVersion":"1.0.2","hostname":"of-spec","linux":{"sysctl":{"net.core.somaxconn":"99"}}}"#;
    fs::write(request.bundle.join("config.json"), spec).unwrap();

    answer(bench.manager.create_sandbox(request)).await.unwrap();
    bench.boot().await.unwrap();

    let sandbox = bench.vm.guest.sandbox.lock().unwrap().clone().unwrap();
    assert_eq!(sandbox.hostname, "of-spec");
    assert_eq!(
        sandbox.sysctls.get("net.core.somaxconn").map(String::as_str),
        Some("99")
    );
    bench.stop().await.unwrap();
}

#[tokio::test]
async fn sandbox_when_it_belongs_to_a_container_can_be_asked_about_too() {
    let bench = bench(Boot::Announced);
    bench.create("c1", &["sleep"]).await.unwrap();
    assert_eq!(kind(bench.make().await), ErrorKind::AlreadyExists);
    assert_eq!(kind(bench.boot().await), ErrorKind::AlreadyExists);
    assert_eq!(bench.sandbox().await.state, Readiness::Ready);

    bench.stop().await.unwrap();

    assert_eq!(bench.end().await.status(), 0);
    assert_eq!(bench.wait(init("c1")).await, 137);
    bench.delete(init("c1")).await.unwrap();
    assert!(bench.shutdown().await);
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn containers_when_they_share_processes_without_a_pause_container_do_so_in_the_pod() {
    let bench = Bench::running().await;
    let request = bench.create_request("c2", &["sleep"], Stdio::default());
    let path = request.bundle.join("config.json");
    let mut spec: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    // The pid that the start of the sandbox has answered.
    spec["linux"]["namespaces"][0]["path"] = format!("/proc/{}/ns/pid", std::process::id()).into();
    fs::write(&path, spec.to_string()).unwrap();

    bench.create_with(request).await.unwrap();

    let created = bench.vm.guest.created.lock().unwrap().clone().unwrap();
    assert!(created.sandbox_pidns);
    bench.stop().await.unwrap();
}

/// The guest's own word comes late: the exit waits for what the cgroup knows, and what comes later is not told again.
#[tokio::test]
async fn kill_for_memory_when_its_news_are_late_is_published_before_the_exit() {
    let mut bench = Bench::running().await;
    for id in ["c2", "c3"] {
        bench.join(id, &["sleep"]).await.unwrap();
        bench.start(init(id)).await.unwrap();
    }
    bench.events();
    bench.vm.guest.counted_kills.lock().unwrap().insert("c2".into());

    for id in ["c2", "c3"] {
        let process = init(id);
        answer(bench.manager.kill_process(&process, 9, false))
            .await
            .unwrap();
        assert_eq!(bench.wait(init(id)).await, 137);
        bench
            .vm
            .guest
            .killed_for_memory
            .lock()
            .unwrap()
            .push_back(id.into());
    }

    let events = bench.events();
    let of_c2: Vec<_> = events.iter().filter(|event| event.contains("c2")).collect();
    assert_eq!(of_c2, ["oom c2", "exit c2 137"]);
    bench.stop().await.unwrap();
    let late = bench.events();
    assert!(!late.iter().any(|event| event.starts_with("oom")), "{late:?}");
}

#[tokio::test]
async fn figures_of_a_sandbox_are_those_of_its_containers_together() {
    let bench = Bench::running().await;
    let none = answer(bench.manager.stats_sandbox(SANDBOX)).await.unwrap();
    assert_eq!(none.pids_current, 0);
    for id in ["c2", "c3"] {
        bench.join(id, &["sleep"]).await.unwrap();
    }

    let both = answer(bench.manager.stats_sandbox(SANDBOX)).await.unwrap();

    assert_eq!(both.pids_current, 4);
    bench.stop().await.unwrap();
}

#[tokio::test]
async fn execs_when_many_come_one_after_another_leave_nothing() {
    let mut bench = Bench::running().await;
    bench.join("c2", &["sleep"]).await.unwrap();
    bench.start(init("c2")).await.unwrap();
    bench.events();
    for number in 0..300 {
        // Of one name, as it is free again each time.
        let (exec, _) = bench.exec_to_its_end("c2", number % 2).await;
        bench.delete(exec).await.unwrap();
    }

    assert!(bench.vm.guest.attached.lock().unwrap().is_empty());
    let events = bench.events();
    let exits = events.iter().filter(|event| event.starts_with("exit")).count();
    assert_eq!((exits, events.len()), (300, 1200));
    bench.stop().await.unwrap();
}
