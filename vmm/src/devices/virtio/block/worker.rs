//! Queues at work: what both engines share.

pub(super) mod intake;
pub(super) mod sync;
pub(super) mod uring;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use super::config::BlockEngine;
use super::target::Target;
use crate::confinement::Confinement;
use crate::devices::virtio::{ActivateError, ActiveQueue, Interrupt, OnLoop};
use crate::io_loop::IoLoop;
use crate::memory::GuestMemory;
use intake::{Intake, Stopped};
use sync::SyncWorker;
use uring::UringWorker;

/// What every queue of an activation gets.
#[derive(Debug)]
pub(super) struct Surroundings {
    pub(super) target: Arc<Target>,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) interrupt: Interrupt,
    pub(super) io: IoLoop,
    /// What a thread of its own gives up.
    pub(super) confinement: Confinement,
}

/// A queue being served.
#[derive(Debug)]
pub(super) enum Worker {
    /// On the I/O loop.
    Uring(OnLoop<UringWorker>),
    /// On a thread of its own.
    Sync(SyncWorker),
}

impl Worker {
    /// Starts serving `queue`, with the chains of its last worker that are `unfinished`. `engine`: what the disk was made with; `Auto` is io_uring as long as a ring can be had.
    pub(super) fn start(
        around: &Surroundings,
        queue: ActiveQueue,
        unfinished: VecDeque<u16>,
        engine: BlockEngine,
    ) -> Result<Self, ActivateError> {
        let target = &around.target;
        let failed = |what| {
            move |source: io::Error| ActivateError::Host {
                device: target.id.clone(),
                what,
                source,
            }
        };
        let index = queue.index;
        let intake = Intake::new(around, queue, unfinished);
        if engine != BlockEngine::Sync {
            match UringWorker::resources(&intake) {
                Ok(resources) => {
                    let worker = UringWorker::new(intake, resources);
                    return Ok(Self::Uring(OnLoop::start(around.io.clone(), worker)?));
                }
                // It was there when the disk was made; out of file descriptors or locked memory.
                Err(error) if engine == BlockEngine::Auto => {
                    guest_log!(WARN, device = %target.id, queue = index, %error, "block: no ring to be had, queue served synchronously");
                }
                Err(error) => return Err(failed("cannot make an io_uring")(error)),
            }
        }
        let worker = SyncWorker::spawn(intake, index, around.confinement)
            .map_err(failed("cannot start the worker thread"))?;
        Ok(Self::Sync(worker))
    }

    /// Waits for what the host's kernel has in hand, which is short whatever the requests are, and begins nothing more. Says
    /// where the queue stands.
    pub(super) fn stop(self, device: &str) -> Option<Stopped> {
        match self {
            Self::Uring(worker) => Some(worker.stop(device, UringWorker::finish)),
            Self::Sync(worker) => worker.stop(device),
        }
    }
}
