//! Ports of the pod's loopback, as the host reaches them: a Unix socket stands for the agent's vsock port.

use std::os::fd::OwnedFd;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixStream};

use crate::harness::Agent;

async fn start() -> Agent {
    let agent = Agent::start_with(&["agent.connect_vport=unix://FOLDER/connect.sock"]).await;
    agent.in_network("ip link set lo up");
    agent
}

/// Listens on `address` in the agent's network namespace.
fn listen(agent: &Agent, address: &'static str) -> TcpListener {
    let namespace: OwnedFd = std::fs::File::open(format!("/proc/{}/ns/net", agent.pid()))
        .unwrap()
        .into();
    // A thread of its own: its namespace changes.
    let bind = move || {
        nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        std::net::TcpListener::bind(address).unwrap()
    };
    let listener = std::thread::spawn(bind).join().unwrap();
    listener.set_nonblocking(true).unwrap();
    TcpListener::from_std(listener).unwrap()
}

async fn ask(agent: &Agent, line: &str) -> UnixStream {
    let mut host = UnixStream::connect(agent.folder().join("connect.sock"))
        .await
        .unwrap();
    host.write_all(line.as_bytes()).await.unwrap();
    host
}

#[tokio::test]
async fn port_when_something_listens_is_reached_and_halves_end_by_themselves() {
    let agent = start().await;
    for (address, line) in [
        ("127.0.0.1:80", "CONNECT tcp4 80\n"),
        ("[::1]:80", "CONNECT tcp6 80\n"),
    ] {
        let listener = listen(&agent, address);
        let mut host = ask(&agent, line).await;
        let (mut pod, _) = listener.accept().await.unwrap();
        let mut ok = [0; 3];
        host.read_exact(&mut ok).await.unwrap();
        assert_eq!(&ok, b"OK\n");

        // The host ends its half; a large answer still comes, and ends.
        host.write_all(b"question").await.unwrap();
        host.shutdown().await.unwrap();
        let mut question = String::new();
        pod.read_to_string(&mut question).await.unwrap();
        let answer = tokio::spawn(async move {
            pod.write_all(&vec![b'a'; 1 << 20]).await.unwrap();
        });
        let mut all = Vec::new();
        host.read_to_end(&mut all).await.unwrap();

        answer.await.unwrap();
        assert_eq!((question.as_str(), all.len()), ("question", 1 << 20));
    }
}

#[tokio::test]
async fn port_when_nobody_listens_is_refused() {
    let agent = start().await;
    for (line, expected) in [
        ("CONNECT tcp4 80\n", "ERROR 111 "),
        ("CONNECT tcp6 80\n", "ERROR 111 "),
        ("GET / HTTP/1.1\r\n\r\n", "ERROR 22 "),
    ] {
        let mut host = ask(&agent, line).await;
        let mut answer = String::new();
        host.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with(expected), "{line:?}: {answer:?}");
    }
}
