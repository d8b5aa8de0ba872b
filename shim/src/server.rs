//! The ttrpc server: Task v2 and v3 from one implementation, and the Sandbox service, on one socket; beside them streams,
//! which are not ttrpc's server's ([`crate::accept`]).

use std::collections::HashMap;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use containerd_shim_protos::sandbox_async::{Sandbox, create_sandbox};
use containerd_shim_protos::shim_async::{Task, create_task};
use runtime::containers::StreamHub;
use ttrpc::asynchronous::transport::Listener;
use ttrpc::asynchronous::{Server, Service};

use crate::accept;
use crate::sandbox_service::SandboxService;
use crate::task_service::TaskService;

const TASK_V3: &str = "containerd.task.v3.Task";
const TASK_V2: &str = "containerd.task.v2.Task";

/// Serves the services on `listener` until the server is shut down. Call within tokio.
///
/// # Errors
/// When the listener cannot be used.
pub async fn serve(
    listener: UnixListener,
    task: TaskService,
    sandbox: SandboxService,
    streams: Arc<StreamHub>,
) -> ttrpc::Result<Server> {
    let failed = |error: std::io::Error| ttrpc::Error::Socket(error.to_string());
    listener.set_nonblocking(true).map_err(failed)?;
    let listener = tokio::net::UnixListener::from_std(listener).map_err(failed)?;
    let listener = Listener::new(accept::connections(listener, streams));
    let task: Arc<dyn Task + Send + Sync> = Arc::new(task);
    let sandbox: Arc<dyn Sandbox + Send + Sync> = Arc::new(sandbox);
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(create_task(Arc::clone(&task)))
        .register_service(as_v2(create_task(task)))
        .register_service(create_sandbox(sandbox));
    server.start().await?;
    Ok(server)
}

/// Task v2 and v3 differ in nothing but the service's name, and methods are found by their bare names.
fn as_v2(mut services: HashMap<String, Service>) -> HashMap<String, Service> {
    services
        .remove(TASK_V3)
        .map(|service| (TASK_V2.to_owned(), service))
        .into_iter()
        .collect()
}
