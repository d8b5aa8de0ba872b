use std::time::{Duration, Instant};

use crate::harness::{Agent, PATIENCE, code, message, process};

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
    assert_eq!(code(&error), ttrpc::Code::NOT_FOUND);
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
}

#[tokio::test]
async fn exec_id_when_its_process_has_ended_is_free_and_until_then_taken() {
    let agent = Agent::start().await;
    agent.create("one", &agent.spec("sleep 1000")).await.unwrap();
    agent.start_container("one").await.unwrap();
    let run = async |command: &[&str]| agent.exec("one", "e", &process(command), [0; 3]).await;

    // More often than ended processes are kept.
    for round in 0..70 {
        run(&["sh", "-c", &format!("exit {round}")]).await.unwrap();
        assert_eq!(agent.wait("one", "e").await.unwrap(), round);
    }
    run(&["sleep", "1000"]).await.unwrap();
    let taken = run(&["true"]).await.unwrap_err();
    assert_eq!(code(&taken), ttrpc::Code::ALREADY_EXISTS);
    agent.signal("one", "e", 9).await.unwrap();
    assert_eq!(agent.wait("one", "e").await.unwrap(), 137);
    run(&["true"]).await.unwrap();
    assert_eq!(agent.wait("one", "e").await.unwrap(), 0);
}

#[tokio::test]
async fn execs_when_a_thousand_have_ended_leave_neither_zombies_nor_descriptors() {
    const ROUNDS: usize = 100;
    const AT_ONCE: usize = 10;
    let agent = Agent::start_with_ports().await;
    agent.create("one", &agent.spec("sleep 1000")).await.unwrap();
    agent.start_container("one").await.unwrap();
    let mut terminal = process(&["true"]);
    terminal.set_terminal(Some(true));
    let kinds = [process(&["true"]), terminal, process(&["frobnicate"])];
    let round = async |number: usize| {
        let runs = (0..AT_ONCE).map(|index| {
            let (agent, kind) = (&agent, &kinds[index % kinds.len()]);
            async move {
                let exec_id = format!("e{number}-{index}");
                if agent.exec("one", &exec_id, kind, [0; 3]).await.is_ok() {
                    assert_eq!(agent.wait("one", &exec_id).await.unwrap(), 0);
                }
            }
        });
        futures::future::join_all(runs).await;
    };
    for number in 0..10 {
        round(number).await;
    }
    let (before, _) = agent.descriptors_and_zombies();

    for number in 10..ROUNDS {
        round(number).await;
    }

    // Those of the last round may be on their way out.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (after, zombies) = agent.descriptors_and_zombies();
        if zombies == 0 && after <= before {
            break;
        }
        assert!(
            Instant::now() < deadline,
            "{zombies} zombies, {after} descriptors, {before} before"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn terminal_when_sized_at_the_start_has_the_size_when_its_program_runs() {
    let agent = Agent::start().await;
    agent.create("one", &agent.spec("sleep 1000")).await.unwrap();
    agent.start_container("one").await.unwrap();
    let size = oci_spec::runtime::BoxBuilder::default()
        .height(33u64)
        .width(111u64)
        .build()
        .unwrap();
    for number in 0..5 {
        let exec_id = format!("e{number}");
        let mut command = process(&["stty", "size"]);
        command.set_terminal(Some(true)).set_console_size(Some(size));
        agent.exec("one", &exec_id, &command, [0; 3]).await.unwrap();
        assert_eq!(agent.read_all("one", &exec_id, false).await, b"33 111\r\n");
        assert_eq!(agent.wait("one", &exec_id).await.unwrap(), 0);
    }
}
