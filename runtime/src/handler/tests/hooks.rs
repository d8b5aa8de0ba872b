//! OCI hooks of the host's, over a fake VM.

use std::os::unix::fs::MetadataExt;

use serde_json::{Value, json};

use super::*;

impl Bench {
    fn with_hooks(&self, id: &str, args: &[&str], hooks: &Value) -> CreateContainerRequest {
        let request = self.create_request(id, args, Stdio::default());
        let path = request.bundle.join("config.json");
        let mut spec: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        spec["hooks"] = hooks.clone();
        spec["annotations"] = json!({"colour": "blue"});
        fs::write(path, spec.to_string()).unwrap();
        request
    }

    /// A hook that notes its name, the inode of the network namespace of the state's pid and its state; then runs `then`.
    fn hook(&self, name: &str, then: &str) -> Value {
        let log = self.path("hooks.log");
        let text = format!(
            "state=$(cat); pid=$(echo \"$state\" | sed -n 's/.*\"pid\":\\([0-9]*\\).*/\\1/p'); \
             net=$(stat -L -c %i /proc/${{pid:-none}}/ns/net 2>/dev/null); \
             echo \"{name} ${{net:-none}} $state\" >> {}; {then}",
            log.display()
        );
        json!({"path": "/bin/sh", "args": ["sh", "-c", text], "timeout": 60})
    }

    /// What hooks have noted: name, namespace, state.
    fn noted(&self) -> Vec<(String, String, Value)> {
        let text = fs::read_to_string(self.path("hooks.log")).unwrap_or_default();
        text.lines()
            .map(|line| {
                let mut words = line.splitn(3, ' ').map(str::to_owned);
                let mut next = || words.next().unwrap();
                let (name, net, state) = (next(), next(), next());
                (name, net, serde_json::from_str(&state).unwrap())
            })
            .collect()
    }

    fn names(&self) -> Vec<String> {
        self.noted().into_iter().map(|(name, ..)| name).collect()
    }
}

#[tokio::test]
async fn hooks_when_a_container_lives_run_in_order_with_its_state() {
    let mut bench = bench(Boot::Announced);
    let hooks = json!({
        "poststop": [bench.hook("poststop", "")],
        "poststart": [bench.hook("poststart", "")],
        "createRuntime": [bench.hook("createRuntime-0", ""), bench.hook("createRuntime-1", "")],
        "prestart": [bench.hook("prestart", "")],
        "createContainer": [{"path": "/guest/a"}],
        "startContainer": [{"path": "/guest/b"}],
    });
    bench
        .create_with(bench.with_hooks("c1", &["sleep"], &hooks))
        .await
        .unwrap();
    assert_eq!(bench.names(), ["prestart", "createRuntime-0", "createRuntime-1"]);
    bench.start(init("c1")).await.unwrap();
    assert_eq!(bench.names().len(), 4);
    bench.kill(init("c1"), 9).await.unwrap();
    bench.wait(init("c1")).await;
    bench.delete(init("c1")).await.unwrap();
    bench.manager.shutdown().await;

    let noted = bench.noted();
    let statuses: Vec<_> = noted
        .iter()
        .map(|(name, _, state)| (name.as_str(), state["status"].as_str().unwrap()))
        .collect();
    let expected = [
        ("prestart", "creating"),
        ("createRuntime-0", "creating"),
        ("createRuntime-1", "creating"),
        ("poststart", "running"),
        ("poststop", "stopped"),
    ];
    assert_eq!(statuses, expected);
    for (name, _, state) in &noted {
        assert_eq!(state["id"], "c1", "{name}");
        assert_eq!(state["ociVersion"], "1.0.2", "{name}");
        assert_eq!(state["bundle"], json!(bench.path("c1")), "{name}");
        assert_eq!(state["annotations"]["colour"], "blue", "{name}");
    }
    assert!(noted[4].2.get("pid").is_none());
    // The spec has a network namespace without a path: one is made for the hooks to fill, and stays the same.
    let own = fs::metadata("/proc/self/ns/net").unwrap().ino().to_string();
    let namespaces: Vec<_> = noted.iter().take(4).map(|(_, net, _)| net.as_str()).collect();
    assert!(
        namespaces
            .iter()
            .all(|net| *net == namespaces[0] && *net != own && *net != "none"),
        "{namespaces:?}, the shim's is {own}"
    );
    let created = bench.vm.guest.created.lock().unwrap().clone().unwrap();
    let hooks = &created.OCI.Hooks;
    let paths = |list: &[protocols::oci::Hook]| list.iter().map(|hook| hook.Path.clone()).collect::<Vec<_>>();
    assert_eq!(paths(&hooks.CreateContainer), ["/guest/a"]);
    assert_eq!(paths(&hooks.StartContainer), ["/guest/b"]);
    assert!(hooks.Prestart.is_empty() && hooks.CreateRuntime.is_empty());
    assert!(hooks.Poststart.is_empty() && hooks.Poststop.is_empty());
    assert_eq!(
        bench.events(),
        ["create c1", "start c1", "exit c1 137", "delete c1 137"]
    );
}

