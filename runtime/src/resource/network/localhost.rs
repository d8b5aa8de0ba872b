//! The loopback of a pod's network namespace, served by the pod.
//!
//! CRI's port-forward connects to `localhost:PORT` in the pod's namespace on the host, where nothing listens: the pod's
//! processes do in their VM. Here one socket of the shim's has every new TCP connection to 127.0.0.0/8 and ::1 of that
//! namespace ([`SkLookup`]), and the agent makes each once more, in the guest ([`CONNECT_PORT`] has the protocol). The other
//! direction does not exist, and other addresses of the namespace are as they were.
//!
//! A port where nobody listens in the guest cannot be refused as a kernel does, before the connection is there: it is made,
//! and then reset. Nothing outlives the process (see [`sk_lookup`](crate::host::sk_lookup)); the namespace is held by the
//! listening socket until [`LocalhostForward::stop`].

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, SockaddrIn6, bind, listen, setsockopt, socket,
    sockopt,
};
use protocols::CONNECT_PORT;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};

use crate::error::{Error, ErrorKind, Result};
use crate::host::blocking;
use crate::host::netns::{self, Netns, NetnsError};
use crate::host::sk_lookup::{SkLookup, SkLookupError};
use crate::hypervisor::Hypervisor;

/// Connections at once; those beyond are reset.
const MAX_CONNECTIONS: usize = 256;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;
/// Bound of reaching the agent, which listens or is not one of ours.
const CONNECT: Duration = Duration::from_secs(5);
/// Bound of the agent's answer. It gives up on a port after 10 s.
const ANSWER: Duration = Duration::from_secs(15);
/// Longest answer; the guest decides what it sends.
const MAX_ANSWER: u64 = 256;
const ACCEPT_RETRY: Duration = Duration::from_millis(50);
/// How often a line about too many connections is logged.
const COMPLAINTS: Duration = Duration::from_secs(60);

/// Why the loopback of a namespace cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum LocalhostError {
    /// The namespace is not to be had.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The namespace is the host's, whose loopback is its own.
    #[error("network namespace {}: it is the host's", .0.display())]
    Hosts(PathBuf),
    /// There is no socket to be had.
    #[error("listen in network namespace {}: {source}", path.display())]
    Listen {
        /// The namespace.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The kernel does not hand connections to it.
    #[error("network namespace {}: {source}", path.display())]
    Lookup {
        /// The namespace.
        path: PathBuf,
        /// Why not.
        source: SkLookupError,
    },
}

impl From<LocalhostError> for Error {
    fn from(error: LocalhostError) -> Self {
        let kind = match error {
            LocalhostError::Netns(error) => return error.into(),
            LocalhostError::Hosts(_) => ErrorKind::FailedPrecondition,
            LocalhostError::Lookup { .. } => ErrorKind::Unimplemented,
            LocalhostError::Listen { .. } => ErrorKind::Internal,
        };
        Self::new(kind, error.to_string())
    }
}

/// Why a connection is reset.
#[derive(Debug, thiserror::Error)]
enum ForwardError {
    #[error("reach the agent: {0}")]
    Agent(#[from] Error),
    #[error("no answer of the agent within {} s", ANSWER.as_secs())]
    Silent,
    #[error("the agent says {0:?}")]
    Refused(String),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The loopback of one namespace, until this is dropped.
#[derive(Debug)]
pub struct LocalhostForward {
    /// Closed to end it.
    end: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl LocalhostForward {
    /// Lets the guest of `hypervisor` serve the loopback of the namespace at `netns`.
    ///
    /// # Errors
    /// `NotFound` without a namespace, `InvalidArgument` for something else, `FailedPrecondition` for the host's own,
    /// `Unimplemented` where the kernel cannot do it
    /// (before Linux 5.9, or without BPF) or does not allow it.
    pub async fn start(netns: &Path, hypervisor: Arc<dyn Hypervisor>) -> Result<Self> {
        Self::start_bounded(netns, hypervisor, MAX_CONNECTIONS).await
    }

    async fn start_bounded(netns: &Path, hypervisor: Arc<dyn Hypervisor>, limit: usize) -> Result<Self> {
        let path = netns.to_owned();
        let (listener, lookup) = blocking("serve a pod's loopback", move || Ok(listen_in(&path)?)).await?;
        let listener = TcpListener::from_std(listener).map_err(|source| LocalhostError::Listen {
            path: netns.to_owned(),
            source,
        })?;
        let (end, ended) = oneshot::channel();
        Ok(Self {
            end,
            task: tokio::spawn(serve(listener, lookup, hypervisor, limit, ended)),
        })
    }

    /// Ends it: when this returns nothing of it is in the namespace. Dropping it does the same, a little later.
    pub async fn stop(self) {
        drop(self.end);
        if let Err(error) = self.task.await {
            tracing::warn!(%error, "the pod's loopback");
        }
    }
}

/// The socket in the namespace, and what brings it connections.
fn listen_in(path: &Path) -> std::result::Result<(std::net::TcpListener, SkLookup), LocalhostError> {
    let netns = Netns::open(path)?;
    if netns.is_hosts() {
        return Err(LocalhostError::Hosts(path.to_owned()));
    }
    let failed = |source| LocalhostError::Listen {
        path: path.to_owned(),
        source,
    };
    netns.run(|| {
        let listener = listener().map_err(|errno| failed(errno.into()))?;
        let own = File::open(netns::OWN).map_err(failed)?;
        let lookup = SkLookup::attach(own.as_fd(), listener.as_fd());
        let lookup = lookup.map_err(|source| LocalhostError::Lookup {
            path: path.to_owned(),
            source,
        })?;
        Ok((listener, lookup))
    })?
}

/// A listening socket that only the loopback interface reaches, for both families where there are both.
fn listener() -> nix::Result<std::net::TcpListener> {
    match listen_on(AddressFamily::Inet6) {
        // No IPv6 in this kernel, or none in this namespace.
        Err(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL) => listen_on(AddressFamily::Inet),
        listener => listener,
    }
}

fn listen_on(family: AddressFamily) -> nix::Result<std::net::TcpListener> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, SockType::Stream, flags, None)?;
    // Its own port is the kernel's choice and nobody's business: no other interface shall reach it.
    setsockopt(&socket, sockopt::BindToDevice, &OsString::from("lo"))?;
    if family == AddressFamily::Inet6 {
        setsockopt(&socket, sockopt::Ipv6V6Only, &false)?;
        let any = SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, 0, 0, 0);
        bind(socket.as_raw_fd(), &SockaddrIn6::from(any))?;
    } else {
        let any = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0);
        bind(socket.as_raw_fd(), &SockaddrIn::from(any))?;
    }
    listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok(socket.into())
}

