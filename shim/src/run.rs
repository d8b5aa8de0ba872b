//! The serving process: set-up before there are threads, then requests until the sandbox is no longer wanted.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use runtime::containers::StreamHub;
use runtime::handler::{RuntimeHandlerManager, SandboxHandler, ShimContext, TaskHandler};
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CoreSchedulingScope, UnshareFlags, create_core_scheduling_cookie, unshare_unsafe};
use tokio::sync::{Notify, mpsc};
use tokio::time::timeout;

use crate::args::Args;
use crate::bundle::{Bundle, BundleError};
use crate::forward::Publisher;
use crate::idle::Activity;
use crate::sandbox_service::SandboxService;
use crate::signals::Termination;
use crate::start::TTRPC_ADDRESS_ENV;
use crate::task_service::TaskService;
use crate::{logging, server, socket, spawn};

/// Threads for requests; the VM has its own.
const WORKERS: usize = 2;

/// A shim without container and requests for this long was forgotten.
const IDLE: Duration = Duration::from_secs(60);

/// The same once its sandbox has ended.
const IDLE_AFTER_END: Duration = Duration::from_secs(10);

/// How long stopping the sandbox may take; the runtime bounds it by itself, this is for one that does not.
const STOP_PATIENCE: Duration = Duration::from_secs(20);

/// How long the last events may take.
const FLUSH_PATIENCE: Duration = Duration::from_secs(5);

/// How long open connections may take to get their last answers.
const DISCONNECT_PATIENCE: Duration = Duration::from_millis(300);

/// How long blocking work, such as giving back the VM's memory, may take after everything else.
const BACKGROUND_PATIENCE: Duration = Duration::from_millis(500);

/// Descriptors the table is made for at the start; growing it later stalls all threads for an RCU grace period.
const FD_TABLE: i32 = 1024;

/// Present in the environment when containerd wants core scheduling.
const SCHED_CORE_ENV: &str = "SCHED_CORE";

/// Why the process cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Not started by `start`.
    #[error("no socket to serve: containerd runs this program with the action start")]
    NotStarted,
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// Which step.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The pid cannot be recorded.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The server did not start.
    #[error("starting the server: {0}")]
    Server(ttrpc::Error),
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> RunError {
    move |source| RunError::Io { what, source }
}

/// Serves the sandbox of the bundle in the working folder until it is no longer wanted.
///
/// # Errors
/// [`RunError`], which is also reported to the parent and logged.
pub fn run(args: &Args) -> Result<(), RunError> {
    let spawn::Inherited { listener, report } = spawn::inherited().ok_or(RunError::NotStarted)?;
    let mut report = Some(report);
    let result = set_up(args, &listener).and_then(|bundle| {
        serve_bundle(args, &bundle, listener, || {
            if let Some(report) = report.take() {
                report.ready();
            }
        })
    });
    if let Err(error) = &result {
        tracing::error!(%error, "cannot serve");
        if let Some(report) = report {
            report.failed(error);
        }
    }
    result
}

fn serve_bundle(
    args: &Args,
    bundle: &Bundle,
    listener: UnixListener,
    ready: impl FnOnce(),
) -> Result<(), RunError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .enable_all()
        .build()
        .map_err(failed("starting the async runtime"))?;
    let ttrpc_address = std::env::var(TTRPC_ADDRESS_ENV).unwrap_or_default();
    let result = runtime.block_on(async {
        let (events, receiver) = mpsc::unbounded_channel();
        let streams = Arc::<StreamHub>::default();
        let context = ShimContext {
            sandbox_id: args.id.clone(),
            namespace: args.namespace.clone(),
            bundle: bundle.dir().to_owned(),
            debug: args.debug,
            log_verbosely: logging::verbosely,
            streams: Arc::clone(&streams),
        };
        let handler = Arc::new(RuntimeHandlerManager::new(context, events));
        let publisher = Publisher::spawn(receiver, &args.namespace, &ttrpc_address);
        serve(listener, handler, streams, publisher, IDLE, ready).await
    });
    runtime.shutdown_timeout(BACKGROUND_PATIENCE);
    result
}

/// Everything that must happen while the process has one thread.
fn set_up(args: &Args, listener: &UnixListener) -> Result<Bundle, RunError> {
    let bundle = Bundle::new(std::env::current_dir().map_err(failed("working folder"))?);
    logging::to_fifo(bundle.dir(), &args.namespace, &args.id, args.debug);
    logging::abort_on_panic();
    // Its own session: signals for containerd's process group are not meant for the pod. Fails only for a group leader,
    // which the child of `start` is not.
    let _ = rustix::process::setsid();
    grow_fd_table(listener)?;
    if std::env::var_os(SCHED_CORE_ENV).is_some_and(|value| !value.is_empty()) {
        let itself = rustix::process::getpid();
        if let Err(error) = create_core_scheduling_cookie(itself, CoreSchedulingScope::ThreadGroup) {
            tracing::warn!(%error, "core scheduling");
        }
    }
    private_mounts()?;
    bundle.write_pid(std::process::id())?;
    Ok(bundle)
}

