//! TCP ports of the pod's own loopback, for the host: what `kubectl port-forward` reaches listens on 127.0.0.1 or ::1 here.
//!
//! The host connects to [`CONNECT_PORT`](protocols::CONNECT_PORT) and asks in one line, `CONNECT tcp4 PORT` or
//! `CONNECT tcp6 PORT`. The answer is `OK` or `ERROR errno text`, a line too; after `OK` the connection carries the bytes of
//! both directions, and the end of each by itself.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, copy_bidirectional};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use crate::transport::{Connection, Listener};

/// Connections at once. Each costs two buffers of 8 KiB.
const MAX_CONNECTIONS: usize = 1024;
/// Longest first line, with its end; the longest valid one has 19 bytes.
const MAX_LINE: u64 = 64;
/// How long the host may take to say what it wants, and a port to be connected to.
const PATIENCE: Duration = Duration::from_secs(10);
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// Serves connections for ever.
pub async fn serve(listener: Listener) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        match listener.accept().await {
            Ok(host) => {
                let place = Arc::clone(&places).try_acquire_owned();
                tokio::spawn(async move {
                    let Ok(_place) = place else {
                        return refuse(host, io::Error::from_raw_os_error(libc::EMFILE)).await;
                    };
                    if let Err(error) = serve_one(host).await {
                        tracing::debug!("connection to a port of the pod: {error}");
                    }
                });
            }
            Err(error) => {
                tracing::warn!("accept a connection to a port of the pod: {error}");
                sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

async fn serve_one(host: impl Connection) -> io::Result<()> {
    // What the host sends behind its line stays in the buffer, and is copied from there.
    let mut host = BufReader::new(host);
    let connected = match timeout(PATIENCE, read_line(&mut host)).await {
        Ok(Ok(line)) => connect(&line).await,
        Ok(Err(error)) => Err(error),
        Err(_) => Err(io::Error::from_raw_os_error(libc::ETIMEDOUT)),
    };
    let mut pod = match connected {
        Ok(pod) => pod,
        Err(error) => {
            refuse(host, error).await;
            return Ok(());
        }
    };
    host.write_all(b"OK\n").await?;
    let copied = copy_bidirectional(&mut host, &mut pod).await;
    if copied.is_err() {
        // One side broke: the other must not take it for an end.
        let _ = pod.set_zero_linger();
    }
    copied.map(drop)
}

async fn read_line(host: &mut BufReader<impl Connection>) -> io::Result<String> {
    let mut line = Vec::new();
    host.take(MAX_LINE).read_until(b'\n', &mut line).await?;
    String::from_utf8(line).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

async fn connect(line: &str) -> io::Result<TcpStream> {
    let address = parse(line).ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
    timeout(PATIENCE, TcpStream::connect(address))
        .await
        .unwrap_or_else(|_| Err(io::Error::from_raw_os_error(libc::ETIMEDOUT)))
}

fn parse(line: &str) -> Option<SocketAddr> {
    let (family, port) = line
        .strip_suffix('\n')?
        .strip_prefix("CONNECT ")?
        .split_once(' ')?;
    let ip: IpAddr = match family {
        "tcp4" => Ipv4Addr::LOCALHOST.into(),
        "tcp6" => Ipv6Addr::LOCALHOST.into(),
        _ => return None,
    };
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    let port = port.parse().ok().filter(|port| *port != 0 && digits)?;
    Some(SocketAddr::new(ip, port))
}

/// Best effort: a host that does not read goes without an answer.
async fn refuse(mut host: impl Connection, error: io::Error) {
    let errno = error.raw_os_error().unwrap_or(libc::EIO);
    let text = io::Error::from_raw_os_error(errno).to_string();
    let answer = format!("ERROR {errno} {text}\n");
    let _ = timeout(PATIENCE, async {
        host.write_all(answer.as_bytes()).await?;
        host.shutdown().await
    })
    .await;
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;
    use tokio::net::TcpListener;

    use super::*;

    /// What the agent says to `first` and to nothing more.
    async fn answer(first: &[u8]) -> String {
        let (mut host, agent) = duplex(256);
        let served = tokio::spawn(serve_one(agent));
        // The agent need not read all of it.
        let _ = host.write_all(first).await;
        let _ = host.shutdown().await;
        let mut said = String::new();
        host.read_to_string(&mut said).await.unwrap();
        drop(host);
        let _ = served.await.unwrap();
        said
    }

    #[tokio::test]
    async fn line_when_hostile_is_answered_with_an_error() {
        let long = [b'C'; 200];
        let lines: [&[u8]; 13] = [
            b"",
            b"\n",
            b"CONNECT tcp4 80",
            b"CONNECT tcp4 0\n",
            b"CONNECT tcp4 65536\n",
            b"CONNECT tcp4 +80\n",
            b"CONNECT tcp4 80 \n",
            b"CONNECT tcp4 80\r\n",
            b"CONNECT udp4 80\n",
            b"connect tcp4 80\n",
            b"CONNECT  tcp4 80\n",
            b"CONNECT tcp4 \xff\n",
            &long,
        ];
        for line in lines {
            assert_eq!(
                answer(line).await,
                "ERROR 22 Invalid argument (os error 22)\n",
                "{line:?}"
            );
        }
    }

    #[tokio::test]
    async fn port_when_nobody_listens_is_refused_with_its_errno() {
        // Bound and not listening: nobody else can listen there meanwhile.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let port = socket.local_addr().unwrap().port();

        let answer = answer(format!("CONNECT tcp4 {port}\n").as_bytes()).await;

        assert_eq!(answer, "ERROR 111 Connection refused (os error 111)\n");
    }

    #[tokio::test]
    async fn host_when_it_ends_its_half_still_gets_the_answer() {
        for (address, family) in [("127.0.0.1:0", "tcp4"), ("[::1]:0", "tcp6")] {
            let Ok(pod) = TcpListener::bind(address).await else {
                assert_eq!(family, "tcp6", "no IPv4 on this machine");
                continue;
            };
            let port = pod.local_addr().unwrap().port();
            let server = tokio::spawn(async move {
                let (mut stream, _) = pod.accept().await.unwrap();
                let mut all = Vec::new();
                stream.read_to_end(&mut all).await.unwrap();
                all.reverse();
                stream.write_all(&all).await.unwrap();
            });

            // Also with bytes that come together with the line.
            let answer = answer(format!("CONNECT {family} {port}\nabc").as_bytes()).await;

            assert_eq!(answer, "OK\ncba");
            server.await.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn host_when_it_says_nothing_is_given_up() {
        let (mut host, agent) = duplex(256);
        let served = tokio::spawn(serve_one(agent));

        let mut said = String::new();
        host.read_to_string(&mut said).await.unwrap();

        assert_eq!(said, "ERROR 110 Connection timed out (os error 110)\n");
        served.await.unwrap().unwrap();
    }
}
