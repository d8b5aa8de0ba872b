//! A container from its creation to its deletion, and those who ask about it.

use super::*;

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
