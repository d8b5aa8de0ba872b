//! The end of the container that stands for a pod, and those beside it.

use super::*;

/// A pod whose own container `c1` and whose `c2` run.
async fn pod() -> Bench {
    let bench = bench(Boot::Announced);
    for id in ["c1", "c2"] {
        bench.member(id, "").await.unwrap();
        bench.start(init(id)).await.unwrap();
    }
    bench
}

impl Bench {
    async fn killed(&self, id: &str) {
        self.kill(init(id), 9).await.unwrap();
        assert_eq!(self.wait(init(id)).await, 137);
    }

    fn paths(&self) -> SandboxPaths {
        SandboxPaths::below(&self.path("run"), "test", "c1").unwrap()
    }

    fn was_asked(&self, call: &str) -> bool {
        self.calls().iter().any(|other| other == call)
    }

    /// It has no container any more: the shim may end, and there is nothing of it.
    async fn is_gone(&self) {
        assert!(self.was_asked("DestroySandbox"), "{:?}", self.calls());
        assert!(self.shutdown().await);
        assert_eq!(self.leftovers(), Vec::<String>::new());
    }
}

#[tokio::test]
async fn pod_when_its_own_container_is_deleted_lives_as_long_as_another_runs() {
    let mut bench = pod().await;
    bench.killed("c1").await;

    assert_eq!(bench.delete(init("c1")).await.unwrap(), 137);

    assert!(bench.was_asked("RemoveContainer c1") && !bench.was_asked("DestroySandbox"));
    assert!(
        bench.paths().orphaned().exists(),
        "`delete` leaves the shim alone"
    );
    assert!(!bench.shutdown().await, "a container is left");
    assert_eq!(bench.status(init("c2")).await, ProcessStatus::Running);
    assert_eq!(
        answer(bench.manager.state_process(&init("c1")))
            .await
            .unwrap_err()
            .kind,
        ErrorKind::NotFound
    );
    let (exec, _) = bench.exec_to_its_end("c2", 3).await;
    bench.delete(exec).await.unwrap();
    assert!(!bench.was_asked("DestroySandbox"), "an exec is no container");

    bench.killed("c2").await;
    assert!(
        !bench.was_asked("DestroySandbox"),
        "it is still to be asked about"
    );
    assert_eq!(bench.delete(init("c2")).await.unwrap(), 137);

    bench.is_gone().await;
    let events = bench.events();
    assert_eq!(
        events.get(events.len() - 2..).unwrap(),
        ["exit c2 137", "delete c2 137"]
    );
}

#[tokio::test]
async fn pod_when_its_own_container_is_deleted_and_the_others_have_ended_ends() {
    let bench = pod().await;
    bench.killed("c2").await;
    bench.killed("c1").await;

    bench.delete(init("c1")).await.unwrap();

    assert!(bench.was_asked("DestroySandbox") && !bench.was_asked("RemoveContainer c1"));
    assert!(!bench.paths().orphaned().exists());
    assert!(!bench.shutdown().await, "a container is left");
    // What is known of it stays until it is deleted.
    assert_eq!(bench.status(init("c2")).await, ProcessStatus::Stopped);
    assert_eq!(bench.delete(init("c2")).await.unwrap(), 137);
    bench.is_gone().await;
}

#[tokio::test]
async fn pod_when_orphaned_ends_with_the_last_that_runs() {
    let bench = pod().await;
    // Not started: it waits, as its process does under runc.
    bench.member("c3", "").await.unwrap();
    bench.killed("c1").await;
    bench.delete(init("c1")).await.unwrap();

    bench.killed("c2").await;
    bench.delete(init("c2")).await.unwrap();
    assert!(!bench.was_asked("DestroySandbox"));
    bench.start(init("c3")).await.unwrap();
    bench.member("c4", "").await.unwrap();
    bench.killed("c3").await;
    bench.delete(init("c3")).await.unwrap();
    assert!(!bench.was_asked("DestroySandbox"));

    // A created one is deleted by ending it.
    bench.delete(init("c4")).await.unwrap();
    bench.is_gone().await;
}

#[tokio::test]
async fn pod_when_its_own_container_is_deleted_while_another_is_created_goes_on() {
    let bench = bench(Boot::Announced);
    bench.member("c1", "").await.unwrap();
    bench.killed("c1").await;
    let meanwhile = async {
        bench.vm.guest.wait_for_call("CreateContainer c2").await;
        bench.delete(init("c1")).await.unwrap();
        bench.vm.guest.let_slow_go();
    };

    let (created, ()) = tokio::join!(bench.create("c2", &["slow"]), meanwhile);

    created.unwrap();
    bench.start(init("c2")).await.unwrap();
    assert_eq!(bench.status(init("c2")).await, ProcessStatus::Running);
    bench.killed("c2").await;
    bench.delete(init("c2")).await.unwrap();
    bench.is_gone().await;
}