#[tokio::test]
async fn create_when_a_hook_fails_leaves_nothing() {
    for (stage, ran) in [
        ("prestart", ["prestart", "poststop"].as_slice()),
        ("createRuntime", &["prestart", "createRuntime", "poststop"]),
    ] {
        let mut bench = bench(Boot::Announced);
        let then = |name: &str| {
            if name == stage {
                "echo no bridge >&2; exit 4"
            } else {
                ""
            }
        };
        let hooks = json!({
            "prestart": [bench.hook("prestart", then("prestart"))],
            "createRuntime": [bench.hook("createRuntime", then("createRuntime")), bench.hook("never", "")],
            "poststop": [bench.hook("poststop", "")],
        });

        let error = bench
            .create_with(bench.with_hooks("c1", &["sleep"], &hooks))
            .await
            .unwrap_err();

        let expected = format!("container c1: {stage} hook #0 /bin/sh: exit status: 4, stderr: no bridge");
        assert_eq!(error.message, expected);
        assert_eq!(bench.names(), ran);
        assert_eq!(bench.leftovers(), Vec::<String>::new());
        assert_eq!(bench.events(), Vec::<String>::new());
        let calls = bench.calls();
        assert!(
            !calls.iter().any(|call| call.starts_with("CreateContainer")),
            "{calls:?}"
        );
        assert!(bench.shutdown().await);
    }
}

