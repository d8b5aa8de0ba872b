//! containerd's Sandbox service, version 1. What the runtime does not provide is answered UNIMPLEMENTED by name; the
//! methods that need no sandbox work, so that containerd can end a shim it started for one.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::sandbox_api as wire;
use containerd_shim_protos::sandbox_async::Sandbox;
use containerd_shim_protos::types::platform::Platform;
use protobuf::MessageField;
use runtime::error::Error;
use tokio::sync::Notify;
use ttrpc::asynchronous::TtrpcContext;

use crate::grpc;

/// Serves the Sandbox API.
pub struct SandboxService {
    shutdown: Arc<Notify>,
}

impl SandboxService {
    /// A service that asks for the end of the process through `shutdown`.
    pub fn new(shutdown: Arc<Notify>) -> Self {
        Self { shutdown }
    }
}

fn unsupported<T>(method: &'static str) -> ttrpc::Result<T> {
    tracing::warn!("{method} is not supported");
    Err(grpc::status(&Error::unsupported(method)))
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        _: wire::CreateSandboxRequest,
    ) -> ttrpc::Result<wire::CreateSandboxResponse> {
        unsupported("CreateSandbox")
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        _: wire::StartSandboxRequest,
    ) -> ttrpc::Result<wire::StartSandboxResponse> {
        unsupported("StartSandbox")
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
        _: wire::StopSandboxRequest,
    ) -> ttrpc::Result<wire::StopSandboxResponse> {
        unsupported("StopSandbox")
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        _: wire::WaitSandboxRequest,
    ) -> ttrpc::Result<wire::WaitSandboxResponse> {
        unsupported("WaitSandbox")
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        _: wire::SandboxStatusRequest,
    ) -> ttrpc::Result<wire::SandboxStatusResponse> {
        unsupported("SandboxStatus")
    }

    async fn ping_sandbox(
        &self,
        _: &TtrpcContext,
        _: wire::PingRequest,
    ) -> ttrpc::Result<wire::PingResponse> {
        Ok(wire::PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        _: wire::ShutdownSandboxRequest,
    ) -> ttrpc::Result<wire::ShutdownSandboxResponse> {
        self.shutdown.notify_one();
        Ok(wire::ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        _: wire::SandboxMetricsRequest,
    ) -> ttrpc::Result<wire::SandboxMetricsResponse> {
        unsupported("SandboxMetrics")
    }
}
