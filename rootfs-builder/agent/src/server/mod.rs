//! The ttrpc server: its sockets, its services, and the announcement that it is ready.

mod health;
mod service;
mod status;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use protocols::agent_ttrpc::create_agent_service;
use protocols::health_ttrpc::create_health;
use tokio::io::AsyncWriteExt;
use tokio::time::{sleep, timeout};
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport;

use crate::container::Ports;
use crate::hotplug::Hotplug;
use crate::logging::Log;
use crate::network::{self, Network};
use crate::options::{Address, Options};
use crate::reaper::Reaper;
use crate::sandbox::Sandbox;
use crate::transport::{Listener, connect_host};

/// What the agent sends to the host's ready port.
const READY: &[u8] = b"ready\n";
/// The vsock device may be probed after PID 1 starts, so its absence is waited out for a while.
const DEVICE_PATIENCE: Duration = Duration::from_secs(10);
/// How long calls may take to finish once the sandbox is destroyed.
const FAREWELL: Duration = Duration::from_secs(1);
const RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// Why the agent cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A socket could not be opened.
    #[error("listen for {purpose} on {address:?}: {source}")]
    Listen {
        /// What the socket is for.
        purpose: &'static str,
        /// Where.
        address: Address,
        /// Why not.
        source: io::Error,
    },
    /// Children's exit statuses could not be collected.
    #[error("handle SIGCHLD: {0}")]
    Reaper(io::Error),
    /// The ttrpc server did not start.
    #[error("start the ttrpc server: {0}")]
    Start(#[from] ttrpc::Error),
}

/// Serves the host until the sandbox is destroyed.
///
/// # Errors
/// A socket cannot be opened.
pub async fn serve(options: &Options, log: &Log, is_init: bool) -> Result<(), ServeError> {
    let reaper = Reaper::start().map_err(ServeError::Reaper)?;
    let ports = Ports::default();
    let sandbox = Arc::new(Sandbox::new(options, reaper, ports.clone(), is_init));

    let listener = listen("ttrpc", &options.server).await?;
    if let Some(address) = &options.stdio {
        // Before anybody can be told to connect.
        ports.serve(listen("stdio", address).await?);
    }
    let guests = is_init.then_some(Address::Vsock(protocols::CONNECT_PORT));
    if let Some(address) = options.connect.clone().or(guests) {
        let listener = listen("connections to the pod's ports", &address).await?;
        tokio::spawn(network::serve_localhost(listener));
    }
    let network = Network::new(Hotplug::new(options.hotplug_timeout, is_init));
    let service = service::Service::new(Arc::clone(&sandbox), network, is_init);
    let mut server = Server::new()
        .add_listener(transport::Listener::new(listener.into_stream()))
        .register_service(create_health(Arc::new(health::HealthService)))
        .register_service(create_agent_service(Arc::new(service)));
    server.start().await?;
    tracing::info!(address = ?options.server, version = env!("CARGO_PKG_VERSION"), "agent listens");

    if let Some(port) = options.ready_port {
        tokio::spawn(announce(port));
    }
    if let Some(address) = &options.log {
        let listener = listen("the log", address).await?;
        tokio::spawn(serve_log(listener, log.clone()));
    }
    sandbox.ended().await;
    // Lets the answer to DestroySandbox out before the machine goes.
    server.stop_listen().await;
    if timeout(FAREWELL, server.disconnect()).await.is_err() {
        tracing::warn!("calls still run after {} ms", FAREWELL.as_millis());
    }
    Ok(())
}

async fn listen(purpose: &'static str, address: &Address) -> Result<Listener, ServeError> {
    let deadline = tokio::time::Instant::now() + DEVICE_PATIENCE;
    loop {
        match Listener::bind(address) {
            Ok(listener) => return Ok(listener),
            Err(_) if matches!(address, Address::Vsock(_)) && tokio::time::Instant::now() < deadline => {
                sleep(RETRY_INTERVAL).await;
            }
            Err(source) => {
                return Err(ServeError::Listen {
                    purpose,
                    address: address.clone(),
                    source,
                });
            }
        }
    }
}

/// Tells the host that the server listens. A host that does not listen, or no longer, is not an error: it calls by itself.
async fn announce(port: u32) {
    let deadline = tokio::time::Instant::now() + DEVICE_PATIENCE;
    loop {
        let error = match connect_host(port).await {
            Ok(mut stream) => match stream.write_all(READY).await {
                Ok(()) => return tracing::debug!(port, "announced readiness"),
                Err(error) => error,
            },
            Err(error) => error,
        };
        if error.kind() == io::ErrorKind::ConnectionReset {
            return tracing::debug!(port, "nobody waits for the announcement");
        }
        if tokio::time::Instant::now() >= deadline {
            return tracing::warn!("announce readiness on host port {port}: {error}; waiting to be called");
        }
        sleep(RETRY_INTERVAL).await;
    }
}

/// Every reader gets the kept log and then follows it.
async fn serve_log(listener: Listener, log: Log) {
    loop {
        match listener.accept().await {
            Ok(reader) => {
                let log = log.clone();
                tokio::spawn(async move { log.stream_to(reader).await });
            }
            Err(error) => {
                tracing::warn!("accept a log reader: {error}");
                sleep(RETRY_INTERVAL).await;
            }
        }
    }
}
