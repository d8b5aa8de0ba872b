//! A client of `kata.hvsock`: the Unix socket through which tools outside of the runtime's process reach a guest's vsock
//! ports, and on port 1024 the agent's ttrpc services.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use prost::Message;

/// Where the runtime puts the socket of a sandbox: Kata's folder, which carries containerd's namespace outside of
/// Kubernetes.
pub fn socket(namespace: &str, sandbox: &str) -> PathBuf {
    Path::new("/run/kata")
        .join(format!("{namespace}@{sandbox}"))
        .join("root/kata.hvsock")
}

/// Connects to a vsock port of the guest.
///
/// # Errors
/// `UnexpectedEof` when nothing listens on the port: the socket is closed without an answer.
pub fn connect(socket: &Path, port: u32, limit: Duration) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    writeln!(stream, "CONNECT {port}")?;
    let mut answer = String::new();
    // Byte by byte: what follows the line belongs to the connection.
    BufReader::with_capacity(1, &stream).read_line(&mut answer)?;
    match answer.strip_prefix("OK ").map(|port| port.trim().parse::<u32>()) {
        Some(Ok(_)) => Ok(stream),
        _ if answer.is_empty() => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Err(io::Error::other(format!("answer {answer:?}"))),
    }
}

/// `ttrpc.Request`, as in containerd/ttrpc's `request.proto`.
#[derive(Clone, PartialEq, Message)]
struct Request {
    #[prost(string, tag = "1")]
    service: String,
    #[prost(string, tag = "2")]
    method: String,
    #[prost(bytes = "vec", tag = "3")]
    payload: Vec<u8>,
}

/// `ttrpc.Response`; its status is absent when the call succeeded.
#[derive(Clone, PartialEq, Message)]
struct Response {
    #[prost(message, optional, tag = "1")]
    status: Option<Status>,
    #[prost(bytes = "vec", tag = "2")]
    payload: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct Status {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
}

/// `grpc.HealthCheckResponse` of the agent; 1 is SERVING.
#[derive(Clone, PartialEq, Message)]
struct HealthCheckResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// Asks the agent's health service; the first call of a connection.
///
/// # Errors
/// I/O, or an answer that is none.
pub fn health(stream: &mut UnixStream) -> io::Result<i32> {
    const REQUEST: u8 = 1;
    const STREAM: u32 = 1;
    const HEADER: usize = 10;
    let request = Request {
        service: "grpc.Health".into(),
        method: "Check".into(),
        payload: Vec::new(),
    }
    .encode_to_vec();
    let mut frame = u32::try_from(request.len())
        .map_err(io::Error::other)?
        .to_be_bytes()
        .to_vec();
    frame.extend(STREAM.to_be_bytes());
    frame.extend([REQUEST, 0]);
    frame.extend(request);
    stream.write_all(&frame)?;
    let mut header = [0; HEADER];
    stream.read_exact(&mut header)?;
    let [l0, l1, l2, l3, ..] = header;
    let mut answer = vec![0; u32::from_be_bytes([l0, l1, l2, l3]) as usize];
    stream.read_exact(&mut answer)?;
    let answer = Response::decode(&*answer)?;
    match answer.status {
        Some(status) if status.code != 0 => Err(io::Error::other(format!("{status:?}"))),
        _ => Ok(HealthCheckResponse::decode(&*answer.payload)?.status),
    }
}
