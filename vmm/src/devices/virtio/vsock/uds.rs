//! The `kata.hvsock` Unix socket: Firecracker's hybrid vsock protocol, for tools outside of this process.
//!
//! A client connects, sends `CONNECT <port>\n` and reads `OK <host port>\n`; from then on the socket is the stream. A
//! refusal closes the socket. The other way, a guest that connects to host port N reaches whoever listens on
//! `<path>_N`.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType};

use super::error::VsockError;
use super::host::HostFd;
use crate::confinement::{Confinement, Delegate, Role};

/// Longest CONNECT line with its newline: `CONNECT 4294967295\r\n` is 20 bytes.
const MAX_LINE: usize = 32;

/// The listening socket; removes its path when dropped.
#[derive(Debug)]
pub(super) struct Endpoint {
    pub(super) listener: UnixListener,
    path: PathBuf,
    /// Connects to `<path>_<port>`; there from the first activation on.
    connector: Option<Delegate<u32, io::Result<OwnedFd>>>,
}

impl Endpoint {
    /// Binds `path`, in place of a socket that nobody listens on any more. Only the owner may connect.
    ///
    /// # Errors
    /// [`VsockError::Bind`], also when somebody listens on `path`.
    pub(super) fn bind(path: &Path) -> Result<Self, VsockError> {
        let failed = |source| VsockError::Bind {
            path: path.to_owned(),
            source,
        };
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_stale(path) => {
                std::fs::remove_file(path).map_err(failed)?;
                UnixListener::bind(path).map_err(failed)?
            }
            other => other.map_err(failed)?,
        };
        let endpoint = Self {
            listener,
            path: path.to_owned(),
            connector: None,
        };
        endpoint.listener.set_nonblocking(true).map_err(failed)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        Ok(endpoint)
    }

    /// Starts the thread that connects to sockets of the host, unless it is there. The I/O loop may make no sockets: it could
    /// connect to containerd's as well.
    ///
    /// # Errors
    /// The host refuses the thread.
    pub(super) fn start_connector(&mut self, confinement: Confinement) -> io::Result<()> {
        if self.connector.is_none() {
            let path = self.path.clone();
            let connect = move |port| connect(&path, port);
            let connector = Delegate::spawn(confinement, Some(Role::Connector), "vmm-connector", connect)?;
            self.connector = Some(connector);
        }
        Ok(())
    }

    /// Connects to the socket of whoever wants the guest's connections to host port `port`. Never blocks: a listener
    /// with a full backlog refuses.
    ///
    /// # Errors
    /// Nobody listens, or not enough.
    pub(super) fn connect_out(&self, port: u32) -> io::Result<OwnedFd> {
        let connector = self.connector.as_ref();
        let connected = connector.and_then(|connector| connector.ask(port));
        connected.unwrap_or_else(|| Err(io::ErrorKind::NotConnected.into()))
    }
}

fn connect(path: &Path, port: u32) -> io::Result<OwnedFd> {
    let mut path = path.as_os_str().to_owned();
    path.push(format!("_{port}"));
    let address = SocketAddrUnix::new(Path::new(&path))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &address)?;
    Ok(socket)
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.display(), %error, "vsock: cannot remove the socket");
        }
    }
}

/// Whether `path` is a socket without a listener, left by a process that was killed.
fn is_stale(path: &Path) -> bool {
    // Connecting to anything else is refused, too.
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    is_socket
        && matches!(UnixStream::connect(path), Err(error) if error.kind() == io::ErrorKind::ConnectionRefused)
}

/// Where a client is with its CONNECT line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Handshake {
    /// The line is not complete.
    Incomplete,
    /// The client wants this guest port.
    Port(u32),
    /// Not a CONNECT line, or the client left.
    Bad,
}

/// Reads the CONNECT line, and not one byte more: the client may send its first data without waiting for OK.
pub(super) fn handshake(client: &HostFd) -> Handshake {
    let mut seen = [0; MAX_LINE];
    // Peeked at until it is complete, so that nothing has to be kept between the pieces of a line.
    let count = match rustix::net::recv(client, &mut seen[..], RecvFlags::PEEK) {
        Ok((_, 0)) => return Handshake::Bad,
        Ok((_, count)) => count.min(MAX_LINE),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Handshake::Incomplete,
        Err(_) => return Handshake::Bad,
    };
    let seen = seen.get(..count).unwrap_or_default();
    let Some(end) = seen.iter().position(|&byte| byte == b'\n') else {
        return if count == MAX_LINE {
            Handshake::Bad
        } else {
            Handshake::Incomplete
        };
    };
    let (line, _) = seen.split_at(end);
    let Some(port) = parse(line) else {
        return Handshake::Bad;
    };
    let mut taken = [0; MAX_LINE];
    match taken
        .get_mut(..=end)
        .map(|line| rustix::net::recv(client, line, RecvFlags::empty()))
    {
        Some(Ok((_, count))) if count == end + 1 => Handshake::Port(port),
        _ => Handshake::Bad,
    }
}

/// Parses a line without its newline: `CONNECT <port>`, in any case.
fn parse(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let (command, port) = (words.next()?, words.next()?);
    if words.next().is_some() || !command.eq_ignore_ascii_case("connect") {
        return None;
    }
    // `u32::from_str` takes a sign.
    if !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    port.parse().ok()
}

