//! From "the VM runs" to "the agent answers".
//!
//! Our agent announces itself: it connects to host port [`READY_PORT`](crate::hypervisor::READY_PORT) once its server
//! listens. A stock kata-agent never does, so a connection attempt that the muxer repeats is under way from the start.
//! Whichever comes first wins.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::hypervisor::{GuestListener, Hypervisor};

const READY_MESSAGE: &[u8] = b"ready\n";
/// How often a waiting thread looks whether it is still wanted.
const SLICE: Duration = Duration::from_millis(200);

/// Waits until the agent on guest port `port` can be talked to and returns the connection. `listener` listens on
/// [`READY_PORT`](crate::hypervisor::READY_PORT) since before the VM was started.
///
/// # Errors
/// `Unavailable` as soon as the VM has ended, `DeadlineExceeded` after `timeout`.
pub async fn wait_ready(
    hypervisor: Arc<dyn Hypervisor>,
    listener: Box<dyn GuestListener>,
    port: u32,
    timeout: Duration,
) -> Result<UnixStream> {
    let deadline = Instant::now() + timeout;
    let wanted = Wanted(Arc::new(AtomicBool::new(true)));
    let announced = {
        let (wanted, hypervisor) = (wanted.0.clone(), hypervisor.clone());
        async move {
            let accepted =
                tokio::task::spawn_blocking(move || announcement(listener, &wanted, deadline)).await;
            if !accepted.unwrap_or(false) {
                // Nobody announces: only the attempt below can succeed.
                std::future::pending::<()>().await;
            }
            let left = deadline.saturating_duration_since(Instant::now()).max(SLICE);
            hypervisor.vsock_connect(port, left).await
        }
    };
    tokio::select! {
        // In this order: a guest that is gone explains a connection that failed.
        biased;
        exit = hypervisor.wait_vm() => {
            Err(Error::new(ErrorKind::Unavailable, format!("{exit} before the agent was ready")))
        }
        stream = announced => stream,
        stream = hypervisor.vsock_connect(port, timeout) => stream,
    }
}

/// Tells the waiting thread that nobody waits any more.
struct Wanted(Arc<AtomicBool>);

impl Drop for Wanted {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

fn announcement(mut listener: Box<dyn GuestListener>, wanted: &AtomicBool, deadline: Instant) -> bool {
    while wanted.load(Ordering::Relaxed) && Instant::now() < deadline {
        match listener.accept(SLICE) {
            Ok(stream) => {
                if let Err(error) = read_message(stream) {
                    tracing::warn!(%error, "connection to the ready port without the ready message");
                    continue;
                }
                return true;
            }
            Err(error) if error.kind == ErrorKind::DeadlineExceeded => {}
            Err(error) => {
                tracing::debug!(%error, "ready port");
                return false;
            }
        }
    }
    false
}

fn read_message(mut stream: UnixStream) -> std::io::Result<()> {
    // The stream may come in either mode; a guest that connects and says nothing must not hold this thread.
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut message = [0; READY_MESSAGE.len()];
    stream.read_exact(&mut message)?;
    if message != READY_MESSAGE {
        return Err(std::io::Error::other(format!(
            "unexpected message {message:02x?}"
        )));
    }
    Ok(())
}
