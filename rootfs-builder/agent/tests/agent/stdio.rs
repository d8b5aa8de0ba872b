use std::time::Duration;

use protocols::agent::{CloseStdinRequest, ReadStreamRequest, TtyWinResizeRequest};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use crate::harness::{Agent, PATIENCE, code, context, message, process};

const MIB: usize = 1 << 20;

fn close(id: &str) -> CloseStdinRequest {
    CloseStdinRequest {
        container_id: id.into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn input_when_written_by_calls_comes_back_and_ends_when_closed() {
    let agent = Agent::start().await;
    agent.create("one", &agent.spec("cat")).await.unwrap();
    agent.start_container("one").await.unwrap();

    agent.write("one", "", b"first ").await.unwrap();
    agent.write("one", "", b"second").await.unwrap();
    agent.client.close_stdin(context(), &close("one")).await.unwrap();

    assert_eq!(agent.read_all("one", "", false).await, b"first second");
    assert_eq!(agent.wait("one", "").await.unwrap(), 0);
    let error = agent.write("one", "", b"late").await.unwrap_err();
    assert_eq!(code(&error), ttrpc::Code::FAILED_PRECONDITION, "{error}");
}

#[tokio::test]
async fn pipeline_when_its_reader_leaves_ends_by_sigpipe() {
    let agent = Agent::start().await;
    // busybox's yes complains when a write fails, which it only sees if SIGPIPE does not end it first.
    let script = "yes | head -n 1 >/dev/null";
    agent.create("one", &agent.spec(script)).await.unwrap();
    agent.start_container("one").await.unwrap();

    assert_eq!(agent.read_all("one", "", true).await, b"");
    assert_eq!(agent.wait("one", "").await.unwrap(), 0);
}

#[tokio::test]
async fn streams_when_connected_carry_bulk_both_ways_and_end() {
    let agent = Agent::start_with_ports().await;
    let mut stdin = agent.connect(5001).await;
    let mut stdout = agent.connect(5002).await;
    let mut stderr = agent.connect(5003).await;
    agent
        .create_with_ports("one", &agent.spec("echo err >&2; cat"), [5001, 5002, 5003])
        .await
        .unwrap();
    agent.start_container("one").await.unwrap();
    let data: Vec<u8> = (0..20 * MIB)
        .map(|index| (index * 7 + index / 251) as u8)
        .collect();

    let send = async {
        stdin.write_all(&data).await.unwrap();
        stdin.shutdown().await.unwrap();
    };
    let receive = async {
        let mut all = Vec::new();
        stdout.read_to_end(&mut all).await.unwrap();
        all
    };
    let ((), received) = timeout(PATIENCE, async { tokio::join!(send, receive) })
        .await
        .unwrap();
    let mut errors = String::new();
    stderr.read_to_string(&mut errors).await.unwrap();

    assert!(received == data, "{} of {} bytes", received.len(), data.len());
    assert_eq!(errors, "err\n");
    assert_eq!(agent.wait("one", "").await.unwrap(), 0);
}

#[tokio::test]
async fn output_when_followed_by_exit_is_complete_and_does_not_delay_the_status() {
    let agent = Agent::start_with_ports().await;
    let mut stdout = agent.connect(6001).await;
    let spec = agent.spec("yes 0123456789abcde | head -c 8388608; exit 3");
    agent.create_with_ports("one", &spec, [0, 6001, 0]).await.unwrap();
    agent.start_container("one").await.unwrap();

    let mut received = Vec::new();
    timeout(PATIENCE, stdout.read_to_end(&mut received))
        .await
        .unwrap()
        .unwrap();

    assert_eq!(received.len(), 8 * MIB);
    assert_eq!(agent.wait("one", "").await.unwrap(), 3);
}

#[tokio::test]
async fn status_when_nobody_reads_the_output_is_published_at_death() {
    let agent = Agent::start_with_ports().await;
    let _stdout = agent.connect(6101).await;
    // Fits the pipe and the socket, so the program can end; nothing of it is read.
    agent
        .create_with_ports(
            "one",
            &agent.spec("head -c 100000 /dev/zero; exit 4"),
            [0, 6101, 0],
        )
        .await
        .unwrap();
    agent.start_container("one").await.unwrap();

    assert_eq!(
        timeout(PATIENCE, agent.wait("one", "")).await.unwrap().unwrap(),
        4
    );
}

#[tokio::test]
async fn output_when_a_child_outlives_the_process_stays_open_until_the_child_ends() {
    let agent = Agent::start_with_ports().await;
    agent.create("one", &agent.spec("sleep 1000")).await.unwrap();
    agent.start_container("one").await.unwrap();
    let mut stdout = agent.connect(6201).await;
    // Late is when the shell has ended and was waited for.
    let script = "(while kill -0 $$ 2>/dev/null; do sleep 0.05; done; echo late) & echo early";
    agent
        .exec("one", "background", &process(&["sh", "-c", script]), [0, 6201, 0])
        .await
        .unwrap();

    assert_eq!(agent.wait("one", "background").await.unwrap(), 0);
    let mut text = String::new();
    timeout(PATIENCE, stdout.read_to_string(&mut text))
        .await
        .unwrap()
        .unwrap();

    assert_eq!(text, "early\nlate\n");
}

#[tokio::test]
async fn output_when_the_host_hangs_up_does_not_stop_the_program() {
    let agent = Agent::start_with_ports().await;
    let stdout = agent.connect(6301).await;
    let spec = agent.spec("yes | head -c 1000000; exit 6");
    agent.create_with_ports("one", &spec, [0, 6301, 0]).await.unwrap();
    drop(stdout);
    agent.start_container("one").await.unwrap();

    assert_eq!(
        timeout(PATIENCE, agent.wait("one", "")).await.unwrap().unwrap(),
        6
    );
}

#[tokio::test]
async fn connection_when_the_host_closes_it_after_the_exit_is_given_back() {
    let agent = Agent::start_with_ports().await;
    agent.create("one", &agent.spec("sleep 1000")).await.unwrap();
    agent.start_container("one").await.unwrap();
    let before = agent.steady_descriptors().await;
    let stdout = agent.connect(6401).await;
    let script = "sleep 1000 & exit 0";
    agent
        .exec("one", "background", &process(&["sh", "-c", script]), [0, 6401, 0])
        .await
        .unwrap();
    assert_eq!(agent.wait("one", "background").await.unwrap(), 0);
    let settled = async |count: usize| {
        let reached = async {
            while agent.descriptors_and_zombies().0 != count {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, reached).await.is_ok()
    };
    // The pipe, which the silent child could still write to, and the connection.
    assert!(settled(before + 2).await);

    drop(stdout);

    assert!(settled(before + 1).await);
}

#[tokio::test]
async fn port_when_nobody_connects_fails_the_call_with_its_number() {
    let agent = Agent::start_with_ports().await;

    let error = agent
        .create_with_ports("one", &agent.spec("true"), [0, 7001, 0])
        .await
        .unwrap_err();

    assert_eq!(code(&error), ttrpc::Code::UNAVAILABLE);
    assert!(
        message(&error).starts_with("stdio port 7001: no connection"),
        "{error}"
    );
    let error = agent.start_container("one").await.unwrap_err();
    assert_eq!(code(&error), ttrpc::Code::NOT_FOUND, "{error}");
}

#[tokio::test]
async fn stdout_when_reopened_by_the_user_works() {
    let agent = Agent::start().await;
    let mut spec = agent.spec("echo reopened > /dev/stdout; test -p /dev/stdout && echo pipe");
    spec.process_mut().as_mut().unwrap().user_mut().set_uid(1000);

    let output = agent.run("one", &spec).await;

    assert_eq!(output.stdout, "reopened\npipe\n", "{}", output.stderr);
}

#[tokio::test]
async fn terminal_when_resized_tells_its_programs_and_carries_input() {
    let agent = Agent::start_with_ports().await;
    let mut stdin = agent.connect(8001).await;
    let mut stdout = agent.connect(8002).await;
    let mut spec = agent.spec("test -t 0 && test -t 1 && test -t 2 && echo terminal; stty size; read line; stty size; echo got $line");
    let size = oci_spec::runtime::BoxBuilder::default()
        .height(24u64)
        .width(80u64)
        .build()
        .unwrap();
    spec.process_mut()
        .as_mut()
        .unwrap()
        .set_terminal(Some(true))
        .set_console_size(Some(size));
    agent
        .create_with_ports("one", &spec, [8001, 8002, 0])
        .await
        .unwrap();
    agent.start_container("one").await.unwrap();

    let mut shown = String::new();
    while !shown.contains("24 80") {
        shown.push(timeout(PATIENCE, stdout.read_u8()).await.unwrap().unwrap().into());
    }
    let resize = TtyWinResizeRequest {
        container_id: "one".into(),
        row: 50,
        column: 132,
        ..Default::default()
    };
    agent.client.tty_win_resize(context(), &resize).await.unwrap();
    stdin.write_all(b"hello\n").await.unwrap();
    timeout(PATIENCE, stdout.read_to_string(&mut shown))
        .await
        .unwrap()
        .unwrap();

    assert!(shown.starts_with("terminal\r\n24 80"), "{shown:?}");
    assert!(shown.ends_with("hello\r\n50 132\r\ngot hello\r\n"), "{shown:?}");
    assert_eq!(agent.wait("one", "").await.unwrap(), 0);
}

#[tokio::test]
async fn terminal_when_used_by_calls_works_and_others_have_none() {
    let agent = Agent::start().await;
    let mut spec = agent.spec("read line; echo $line");
    spec.process_mut().as_mut().unwrap().set_terminal(Some(true));
    agent.create("tty", &spec).await.unwrap();
    agent.start_container("tty").await.unwrap();
    agent.write("tty", "", b"typed\n").await.unwrap();
    assert_eq!(agent.read_all("tty", "", false).await, b"typed\r\ntyped\r\n");

    agent.create("plain", &agent.spec("sleep 1000")).await.unwrap();
    let resize = TtyWinResizeRequest {
        container_id: "plain".into(),
        row: 1,
        column: 1,
        ..Default::default()
    };
    let error = agent.client.tty_win_resize(context(), &resize).await.unwrap_err();
    assert_eq!(code(&error), ttrpc::Code::FAILED_PRECONDITION, "{error}");
}

#[tokio::test]
async fn read_when_the_stream_has_a_port_is_refused() {
    let agent = Agent::start_with_ports().await;
    agent.create("one", &agent.spec("true")).await.unwrap();
    let request = ReadStreamRequest {
        container_id: "one".into(),
        len: 1,
        ..Default::default()
    };

    let error = agent.client.read_stdout(context(), &request).await.unwrap_err();

    assert_eq!(code(&error), ttrpc::Code::FAILED_PRECONDITION, "{error}");
}