/// What a client sends, for fuzzing: its line is taken or nothing, and what comes behind stays where it is.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn check_untrusted(data: &[u8]) {
    use std::io::{Read, Write};

    // Less than a socket takes at once.
    let data = data.get(..4096).unwrap_or(data);
    let Ok((mut client, server)) = UnixStream::pair() else {
        return;
    };
    let Ok(Ok(host)) = server.try_clone().map(|server| HostFd::new(server.into())) else {
        return;
    };
    if client.write_all(data).is_err() {
        return;
    }
    let end = data.iter().take(MAX_LINE).position(|&byte| byte == b'\n');
    let left = match (handshake(&host), end) {
        (Handshake::Port(port), Some(end)) => {
            let (line, rest) = data.split_at(end);
            let line = String::from_utf8_lossy(line);
            let said = line.split_ascii_whitespace().nth(1);
            assert_eq!(said.and_then(|port| port.parse().ok()), Some(port));
            rest.split_first().map_or(rest, |(_, behind)| behind)
        }
        (Handshake::Incomplete, None) if data.len() < MAX_LINE => data,
        // The client is sent away.
        (Handshake::Bad, _) if !data.is_empty() => return,
        (other, end) => panic!("{other:?} of {data:?}, whose line ends at {end:?}"),
    };
    drop(client);
    let mut found = Vec::new();
    let read = server
        .set_nonblocking(false)
        .and_then(|()| (&server).read_to_end(&mut found));
    assert!(read.is_ok() && found == left, "{found:?} is left of {data:?}");
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn pair() -> (UnixStream, HostFd) {
        let (client, server) = UnixStream::pair().unwrap();
        (client, HostFd::new(server.into()).unwrap())
    }

    #[test]
    fn parse_when_line_is_valid_returns_port() {
        assert_eq!(parse(b"CONNECT 1024"), Some(1024));
        assert_eq!(parse(b"connect 1024"), Some(1024));
        assert_eq!(parse(b"CONNECT 4294967295\r"), Some(u32::MAX));
        assert_eq!(parse(b"CONNECT  0 "), Some(0));
    }

    #[test]
    fn parse_when_line_is_invalid_returns_none() {
        for line in [
            &b""[..],
            b"CONNECT",
            b"CONNECT ",
            b"CONNECT 4294967296",
            b"CONNECT -1",
            b"CONNECT +1",
            b"CONNECT 0x10",
            b"CONNECT 1 2",
            b"CONNECT1024",
            b"GET / HTTP/1.1",
            b"CONNECT \xff",
        ] {
            assert_eq!(parse(line), None, "{line:?}");
        }
    }

    #[test]
    fn handshake_when_line_comes_in_pieces_waits_for_all_of_it() {
        let (mut client, server) = pair();
        assert_eq!(handshake(&server), Handshake::Incomplete);
        for piece in ["CON", "NECT 10", "24"] {
            client.write_all(piece.as_bytes()).unwrap();
            assert_eq!(handshake(&server), Handshake::Incomplete);
        }
        client.write_all(b"\nfirst data").unwrap();
        assert_eq!(handshake(&server), Handshake::Port(1024));
        let mut rest = [0; 32];
        let (_, count) = rustix::net::recv(&server, &mut rest[..], RecvFlags::empty()).unwrap();
        assert_eq!(&rest[..count], b"first data");
    }

    #[test]
    fn handshake_when_line_never_ends_is_bad() {
        let (mut client, server) = pair();
        client.write_all(&[b'C'; MAX_LINE]).unwrap();
        assert_eq!(handshake(&server), Handshake::Bad);
    }

    #[test]
    fn handshake_when_client_leaves_is_bad() {
        let (client, server) = pair();
        drop(client);
        assert_eq!(handshake(&server), Handshake::Bad);
    }

    fn temporary(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("dragonball-uds-{}-{name}", std::process::id()))
    }

    #[test]
    fn bind_when_socket_is_stale_replaces_it_and_drop_removes_it() {
        let path = temporary("stale");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let endpoint = Endpoint::bind(&path).unwrap();
        assert!(
            matches!(Endpoint::bind(&path), Err(VsockError::Bind { .. })),
            "a live socket was replaced"
        );
        drop(endpoint);
        assert!(!path.exists());
    }

    #[test]
    fn bind_when_path_is_a_file_keeps_it() {
        let path = temporary("file");
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(Endpoint::bind(&path), Err(VsockError::Bind { .. })));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn connect_out_reaches_the_listener_of_the_port() {
        let path = temporary("out");
        let mut endpoint = Endpoint::bind(&path).unwrap();
        endpoint.start_connector(Confinement::default()).unwrap();
        assert!(endpoint.connect_out(7).is_err());
        let mut port_path = path.clone().into_os_string();
        port_path.push("_7");
        let listener = UnixListener::bind(&port_path).unwrap();
        let mut socket = UnixStream::from(endpoint.connect_out(7).unwrap());
        socket.write_all(b"x").unwrap();
        let mut byte = [0];
        listener.accept().unwrap().0.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
        std::fs::remove_file(&port_path).unwrap();
    }
}