/// Allows as many descriptors as the hard limit, because virtio-fs holds one per open guest file, and makes the table
/// large before there are threads.
fn grow_fd_table(any: &impl AsFd) -> Result<(), RunError> {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        },
    ) {
        tracing::warn!(%error, "raising the limit of open files");
    }
    let highest = getrlimit(Resource::Nofile)
        .current
        .and_then(|limit| i32::try_from(limit).ok());
    let last = highest.map_or(FD_TABLE, |limit| limit.min(FD_TABLE)) - 1;
    // Opening the highest descriptor sizes the table; closing it again does not shrink it.
    rustix::io::fcntl_dupfd_cloexec(any, last)
        .map_err(io::Error::from)
        .map_err(failed("growing the descriptor table"))?;
    Ok(())
}

/// A mount namespace of its own, so that the kernel removes the pod's mounts with the process, however it ends, and
/// containerd's folders are never busy because of them. Mounts made on the host later (volumes) still come in: the
/// namespace is a slave of the host's. And it is shared with the namespaces of this process' own threads, so that the
/// file server sees the root filesystems mounted after it started.
fn private_mounts() -> Result<(), RunError> {
    // SAFETY: unsharing the mount namespace takes no memory or descriptors away, and there is one thread.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }
        .map_err(io::Error::from)
        .map_err(failed("making a mount namespace (root is needed)"))?;
    for propagation in [MountPropagationFlags::DOWNSTREAM, MountPropagationFlags::SHARED] {
        mount_change("/", propagation | MountPropagationFlags::REC)
            .map_err(io::Error::from)
            .map_err(failed("setting the propagation of mounts"))?;
    }
    Ok(())
}

/// Serves `handler` and `streams` on `listener` until it is shut down, a signal comes or nobody needs it for `idle`; then removes the
/// socket, stops the sandbox and publishes the last events, each in bounded time. Calls `ready` once it serves and
/// handles signals.
///
/// # Errors
/// [`RunError`] when the server does not start.
pub async fn serve<H: TaskHandler + SandboxHandler>(
    listener: UnixListener,
    handler: Arc<H>,
    streams: Arc<StreamHub>,
    publisher: Publisher,
    idle: Duration,
    ready: impl FnOnce(),
) -> Result<(), RunError> {
    let path = socket_path(&listener);
    let mut signals = Termination::new().map_err(failed("installing signal handlers"))?;
    let activity = Activity::new();
    let shutdown = Arc::new(Notify::new());
    let mut end = handler.watch_end();
    let task = TaskService::new(handler.clone(), Arc::clone(&activity), Arc::clone(&shutdown));
    let sandbox = SandboxService::new(handler.clone(), Arc::clone(&activity), Arc::clone(&shutdown));
    let mut server = server::serve(listener, task, sandbox, streams)
        .await
        .map_err(RunError::Server)?;

    ready();
    tracing::info!("serving");

    let ended = async {
        if end.wait_for(|ended| *ended).await.is_err() {
            // The runtime does not report ends (any more): the other conditions decide.
            std::future::pending::<()>().await;
        }
        activity.idle_for(IDLE_AFTER_END).await;
    };
    tokio::select! {
        () = shutdown.notified() => tracing::info!("shutting down as asked"),
        signal = signals.received() => tracing::info!(signal, "shutting down"),
        () = ended => tracing::info!("sandbox has ended, shutting down"),
        () = activity.idle_for(idle) => tracing::warn!(seconds = idle.as_secs(), "nobody uses this shim, shutting down"),
    }

    // First, so that a new shim for the same id can bind at once.
    server.stop_listen().await;
    if let Some(path) = path
        && let Err(error) = socket::remove(&path)
    {
        tracing::warn!(%error, "socket");
    }
    if timeout(STOP_PATIENCE, handler.shutdown()).await.is_err() {
        tracing::error!(
            seconds = STOP_PATIENCE.as_secs(),
            "sandbox does not stop, leaving it to the kernel"
        );
    }
    publisher.flush(FLUSH_PATIENCE).await;
    // Waits for a Wait that nobody answers any more: not longer than it takes to send what is ready.
    let _ = timeout(DISCONNECT_PATIENCE, server.disconnect()).await;
    tracing::info!("end");
    Ok(())
}

fn socket_path(listener: &UnixListener) -> Option<PathBuf> {
    listener.local_addr().ok()?.as_pathname().map(PathBuf::from)
}
