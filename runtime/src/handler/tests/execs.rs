//! Further processes of a container.

use super::*;

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
