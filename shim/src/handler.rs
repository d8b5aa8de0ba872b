//! What the services need from the runtime, narrow enough to be faked.

use async_trait::async_trait;
use runtime::error::Result;
use runtime::handler::RuntimeHandlerManager;
use runtime::types::{TaskRequest, TaskResponse};
use tokio::sync::watch;

/// Serves task requests; one per shim process.
#[async_trait]
pub trait TaskHandler: Send + Sync + 'static {
    /// One request, one answer.
    async fn handle_task(&self, request: TaskRequest) -> Result<TaskResponse>;

    /// Stops everything within a bounded time; exits are reported as events.
    async fn shutdown(&self);

    /// True once the sandbox has ended and nothing is left.
    fn watch_end(&self) -> watch::Receiver<bool>;
}

#[async_trait]
impl TaskHandler for RuntimeHandlerManager {
    async fn handle_task(&self, request: TaskRequest) -> Result<TaskResponse> {
        Self::handle_task(self, request).await
    }

    async fn shutdown(&self) {
        Self::shutdown(self).await;
    }

    fn watch_end(&self) -> watch::Receiver<bool> {
        Self::watch_end(self)
    }
}
