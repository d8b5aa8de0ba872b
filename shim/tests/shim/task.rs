//! The services over a real socket, with a fake runtime behind them.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use containerd_shim_protos::api;
use containerd_shim_protos::shim_async::TaskClient;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use runtime::error::{Error, ErrorKind};
use runtime::types::{
    ContainerStats, ProcessExit, ProcessState, ProcessStatus, Stdio, UpdateContainerRequest,
};
use shim::convert::process;
use shim::forward::Publisher;
use shim::run::{RunError, serve};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use ttrpc::Code;
use ttrpc::asynchronous::Client;
use ttrpc::context::Context;
use ttrpc::proto::Request;

use crate::fake::{Answer, CONTAINER_PID, Call, FakeRuntime};

const PATIENCE: Duration = Duration::from_secs(120);

pub struct Served {
    _folder: tempfile::TempDir,
    pub socket: PathBuf,
    idle: Duration,
    task: JoinHandle<Result<(), RunError>>,
}

impl Served {
    pub fn new(runtime: &Arc<FakeRuntime>) -> Self {
        Self::with_idle(runtime, PATIENCE * 10)
    }

    pub fn with_idle(runtime: &Arc<FakeRuntime>, idle: Duration) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let (_, events) = mpsc::unbounded_channel();
        let publisher = Publisher::spawn(events, "test", "");
        let task = tokio::spawn(serve(
            listener,
            runtime.clone(),
            Arc::default(),
            publisher,
            idle,
            || (),
        ));
        Self {
            _folder: folder,
            socket,
            idle,
            task,
        }
    }

    fn address(&self) -> String {
        format!("unix://{}", self.socket.display())
    }

    pub async fn client(&self) -> Client {
        Client::connect(&self.address()).await.unwrap()
    }

    async fn task(&self) -> TaskClient {
        TaskClient::new(self.client().await)
    }

    /// The process would end now: the socket is gone and the runtime stopped.
    pub async fn has_ended(self, runtime: &FakeRuntime) {
        timeout(PATIENCE, self.task).await.unwrap().unwrap().unwrap();
        assert!(!self.socket.exists());
        assert!(*runtime.stopped.borrow());
    }
}

pub fn ctx() -> Context {
    ttrpc::context::with_duration(PATIENCE)
}

pub fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message().to_owned()),
        other => panic!("not a status: {other:?}"),
    }
}

fn wait_request() -> api::WaitRequest {
    api::WaitRequest {
        id: "c".into(),
        ..Default::default()
    }
}

fn exit(status: u32) -> ProcessExit {
    ProcessExit {
        status,
        at: UNIX_EPOCH + Duration::from_secs(5),
    }
}

#[tokio::test]
async fn service_when_v2_or_v3_reaches_the_same_runtime() {
    let runtime = FakeRuntime::new(|_| Ok(Answer::Pid(7)));
    let served = Served::new(&runtime);

    for service in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
        let payload = api::StartRequest {
            id: "c".into(),
            ..Default::default()
        }
        .write_to_bytes()
        .unwrap();
        let request = Request {
            service: service.into(),
            method: "Start".into(),
            payload,
            ..Default::default()
        };
        let response = served.client().await.request(request).await.unwrap();
        assert_eq!(
            api::StartResponse::parse_from_bytes(&response.payload)
                .unwrap()
                .pid,
            7,
            "{service}"
        );
    }

    assert_eq!(runtime.seen(), vec![Call::Start(process("c", "")); 2]);
}

#[tokio::test]
async fn error_when_of_any_kind_has_its_grpc_code() {
    let kinds = [
        (ErrorKind::NotFound, Code::NOT_FOUND),
        (ErrorKind::AlreadyExists, Code::ALREADY_EXISTS),
        (ErrorKind::InvalidArgument, Code::INVALID_ARGUMENT),
        (ErrorKind::FailedPrecondition, Code::FAILED_PRECONDITION),
        (ErrorKind::PermissionDenied, Code::PERMISSION_DENIED),
        (ErrorKind::Unimplemented, Code::UNIMPLEMENTED),
        (ErrorKind::Unavailable, Code::UNAVAILABLE),
        (ErrorKind::DeadlineExceeded, Code::DEADLINE_EXCEEDED),
        (ErrorKind::ResourceExhausted, Code::RESOURCE_EXHAUSTED),
        (ErrorKind::Internal, Code::INTERNAL),
    ];
    for (kind, expected) in kinds {
        let runtime = FakeRuntime::new(move |_| Err(Error::new(kind, "container c: no")));
        let served = Served::new(&runtime);

        let result = served.task().await.start(ctx(), &api::StartRequest::new()).await;

        assert_eq!(code(result), (expected, "container c: no".to_owned()));
    }
}

