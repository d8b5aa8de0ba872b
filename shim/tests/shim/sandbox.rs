//! The Sandbox service over a real socket: first with a fake runtime behind it, then the real one without a machine.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::sandbox_api as wire;
use containerd_shim_protos::sandbox_async::SandboxClient;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use runtime::error::{Error, ErrorKind};
use runtime::hypervisor::VmExit;
use runtime::sandbox::{Readiness, SandboxEnd, SandboxStatus};
use runtime::types::{ContainerStats, StartedSandbox};
use ttrpc::Code;

use crate::fake::{Answer, Call, FakeRuntime};
use crate::harness::Pod;
use crate::task::{Served, code, ctx};

fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

fn id() -> String {
    "s".to_owned()
}

async fn client(served: &Served) -> SandboxClient {
    SandboxClient::new(served.client().await)
}

#[tokio::test]
async fn sandbox_when_created_carries_pod_namespace_and_kept_options() {
    let runtime = FakeRuntime::new(|_| Ok(Answer::Done));
    let served = Served::new(&runtime);
    let bundle = tempfile::tempdir().unwrap();
    let options = b"\x0a\x19runtimeoptions.v1.Options\x12\x04\x12\x02/c";
    std::fs::write(bundle.path().join("options.pb"), options).unwrap();
    let request = wire::CreateSandboxRequest {
        sandbox_id: id(),
        bundle_path: bundle.path().to_str().unwrap().into(),
        netns_path: "/run/netns/x".into(),
        annotations: HashMap::from([("a".to_owned(), "b".to_owned())]),
        options: MessageField::some(Any {
            type_url: "runtime.v1.PodSandboxConfig".into(),
            value: b"\x12\x03web".to_vec(),
            ..Default::default()
        }),
        ..Default::default()
    };

    client(&served)
        .await
        .create_sandbox(ctx(), &request)
        .await
        .unwrap();

    let seen = runtime.seen();
    let [Call::CreateSandbox(created)] = seen.as_slice() else {
        panic!("{seen:?}")
    };
    assert_eq!(created.sandbox_id, "s");
    assert_eq!(created.bundle, bundle.path());
    assert_eq!(created.netns.to_str(), Some("/run/netns/x"));
    assert_eq!(created.annotations, request.annotations);
    assert_eq!(created.pod.as_ref().unwrap().hostname, "web");
    assert_eq!(
        created.options.config_path, "/c",
        "the runtime class's, from `start`"
    );
}

#[tokio::test]
async fn sandbox_when_malformed_does_not_reach_the_runtime() {
    let runtime = FakeRuntime::new(|_| Ok(Answer::Done));
    let served = Served::new(&runtime);
    let client = client(&served).await;
    let garbage = wire::CreateSandboxRequest {
        sandbox_id: id(),
        options: MessageField::some(Any {
            type_url: "runtime.v1.PodSandboxConfig".into(),
            value: b"\x0a\xff".to_vec(),
            ..Default::default()
        }),
        ..Default::default()
    };
    assert_eq!(
        code(client.create_sandbox(ctx(), &garbage).await).0,
        Code::INVALID_ARGUMENT
    );

    let with_rootfs = wire::CreateSandboxRequest {
        sandbox_id: id(),
        rootfs: vec![Default::default()],
        ..Default::default()
    };
    let refused = code(client.create_sandbox(ctx(), &with_rootfs).await);
    assert_eq!(refused.0, Code::UNIMPLEMENTED);
    assert!(refused.1.contains("root filesystem"), "{refused:?}");
    assert!(runtime.seen().is_empty());
}

