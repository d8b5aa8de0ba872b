//! `start`: make sure that a process serves the container's sandbox, and print where.
//!
//! containerd takes everything on stdout and stderr as the answer, so on success there is the address and nothing else;
//! warnings go to the bundle's log FIFO.

use std::env;
use std::fs;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use containerd_shim_protos::bootstrap_api::BootstrapParams;
use runtime::cri::ContainerKind;

use crate::address::{Address, AddressError, DEFAULT_SOCKET_DIR};
use crate::args::Args;
use crate::bundle::{Bundle, BundleError};
use crate::socket::SocketError;
use crate::spawn::SpawnError;
use crate::{bootstrap, logging, socket, spawn};

/// containerd's event endpoint, in the environment of every shim.
pub const TTRPC_ADDRESS_ENV: &str = "TTRPC_ADDRESS";

/// Socket folder of newer containerd releases for shims that do not read bootstrap parameters.
const SOCKET_DIR_ENV: &str = "SHIM_SOCKET_DIR";

/// Highest oom_score_adj there is.
const OOM_SCORE_ADJ_MAX: i32 = 1000;

/// Why `start` failed.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The working folder is unusable.
    #[error("working folder: {0}")]
    WorkingFolder(io::Error),
    /// The bundle is unusable.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// There is no address.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// The socket cannot be bound.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The serving process did not come up.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// A container of a pod whose sandbox is gone.
    #[error("sandbox {sandbox_id} of container {id} is not served at {}", address.path().display())]
    NoSandbox {
        /// The sandbox.
        sandbox_id: String,
        /// The container.
        id: String,
        /// Where its shim should listen.
        address: Address,
    },
    /// The answer does not encode.
    #[error("encoding the answer: {0}")]
    Encode(#[from] protobuf::Error),
}

/// What containerd said, on the command line and on stdin.
struct Call<'a> {
    args: &'a Args,
    params: Option<BootstrapParams>,
    /// Of the runtime class, encoded.
    options: Option<Vec<u8>>,
    debug: bool,
}

/// Runs the action in the working folder; returns what to print on stdout.
///
/// # Errors
/// [`StartError`]; no process, socket or file is left then.
pub fn start(args: &Args) -> Result<Vec<u8>, StartError> {
    runtime::timeline::mark("shim start");
    spawn::close_inherited_on_exec();
    let bundle = Bundle::new(env::current_dir().map_err(StartError::WorkingFolder)?);
    let stdin = bootstrap::read_stdin();
    let params = bootstrap::params(&stdin, &args.namespace, &args.id);
    let call = Call {
        args,
        options: bootstrap::runtime_options(&stdin, params.as_ref()),
        debug: args.debug || params.as_ref().is_some_and(bootstrap::wants_debug),
        params,
    };
    logging::to_fifo(bundle.dir(), &args.namespace, &args.id, call.debug);
    for warning in &args.warnings {
        tracing::warn!("{warning}");
    }

    let address = match bundle.kind()? {
        ContainerKind::Member { sandbox_id } => join_sandbox(&call, &bundle, &sandbox_id)?,
        ContainerKind::Single | ContainerKind::Sandbox => new_sandbox(&call, &bundle)?,
    };
    Ok(bootstrap::reply(call.params.as_ref(), &address)?)
}

fn join_sandbox(call: &Call<'_>, bundle: &Bundle, sandbox_id: &str) -> Result<Address, StartError> {
    let address = address_of(call, sandbox_id)?;
    if !socket::is_served(address.path()) {
        let (sandbox_id, id) = (sandbox_id.to_owned(), call.args.id.clone());
        return Err(StartError::NoSandbox {
            sandbox_id,
            id,
            address,
        });
    }
    bundle.write_address(&address)?;
    Ok(address)
}

fn address_of(call: &Call<'_>, sandbox_id: &str) -> Result<Address, AddressError> {
    let folder = socket_dir(call.params.as_ref());
    Address::of_sandbox(&folder, &call.args.address, &call.args.namespace, sandbox_id)
}

fn new_sandbox(call: &Call<'_>, bundle: &Bundle) -> Result<Address, StartError> {
    let address = if call.args.socket.is_empty() {
        address_of(call, &call.args.id)?
    } else {
        Address::of_path(PathBuf::from(&call.args.socket))?
    };
    let listener = socket::bind(&address)?;
    serve(call, bundle, &address, &listener).inspect_err(|_| {
        bundle.clear();
        if let Err(error) = socket::remove(address.path()) {
            tracing::warn!(%error, "cleaning up");
        }
    })?;
    Ok(address)
}

fn serve(
    call: &Call<'_>,
    bundle: &Bundle,
    address: &Address,
    listener: &UnixListener,
) -> Result<(), StartError> {
    // Before the process exists, so that it is never without: containerd ≤ 1.6 reads it after a restart.
    bundle.write_address(address)?;
    if let Some(options) = &call.options {
        bundle.write_options(options)?;
    }
    if let Err(error) = raise_oom_score() {
        tracing::warn!(%error, "oom_score_adj");
    }
    let params = call.params.as_ref();
    let ttrpc_address = params
        .map(|params| params.containerd_ttrpc_address.as_str())
        .unwrap_or_default();
    let environment: &[_] = if ttrpc_address.is_empty() {
        &[]
    } else {
        &[(TTRPC_ADDRESS_ENV, ttrpc_address)]
    };
    spawn::spawn(call.args, call.debug, environment, listener)?;
    Ok(())
}

/// The folder for sockets: as the bootstrap parameters or the environment say, else containerd's default.
pub(crate) fn socket_dir(params: Option<&BootstrapParams>) -> PathBuf {
    let from_params = params.and_then(|params| params.socket_dir.clone());
    from_params
        .or_else(|| env::var(SOCKET_DIR_ENV).ok())
        .filter(|dir| !dir.is_empty())
        .map_or_else(|| PathBuf::from(DEFAULT_SOCKET_DIR), PathBuf::from)
}

/// One above containerd's score, as containerd's own shims do, so that the kernel takes a shim before containerd. Set
/// here and inherited by the serving process.
fn raise_oom_score() -> io::Result<()> {
    let parent = rustix::process::getppid().map_or(1, |pid| pid.as_raw_nonzero().get());
    let score = read_oom_score(Path::new(&format!("/proc/{parent}/oom_score_adj")))?;
    fs::write(
        "/proc/self/oom_score_adj",
        (score + 1).min(OOM_SCORE_ADJ_MAX).to_string(),
    )
}

fn read_oom_score(path: &Path) -> io::Result<i32> {
    fs::read_to_string(path)?.trim().parse().map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_dir_when_in_the_parameters_wins() {
        let params = BootstrapParams {
            socket_dir: Some("/run/other".into()),
            ..Default::default()
        };
        assert_eq!(socket_dir(Some(&params)), PathBuf::from("/run/other"));

        let params = BootstrapParams {
            socket_dir: Some(String::new()),
            ..Default::default()
        };
        assert_eq!(socket_dir(Some(&params)), PathBuf::from(DEFAULT_SOCKET_DIR));
    }

    #[test]
    fn oom_score_when_read_is_a_number() {
        assert!((-1000..=1000).contains(&read_oom_score(Path::new("/proc/self/oom_score_adj")).unwrap()));
    }
}