#[tokio::test]
async fn request_when_served_carries_its_arguments() {
    let runtime = FakeRuntime::new(|request| match request {
        Call::Create(_) => Ok(Answer::Pid(7)),
        _ => Ok(Answer::Done),
    });
    let served = Served::new(&runtime);
    let client = served.task().await;
    let any = |type_url: &str, value: &[u8]| {
        MessageField::some(Any {
            type_url: type_url.into(),
            value: value.to_vec(),
            ..Default::default()
        })
    };

    let create = api::CreateTaskRequest {
        id: "c".into(),
        bundle: "/b".into(),
        stdout: "/out".into(),
        options: any("runtimeoptions.v1.Options", b"\x12\x02/c"),
        ..Default::default()
    };
    client.create(ctx(), &create).await.unwrap();
    let exec = api::ExecProcessRequest {
        id: "c".into(),
        exec_id: "e".into(),
        spec: any("types.containerd.io/opencontainers/runtime-spec/1/Process", b"{}"),
        ..Default::default()
    };
    client.exec(ctx(), &exec).await.unwrap();
    let kill = api::KillRequest {
        id: "c".into(),
        exec_id: "e".into(),
        signal: 15,
        all: true,
        ..Default::default()
    };
    client.kill(ctx(), &kill).await.unwrap();
    let resize = api::ResizePtyRequest {
        id: "c".into(),
        width: 80,
        height: 24,
        ..Default::default()
    };
    client.resize_pty(ctx(), &resize).await.unwrap();
    client
        .close_io(
            ctx(),
            &api::CloseIORequest {
                id: "c".into(),
                stdin: true,
                ..Default::default()
            },
        )
        .await
        .unwrap();
    client
        .close_io(
            ctx(),
            &api::CloseIORequest {
                id: "c".into(),
                ..Default::default()
            },
        )
        .await
        .unwrap();
    let update = api::UpdateTaskRequest {
        id: "c".into(),
        resources: any(
            "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources",
            b"{\"cpu\":{}}",
        ),
        annotations: [("kubernetes.io/egress-bandwidth".into(), "10M".into())].into(),
        ..Default::default()
    };
    client.update(ctx(), &update).await.unwrap();
    client
        .pause(
            ctx(),
            &api::PauseRequest {
                id: "c".into(),
                ..Default::default()
            },
        )
        .await
        .unwrap();
    client
        .resume(
            ctx(),
            &api::ResumeRequest {
                id: "c".into(),
                ..Default::default()
            },
        )
        .await
        .unwrap();

    let seen = runtime.seen();
    let Call::Create(created) = &seen[0] else {
        panic!("{seen:?}")
    };
    assert_eq!(
        (
            created.options.config_path.as_str(),
            created.stdio.stdout.as_str()
        ),
        ("/c", "/out")
    );
    let Call::Exec(exec) = &seen[1] else {
        panic!("{seen:?}")
    };
    assert_eq!(
        (exec.process.clone(), exec.spec_json.as_slice()),
        (process("c", "e"), &b"{}"[..])
    );
    assert_eq!(
        seen[2..],
        [
            Call::Kill(process("c", "e"), 15, true),
            Call::ResizePty(process("c", ""), 80, 24),
            // The request without stdin closes nothing.
            Call::CloseIo(process("c", "")),
            Call::Update(UpdateContainerRequest {
                container_id: "c".into(),
                resources_json: b"{\"cpu\":{}}".to_vec(),
                annotations: [("kubernetes.io/egress-bandwidth".into(), "10M".into())].into(),
            }),
            Call::Pause("c".into()),
            Call::Resume("c".into()),
        ]
    );
}

