//! containerd's Task service over the runtime.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::shim_async::Task;
use protobuf::MessageField;
use runtime::error::{Error, ErrorKind};
use runtime::handler::TaskHandler;
use tokio::sync::Notify;
use ttrpc::asynchronous::TtrpcContext;

use crate::convert::{self, process};
use crate::idle::Activity;
use crate::requests::Requests;
use crate::version;

/// Serves Task v2 and v3.
pub struct TaskService {
    requests: Requests<dyn TaskHandler>,
}

impl TaskService {
    /// A service over `handler` that notes what it serves in `activity` and asks for the end of the process through
    /// `shutdown`.
    pub fn new(handler: Arc<dyn TaskHandler>, activity: Arc<Activity>, shutdown: Arc<Notify>) -> Self {
        Self {
            requests: Requests::new(handler, activity, shutdown),
        }
    }

    /// The runtime, for a future that outlives this call.
    fn handler(&self) -> Arc<dyn TaskHandler> {
        Arc::clone(self.requests.handler())
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
        let (handler, activity) = (self.handler(), Arc::clone(self.requests.activity()));
        let id = request.id.clone();
        let name = id.clone();
        let create = async move {
            let request = convert::create_request(request)?;
            let pid = handler.create_container(request).await?;
            activity.created(&id);
            Ok(pid)
        };
        let pid = self.requests.change("Create", name, create).await?;
        Ok(api::CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: api::StartRequest) -> ttrpc::Result<api::StartResponse> {
        let (handler, process) = (self.handler(), process(&request.id, &request.exec_id));
        let start = async move { handler.start_process(&process).await };
        let name = target(&request.id, &request.exec_id);
        let pid = self.requests.change("Start", name, start).await?;
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
        let (handler, process) = (self.handler(), process(&request.id, &request.exec_id));
        let activity = Arc::clone(self.requests.activity());
        let name = target(&request.id, &request.exec_id);
        let delete = async move {
            let deleted = handler.delete_process(&process).await?;
            if process.exec_id.is_empty() {
                activity.deleted(&process.container_id);
            }
            Ok(deleted)
        };
        let deleted = self.requests.change("Delete", name, delete).await?;
        Ok(api::DeleteResponse {
            pid: deleted.pid,
            exit_status: deleted.exit.status,
            exited_at: MessageField::some(convert::timestamp(deleted.exit.at)),
            ..Default::default()
        })
    }

    async fn exec(&self, _: &TtrpcContext, request: api::ExecProcessRequest) -> ttrpc::Result<api::Empty> {
        let name = target(&request.id, &request.exec_id);
        let handler = self.handler();
        let exec = async move { handler.exec_process(convert::exec_request(request)?).await };
        self.requests.change("Exec", name, exec).await?;
        Ok(api::Empty::new())
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> ttrpc::Result<api::Empty> {
        let (handler, process) = (self.handler(), process(&request.id, &request.exec_id));
        let (signal, all) = (request.signal, request.all);
        let name = format!("{} signal {signal}", target(&request.id, &request.exec_id));
        let kill = async move { handler.kill_process(&process, signal, all).await };
        self.requests.change("Kill", name, kill).await?;
        Ok(api::Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: api::WaitRequest) -> ttrpc::Result<api::WaitResponse> {
        let process = process(&request.id, &request.exec_id);
        let name = target(&request.id, &request.exec_id);
        let exit = self
            .requests
            .query("Wait", name, self.requests.handler().wait_process(&process))
            .await?;
        Ok(api::WaitResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(convert::timestamp(exit.at)),
            ..Default::default()
        })
    }

    async fn state(&self, _: &TtrpcContext, request: api::StateRequest) -> ttrpc::Result<api::StateResponse> {
        let process = process(&request.id, &request.exec_id);
        let name = target(&request.id, &request.exec_id);
        self.requests
            .query("State", name, self.requests.handler().state_process(&process))
            .await
            .map(convert::state_response)
    }

    async fn pids(&self, _: &TtrpcContext, request: api::PidsRequest) -> ttrpc::Result<api::PidsResponse> {
        let pids = self.requests.handler().pids(&request.id);
        let pids = self.requests.query("Pids", request.id.clone(), pids).await?;
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
        let (handler, id) = (self.handler(), request.id.clone());
        let pause = async move { handler.pause_container(&id).await };
        self.requests.change("Pause", request.id, pause).await?;
        Ok(api::Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: api::ResumeRequest) -> ttrpc::Result<api::Empty> {
        let (handler, id) = (self.handler(), request.id.clone());
        let resume = async move { handler.resume_container(&id).await };
        self.requests.change("Resume", request.id, resume).await?;
        Ok(api::Empty::new())
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        request: api::CheckpointTaskRequest,
    ) -> ttrpc::Result<api::Empty> {
        self.requests
            .query("Checkpoint", request.id, async {
                Err(Error::unsupported("Checkpoint"))
            })
            .await
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: api::ResizePtyRequest,
    ) -> ttrpc::Result<api::Empty> {
        let (handler, process) = (self.handler(), process(&request.id, &request.exec_id));
        let (width, height) = (request.width, request.height);
        let name = target(&request.id, &request.exec_id);
        let resize = async move { handler.resize_process_pty(&process, width, height).await };
        self.requests.change("ResizePty", name, resize).await?;
        Ok(api::Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: api::CloseIORequest) -> ttrpc::Result<api::Empty> {
        if !request.stdin {
            // stdin is the only stream a client can close.
            return Ok(api::Empty::new());
        }
        let (handler, process) = (self.handler(), process(&request.id, &request.exec_id));
        let name = target(&request.id, &request.exec_id);
        let close = async move { handler.close_process_io(&process).await };
        self.requests.change("CloseIO", name, close).await?;
        Ok(api::Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: api::UpdateTaskRequest) -> ttrpc::Result<api::Empty> {
        let (handler, name) = (self.handler(), request.id.clone());
        let update = async move { handler.update_container(convert::update_request(request)?).await };
        self.requests.change("Update", name, update).await?;
        Ok(api::Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: api::StatsRequest) -> ttrpc::Result<api::StatsResponse> {
        let stats = async { convert::stats(&self.requests.handler().stats_container(&request.id).await?) };
        let stats = self.requests.query("Stats", request.id.clone(), stats).await?;
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
        let connect = async {
            match self.requests.handler().connect_container(&request.id).await {
                // containerd connects after its restart to see that the shim lives; the container may be gone.
                Err(error) if error.kind == ErrorKind::NotFound => Ok(0),
                connected => connected,
            }
        };
        let task_pid = self
            .requests
            .query("Connect", request.id.clone(), connect)
            .await?;
        Ok(api::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: version::VERSION.to_owned(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: api::ShutdownRequest) -> ttrpc::Result<api::Empty> {
        let (handler, id, now) = (self.handler(), request.id.clone(), request.now);
        let shutdown = async move { handler.shutdown_container(&id, now).await };
        let end = self.requests.change("Shutdown", request.id, shutdown).await;
        // Nobody will ask again: a runtime that cannot say must not keep an empty shim alive.
        if end
            .as_ref()
            .copied()
            .unwrap_or_else(|_| !self.requests.activity().has_containers())
        {
            self.requests.end_process();
        }
        end?;
        Ok(api::Empty::new())
    }
}
