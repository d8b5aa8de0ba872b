//! How a request is served: counted, timed, logged with its id, its error turned into a gRPC status.

use std::sync::Arc;

use runtime::error::{Error, ErrorKind, Result};
use tokio::time::Instant;

use crate::grpc;
use crate::idle::Activity;

/// Answers a query about `id`. It ends with the client: a Wait whose caller is gone waits for nobody.
pub async fn query<T>(
    activity: &Arc<Activity>,
    name: &'static str,
    id: String,
    work: impl Future<Output = Result<T>>,
) -> ttrpc::Result<T> {
    let _request = activity.request();
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
    activity: &Arc<Activity>,
    name: &'static str,
    id: String,
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> ttrpc::Result<T> {
    let request = activity.request();
    let running = tokio::spawn(async move {
        let _request = request;
        work.await
    });
    let result = async {
        running
            .await
            .unwrap_or_else(|error| Err(Error::new(ErrorKind::Internal, format!("{name}: {error}"))))
    };
    query(activity, name, id, result).await
}
