//! gRPC calls to containerd's socket, with the time limit of the settings on every one.

use std::time::Duration;

use prost::Message;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;

use crate::containerd::Containerd;

/// A connection to one containerd, for calls in its namespace.
pub struct Client {
    runtime: Runtime,
    channel: Channel,
    namespace: String,
    limit: Duration,
}

impl Client {
    /// Connects to a containerd.
    ///
    /// # Errors
    /// When the runtime cannot be built or the socket does not answer.
    pub fn connect(daemon: &Containerd) -> Result<Self, Box<dyn std::error::Error>> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let endpoint = Endpoint::try_from(format!("unix://{}", daemon.socket().display()))?;
        let channel = runtime.block_on(endpoint.connect())?;
        let (namespace, limit) = (daemon.namespace().to_owned(), daemon.settings.call_limit);
        Ok(Self {
            runtime,
            channel,
            namespace,
            limit,
        })
    }

    /// Calls `method`, such as `package.Service/Method`, and waits for its answer.
    ///
    /// # Errors
    /// What the other side answers, or `DEADLINE_EXCEEDED`.
    pub fn call<Q, A>(&self, method: &'static str, request: Q) -> Result<A, Status>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        self.join(self.start(method, request))
    }

    /// Starts a call that goes on by itself.
    pub fn start<Q, A>(&self, method: &'static str, request: Q) -> JoinHandle<Result<A, Status>>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        let call = unary(
            self.channel.clone(),
            method,
            self.namespace.clone(),
            self.limit,
            request,
        );
        self.runtime.spawn(call)
    }

    /// The result of a started call.
    ///
    /// # Errors
    /// What the other side answered, or `DEADLINE_EXCEEDED`.
    pub fn join<A>(&self, call: JoinHandle<Result<A, Status>>) -> Result<A, Status> {
        self.runtime
            .block_on(call)
            .map_err(|e| Status::new(Code::Internal, e.to_string()))?
    }
}

async fn unary<Q, A>(
    channel: Channel,
    method: &'static str,
    namespace: String,
    limit: Duration,
    message: Q,
) -> Result<A, Status>
where
    Q: Message + Send + Sync + 'static,
    A: Message + Default + Send + Sync + 'static,
{
    let internal = |e: &dyn std::fmt::Display| Status::new(Code::Internal, format!("{method}: {e}"));
    let mut request = Request::new(message);
    let value = MetadataValue::try_from(namespace).map_err(|e| internal(&e))?;
    request.metadata_mut().insert("containerd-namespace", value);
    let path = PathAndQuery::try_from(format!("/{method}")).map_err(|e| internal(&e))?;
    let mut client = Grpc::new(channel);
    let call = async {
        client.ready().await.map_err(|e| internal(&e))?;
        client.unary(request, path, ProstCodec::default()).await
    };
    match tokio::time::timeout(limit, call).await {
        Ok(answer) => answer.map(tonic::Response::into_inner),
        Err(_) => Err(Status::new(
            Code::DeadlineExceeded,
            format!("{method}: no answer within {limit:?}"),
        )),
    }
}
