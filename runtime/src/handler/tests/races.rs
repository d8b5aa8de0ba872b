//! Requests that come at the same time, or too early.

use super::*;

#[tokio::test]
async fn deletes_when_at_the_same_time_are_one() {
    let mut bench = bench(Boot::Announced);
    bench.create("c1", &["exit", "3"]).await.unwrap();
    bench.start(init("c1")).await.unwrap();
    bench.wait(init("c1")).await;

    let (one, other) = tokio::join!(bench.delete(init("c1")), bench.delete(init("c1")));

    let refused: Vec<_> = [one, other].into_iter().filter_map(Result::err).collect();
    assert_eq!(refused.len(), 1, "{refused:?}");
    assert_eq!(refused[0].kind, ErrorKind::NotFound);
    let deletes = bench
        .events()
        .into_iter()
        .filter(|event| event.starts_with("delete"));
    assert_eq!(deletes.collect::<Vec<_>>(), ["delete c1 3"]);
    bench.manager.shutdown().await;
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn delete_when_refused_can_be_repeated() {
    let bench = bench(Boot::Announced);
    bench.create("c1", &["sleep"]).await.unwrap();
    bench.start(init("c1")).await.unwrap();
    assert_eq!(
        bench.delete(init("c1")).await.unwrap_err().kind,
        ErrorKind::FailedPrecondition
    );
    bench.kill(init("c1"), 9).await.unwrap();
    bench.wait(init("c1")).await;
    bench.delete(init("c1")).await.unwrap();
    bench.manager.shutdown().await;
}

#[tokio::test]
async fn kill_when_during_a_create_finds_nothing_and_delete_takes_it_back() {
    let mut bench = bench(Boot::Announced);
    bench.create("c1", &["sleep"]).await.unwrap();

    let meanwhile = async {
        bench.vm.guest.wait_for_call("CreateContainer c2").await;
        // As runc's shim answers.
        assert_eq!(
            bench.kill(init("c2"), 9).await.unwrap_err().kind,
            ErrorKind::NotFound
        );
        assert_eq!(
            bench.delete(init("c2")).await.unwrap_err().kind,
            ErrorKind::NotFound
        );
        bench.vm.guest.let_slow_go();
    };
    let (created, ()) = tokio::join!(bench.create("c2", &["slow"]), meanwhile);

    let error = created.unwrap_err();
    assert!(error.message.contains("deleted while it was created"), "{error}");
    assert_eq!(bench.events(), ["create c1"], "nobody hears of it");
    let calls = bench.vm.guest.calls.lock().unwrap().clone();
    assert_eq!(calls.last().map(String::as_str), Some("RemoveContainer c2"));
    // The id is free again.
    bench.create("c2", &["sleep"]).await.unwrap();
    bench.manager.shutdown().await;
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn shutdown_when_the_container_being_created_was_deleted_ends_the_shim() {
    let bench = bench(Boot::Announced);
    let meanwhile = async {
        bench.vm.guest.wait_for_call("CreateContainer c1").await;
        assert_eq!(
            bench.delete(init("c1")).await.unwrap_err().kind,
            ErrorKind::NotFound
        );
        bench.vm.guest.let_slow_go();
        bench.shutdown().await
    };
    // Whether the agent's answer or the end of its VM comes first is open.
    let (_created, ended) = tokio::join!(bench.create("c1", &["slow"]), meanwhile);
    assert!(ended);
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn close_io_when_before_the_start_is_remembered() {
    let bench = bench(Boot::Announced);
    bench.create("c1", &["sleep"]).await.unwrap();
    bench.start(init("c1")).await.unwrap();
    let stdio = Stdio {
        stdin: fifo(&bench.path("stdin")),
        stdout: fifo(&bench.path("stdout")),
        ..Default::default()
    };
    // Both ends, so that the reader of what comes out has a writer from the beginning.
    let output = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&stdio.stdout)
        .unwrap();
    bench
        .exec_with(exec("e1"), &["cat"], stdio.clone())
        .await
        .unwrap();

    bench.manager.close_process_io(&exec("e1")).await.unwrap();
    bench.start(exec("e1")).await.unwrap();

    // Nobody else holds the other end: `cat` sees the end of its input and exits.
    assert_eq!(bench.wait(exec("e1")).await, 0);
    drop(output);
    bench.manager.shutdown().await;
}

#[tokio::test]
async fn logger_when_never_ready_holds_its_own_container_only() {
    let bench = bench(Boot::Announced);
    bench.create("c1", &["sleep"]).await.unwrap();
    let logger = bench.path("logger");
    fs::write(&logger, "#!/bin/sh\nexec sleep 1000\n").unwrap();
    fs::set_permissions(&logger, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let uri = format!("binary://{}", logger.display());
    let stdio = Stdio {
        stdout: uri.clone(),
        stderr: uri,
        ..Default::default()
    };
    let ended = std::cell::Cell::new(0);
    // As many as there are async threads, and one more: the test's runtime has a single one.
    let slow = ["c2", "c3", "c4"].map(|id| {
        let (bench, stdio, ended) = (&bench, stdio.clone(), &ended);
        async move {
            let request = bench.create_request(id, &["sleep"], stdio);
            let created = bench.create_with(request).await;
            ended.set(ended.get() + 1);
            created
        }
    });
    let [one, two, three] = slow;
    let meanwhile = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let status = bench.status(init("c1")).await;
        (status, ended.get())
    };
    let (one, two, three, (status, ended)) = tokio::join!(one, two, three, meanwhile);

    assert_eq!(status, ProcessStatus::Created);
    assert_eq!(ended, 0, "answered before any of them gave up");
    for refused in [one, two, three] {
        let error = refused.unwrap_err();
        assert_eq!(error.kind, ErrorKind::DeadlineExceeded);
        assert!(error.message.contains("not ready"), "{error}");
    }
    bench.manager.shutdown().await;
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}