#[tokio::test]
async fn create_when_the_guest_refuses_it_runs_poststop() {
    let bench = bench(Boot::Announced);
    let hooks =
        json!({"createRuntime": [bench.hook("createRuntime", "")], "poststop": [bench.hook("poststop", "")]});

    bench
        .create_with(bench.with_hooks("c1", &["refused"], &hooks))
        .await
        .unwrap_err();

    assert_eq!(bench.names(), ["createRuntime", "poststop"]);
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn hooks_when_they_cannot_be_run_are_refused_before_the_boot() {
    let bench = bench(Boot::Announced);
    let hooks = json!({"poststart": [{"path": "/bin/true", "timeout": -3}]});

    let error = bench
        .create_with(bench.with_hooks("c1", &["sleep"], &hooks))
        .await
        .unwrap_err();

    assert_eq!(error.kind, ErrorKind::InvalidArgument);
    assert_eq!(
        error.message,
        "container c1: poststart hook #0 /bin/true: timeout -3: must be greater than 0 seconds"
    );
    assert_eq!(bench.calls(), Vec::<String>::new());
}

#[tokio::test]
async fn start_when_a_poststart_hook_fails_kills_the_container() {
    let mut bench = bench(Boot::Announced);
    let hooks = json!({
        "poststart": [bench.hook("first", "exit 1"), bench.hook("never", "")],
        "poststop": [bench.hook("poststop", "")],
    });
    bench
        .create_with(bench.with_hooks("c1", &["sleep"], &hooks))
        .await
        .unwrap();

    let error = bench.start(init("c1")).await.unwrap_err();

    assert!(
        error
            .message
            .contains("poststart hook #0 /bin/sh: exit status: 1"),
        "{error}"
    );
    assert_eq!(bench.wait(init("c1")).await, 137);
    assert!(bench.calls().contains(&"SignalProcess \"\" 9".to_owned()));
    bench.delete(init("c1")).await.unwrap();
    assert_eq!(bench.names(), ["first", "poststop"]);
    assert_eq!(bench.events(), ["create c1", "exit c1 137", "delete c1 137"]);
    bench.manager.shutdown().await;
}

#[tokio::test]
async fn poststop_when_nobody_deletes_the_container_runs_with_the_shutdown() {
    let bench = bench(Boot::Announced);
    let hooks = json!({"poststop": [bench.hook("poststop", "exit 1"), bench.hook("second", "")]});
    bench
        .create_with(bench.with_hooks("c1", &["sleep"], &hooks))
        .await
        .unwrap();
    assert_eq!(bench.names(), Vec::<String>::new());

    bench.manager.shutdown().await;
    bench.manager.shutdown().await;

    assert_eq!(bench.names(), ["poststop", "second"]);
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn poststop_when_the_shim_crashed_runs_once() {
    let bench = bench(Boot::Announced);
    let hooks = json!({"poststop": [bench.hook("poststop", "")]});
    bench
        .create_with(bench.with_hooks("c1", &["sleep"], &hooks))
        .await
        .unwrap();
    let paths = SandboxPaths::below(&bench.path("run"), "test", "c1").unwrap();
    let cleanup = || cleanup_paths(paths.clone(), bench.path("c1"));
    cleanup().await.unwrap_err();
    assert_eq!(bench.names(), Vec::<String>::new(), "the shim lives");

    // As above: nobody holds the lock of this file.
    let copy = paths.state().join("copy");
    fs::copy(paths.journal(), &copy).unwrap();
    fs::rename(&copy, paths.journal()).unwrap();
    let (one, other) = tokio::join!(cleanup(), cleanup());
    // The one that comes second may find the first at work.
    assert!(one.is_ok() || other.is_ok(), "{one:?} {other:?}");

    assert_eq!(bench.names(), ["poststop"]);
    bench.manager.shutdown().await;
    assert_eq!(bench.names(), ["poststop"]);
}

#[tokio::test]
async fn guest_hook_path_when_configured_is_told_to_the_agent() {
    let bench = bench(Boot::Announced);
    let mut request = bench.create_request("c1", &["sleep"], Stdio::default());
    request
        .options
        .config_body
        .extend(b"guest_hook_path = \"/usr/share/oci/hooks\"\n");

    bench.create_with(request).await.unwrap();

    let sandbox = bench.vm.guest.sandbox.lock().unwrap().clone().unwrap();
    assert_eq!(sandbox.guest_hook_path, "/usr/share/oci/hooks");
    bench.manager.shutdown().await;
}

#[tokio::test]
async fn netns_when_missing_is_an_error_that_leaves_nothing() {
    let bench = bench(Boot::Announced);
    let request = bench.create_request("c1", &["sleep"], Stdio::default());
    let path = request.bundle.join("config.json");
    let mut spec: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    let network = namespaces
        .iter_mut()
        .find(|namespace| namespace["type"] == "network");
    network.unwrap()["path"] = json!("/run/netns/never-made");
    fs::write(path, spec.to_string()).unwrap();

    let error = bench.create_with(request).await.unwrap_err();

    assert!(
        error.message.contains("network namespace /run/netns/never-made"),
        "{error}"
    );
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}
