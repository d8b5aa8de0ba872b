//! The `vmm-io` thread: one epoll loop that runs the virtqueue workers, timers and the vsock muxer of a VM.
//!
//! Work is handed over once, as a [`Worker`]; from then on the loop owns the calls into it. A worker must never block:
//! anything that can (a file on a slow disk, a FUSE request) belongs on a thread of its own.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
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
    stop: Arc<AtomicBool>,
    thread_id: i32,
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
        let stop = Arc::new(AtomicBool::new(false));
        let endpoint = manager.remote_endpoint();
        let ended = stop.clone();
        let (send_id, thread_id) = mpsc::sync_channel(1);
        let spawn_error = |source| IoLoopError::Spawn {
            name: name.to_owned(),
            source,
        };
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                // SAFETY: gettid has no arguments and cannot fail.
                let _ = send_id.send(unsafe { libc::gettid() });
                while !ended.load(Ordering::Acquire) {
                    if let Err(error) = manager.run() {
                        tracing::error!(?error, "I/O loop: epoll failed");
                    }
                }
            })
            .map_err(spawn_error)?;
        let thread_id = thread_id.recv().map_err(|e| spawn_error(io::Error::other(e)))?;
        Ok((
            Self {
                endpoint,
                stop,
                thread_id,
            },
            thread,
        ))
    }

    /// Kernel thread id of the loop.
    pub fn thread_id(&self) -> i32 {
        self.thread_id
    }

    /// Returns after every event that was pending when it was called has been handled.
    ///
    /// Must not be called from the loop's own thread.
    ///
    /// # Errors
    /// [`IoLoopError::Endpoint`] when the loop has ended.
    pub fn drain(&self) -> Result<(), IoLoopError> {
        // The first call may share its epoll_wait with some of the events only; after the second all had their turn.
        for _ in 0..2 {
            self.endpoint
                .call_blocking::<_, _, event_manager::Error>(|_| Ok(()))
                .map_err(|e| IoLoopError::Endpoint(format!("cannot drain: {e:?}")))?;
        }
        Ok(())
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
        self.stop.store(true, Ordering::Release);
        // The kick wakes epoll_wait; if it fails the thread is already gone.
        let _ = self.endpoint.kick();
    }
}