#[tokio::test]
async fn answer_when_given_carries_what_the_runtime_says() {
    let runtime = FakeRuntime::new(|request| {
        Ok(match request {
            Call::State(process) => Answer::State(ProcessState {
                process: process.clone(),
                bundle: "/b".into(),
                pid: 7,
                status: ProcessStatus::Stopped,
                stdio: Stdio::default(),
                exit: Some(exit(42)),
            }),
            Call::Pids(_) => Answer::Pids(vec![7, 8]),
            Call::Stats(_) => Answer::Stats(Box::new(ContainerStats {
                pids_current: 3,
                ..Default::default()
            })),
            Call::Connect(_) => Answer::Pid(7),
            _ => Answer::Exit(exit(42)),
        })
    });
    let served = Served::new(&runtime);
    let client = served.task().await;

    let state = client
        .state(
            ctx(),
            &api::StateRequest {
                id: "c".into(),
                ..Default::default()
            },
        )
        .await
        .unwrap();
    assert_eq!(
        (state.pid, state.exit_status, state.exited_at.seconds),
        (7, 42, 5)
    );
    let pids = client.pids(ctx(), &api::PidsRequest::new()).await.unwrap();
    assert_eq!(
        pids.processes
            .iter()
            .map(|process| process.pid)
            .collect::<Vec<_>>(),
        [7, 8]
    );
    let stats = client.stats(ctx(), &api::StatsRequest::new()).await.unwrap();
    assert_eq!(stats.stats.type_url, "io.containerd.cgroups.v2.Metrics");
    let connect = client.connect(ctx(), &api::ConnectRequest::new()).await.unwrap();
    assert_eq!((connect.shim_pid, connect.task_pid), (std::process::id(), 7));
    let wait = client.wait(ctx(), &wait_request()).await.unwrap();
    assert_eq!((wait.exit_status, wait.exited_at.seconds), (42, 5));
    let delete = client.delete(ctx(), &api::DeleteRequest::new()).await.unwrap();
    assert_eq!(
        (delete.pid, delete.exit_status, delete.exited_at.seconds),
        (CONTAINER_PID, 42, 5)
    );
}

#[tokio::test]
async fn connect_when_the_container_is_gone_works() {
    let runtime = FakeRuntime::new(|_| Err(Error::new(ErrorKind::NotFound, "container c does not exist")));
    let served = Served::new(&runtime);

    let connect = served
        .task()
        .await
        .connect(ctx(), &api::ConnectRequest::new())
        .await
        .unwrap();

    assert_eq!((connect.shim_pid, connect.task_pid), (std::process::id(), 0));
}

#[tokio::test]
async fn method_when_not_provided_is_unimplemented_by_name() {
    let runtime = FakeRuntime::new(|_| Ok(Answer::Done));
    let served = Served::new(&runtime);

    let checkpoint = served
        .task()
        .await
        .checkpoint(ctx(), &api::CheckpointTaskRequest::new())
        .await;
    assert_eq!(
        code(checkpoint),
        (
            Code::UNIMPLEMENTED,
            "Checkpoint is not supported by this runtime".to_owned()
        )
    );

    assert!(runtime.seen().is_empty());
}

#[tokio::test]
async fn request_when_malformed_does_not_reach_the_runtime() {
    let runtime = FakeRuntime::new(|_| Ok(Answer::Done));
    let served = Served::new(&runtime);
    let client = served.task().await;
    let garbage = MessageField::some(Any {
        type_url: "runtimeoptions.v1.Options".into(),
        value: b"\x12\xff".to_vec(),
        ..Default::default()
    });

    let create = client
        .create(
            ctx(),
            &api::CreateTaskRequest {
                options: garbage,
                ..Default::default()
            },
        )
        .await;
    assert_eq!(code(create).0, Code::INVALID_ARGUMENT);
    let exec = client.exec(ctx(), &api::ExecProcessRequest::new()).await;
    assert_eq!(code(exec).0, Code::INVALID_ARGUMENT);
    let update = client.update(ctx(), &api::UpdateTaskRequest::new()).await;
    assert_eq!(code(update).0, Code::INVALID_ARGUMENT);
    assert!(runtime.seen().is_empty());
}

#[tokio::test]
async fn clients_when_they_wait_do_not_hold_others_up() {
    let runtime = FakeRuntime::gated(0, |request| match request {
        Call::Wait(_) => Ok(Answer::Exit(exit(3))),
        _ => Ok(Answer::Pids(vec![7])),
    });
    let served = Served::new(&runtime);
    let mut waits = Vec::new();
    for _ in 0..20 {
        let client = served.task().await;
        waits.push(tokio::spawn(
            async move { client.wait(ctx(), &wait_request()).await },
        ));
    }
    // One more on the connection of another: requests on one connection do not wait for each other either.
    let client = served.task().await;
    let twin = client.clone();
    waits.push(tokio::spawn(
        async move { twin.wait(ctx(), &wait_request()).await },
    ));
    while runtime.seen().len() < 21 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }

    let pids = tokio::spawn(async move { client.pids(ctx(), &api::PidsRequest::new()).await });
    runtime.gate.add_permits(22);

    for wait in waits {
        assert_eq!(wait.await.unwrap().unwrap().exit_status, 3);
    }
    assert_eq!(pids.await.unwrap().unwrap().processes.len(), 1);
}

