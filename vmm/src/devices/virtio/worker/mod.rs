//! Where devices work: on the I/O loop, or on threads of their own.

pub mod queue_thread;

use std::sync::{Arc, Mutex, PoisonError};

use event_manager::{MutEventSubscriber, SubscriberId};

use crate::devices::virtio::state::QueuePosition;
use crate::io_loop::{IoLoop, IoLoopError, Worker};

/// A device's worker on the I/O loop, from activation to reset.
#[derive(Debug)]
pub struct Running {
    io: IoLoop,
    worker: SubscriberId,
}

impl Running {
    /// Hands `worker` to the loop.
    ///
    /// # Errors
    /// The loop has ended.
    pub fn start(io: IoLoop, worker: Worker) -> Result<Self, IoLoopError> {
        let worker = io.add(worker)?;
        Ok(Self { io, worker })
    }

    /// Takes the worker off the loop: it is not called any more. `device` is the id used in logs.
    pub fn stop(self, device: &str) {
        if let Err(error) = self.io.remove(self.worker) {
            // The loop has ended, so it calls nothing any more.
            guest_log!(DEBUG, device, %error, "virtio: reset after the loop");
        }
    }
}

/// A worker that serves its queues on the I/O loop.
pub trait LoopWorker: MutEventSubscriber + Send + 'static {
    /// Where the queues stand, in the order of their numbers.
    fn positions(&self) -> Vec<QueuePosition>;
}

/// A worker of type `W` on the I/O loop that can be asked for its queues when it is taken off.
#[derive(Debug)]
pub struct OnLoop<W> {
    worker: Arc<Mutex<W>>,
    running: Running,
}

impl<W: MutEventSubscriber + Send + 'static> OnLoop<W> {
    /// Hands `worker` to the loop.
    ///
    /// # Errors
    /// The loop has ended.
    pub fn start(io: IoLoop, worker: W) -> Result<Self, IoLoopError> {
        let worker = Arc::new(Mutex::new(worker));
        let running = Running::start(io, worker.clone())?;
        Ok(Self { worker, running })
    }

    /// Takes the worker off the loop, then asks it; `device` is the id used in logs.
    pub fn stop<T>(self, device: &str, ask: impl FnOnce(&mut W) -> T) -> T {
        self.running.stop(device);
        ask(&mut self.worker.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<W: LoopWorker> OnLoop<W> {
    /// Takes the worker, if there is one, off the loop, and says where its queues stand. `device` is the id used in logs.
    pub fn suspend(running: &mut Option<Self>, device: &str) -> Vec<QueuePosition> {
        let running = running.take();
        running.map_or_else(Vec::new, |running| {
            running.stop(device, |worker| worker.positions())
        })
    }
}