/// Accepts until `ended`, then ends every connection.
async fn serve(
    listener: TcpListener,
    lookup: SkLookup,
    hypervisor: Arc<dyn Hypervisor>,
    limit: usize,
    mut ended: oneshot::Receiver<()>,
) {
    let mut connections = JoinSet::new();
    let mut complaint = Complaint::default();
    loop {
        let accepted = tokio::select! {
            biased;
            // Also when the sender is dropped, which is how it is told.
            _ = &mut ended => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((client, _)) if connections.len() >= limit => {
                reset(&client);
                complaint.one_more(limit);
            }
            Ok((client, _)) => {
                connections.spawn(forward(client, hypervisor.clone()));
            }
            Err(error) => {
                tracing::debug!(%error, "accept a connection to the pod's loopback");
                sleep(ACCEPT_RETRY).await;
            }
        }
    }
    drop((lookup, listener));
    connections.shutdown().await;
}

/// Logs connections beyond the limit, now and then.
#[derive(Default)]
struct Complaint {
    last: Option<Instant>,
    count: u64,
}

impl Complaint {
    fn one_more(&mut self, limit: usize) {
        self.count += 1;
        if self.last.is_none_or(|last| last.elapsed() >= COMPLAINTS) {
            let count = self.count;
            tracing::warn!(
                count,
                "connections to the pod's loopback were reset: {limit} are open"
            );
            *self = Self {
                last: Some(Instant::now()),
                count: 0,
            };
        }
    }
}

/// Serves one connection to its end. A client whose connection breaks, or never comes about, sees a reset.
async fn forward(mut client: TcpStream, hypervisor: Arc<dyn Hypervisor>) {
    let outcome = async {
        let mut guest = connect(client.local_addr()?, hypervisor.as_ref()).await?;
        copy_bidirectional(&mut client, &mut guest).await?;
        Ok::<(), ForwardError>(())
    };
    if let Err(error) = outcome.await {
        tracing::debug!(%error, "a connection to the pod's loopback");
        reset(&client);
    }
}

/// Makes the connection to `local` once more, in the guest.
async fn connect(
    local: SocketAddr,
    hypervisor: &dyn Hypervisor,
) -> std::result::Result<BufReader<UnixStream>, ForwardError> {
    let stream = hypervisor.vsock_connect(CONNECT_PORT, CONNECT).await?;
    stream.set_nonblocking(true)?;
    // What the guest sends behind its answer stays in the buffer, and is copied from there.
    let mut guest = BufReader::new(UnixStream::from_std(stream)?);
    let answer = timeout(ANSWER, ask(&mut guest, local)).await;
    let answer = answer.map_err(|_| ForwardError::Silent)??;
    if answer == "OK\n" {
        Ok(guest)
    } else {
        Err(ForwardError::Refused(answer))
    }
}

async fn ask(guest: &mut BufReader<UnixStream>, local: SocketAddr) -> io::Result<String> {
    // A socket of both families shows IPv4 addresses as ::ffff:127.0.0.1.
    let family = if local.ip().to_canonical().is_ipv4() {
        "tcp4"
    } else {
        "tcp6"
    };
    let request = format!("CONNECT {family} {}\n", local.port());
    guest.write_all(request.as_bytes()).await?;
    let mut line = Vec::new();
    guest.take(MAX_ANSWER).read_until(b'\n', &mut line).await?;
    Ok(String::from_utf8_lossy(&line).into_owned())
}

/// Lets `client` end with a reset when it is closed.
fn reset(client: &TcpStream) {
    if let Err(error) = client.set_zero_linger() {
        tracing::debug!(%error, "reset a connection to the pod's loopback");
    }
}

#[cfg(test)]
mod tests;