#[tokio::test]
async fn create_when_the_client_is_gone_runs_to_its_end() {
    let runtime = FakeRuntime::gated(0, |_| Ok(Answer::Pid(7)));
    let served = Served::new(&runtime);
    let client = served.task().await;
    let call = tokio::spawn(async move { client.create(ctx(), &api::CreateTaskRequest::new()).await });
    while runtime.seen().is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }

    // containerd is restarted: its connection closes.
    call.abort();
    assert!(call.await.unwrap_err().is_cancelled());
    tokio::time::sleep(Duration::from_millis(50)).await;
    runtime.gate.add_permits(1);

    let mut answered = runtime.answered.subscribe();
    timeout(PATIENCE, answered.wait_for(|count| *count == 1))
        .await
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn shutdown_when_nothing_is_left_ends_the_process() {
    let runtime = FakeRuntime::new(|request| match request {
        Call::Shutdown(container, _) => Ok(Answer::Shutdown(container == "last")),
        _ => Ok(Answer::Done),
    });
    let served = Served::new(&runtime);
    let client = served.task().await;

    client
        .shutdown(
            ctx(),
            &api::ShutdownRequest {
                id: "one".into(),
                ..Default::default()
            },
        )
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(served.socket.exists() && !*runtime.stopped.borrow());

    client
        .shutdown(
            ctx(),
            &api::ShutdownRequest {
                id: "last".into(),
                ..Default::default()
            },
        )
        .await
        .unwrap();
    served.has_ended(&runtime).await;
}

#[tokio::test]
async fn shutdown_when_it_fails_ends_an_empty_shim() {
    let runtime = FakeRuntime::new(|_| Err(Error::new(ErrorKind::Internal, "stuck")));
    let served = Served::new(&runtime);

    let result = served
        .task()
        .await
        .shutdown(ctx(), &api::ShutdownRequest::new())
        .await;

    assert_eq!(code(result).0, Code::INTERNAL);
    served.has_ended(&runtime).await;
}

#[tokio::test]
async fn shutdown_when_a_client_waits_does_not_wait() {
    let waiting = FakeRuntime::new(|_| Ok(Answer::Shutdown(true)));
    waiting.never_answer_waits();
    let served = Served::new(&waiting);
    let client = served.task().await;
    let waiter = client.clone();
    let wait = tokio::spawn(async move { waiter.wait(ctx(), &wait_request()).await });
    while waiting.seen().is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }

    client
        .shutdown(ctx(), &api::ShutdownRequest::new())
        .await
        .unwrap();

    served.has_ended(&waiting).await;
    wait.abort();
}

/// A shim that ends itself when it is idle for a while, and what it answered to a create: on a busy machine it may have
/// ended before that came, and has to be given more time.
async fn create_before_idle(
    runtime: impl Fn() -> Arc<FakeRuntime>,
) -> (Served, Arc<FakeRuntime>, ttrpc::Result<api::CreateTaskResponse>) {
    let mut idle = Duration::from_millis(100);
    loop {
        let runtime = runtime();
        let served = Served::with_idle(&runtime, idle);
        let create = api::CreateTaskRequest {
            id: "c".into(),
            ..Default::default()
        };
        if let Ok(client) = Client::connect(&served.address()).await {
            let answer = TaskClient::new(client).create(ctx(), &create).await;
            // Without a status it is the connection that failed.
            if matches!(answer, Ok(_) | Err(ttrpc::Error::RpcStatus(_))) {
                return (served, runtime, answer);
            }
        }
        idle *= 10;
        assert!(idle < PATIENCE, "the shim ends before it is asked");
    }
}

#[tokio::test]
async fn shim_when_forgotten_ends_itself() {
    let runtime = || FakeRuntime::new(|_| Err(Error::new(ErrorKind::Unavailable, "no VM")));
    let (served, runtime, create) = create_before_idle(runtime).await;
    assert_eq!(code(create).0, Code::UNAVAILABLE);

    served.has_ended(&runtime).await;
}

#[tokio::test]
async fn shim_when_it_has_a_container_stays() {
    let runtime = || {
        FakeRuntime::new(|request| match request {
            Call::Create(_) => Ok(Answer::Pid(7)),
            _ => Ok(Answer::Exit(exit(0))),
        })
    };
    let (served, runtime, create) = create_before_idle(runtime).await;
    create.unwrap();
    tokio::time::sleep(4 * served.idle).await;
    assert!(served.socket.exists());

    served
        .task()
        .await
        .delete(
            ctx(),
            &api::DeleteRequest {
                id: "c".into(),
                ..Default::default()
            },
        )
        .await
        .unwrap();

    served.has_ended(&runtime).await;
}
