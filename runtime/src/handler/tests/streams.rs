//! Streams that a client fetches from the shim, of init and of an exec.

use super::*;
use crate::containers::Client;

fn stream(name: &str) -> String {
    format!("ttrpc+unix:///run/containerd/s/x?streaming_id={name}")
}

/// All that comes out of a stream.
async fn fetch(client: &Client) -> String {
    let all = async {
        let mut lease = client.lease().await.unwrap();
        let mut all = Vec::new();
        while let Some(bytes) = lease.next(1000).await.unwrap().map(<[u8]>::to_vec) {
            lease.sent(bytes.len());
            all.extend(bytes);
        }
        lease.finish();
        String::from_utf8(all).unwrap()
    };
    tokio::time::timeout(LIMIT, all)
        .await
        .expect("no end of the output")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_when_a_process_has_them_carry_its_bytes() {
    let bench = bench(Boot::Announced);
    let stdio = Stdio {
        stdin: stream("c1-stdin"),
        stdout: stream("c1-stdout"),
        ..Default::default()
    };
    // As containerd does: before the container is there.
    let stdout = bench.streams.connect("c1-stdout");
    let stdin = bench.streams.connect("c1-stdin");
    bench
        .create_with(bench.create_request("c1", &["cat"], stdio))
        .await
        .unwrap();
    bench.start(init("c1")).await.unwrap();
    let mut lease = stdin.lease().await.unwrap();
    lease.received(b"through the guest");
    lease.flush().await.unwrap();
    answer(bench.manager.close_process_io(&init("c1"))).await.unwrap();
    lease.finish();

    assert_eq!(fetch(&stdout).await, "through the guest");
    assert_eq!(bench.wait(init("c1")).await, 0);
    bench.delete(init("c1")).await.unwrap();
    bench.manager.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stream_of_an_exec_when_nobody_fetches_it_holds_nothing_up() {
    let bench = bench(Boot::Announced);
    bench.create("c1", &["sleep"]).await.unwrap();
    bench.start(init("c1")).await.unwrap();
    for name in ["fetched", "not-fetched"] {
        let stdio = Stdio {
            stdout: stream(name),
            ..Default::default()
        };
        bench.exec_with(exec(name), &["echo", name], stdio).await.unwrap();
        let client = (name == "fetched").then(|| bench.streams.connect(name));
        bench.start(exec(name)).await.unwrap();
        if let Some(client) = client {
            assert_eq!(fetch(&client).await, "fetched\n");
        }
        assert_eq!(bench.wait(exec(name)).await, 0);
        bench.delete(exec(name)).await.unwrap();
    }
    bench.manager.shutdown().await;
}
