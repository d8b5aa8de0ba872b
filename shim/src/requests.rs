//! How a request is served: counted, timed, logged with its id, its error turned into a gRPC status.

use std::sync::Arc;

use runtime::error::{Error, ErrorKind, Result};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::grpc;
use crate::idle::Activity;

/// What serves the requests of one service: the runtime behind `H`, and the process around it.
pub struct Requests<H: ?Sized> {
    handler: Arc<H>,
    activity: Arc<Activity>,
    shutdown: Arc<Notify>,
}

impl<H: ?Sized> Requests<H> {
    /// Requests to `handler`, noted in `activity`; the end of the process is asked for through `shutdown`.
    pub fn new(handler: Arc<H>, activity: Arc<Activity>, shutdown: Arc<Notify>) -> Self {
        Self {
            handler,
            activity,
            shutdown,
        }
    }

    /// The runtime.
    pub fn handler(&self) -> &Arc<H> {
        &self.handler
    }

    /// What the process is doing.
    pub fn activity(&self) -> &Arc<Activity> {
        &self.activity
    }

    /// Lets the process end.
    pub fn end_process(&self) {
        self.shutdown.notify_one();
    }

    /// Answers a query about `id`. It ends with the client: a Wait whose caller is gone waits for nobody.
    pub async fn query<T>(
        &self,
        name: &'static str,
        id: String,
        work: impl Future<Output = Result<T>>,
    ) -> ttrpc::Result<T> {
        let _request = self.activity.request();
        let start = Instant::now();
        let result = work.await;
        let us = start.elapsed().as_micros();
        match &result {
            Ok(_) => tracing::debug!(id, us, "{name}"),
            // Clients learn from such answers that a process is gone; only a create has to find things.
            Err(error) if error.kind == ErrorKind::NotFound && !name.starts_with("Create") => {
                tracing::debug!(id, us, %error, "{name} failed");
            }
            Err(error) => tracing::warn!(id, us, kind = ?error.kind, %error, "{name} failed"),
        }
        result.map_err(|error| grpc::status(&error))
    }

    /// Carries out a change. It runs to its end even if the client gives up or goes away: ttrpc drops the future of a
    /// request whose connection closes, and half a create is worse than one nobody waits for.
    pub async fn change<T: Send + 'static>(
        &self,
        name: &'static str,
        id: String,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> ttrpc::Result<T> {
        let request = self.activity.request();
        let running = tokio::spawn(async move {
            let _request = request;
            work.await
        });
        let result = async {
            running
                .await
                .unwrap_or_else(|error| Err(Error::new(ErrorKind::Internal, format!("{name}: {error}"))))
        };
        self.query(name, id, result).await
    }
}
