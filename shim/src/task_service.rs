//! containerd's Task service over the runtime.

use std::future::Future;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::shim_async::Task;
use protobuf::MessageField;
use runtime::error::{Error, ErrorKind, Result};
use runtime::types::{TaskRequest, TaskResponse};
use tokio::sync::Notify;
use tokio::time::Instant;
use ttrpc::asynchronous::TtrpcContext;

use crate::convert::{self, process};
use crate::grpc;
use crate::handler::TaskHandler;
use crate::idle::Activity;
use crate::version;

/// Serves Task v2 and v3.
pub struct TaskService {
    handler: Arc<dyn TaskHandler>,
    activity: Arc<Activity>,
    shutdown: Arc<Notify>,
}

impl TaskService {
    /// A service over `handler` that notes what it serves in `activity` and asks for the end of the process through
    /// `shutdown`.
    pub fn new(handler: Arc<dyn TaskHandler>, activity: Arc<Activity>, shutdown: Arc<Notify>) -> Self {
        Self {
            handler,
            activity,
            shutdown,
        }
    }

    /// Answers a query. It ends with the client: a Wait whose caller is gone waits for nobody.
    async fn query<T>(
        &self,
        name: &'static str,
        task: String,
        work: impl Future<Output = Result<T>>,
    ) -> ttrpc::Result<T> {
        let _request = self.activity.request();
        let start = Instant::now();
        let result = work.await;
        let us = start.elapsed().as_micros();
        match &result {
            Ok(_) => tracing::debug!(task, us, "{name}"),
            // Clients learn from such answers that a process is gone; only a create has to find things.
            Err(error) if error.kind == ErrorKind::NotFound && name != "Create" => {
                tracing::debug!(task, us, %error, "{name} failed");
            }
            Err(error) => tracing::warn!(task, us, kind = ?error.kind, %error, "{name} failed"),
        }
        result.map_err(|error| grpc::status(&error))
    }

    /// Carries out a change. It runs to its end even if the client gives up or goes away: ttrpc drops the future of a
    /// request whose connection closes, and half a create is worse than one nobody waits for.
    async fn change<T: Send + 'static>(
        &self,
        name: &'static str,
        task: String,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> ttrpc::Result<T> {
        let request = self.activity.request();
        let running = tokio::spawn(async move {
            let _request = request;
            work.await
        });
        self.query(name, task, async {
            running
                .await
                .unwrap_or_else(|error| Err(Error::new(ErrorKind::Internal, format!("{name}: {error}"))))
        })
        .await
    }

    fn handle(&self, request: TaskRequest) -> impl Future<Output = Result<TaskResponse>> + Send + 'static {
        let handler = Arc::clone(&self.handler);
        async move { handler.handle_task(request).await }
    }

    async fn change_only(
        &self,
        name: &'static str,
        task: String,
        request: TaskRequest,
    ) -> ttrpc::Result<api::Empty> {
        self.change(name, task, self.handle(request)).await?;
        Ok(api::Empty::new())
    }
}

/// An answer that does not belong to the request: a defect of the runtime, which the client must not misread.
fn mismatch<T>(response: &TaskResponse) -> Result<T> {
    Err(Error::new(
        ErrorKind::Internal,
        format!("the runtime answered with {response:?}"),
    ))
}

fn pid_of(response: TaskResponse) -> Result<u32> {
    match response {
        TaskResponse::Pid(pid) => Ok(pid),
        other => mismatch(&other),
    }
}