#[tokio::test]
async fn answers_when_served_carry_everything() {
    let end = SandboxEnd {
        exit: VmExit::Panic,
        at: at(9),
        wanted: false,
    };
    let status = SandboxStatus {
        sandbox_id: id(),
        pid: 7,
        state: Readiness::Ready,
        info: HashMap::from([("devices".to_owned(), "share".to_owned())]),
        created_at: Some(at(5)),
        end: None,
    };
    let runtime = FakeRuntime::new(move |call| match call {
        Call::StartSandbox(_) => Ok(Answer::Started(StartedSandbox {
            pid: 7,
            created_at: at(5),
        })),
        Call::WaitSandbox(_) => Ok(Answer::End(end.clone())),
        Call::SandboxStatus(_) => Ok(Answer::Status(Box::new(status.clone()))),
        Call::SandboxMetrics(_) => Ok(Answer::Stats(Box::new(ContainerStats {
            pids_current: 3,
            ..Default::default()
        }))),
        _ => Ok(Answer::Done),
    });
    let served = Served::new(&runtime);
    let client = client(&served).await;

    let start = wire::StartSandboxRequest {
        sandbox_id: id(),
        ..Default::default()
    };
    let started = client.start_sandbox(ctx(), &start).await.unwrap();
    assert_eq!((started.pid, started.created_at.seconds), (7, 5));
    let wait = wire::WaitSandboxRequest {
        sandbox_id: id(),
        ..Default::default()
    };
    let ended = client.wait_sandbox(ctx(), &wait).await.unwrap();
    assert_eq!((ended.exit_status, ended.exited_at.seconds), (137, 9));
    let mut query = wire::SandboxStatusRequest {
        sandbox_id: id(),
        ..Default::default()
    };
    let brief = client.sandbox_status(ctx(), &query).await.unwrap();
    assert_eq!(
        (brief.state.as_str(), brief.pid, brief.created_at.seconds),
        ("SANDBOX_READY", 7, 5)
    );
    assert!(brief.info.is_empty() && brief.exited_at.is_none());
    query.verbose = true;
    let verbose = client.sandbox_status(ctx(), &query).await.unwrap();
    assert_eq!(verbose.info.get("devices").map(String::as_str), Some("share"));
    let metrics = wire::SandboxMetricsRequest {
        sandbox_id: id(),
        ..Default::default()
    };
    let metrics = client
        .sandbox_metrics(ctx(), &metrics)
        .await
        .unwrap()
        .metrics
        .unwrap();
    assert_eq!(metrics.id, "s");
    assert_eq!(metrics.data.type_url, "io.containerd.cgroups.v2.Metrics");
    let ping = wire::PingRequest {
        sandbox_id: id(),
        ..Default::default()
    };
    client.ping_sandbox(ctx(), &ping).await.unwrap();
    for (seconds, timeout) in [(0, None), (5, Some(Duration::from_secs(5)))] {
        let stop = wire::StopSandboxRequest {
            sandbox_id: id(),
            timeout_secs: seconds,
            ..Default::default()
        };
        client.stop_sandbox(ctx(), &stop).await.unwrap();
        assert_eq!(runtime.seen().last(), Some(&Call::StopSandbox(id(), timeout)));
    }
    let platform = client
        .platform(ctx(), &wire::PlatformRequest::new())
        .await
        .unwrap();
    assert_eq!(platform.platform.os, "linux");
    assert!(["amd64", "arm64"].contains(&platform.platform.architecture.as_str()));
}

#[tokio::test]
async fn error_of_every_call_has_its_code_and_message() {
    let runtime = FakeRuntime::new(|_| {
        let message = "sandbox s has not been created";
        Err(Error::new(ErrorKind::FailedPrecondition, message))
    });
    let served = Served::new(&runtime);
    let client = client(&served).await;
    let expected = (
        Code::FAILED_PRECONDITION,
        "sandbox s has not been created".to_owned(),
    );

    assert_eq!(
        code(client.create_sandbox(ctx(), &Default::default()).await),
        expected
    );
    assert_eq!(
        code(client.start_sandbox(ctx(), &Default::default()).await),
        expected
    );
    assert_eq!(
        code(client.stop_sandbox(ctx(), &Default::default()).await),
        expected
    );
    assert_eq!(
        code(client.wait_sandbox(ctx(), &Default::default()).await),
        expected
    );
    assert_eq!(
        code(client.sandbox_status(ctx(), &Default::default()).await),
        expected
    );
    assert_eq!(
        code(client.ping_sandbox(ctx(), &Default::default()).await),
        expected
    );
    assert_eq!(
        code(client.sandbox_metrics(ctx(), &Default::default()).await),
        expected
    );
    assert_eq!(
        code(client.shutdown_sandbox(ctx(), &Default::default()).await),
        expected
    );
    assert_eq!(runtime.seen().len(), 8);
    assert!(served.socket.exists(), "a shutdown that failed ends nothing");
}

