//! Stdio connections from the host. It connects first, from a source port of its choice, then names that port in
//! `CreateContainer` or `ExecProcess`; the two travel on different sockets and may arrive in either order.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use super::stdio::Connections;
use crate::transport::{Connection, Listener};

/// How long a call waits for its connections. They are made before the call, so this only covers a busy host.
const PATIENCE: Duration = Duration::from_secs(10);
/// Connections nobody has asked for yet; a host that makes more is broken.
const MAX_PARKED: usize = 256;
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// Stdio that was promised and did not come.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// The agent was not told to listen.
    #[error("stdio port {0}: the agent was started without agent.passfd_listener_port")]
    NotListening(u32),
    /// No connection came.
    #[error("stdio port {port}: no connection from the host within {} s", PATIENCE.as_secs())]
    Timeout {
        /// Source port that was named.
        port: u32,
    },
    /// Two calls named the same port.
    #[error("stdio port {0}: already in use")]
    Taken(u32),
}

/// Connections by the host's source port. Cheap to clone.
#[derive(Clone, Default)]
pub struct Ports {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    listening: bool,
    parked: HashMap<u32, Box<dyn Connection>>,
    awaited: HashMap<u32, oneshot::Sender<Box<dyn Connection>>>,
}

impl Ports {
    /// Whether the host connects stdio at all.
    pub fn listening(&self) -> bool {
        self.state().listening
    }

    /// Accepts connections for ever.
    pub fn serve(&self, listener: Listener) {
        self.state().listening = true;
        let ports = self.clone();
        tokio::spawn(async move {
            loop {
                match listener.accept_numbered().await {
                    Ok((connection, port)) => ports.arrived(port, connection),
                    Err(error) => {
                        tracing::warn!("accept a stdio connection: {error}");
                        sleep(ACCEPT_RETRY).await;
                    }
                }
            }
        });
    }

    /// The connections of one process. A port of 0 means none.
    ///
    /// # Errors
    /// A named connection does not come; the call must fail, since its output would be lost.
    pub async fn claim(&self, stdin: u32, stdout: u32, stderr: u32) -> Result<Connections, PortError> {
        Ok(Connections {
            stdin: self.claim_one(stdin).await?,
            stdout: self.claim_one(stdout).await?,
            stderr: self.claim_one(stderr).await?,
        })
    }

    async fn claim_one(&self, port: u32) -> Result<Option<Box<dyn Connection>>, PortError> {
        if port == 0 {
            return Ok(None);
        }
        let arrival = {
            let mut state = self.state();
            if !state.listening {
                return Err(PortError::NotListening(port));
            }
            if let Some(connection) = state.parked.remove(&port) {
                return Ok(Some(connection));
            }
            if state.awaited.contains_key(&port) {
                return Err(PortError::Taken(port));
            }
            let (sender, arrival) = oneshot::channel();
            state.awaited.insert(port, sender);
            arrival
        };
        match timeout(PATIENCE, arrival).await {
            Ok(Ok(connection)) => Ok(Some(connection)),
            _ => {
                self.state().awaited.remove(&port);
                Err(PortError::Timeout { port })
            }
        }
    }

    fn arrived(&self, port: u32, connection: Box<dyn Connection>) {
        let mut state = self.state();
        let connection = match state.awaited.remove(&port) {
            Some(claim) => match claim.send(connection) {
                Ok(()) => return,
                // The call gave up in the same moment.
                Err(connection) => connection,
            },
            None => connection,
        };
        if state.parked.len() >= MAX_PARKED {
            tracing::warn!(
                port,
                "dropped a stdio connection: {MAX_PARKED} are waiting to be asked for"
            );
            return;
        }
        state.parked.insert(port, connection);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test]
    async fn connection_when_early_or_late_reaches_its_claim() {
        let ports = Ports::default();
        ports.state().listening = true;
        let (mut early, far) = duplex(16);
        ports.arrived(5, Box::new(far));
        let late = tokio::spawn({
            let ports = ports.clone();
            async move { ports.claim(0, 6, 0).await }
        });
        tokio::task::yield_now().await;
        let (_near, far) = duplex(16);
        ports.arrived(6, Box::new(far));

        let connections = ports.claim(5, 0, 0).await.unwrap();
        connections.stdin.unwrap().write_all(b"x").await.unwrap();

        assert_eq!(early.read_u8().await.unwrap(), b'x');
        assert!(connections.stdout.is_none());
        assert!(late.await.unwrap().unwrap().stdout.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn claim_when_nobody_connects_names_the_port() {
        let ports = Ports::default();
        ports.state().listening = true;

        let error = ports.claim(0, 77, 0).await.err().unwrap();

        assert_eq!(
            error.to_string(),
            "stdio port 77: no connection from the host within 10 s"
        );
        assert!(ports.state().awaited.is_empty());
    }

    #[tokio::test]
    async fn claim_when_not_listening_fails_at_once() {
        let error = Ports::default().claim(9, 0, 0).await.err().unwrap();

        assert!(matches!(error, PortError::NotListening(9)));
    }
}
