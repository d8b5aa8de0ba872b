//! What a guest is told of its end.

use serde_json::json;

use super::*;

/// `c1`, which ends at once, with nothing of the host's that it may write to.
fn read_only(bench: &Bench) -> CreateContainerRequest {
    let request = bench.create_request("c1", &["exit", "0"], Stdio::default());
    edit_spec(&request, |spec| spec["root"]["readonly"] = true.into());
    request
}

impl Bench {
    /// Creates a container that ends, and deletes it.
    async fn run(&self, request: CreateContainerRequest) {
        let process = init(&request.container_id);
        self.create_with(request).await.unwrap();
        self.start(process.clone()).await.unwrap();
        assert_eq!(self.wait(process.clone()).await, 0);
        self.delete(process).await.unwrap();
    }

    fn farewells(&self) -> usize {
        let calls = self.calls();
        calls.iter().filter(|call| *call == "DestroySandbox").count()
    }
}

#[tokio::test]
async fn guest_when_it_could_write_nothing_is_not_told() {
    let mut bench = bench(Boot::Announced);

    bench.run(read_only(&bench)).await;

    assert!(bench.shutdown().await);
    let calls = ["CreateSandbox", "CreateContainer c1", "StartContainer c1"];
    assert_eq!(bench.calls(), calls);
    assert!(*bench.manager.watch_end().borrow());
    assert_eq!(bench.leftovers(), Vec::<String>::new());
    assert_eq!(
        bench.events(),
        ["create c1", "start c1", "exit c1 0", "delete c1 0"]
    );
}

#[tokio::test]
async fn guest_when_it_may_owe_data_is_told_before_a_delete_is_answered() {
    type Change = fn(&mut CreateContainerRequest);
    let cases: [(&str, Change); 5] = [
        ("a root", |request| {
            edit_spec(request, |spec| spec["root"]["readonly"] = false.into());
        }),
        ("a root, by default", |request| {
            edit_spec(request, |spec| spec["root"] = json!({"path": "rootfs"}));
        }),
        ("a volume", |request| {
            edit_spec(request, |spec| spec["mounts"][1]["options"] = json!(["rbind"]));
        }),
        ("what will be mounted below a volume", |request| {
            let options = json!(["rbind", "ro", "rslave"]);
            edit_spec(request, |spec| spec["mounts"][1]["options"] = options);
        }),
        ("hooks of the guest's image", |request| {
            let line = b"guest_hook_path = \"/hooks\"\n";
            request.options.config_body.extend(line);
        }),
    ];
    for (case, change) in cases {
        let bench = bench(Boot::Announced);
        let mut request = read_only(&bench);
        change(&mut request);

        bench.run(request).await;

        assert_eq!(bench.farewells(), 1, "{case}");
        assert!(bench.shutdown().await);
        assert_eq!(bench.farewells(), 1, "{case}");
        assert_eq!(bench.leftovers(), Vec::<String>::new());
    }
}

/// That it was removed does not say that all it wrote has arrived.
#[tokio::test]
async fn guest_when_a_container_that_is_gone_could_write_is_told() {
    let bench = bench(Boot::Announced);
    let request = read_only(&bench);
    edit_spec(&request, |spec| {
        spec["annotations"] = json!({
            "io.kubernetes.cri.container-type": "sandbox",
            "io.kubernetes.cri.sandbox-id": "c1",
        });
    });
    bench.create_with(request).await.unwrap();
    bench.start(init("c1")).await.unwrap();
    bench.member("c2", "").await.unwrap();
    bench.delete(init("c2")).await.unwrap();
    assert_eq!(bench.farewells(), 0);

    assert_eq!(bench.wait(init("c1")).await, 0);
    bench.delete(init("c1")).await.unwrap();

    assert_eq!(bench.farewells(), 1);
    assert!(bench.shutdown().await);
}

#[tokio::test]
async fn guest_when_a_container_runs_is_told() {
    let bench = bench(Boot::Announced);
    bench.create_with(read_only(&bench)).await.unwrap();

    bench.manager.shutdown().await;

    assert_eq!(bench.farewells(), 1);
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}