#[tokio::test]
async fn shutdown_of_a_sandbox_ends_the_process_whoever_waits() {
    let runtime = FakeRuntime::new(|_| Ok(Answer::Done));
    runtime.never_answer_waits();
    let served = Served::new(&runtime);
    let waiter = client(&served).await;
    let wait = tokio::spawn(async move { waiter.wait_sandbox(ctx(), &Default::default()).await });
    while runtime.seen().is_empty() {
        tokio::task::yield_now().await;
    }

    let shutdown = wire::ShutdownSandboxRequest {
        sandbox_id: id(),
        ..Default::default()
    };
    client(&served)
        .await
        .shutdown_sandbox(ctx(), &shutdown)
        .await
        .unwrap();

    served.has_ended(&runtime).await;
    wait.abort();
}

#[tokio::test]
async fn shim_when_it_has_a_sandbox_without_containers_stays() {
    let runtime = FakeRuntime::new(|_| Ok(Answer::Done));
    let idle = Duration::from_millis(50);
    let served = Served::with_idle(&runtime, idle);
    client(&served)
        .await
        .create_sandbox(
            ctx(),
            &wire::CreateSandboxRequest {
                sandbox_id: id(),
                ..Default::default()
            },
        )
        .await
        .unwrap();

    tokio::time::sleep(idle * 10).await;

    assert!(served.socket.exists());
    client(&served)
        .await
        .shutdown_sandbox(ctx(), &Default::default())
        .await
        .unwrap();
    served.has_ended(&runtime).await;
}

/// Connects to the shim of `pod`, as containerd does.
async fn connect(pod: &Pod) -> SandboxClient {
    let address = format!("unix://{}", pod.socket().display());
    SandboxClient::new(ttrpc::asynchronous::Client::connect(&address).await.unwrap())
}

/// The whole way of a sandbox that cannot boot, through the real binary: the configuration that containerd gave to `start`
/// names a kernel that does not exist.
#[tokio::test]
async fn sandbox_when_its_kernel_is_missing_is_refused_by_name() {
    let pod = Pod::new("no-kernel", None);
    let config = pod.bundle().join("configuration.toml");
    std::fs::write(
        &config,
        "[hypervisor.dragonball]\nkernel = \"/nonexistent/vmlinux\"\n",
    )
    .unwrap();
    let path = config.to_str().unwrap();
    let length = u8::try_from(path.len()).unwrap();
    let options = Any {
        type_url: "runtimeoptions.v1.Options".into(),
        value: [&[0x12, length], path.as_bytes()].concat(),
        ..Default::default()
    };
    let command = pod.command(&pod.id, "start");
    let stdin = options.write_to_bytes().unwrap();
    let output = tokio::task::spawn_blocking(move || crate::harness::run(command, &stdin))
        .await
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let client = connect(&pod).await;
    let create = wire::CreateSandboxRequest {
        sandbox_id: pod.id.clone(),
        bundle_path: pod.bundle().to_str().unwrap().into(),
        ..Default::default()
    };

    let refused = code(client.create_sandbox(ctx(), &create).await);

    assert_eq!(refused.0, Code::NOT_FOUND);
    assert!(refused.1.contains("/nonexistent/vmlinux"), "{refused:?}");
    let start = wire::StartSandboxRequest {
        sandbox_id: pod.id.clone(),
        ..Default::default()
    };
    assert_eq!(
        code(client.start_sandbox(ctx(), &start).await).0,
        Code::FAILED_PRECONDITION
    );
    let shutdown = wire::ShutdownSandboxRequest {
        sandbox_id: pod.id.clone(),
        ..Default::default()
    };
    client.shutdown_sandbox(ctx(), &shutdown).await.unwrap();
    let pid = pod.pid().unwrap();
    tokio::task::spawn_blocking(move || {
        crate::harness::wait_until("the shim ends", || !crate::harness::is_alive(pid));
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn sandbox_when_it_is_another_shims_is_not_found() {
    let pod = Pod::new("mine", None);
    let command = pod.command(&pod.id, "start");
    tokio::task::spawn_blocking(move || crate::harness::run(command, b""))
        .await
        .unwrap();
    let client = connect(&pod).await;
    let request = wire::SandboxStatusRequest {
        sandbox_id: "theirs".into(),
        ..Default::default()
    };

    let refused = code(client.sandbox_status(ctx(), &request).await);

    assert_eq!(refused.0, Code::NOT_FOUND);
    assert!(
        refused.1.contains("theirs") && refused.1.contains("mine"),
        "{refused:?}"
    );
    drop(Arc::new(pod));
}
