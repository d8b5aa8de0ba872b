//! `grpc.Health`: is the agent alive, and which one is it.

use async_trait::async_trait;
use protocols::health::health_check_response::ServingStatus;
use protocols::health::{CheckRequest, HealthCheckResponse, VersionCheckResponse};
use protocols::health_ttrpc::Health;
use ttrpc::asynchronous::TtrpcContext;

/// Version of the agent protocol, as stock agents report it.
const API_VERSION: &str = "0.0.1";

pub struct HealthService;

#[async_trait]
impl Health for HealthService {
    async fn check(&self, _: &TtrpcContext, _: CheckRequest) -> ttrpc::Result<HealthCheckResponse> {
        Ok(HealthCheckResponse {
            status: ServingStatus::SERVING.into(),
            ..Default::default()
        })
    }

    async fn version(&self, _: &TtrpcContext, _: CheckRequest) -> ttrpc::Result<VersionCheckResponse> {
        Ok(VersionCheckResponse {
            grpc_version: API_VERSION.to_owned(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }
}
