//! `delete`: containerd believes the shim is dead. Whatever it left behind goes, and doing so again is fine.

use std::env;
use std::io;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use containerd_shim_protos::api::DeleteResponse;
use protobuf::{Message, MessageField};
use runtime::cri::ContainerKind;
use runtime::error::{Error, ErrorKind};
use runtime::handler::is_orphaned;

use crate::address::Address;
use crate::args::Args;
use crate::bundle::Bundle;
use crate::process::ShimProcess;
use crate::start::socket_dir;
use crate::{convert, logging, socket};

/// Exit status of a container whose VM is gone: as if killed by signal 9.
const KILLED: u32 = 137;

/// How long a leftover shim may take to end by itself; twice this and [`CLEANUP_PATIENCE`] stay below the 5 s that
/// containerd allows.
const SHIM_PATIENCE: Duration = Duration::from_millis(1000);

/// How long undoing may take.
const CLEANUP_PATIENCE: Duration = Duration::from_millis(2000);

/// How long a dying process may take to close its socket.
const CLOSE_PATIENCE: Duration = Duration::from_millis(500);

/// Why `delete` failed. Leftovers that could not be removed are warnings, not errors: containerd would keep the bundle.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// The working folder is unusable.
    #[error("working folder: {0}")]
    WorkingFolder(io::Error),
    /// tokio did not start.
    #[error("starting the async runtime: {0}")]
    Runtime(io::Error),
    /// The answer does not encode.
    #[error("encoding the answer: {0}")]
    Encode(#[from] protobuf::Error),
}

/// Runs the action; returns what to print on stdout.
///
/// # Errors
/// [`DeleteError`]
pub fn delete(args: &Args) -> Result<Vec<u8>, DeleteError> {
    logging::to_stderr(&args.namespace, &args.id, args.debug);
    let dir = if args.bundle.is_empty() {
        env::current_dir().map_err(DeleteError::WorkingFolder)?
    } else {
        PathBuf::from(&args.bundle)
    };
    let bundle = Bundle::new(dir);
    let pid = bundle.pid();
    match bundle.kind() {
        // The sandbox' own delete takes care of the process and everything shared, if it is still to come.
        Ok(ContainerKind::Member { sandbox_id }) if is_orphaned(&args.namespace, &sandbox_id) => {
            delete_orphaned(args, &bundle, &sandbox_id)?;
        }
        Ok(ContainerKind::Member { .. }) => {}
        // containerd has closed its connection because the container is gone, and takes that for the shim's death.
        Ok(_) | Err(_) if is_orphaned(&args.namespace, &args.id) => {
            delete_orphaned(args, &bundle, &args.id)?;
        }
        // A bundle that is half gone is still cleaned up as the sandbox it may have been.
        Ok(_) | Err(_) => delete_sandbox(args, &bundle, pid)?,
    }
    if let Err(error) = runtime::host::mounts::unmount_below(&bundle.dir().join("rootfs")) {
        tracing::warn!(%error, "root filesystem");
    }
    let response = DeleteResponse {
        pid: pid.unwrap_or_default(),
        exit_status: KILLED,
        exited_at: MessageField::some(convert::timestamp(SystemTime::now())),
        ..Default::default()
    };
    Ok(response.write_to_bytes()?)
}

fn delete_sandbox(args: &Args, bundle: &Bundle, pid: Option<u32>) -> Result<(), DeleteError> {
    let process = pid.and_then(|pid| ShimProcess::find(pid, &args.namespace, &args.id));
    if process.is_some_and(|process| !process.end(SHIM_PATIENCE)) {
        tracing::warn!(pid, "shim process does not end");
    }
    if let Err(error) = clean_up(args, bundle, &args.id)? {
        tracing::warn!(%error, "cleaning up");
    }
    remove_socket_of(args, bundle, &args.id);
    bundle.clear();
    Ok(())
}

/// A sandbox whose containers go on without its own: as long as its shim lives, they are its business.
fn delete_orphaned(args: &Args, bundle: &Bundle, sandbox_id: &str) -> Result<(), DeleteError> {
    match clean_up(args, bundle, sandbox_id)? {
        Err(error) if error.kind == ErrorKind::AlreadyExists => {
            tracing::debug!(%error, "left alone");
            return Ok(());
        }
        Err(error) => tracing::warn!(%error, "cleaning up"),
        Ok(()) => {}
    }
    remove_socket_of(args, bundle, sandbox_id);
    bundle.clear();
    Ok(())
}

/// Undoes what a dead shim of the sandbox has left, in bounded time; what became of that.
fn clean_up(
    args: &Args,
    bundle: &Bundle,
    sandbox_id: &str,
) -> Result<runtime::error::Result<()>, DeleteError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(DeleteError::Runtime)?;
    let cleanup = runtime.block_on(async {
        tokio::time::timeout(
            CLEANUP_PATIENCE,
            runtime::handler::cleanup(&args.namespace, sandbox_id, bundle.dir()),
        )
        .await
    });
    // Blocking work of a clean-up that hangs must not hold the process.
    runtime.shutdown_background();
    Ok(cleanup.unwrap_or_else(|_| {
        let message = format!("not done in {} s, left", CLEANUP_PATIENCE.as_secs());
        Err(Error::new(ErrorKind::DeadlineExceeded, message))
    }))
}

/// Removes the socket of a shim that is dead.
fn remove_socket_of(args: &Args, bundle: &Bundle, sandbox_id: &str) {
    // A `start` that was killed between binding its socket and writing the address down leaves only the socket.
    let bound = || Address::of_sandbox(&socket_dir(None), &args.address, &args.namespace, sandbox_id).ok();
    if let Some(address) = bundle.address().or_else(bound) {
        remove_socket(&address);
    }
}

/// Removes the socket once nobody listens on it: of a process that was just killed, threads may still hold it for a
/// moment.
fn remove_socket(address: &Address) {
    let deadline = Instant::now() + CLOSE_PATIENCE;
    while socket::is_served(address.path()) {
        if Instant::now() > deadline {
            tracing::warn!(%address, "still served, left");
            return;
        }
        sleep(Duration::from_millis(5));
    }
    if let Err(error) = socket::remove(address.path()) {
        tracing::warn!(%error, "socket");
    }
}
