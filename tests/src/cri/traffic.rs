//! The host's side of what pods send and receive.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::command::eventually;

/// Bytes that repeat nowhere near, from a seed.
pub fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    // Knuth's multiplier for a linear congruential generator; its high bits are the good ones.
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    };
    (0..length).map(|_| next()).collect()
}

/// The checksum as `sha256sum` prints it.
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// A server on the host for one connection; its thread ends with it.
pub struct Server<T> {
    address: SocketAddr,
    thread: JoinHandle<io::Result<T>>,
}

impl<T: Send + 'static> Server<T> {
    fn start(
        address: IpAddr,
        serve: impl FnOnce(TcpStream) -> io::Result<T> + Send + 'static,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind((address, 0))?;
        let address = listener.local_addr()?;
        let thread = thread::spawn(move || serve(listener.accept()?.0));
        Ok(Self { address, thread })
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// What came of its connection.
    ///
    /// # Errors
    /// When the connection broke.
    pub fn result(self) -> io::Result<T> {
        self.thread
            .join()
            .map_err(|_| io::Error::other("the server panicked"))?
    }
}

/// A server that sends `bytes` and hangs up.
///
/// # Errors
/// When the address cannot be listened on.
pub fn source(address: IpAddr, bytes: Vec<u8>) -> io::Result<Server<()>> {
    Server::start(address, move |mut peer| peer.write_all(&bytes))
}

/// A server that reads to the end, answers with the checksum and returns it.
///
/// # Errors
/// When the address cannot be listened on.
pub fn sink(address: IpAddr) -> io::Result<Server<String>> {
    Server::start(address, |mut peer| {
        let mut bytes = Vec::new();
        peer.read_to_end(&mut bytes)?;
        let sum = sha256(&bytes);
        peer.write_all(format!("{sum}\n").as_bytes())?;
        Ok(sum)
    })
}

/// A server on the host that counts what its one connection brings; its thread ends with it.
#[derive(Debug)]
pub struct Meter {
    address: SocketAddr,
    bytes: Arc<AtomicU64>,
}

impl Meter {
    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// The bytes so far.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

/// A server that counts bytes.
///
/// # Errors
/// When the address cannot be listened on.
pub fn meter(address: IpAddr) -> io::Result<Meter> {
    let bytes = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&bytes);
    let server = Server::start(address, move |mut peer| {
        let mut buffer = [0; 16 << 10];
        loop {
            match peer.read(&mut buffer)? {
                0 => return Ok(()),
                read => count.fetch_add(read as u64, Ordering::Relaxed),
            };
        }
    })?;
    Ok(Meter {
        address: server.address,
        bytes,
    })
}

/// A server that answers every HTTP request with `body`, until the process ends; returns its port.
///
/// # Errors
/// When the address cannot be listened on.
pub fn web(address: IpAddr, body: &'static str) -> io::Result<u16> {
    let listener = TcpListener::bind((address, 0))?;
    let port = listener.local_addr()?.port();
    thread::spawn(move || {
        for mut peer in listener.incoming().flatten() {
            let mut request = [0; 1024];
            let answer = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
            // A client that hangs up early is its test's concern.
            let _ = peer
                .read(&mut request)
                .and_then(|_| peer.write_all(answer.as_bytes()));
            let _ = peer.shutdown(Shutdown::Write);
        }
    });
    Ok(port)
}

/// What a web server at this address answers to `GET PATH`: the body.
///
/// # Errors
/// When there is no answer within `limit`, or none that is 200.
pub fn fetch(address: (IpAddr, u16), path: &str, limit: Duration) -> io::Result<Vec<u8>> {
    let mut peer = TcpStream::connect_timeout(&address.into(), limit)?;
    peer.set_read_timeout(Some(limit))?;
    peer.write_all(request(path).as_bytes())?;
    let mut answer = Vec::new();
    peer.read_to_end(&mut answer)?;
    body(&answer)
}

/// The request for `path`.
pub fn request(path: &str) -> String {
    format!("GET {path} HTTP/1.0\r\nHost: pod\r\n\r\n")
}

/// The body of an answer.
///
/// # Errors
/// When it is not one of status 200.
pub fn body(answer: &[u8]) -> io::Result<Vec<u8>> {
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n");
    let (head, body) = match end {
        Some(end) => (answer.get(..end), answer.get(end + 4..)),
        None => (Some(answer), None),
    };
    let head = String::from_utf8_lossy(head.unwrap_or_default());
    let status = head.split_whitespace().nth(1);
    match (status, body) {
        (Some("200"), Some(body)) => Ok(body.to_vec()),
        _ => Err(io::Error::other(format!("HTTP answer {head:?}"))),
    }
}

/// The body as text, once the server answers: it may still be starting.
///
/// # Panics
/// When it does not answer within `limit`.
#[track_caller]
pub fn fetch_soon(address: (IpAddr, u16), path: &str, limit: Duration) -> String {
    let mut answer = Err(io::Error::other("never asked"));
    eventually(limit, || {
        answer = fetch(address, path, limit);
        answer.is_ok()
    });
    match answer {
        Ok(body) => String::from_utf8_lossy(&body).into_owned(),
        Err(e) => panic!("http://{address:?}{path}: {e}"),
    }
}

/// Sends datagrams of a kilobyte, as fast as it goes.
///
/// # Errors
/// When the socket cannot be made. A datagram that does not leave is what a flood is.
pub fn flood(to: (IpAddr, u16), count: usize) -> io::Result<()> {
    let any: IpAddr = match to.0 {
        IpAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    let datagram = [0x55; 1024];
    for _ in 0..count {
        let _ = socket.send_to(&datagram, to);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sink_when_bytes_came_tells_their_checksum() {
        let sink = sink([127, 0, 0, 1].into()).unwrap();
        let bytes = pattern(100_000, 1);
        let mut peer = TcpStream::connect(("127.0.0.1", sink.port())).unwrap();
        peer.write_all(&bytes).unwrap();
        peer.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        peer.read_to_string(&mut answer).unwrap();
        assert_eq!(answer.trim(), sha256(&bytes));
        assert_eq!(sink.result().unwrap(), sha256(&bytes));
    }

    #[test]
    fn meter_when_bytes_come_counts_them() {
        let meter = meter([127, 0, 0, 1].into()).unwrap();
        let mut peer = TcpStream::connect(("127.0.0.1", meter.port())).unwrap();
        for sum in [1000, 2000] {
            peer.write_all(&[0; 1000]).unwrap();
            assert!(eventually(Duration::from_secs(60), || meter.bytes() == sum));
        }
    }

    #[test]
    fn fetch_when_the_server_answers_returns_the_body() {
        let port = web([127, 0, 0, 1].into(), "hello").unwrap();
        let body = fetch(([127, 0, 0, 1].into(), port), "/", Duration::from_secs(60)).unwrap();
        assert_eq!(body, b"hello");
        assert!(body_of_refusal().contains("404"));
    }

    fn body_of_refusal() -> String {
        body(b"HTTP/1.0 404 Not Found\r\n\r\nno").unwrap_err().to_string()
    }
}
