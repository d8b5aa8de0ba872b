//! The `vmm-io` thread: one epoll loop that runs the virtqueue workers, timers and the vsock muxer of a VM.
//!
//! Work is handed over once, as a [`Worker`]; from then on the loop owns the calls into it. A worker must never block:
//! anything that can (a file on a slow disk, a FUSE request) belongs on a thread of its own.

use std::io;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use event_manager::{EventManager, MutEventSubscriber, RemoteEndpoint, SubscriberId};

/// Something that reacts to file descriptors becoming ready, on the loop's thread.
pub type Worker = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// The loop cannot be started or no longer answers.
#[derive(Debug, thiserror::Error)]
pub enum IoLoopError {
    /// epoll or eventfd creation failed.
    #[error("I/O loop: cannot create the event manager: {0}")]
    Create(String),
    /// The thread could not be spawned.
    #[error("I/O loop: cannot start thread {name}: {source}")]
    Spawn {
        /// Thread name.
        name: String,
        /// Cause.
        source: io::Error,
    },
    /// The loop has ended, or refused the worker.
    #[error("I/O loop: {0}")]
    Endpoint(String),
}

/// A handle to the loop; clones refer to the same thread.
#[derive(Clone)]
pub struct IoLoop {
    endpoint: RemoteEndpoint<Worker>,
    stop: Arc<std::sync::atomic::AtomicBool>,
}

impl std::fmt::Debug for IoLoop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IoLoop").finish_non_exhaustive()
    }
}

impl IoLoop {
    /// Starts the loop on a thread called `name`.
    ///
    /// # Errors
    /// [`IoLoopError::Create`] or [`IoLoopError::Spawn`] when the kernel refuses epoll, eventfd or the thread.
    pub fn spawn(name: &str) -> Result<(Self, JoinHandle<()>), IoLoopError> {
        let mut manager: EventManager<Worker> =
            EventManager::new().map_err(|e| IoLoopError::Create(format!("{e:?}")))?;
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let handle = Self {
            endpoint: manager.remote_endpoint(),
            stop: stop.clone(),
        };
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                while !stop.load(std::sync::atomic::Ordering::Acquire) {
                    if let Err(error) = manager.run() {
                        tracing::error!(?error, "I/O loop: epoll failed");
                    }
                }
            })
            .map_err(|source| IoLoopError::Spawn {
                name: name.to_owned(),
                source,
            })?;
        Ok((handle, thread))
    }

    /// Hands `worker` to the loop and waits until its `init` has run.
    ///
    /// Must not be called from the loop's own thread (it would wait for itself).
    ///
    /// # Errors
    /// [`IoLoopError::Endpoint`] when the loop has ended.
    pub fn add(&self, worker: Worker) -> Result<SubscriberId, IoLoopError> {
        self.endpoint
            .call_blocking::<_, _, event_manager::Error>(move |manager| Ok(manager.add_subscriber(worker)))
            .map_err(|e| IoLoopError::Endpoint(format!("cannot add a worker: {e:?}")))
    }

    /// Takes a worker back. When this returns the loop no longer calls it.
    ///
    /// # Errors
    /// [`IoLoopError::Endpoint`] when the loop has ended or does not know `id`.
    pub fn remove(&self, id: SubscriberId) -> Result<Worker, IoLoopError> {
        self.endpoint
            .call_blocking(move |manager| manager.remove_subscriber(id))
            .map_err(|e| IoLoopError::Endpoint(format!("cannot remove a worker: {e:?}")))
    }

    /// Ends the thread after the event in hand. Idempotent.
    pub fn stop(&self) {
        self.stop.store(true, std::sync::atomic::Ordering::Release);
        // The kick wakes epoll_wait; if it fails the thread is already gone.
        let _ = self.endpoint.kick();
    }
}
