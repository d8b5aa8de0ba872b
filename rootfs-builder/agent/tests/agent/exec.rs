use crate::harness::{Agent, code, message, process};

#[tokio::test]
async fn exec_when_run_has_its_own_status_streams_and_the_containers_world() {
    let agent = Agent::start().await;
    agent.create("one", &agent.spec("sleep 1000")).await.unwrap();
    agent.start_container("one").await.unwrap();

    let script = "cat; echo err >&2; hostname; ls /proc/1/cmdline; exit 7";
    agent
        .exec("one", "e1", &process(&["sh", "-c", script]), [0; 3])
        .await
        .unwrap();
    agent.write("one", "e1", b"in ").await.unwrap();
    let close = protocols::agent::CloseStdinRequest {
        container_id: "one".into(),
        exec_id: "e1".into(),
        ..Default::default()
    };
    agent
        .client
        .close_stdin(crate::harness::context(), &close)
        .await
        .unwrap();

    assert_eq!(
        agent.read_all("one", "e1", false).await,
        b"in pod-name\n/proc/1/cmdline\n"
    );
    assert_eq!(agent.read_all("one", "e1", true).await, b"err\n");
    assert_eq!(agent.wait("one", "e1").await.unwrap(), 7);
}

#[tokio::test]
async fn exec_when_signalled_reports_it_and_leaves_the_container_alone() {
    let agent = Agent::start().await;
    agent.create("one", &agent.spec("sleep 1000")).await.unwrap();
    agent.start_container("one").await.unwrap();
    agent
        .exec("one", "e1", &process(&["sleep", "1000"]), [0; 3])
        .await
        .unwrap();

    agent.signal("one", "e1", 15).await.unwrap();

    assert_eq!(agent.wait("one", "e1").await.unwrap(), 143);
    let error = agent.signal("one", "e1", 15).await.unwrap_err();
    assert_eq!(code(&error), ttrpc::Code::NOT_FOUND, "{error}");
    agent
        .exec("one", "e2", &process(&["true"]), [0; 3])
        .await
        .unwrap();
    assert_eq!(agent.wait("one", "e2").await.unwrap(), 0);
}

#[tokio::test]
async fn exec_when_its_program_is_missing_fails_at_once_naming_it() {
    let agent = Agent::start().await;
    agent.create("one", &agent.spec("sleep 1000")).await.unwrap();
    agent.start_container("one").await.unwrap();

    let error = agent
        .exec("one", "e1", &process(&["frobnicate"]), [0; 3])
        .await
        .unwrap_err();
    assert!(
        message(&error).contains("exec: \"frobnicate\": executable file not found in $PATH"),
        "{error}"
    );
    assert_eq!(code(&error), ttrpc::Code::INVALID_ARGUMENT);
    // The name is free again.
    agent
        .exec("one", "e1", &process(&["true"]), [0; 3])
        .await
        .unwrap();
    assert_eq!(agent.wait("one", "e1").await.unwrap(), 0);
}

#[tokio::test]
async fn exec_when_the_container_does_not_run_is_refused() {
    let agent = Agent::start().await;
    agent.create("one", &agent.spec("true")).await.unwrap();

    let error = agent
        .exec("one", "e1", &process(&["true"]), [0; 3])
        .await
        .unwrap_err();
    assert_eq!(code(&error), ttrpc::Code::FAILED_PRECONDITION);
    assert_eq!(
        message(&error),
        "container one: container one is created, not running"
    );
    agent.start_container("one").await.unwrap();
    agent.wait("one", "").await.unwrap();
    let error = agent
        .exec("one", "e1", &process(&["true"]), [0; 3])
        .await
        .unwrap_err();
    assert_eq!(
        message(&error),
        "container one: container one is stopped, not running"
    );
}

#[tokio::test]
async fn execs_when_many_are_all_answered_and_old_ones_forgotten() {
    let agent = Agent::start().await;
    agent.create("one", &agent.spec("sleep 1000")).await.unwrap();
    agent.start_container("one").await.unwrap();

    for number in 0..70 {
        let exec_id = format!("e{number}");
        agent
            .exec(
                "one",
                &exec_id,
                &process(&["sh", "-c", &format!("exit {number}")]),
                [0; 3],
            )
            .await
            .unwrap();
        assert_eq!(agent.wait("one", &exec_id).await.unwrap(), number);
    }

    assert_eq!(
        code(&agent.wait("one", "e0").await.unwrap_err()),
        ttrpc::Code::NOT_FOUND
    );
    assert_eq!(agent.wait("one", "e69").await.unwrap(), 69);
    let taken = agent
        .exec("one", "e69", &process(&["true"]), [0; 3])
        .await
        .unwrap_err();
    assert_eq!(code(&taken), ttrpc::Code::ALREADY_EXISTS);
}