fn target(id: &str, exec_id: &str) -> String {
    if exec_id.is_empty() {
        id.to_owned()
    } else {
        format!("{id}/{exec_id}")
    }
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> ttrpc::Result<api::CreateTaskResponse> {
        let id = request.id.clone();
        let (handler, activity) = (Arc::clone(&self.handler), Arc::clone(&self.activity));
        let pid = self
            .change("Create", id.clone(), async move {
                let request = convert::create_request(request)?;
                let pid = pid_of(handler.handle_task(TaskRequest::CreateContainer(request)).await?)?;
                activity.created(&id);
                Ok(pid)
            })
            .await?;
        Ok(api::CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: api::StartRequest) -> ttrpc::Result<api::StartResponse> {
        let work = self.handle(TaskRequest::StartProcess(process(&request.id, &request.exec_id)));
        let name = target(&request.id, &request.exec_id);
        let pid = self.change("Start", name, async { pid_of(work.await?) }).await?;
        Ok(api::StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: api::DeleteRequest,
    ) -> ttrpc::Result<api::DeleteResponse> {
        let work = self.handle(TaskRequest::DeleteProcess(process(&request.id, &request.exec_id)));
        let activity = Arc::clone(&self.activity);
        let name = target(&request.id, &request.exec_id);
        let (pid, exit) = self
            .change("Delete", name, async move {
                let (pid, exit) = match work.await? {
                    TaskResponse::Exit { pid, exit } => (pid, exit),
                    other => return mismatch(&other),
                };
                if request.exec_id.is_empty() {
                    activity.deleted(&request.id);
                }
                Ok((pid, exit))
            })
            .await?;
        Ok(api::DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: MessageField::some(convert::timestamp(exit.at)),
            ..Default::default()
        })
    }

    async fn exec(&self, _: &TtrpcContext, request: api::ExecProcessRequest) -> ttrpc::Result<api::Empty> {
        let name = target(&request.id, &request.exec_id);
        let handler = Arc::clone(&self.handler);
        self.change("Exec", name, async move {
            let request = convert::exec_request(request)?;
            handler.handle_task(TaskRequest::ExecProcess(request)).await
        })
        .await?;
        Ok(api::Empty::new())
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> ttrpc::Result<api::Empty> {
        let name = format!(
            "{} signal {}",
            target(&request.id, &request.exec_id),
            request.signal
        );
        let kill = TaskRequest::KillProcess {
            process: process(&request.id, &request.exec_id),
            signal: request.signal,
            all: request.all,
        };
        self.change_only("Kill", name, kill).await
    }

    async fn wait(&self, _: &TtrpcContext, request: api::WaitRequest) -> ttrpc::Result<api::WaitResponse> {
        let work = self.handle(TaskRequest::WaitProcess(process(&request.id, &request.exec_id)));
        let name = target(&request.id, &request.exec_id);
        let exit = self
            .query("Wait", name, async {
                match work.await? {
                    TaskResponse::Exit { exit, .. } => Ok(exit),
                    other => mismatch(&other),
                }
            })
            .await?;
        Ok(api::WaitResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(convert::timestamp(exit.at)),
            ..Default::default()
        })
    }

    async fn state(&self, _: &TtrpcContext, request: api::StateRequest) -> ttrpc::Result<api::StateResponse> {
        let work = self.handle(TaskRequest::StateProcess(process(&request.id, &request.exec_id)));
        let name = target(&request.id, &request.exec_id);
        self.query("State", name, async {
            match work.await? {
                TaskResponse::State(state) => Ok(convert::state_response(state)),
                other => mismatch(&other),
            }
        })
        .await
    }

    async fn pids(&self, _: &TtrpcContext, request: api::PidsRequest) -> ttrpc::Result<api::PidsResponse> {
        let work = self.handle(TaskRequest::Pids(request.id.clone()));
        let pids = self
            .query("Pids", request.id, async {
                match work.await? {
                    TaskResponse::Pids(pids) => Ok(pids),
                    other => mismatch(&other),
                }
            })
            .await?;
        let processes = pids
            .into_iter()
            .map(|pid| api::ProcessInfo {
                pid,
                ..Default::default()
            })
            .collect();
        Ok(api::PidsResponse {
            processes,
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, request: api::PauseRequest) -> ttrpc::Result<api::Empty> {
        self.change_only(
            "Pause",
            request.id.clone(),
            TaskRequest::PauseContainer(request.id),
        )
        .await
    }

    async fn resume(&self, _: &TtrpcContext, request: api::ResumeRequest) -> ttrpc::Result<api::Empty> {
        self.change_only(
            "Resume",
            request.id.clone(),
            TaskRequest::ResumeContainer(request.id),
        )
        .await
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        request: api::CheckpointTaskRequest,
    ) -> ttrpc::Result<api::Empty> {
        self.query("Checkpoint", request.id, async {
            Err(Error::unsupported("Checkpoint"))
        })
        .await
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: api::ResizePtyRequest,
    ) -> ttrpc::Result<api::Empty> {
        let name = target(&request.id, &request.exec_id);
        let resize = TaskRequest::ResizeProcessPty {
            process: process(&request.id, &request.exec_id),
            width: request.width,
            height: request.height,
        };
        self.change_only("ResizePty", name, resize).await
    }

    async fn close_io(&self, _: &TtrpcContext, request: api::CloseIORequest) -> ttrpc::Result<api::Empty> {
        if !request.stdin {
            // stdin is the only stream a client can close.
            return Ok(api::Empty::new());
        }
        let name = target(&request.id, &request.exec_id);
        self.change_only(
            "CloseIO",
            name,
            TaskRequest::CloseProcessIo(process(&request.id, &request.exec_id)),
        )
        .await
    }

    async fn update(&self, _: &TtrpcContext, request: api::UpdateTaskRequest) -> ttrpc::Result<api::Empty> {
        let id = request.id.clone();
        let handler = Arc::clone(&self.handler);
        self.change("Update", id.clone(), async move {
            let resources_json = convert::resources_json(request)?;
            handler
                .handle_task(TaskRequest::UpdateContainer {
                    container_id: id,
                    resources_json,
                })
                .await
        })
        .await?;
        Ok(api::Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: api::StatsRequest) -> ttrpc::Result<api::StatsResponse> {
        let work = self.handle(TaskRequest::StatsContainer(request.id.clone()));
        let stats = self
            .query("Stats", request.id, async {
                match work.await? {
                    TaskResponse::Stats(stats) => convert::stats(&stats),
                    other => mismatch(&other),
                }
            })
            .await?;
        Ok(api::StatsResponse {
            stats: MessageField::some(stats),
            ..Default::default()
        })
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: api::ConnectRequest,
    ) -> ttrpc::Result<api::ConnectResponse> {
        let work = self.handle(TaskRequest::ConnectContainer(request.id.clone()));
        let task_pid = self
            .query("Connect", request.id, async {
                match work.await {
                    Ok(response) => pid_of(response),
                    // containerd connects after its restart to see that the shim lives; the container may be gone.
                    Err(error) if error.kind == ErrorKind::NotFound => Ok(0),
                    Err(error) => Err(error),
                }
            })
            .await?;
        Ok(api::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: version::VERSION.to_owned(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: api::ShutdownRequest) -> ttrpc::Result<api::Empty> {
        let work = self.handle(TaskRequest::ShutdownContainer {
            container_id: request.id.clone(),
            now: request.now,
        });
        let end = self
            .change("Shutdown", request.id, async {
                match work.await? {
                    TaskResponse::Shutdown(end) => Ok(end),
                    other => mismatch(&other),
                }
            })
            .await;
        // Nobody will ask again: a runtime that cannot say must not keep an empty shim alive.
        if end
            .as_ref()
            .copied()
            .unwrap_or_else(|_| !self.activity.has_containers())
        {
            self.shutdown.notify_one();
        }
        end?;
        Ok(api::Empty::new())
    }
}
