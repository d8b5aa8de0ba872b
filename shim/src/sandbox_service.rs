//! containerd's Sandbox service, version 1 (`sandboxer = "shim"`): a pod without a pause container. Its containers are created
//! by the Task service beside it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use containerd_shim_protos::sandbox_api as wire;
use containerd_shim_protos::sandbox_async::Sandbox;
use containerd_shim_protos::types::platform::Platform;
use protobuf::MessageField;
use protobuf::well_known_types::timestamp::Timestamp;
use runtime::handler::SandboxHandler;
use runtime::sandbox::{Readiness, SandboxStatus};
use tokio::sync::Notify;
use ttrpc::asynchronous::TtrpcContext;

use crate::convert::{self, timestamp};
use crate::idle::Activity;
use crate::requests::Requests;

/// State of a sandbox that containers can be created in.
const READY: &str = "SANDBOX_READY";
/// State of one that does not run yet, or any more.
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// Serves the Sandbox API.
pub struct SandboxService {
    requests: Requests<dyn SandboxHandler>,
}

impl SandboxService {
    /// A service over `handler` that notes what it serves in `activity` and asks for the end of the process through
    /// `shutdown`.
    pub fn new(handler: Arc<dyn SandboxHandler>, activity: Arc<Activity>, shutdown: Arc<Notify>) -> Self {
        Self {
            requests: Requests::new(handler, activity, shutdown),
        }
    }

    /// The runtime, for a future that outlives this call.
    fn handler(&self) -> Arc<dyn SandboxHandler> {
        Arc::clone(self.requests.handler())
    }
}

fn optional(time: Option<SystemTime>) -> MessageField<Timestamp> {
    MessageField::from_option(time.map(timestamp))
}

fn status_response(status: SandboxStatus, verbose: bool) -> wire::SandboxStatusResponse {
    let state = match status.state {
        Readiness::Ready => READY,
        Readiness::NotReady => NOT_READY,
    };
    wire::SandboxStatusResponse {
        sandbox_id: status.sandbox_id,
        pid: status.pid,
        state: state.to_owned(),
        info: if verbose { status.info } else { Default::default() },
        created_at: optional(status.created_at),
        exited_at: optional(status.end.map(|end| end.at)),
        ..Default::default()
    }
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: wire::CreateSandboxRequest,
    ) -> ttrpc::Result<wire::CreateSandboxResponse> {
        let (handler, activity) = (self.handler(), Arc::clone(self.requests.activity()));
        let id = request.sandbox_id.clone();
        let name = id.clone();
        let create = async move {
            handler.create_sandbox(convert::sandbox_request(request)?).await?;
            // It needs this process until it is shut down, with or without containers.
            activity.created(&id);
            Ok(())
        };
        self.requests.change("CreateSandbox", name, create).await?;
        Ok(wire::CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: wire::StartSandboxRequest,
    ) -> ttrpc::Result<wire::StartSandboxResponse> {
        let (handler, id) = (self.handler(), request.sandbox_id.clone());
        let start = async move { handler.start_sandbox(&id).await };
        let started = self
            .requests
            .change("StartSandbox", request.sandbox_id, start)
            .await?;
        Ok(wire::StartSandboxResponse {
            pid: started.pid,
            created_at: MessageField::some(timestamp(started.created_at)),
            ..Default::default()
        })
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        _: wire::PlatformRequest,
    ) -> ttrpc::Result<wire::PlatformResponse> {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let platform = Platform {
            os: "linux".into(),
            architecture: architecture.into(),
            ..Default::default()
        };
        Ok(wire::PlatformResponse {
            platform: MessageField::some(platform),
            ..Default::default()
        })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: wire::StopSandboxRequest,
    ) -> ttrpc::Result<wire::StopSandboxResponse> {
        let (handler, id) = (self.handler(), request.sandbox_id.clone());
        let seconds = u64::from(request.timeout_secs);
        let timeout = (seconds > 0).then(|| Duration::from_secs(seconds));
        let stop = async move { handler.stop_sandbox(&id, timeout).await };
        self.requests
            .change("StopSandbox", request.sandbox_id, stop)
            .await?;
        Ok(wire::StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: wire::WaitSandboxRequest,
    ) -> ttrpc::Result<wire::WaitSandboxResponse> {
        let wait = self.requests.handler().wait_sandbox(&request.sandbox_id);
        let end = self
            .requests
            .query("WaitSandbox", request.sandbox_id.clone(), wait)
            .await?;
        Ok(wire::WaitSandboxResponse {
            exit_status: end.status(),
            exited_at: MessageField::some(timestamp(end.at)),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: wire::SandboxStatusRequest,
    ) -> ttrpc::Result<wire::SandboxStatusResponse> {
        let status = self.requests.handler().sandbox_status(&request.sandbox_id);
        self.requests
            .query("SandboxStatus", request.sandbox_id.clone(), status)
            .await
            .map(|status| status_response(status, request.verbose))
    }

    async fn ping_sandbox(
        &self,
        _: &TtrpcContext,
        request: wire::PingRequest,
    ) -> ttrpc::Result<wire::PingResponse> {
        let ping = self.requests.handler().ping_sandbox(&request.sandbox_id);
        self.requests
            .query("PingSandbox", request.sandbox_id.clone(), ping)
            .await?;
        Ok(wire::PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: wire::ShutdownSandboxRequest,
    ) -> ttrpc::Result<wire::ShutdownSandboxResponse> {
        let (handler, id) = (self.handler(), request.sandbox_id.clone());
        let shutdown = async move { handler.shutdown_sandbox(&id).await };
        self.requests
            .change("ShutdownSandbox", request.sandbox_id, shutdown)
            .await?;
        self.requests.end_process();
        Ok(wire::ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: wire::SandboxMetricsRequest,
    ) -> ttrpc::Result<wire::SandboxMetricsResponse> {
        let stats =
            async { convert::stats(&self.requests.handler().stats_sandbox(&request.sandbox_id).await?) };
        let data = self
            .requests
            .query("SandboxMetrics", request.sandbox_id.clone(), stats)
            .await?;
        let mut response = wire::SandboxMetricsResponse::new();
        // The crate keeps this type's name to itself.
        let metric = response.metrics.mut_or_insert_default();
        metric.timestamp = MessageField::some(timestamp(SystemTime::now()));
        metric.id = request.sandbox_id;
        metric.data = MessageField::some(data);
        Ok(response)
    }
}
