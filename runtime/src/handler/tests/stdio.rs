//! FIFOs and terminals of processes.

use super::*;

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
