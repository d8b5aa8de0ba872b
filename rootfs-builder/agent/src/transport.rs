//! Listening for the host: vsock in a guest, Unix sockets in test mode.

use std::io;
use std::path::Path;
use std::time::Duration;

use futures::Stream;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::UnixListener;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};

use crate::options::Address;

const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// A byte stream to the host.
pub trait Connection: AsyncRead + AsyncWrite + Send + Sync + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> Connection for T {}

/// A socket the host connects to.
pub enum Listener {
    /// vsock, in a guest.
    Vsock(VsockListener),
    /// Unix, in test mode.
    Unix(UnixListener),
}

impl Listener {
    /// Starts listening on `address`. A stale socket file is replaced.
    ///
    /// # Errors
    /// The kernel has no vsock, or the address is taken.
    pub fn bind(address: &Address) -> io::Result<Self> {
        match address {
            Address::Vsock(port) => {
                VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, *port)).map(Self::Vsock)
            }
            Address::Unix(path) => {
                if Path::new(path).exists() {
                    std::fs::remove_file(path)?;
                }
                UnixListener::bind(path).map(Self::Unix)
            }
        }
    }

    /// The next connection from the host. Connections from inside the guest are dropped: vsock has no permissions,
    /// and a container must not be able to drive the agent.
    ///
    /// # Errors
    /// `accept` failed.
    pub async fn accept(&self) -> io::Result<Box<dyn Connection>> {
        self.accept_with_port(false).await.map(|(stream, _)| stream)
    }

    /// The next connection and the host's source port, which tells what the connection is for. A Unix socket has
    /// no ports: the client writes the port as 4 bytes, little endian, first.
    ///
    /// # Errors
    /// `accept` failed, or a Unix client hung up before its port.
    pub async fn accept_numbered(&self) -> io::Result<(Box<dyn Connection>, u32)> {
        self.accept_with_port(true).await
    }

    async fn accept_with_port(&self, numbered: bool) -> io::Result<(Box<dyn Connection>, u32)> {
        match self {
            Self::Vsock(listener) => loop {
                let (stream, peer) = listener.accept().await?;
                if peer.cid() == VMADDR_CID_HOST {
                    return Ok((Box::new(stream), peer.port()));
                }
                tracing::warn!(
                    cid = peer.cid(),
                    port = peer.port(),
                    "refused a connection that is not the host's"
                );
            },
            Self::Unix(listener) => {
                let (mut stream, _) = listener.accept().await?;
                let port = if numbered { stream.read_u32_le().await? } else { 0 };
                Ok((Box::new(stream), port))
            }
        }
    }

    /// All connections, for the ttrpc server, which keeps polling after an error: out of descriptors, for example,
    /// lasts until one is closed.
    pub fn into_stream(self) -> impl Stream<Item = io::Result<Box<dyn Connection>>> + Send + 'static {
        futures::stream::unfold(self, |listener| async move {
            let accepted = listener.accept().await;
            if accepted.is_err() {
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
            Some((accepted, listener))
        })
    }
}

/// Connects to `port` of the host.
///
/// # Errors
/// No vsock device, or nobody listens.
pub async fn connect_host(port: u32) -> io::Result<VsockStream> {
    VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, port)).await
}
