//! containerd's own API, for what `ctr` cannot express: waiting for a task from several clients without
//! deleting it, creating one without starting it, and reading gRPC codes.
//!
//! Messages are the subset of `containerd.services.tasks.v1` and `containerd.services.snapshots.v1` used
//! here, field numbers as in containerd's `api/services/{tasks,snapshots}/v1/*.proto`.

use std::collections::HashMap;

use prost::Message;
use tokio::task::JoinHandle;
use tonic::{Code, Status};

use crate::containerd::Containerd;
use crate::grpc::Client;

/// `containerd.types.Mount`.
#[derive(Clone, PartialEq, Message)]
struct Mount {
    #[prost(string, tag = "1")]
    kind: String,
    #[prost(string, tag = "2")]
    source: String,
    #[prost(string, tag = "3")]
    target: String,
    #[prost(string, repeated, tag = "4")]
    options: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
struct MountsRequest {
    #[prost(string, tag = "1")]
    snapshotter: String,
    #[prost(string, tag = "2")]
    key: String,
}

#[derive(Clone, PartialEq, Message)]
struct MountsResponse {
    #[prost(message, repeated, tag = "1")]
    mounts: Vec<Mount>,
}

#[derive(Clone, PartialEq, Message)]
struct CreateRequest {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(message, repeated, tag = "3")]
    rootfs: Vec<Mount>,
}

/// Names a process: a container's first one when `exec_id` is empty.
#[derive(Clone, PartialEq, Message)]
struct ProcessRequest {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(string, tag = "2")]
    exec_id: String,
    #[prost(uint32, tag = "3")]
    signal: u32,
}

#[derive(Clone, PartialEq, Message)]
struct Any {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct UpdateRequest {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(message, optional, tag = "2")]
    resources: Option<Any>,
    #[prost(map = "string, string", tag = "3")]
    annotations: HashMap<String, String>,
}

#[derive(Clone, PartialEq, Message)]
struct PidResponse {
    #[prost(uint32, tag = "2")]
    pid: u32,
}

#[derive(Clone, PartialEq, Message)]
struct WaitResponse {
    #[prost(uint32, tag = "1")]
    exit_status: u32,
}

#[derive(Clone, PartialEq, Message)]
struct DeleteResponse {
    #[prost(uint32, tag = "3")]
    exit_status: u32,
}

#[derive(Clone, PartialEq, Message)]
struct GetResponse {
    #[prost(message, optional, tag = "1")]
    process: Option<Process>,
}

#[derive(Clone, PartialEq, Message)]
struct Empty {}

/// `containerd.v1.types.Process`, as far as the tests look at it.
#[derive(Clone, PartialEq, Message)]
pub struct Process {
    /// Process id on the host.
    #[prost(uint32, tag = "3")]
    pub pid: u32,
    /// One of [`CREATED`], [`RUNNING`], [`STOPPED`].
    #[prost(int32, tag = "4")]
    pub status: i32,
    /// Exit status of a stopped process.
    #[prost(uint32, tag = "9")]
    pub exit_status: u32,
}

/// Created, not started.
pub const CREATED: i32 = 1;
/// Running.
pub const RUNNING: i32 = 2;
/// Exited, not deleted.
pub const STOPPED: i32 = 3;

/// A wait that is under way.
pub struct Waiter(JoinHandle<Result<WaitResponse, Status>>);

/// A client of one containerd, with the time limit of its settings on every call.
pub struct TaskApi {
    client: Client,
}

impl TaskApi {
    /// Connects to a containerd.
    ///
    /// # Errors
    /// When the runtime cannot be built or the socket does not answer.
    pub fn connect(daemon: &Containerd) -> Result<Self, Box<dyn std::error::Error>> {
        Ok(Self {
            client: Client::connect(daemon)?,
        })
    }

    /// Creates the task of an existing container, with its streams discarded, and does not start it.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn create(&self, container: &str, snapshotter: &str) -> Result<u32, Status> {
        let request = MountsRequest {
            snapshotter: snapshotter.to_owned(),
            key: container.to_owned(),
        };
        let mounts: MountsResponse =
            self.call("containerd.services.snapshots.v1.Snapshots/Mounts", request)?;
        let request = CreateRequest {
            container_id: container.to_owned(),
            rootfs: mounts.mounts,
        };
        let created: PidResponse = self.call("containerd.services.tasks.v1.Tasks/Create", request)?;
        Ok(created.pid)
    }

    /// Starts a created task.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn start(&self, container: &str) -> Result<(), Status> {
        let request = process(container, "", 0);
        self.call::<_, Empty>("containerd.services.tasks.v1.Tasks/Start", request)
            .map(drop)
    }

    /// Sends a signal; `exec_id` is empty for the container's first process.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn kill(&self, container: &str, exec_id: &str, signal: u32) -> Result<(), Status> {
        let request = process(container, exec_id, signal);
        self.call::<_, Empty>("containerd.services.tasks.v1.Tasks/Kill", request)
            .map(drop)
    }

    /// Updates a task with an annotation, and no limit.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn annotate(&self, container: &str, annotation: &str, value: &str) -> Result<(), Status> {
        let request = UpdateRequest {
            container_id: container.to_owned(),
            resources: Some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned(),
                value: b"{}".to_vec(),
            }),
            annotations: HashMap::from([(annotation.to_owned(), value.to_owned())]),
        };
        self.call::<_, Empty>("containerd.services.tasks.v1.Tasks/Update", request)
            .map(drop)
    }

    /// The state of a task.
    ///
    /// # Errors
    /// What containerd answers; `NOT_FOUND` also when the answer is empty.
    pub fn get(&self, container: &str) -> Result<Process, Status> {
        let request = process(container, "", 0);
        let answer: GetResponse = self.call("containerd.services.tasks.v1.Tasks/Get", request)?;
        answer
            .process
            .ok_or_else(|| Status::new(Code::NotFound, "empty answer"))
    }

    /// Deletes a stopped task and returns its exit status.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn delete(&self, container: &str) -> Result<u32, Status> {
        let request = process(container, "", 0);
        let answer: DeleteResponse = self.call("containerd.services.tasks.v1.Tasks/Delete", request)?;
        Ok(answer.exit_status)
    }

    /// Waits for a task to exit and returns its status.
    ///
    /// # Errors
    /// What containerd answers, or `DEADLINE_EXCEEDED`.
    pub fn wait(&self, container: &str) -> Result<u32, Status> {
        self.join(self.start_wait(container))
    }

    /// Starts a wait of its own connection, as another client would.
    pub fn start_wait(&self, container: &str) -> Waiter {
        let request = process(container, "", 0);
        let call = self
            .client
            .start::<_, WaitResponse>("containerd.services.tasks.v1.Tasks/Wait", request);
        Waiter(call)
    }

    /// Whether a wait is still under way.
    pub fn is_waiting(&self, waiter: &Waiter) -> bool {
        !waiter.0.is_finished()
    }

    /// The result of a wait.
    ///
    /// # Errors
    /// What containerd answered, or `DEADLINE_EXCEEDED`.
    pub fn join(&self, waiter: Waiter) -> Result<u32, Status> {
        self.client.join(waiter.0).map(|answer| answer.exit_status)
    }

    fn call<Q, A>(&self, method: &'static str, request: Q) -> Result<A, Status>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        self.client.call(method, request)
    }
}

fn process(container: &str, exec_id: &str, signal: u32) -> ProcessRequest {
    ProcessRequest {
        container_id: container.to_owned(),
        exec_id: exec_id.to_owned(),
        signal,
    }
}
