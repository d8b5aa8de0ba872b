//! The synchronous engine: a thread per queue that does one request after the other.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::intake::{Intake, Taken};
use crate::devices::virtio::block::request::Request;
use crate::devices::virtio::state::QueuePosition;

/// Requests per turn at most, so that the first of many slow ones is not held back by the last.
const BATCH: usize = 8;

/// What the worker waits for after a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wait {
    /// A kick.
    Kick,
    /// A kick, or this time.
    Until(Instant),
    /// Nothing: there is more to do.
    Not,
}

/// The running thread. [`SyncWorker::stop`] ends it.
#[derive(Debug)]
pub(in super::super) struct SyncWorker {
    stop: Arc<EventFd>,
    thread: JoinHandle<QueuePosition>,
}

impl SyncWorker {
    pub(super) fn spawn(intake: Intake, queue: usize) -> io::Result<Self> {
        let stop = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let stopped = stop.clone();
        let thread = std::thread::Builder::new()
            .name(format!("blk{queue}-{}", intake.target.id))
            .spawn(move || run(intake, &stopped))?;
        Ok(Self { stop, thread })
    }

    /// Waits for the request in hand, if any, and ends the thread. Says where the queue stands.
    pub(super) fn stop(self, device: &str) -> Option<QueuePosition> {
        if let Err(error) = self.stop.write(1) {
            guest_log!(ERROR, device, %error, "block: cannot wake the worker to stop it");
        }
        let position = self.thread.join();
        if position.is_err() {
            guest_log!(ERROR, device, "block: the worker panicked");
        }
        position.ok()
    }
}

fn run(mut intake: Intake, stop: &EventFd) -> QueuePosition {
    // Without a kick at first: requests may have come while no worker looked.
    let mut wait = Wait::Not;
    loop {
        match wait_for_kick(&intake, stop, wait) {
            Ok(false) => {}
            Ok(true) => break,
            Err(error) => {
                guest_log!(ERROR, device = %intake.target.id, %error, "block: poll failed, worker ends");
                break;
            }
        }
        intake.begin_turn();
        let more = batch(&mut intake);
        wait = match intake.end_turn(false) {
            _ if more => Wait::Not,
            Some(until) => Wait::Until(until),
            None => Wait::Kick,
        };
    }
    if let Some(request) = intake.take_held() {
        perform(&mut intake, request);
    }
    intake.queue.notify();
    intake.queue.position()
}

/// Serves up to [`BATCH`] chains; true when there may be more.
fn batch(intake: &mut Intake) -> bool {
    for _ in 0..BATCH {
        match intake.take() {
            Taken::Request(request) => perform(intake, request),
            Taken::Returned => {}
            Taken::Idle | Taken::Throttled => return false,
        }
    }
    true
}

fn perform(intake: &mut Intake, mut request: Request) {
    let disk = &intake.target.disk;
    while let Some(step) = request.step() {
        let result = step.perform(disk);
        request.step_done(disk, result);
    }
    intake.answer(request);
}

/// Sleeps as `wait` says; true means stop.
fn wait_for_kick(intake: &Intake, stop: &EventFd, wait: Wait) -> io::Result<bool> {
    let readable = |fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let mut fds = [
        readable(stop.as_raw_fd()),
        readable(intake.queue.kick().as_raw_fd()),
    ];
    loop {
        let left = match wait {
            Wait::Kick => None,
            Wait::Until(until) => Some(until.saturating_duration_since(Instant::now())),
            Wait::Not => Some(Duration::ZERO),
        };
        let timeout = left.map(|left| libc::timespec {
            // Far less than a second.
            tv_sec: 0,
            tv_nsec: libc::c_long::from(left.subsec_nanos() as i32),
        });
        let timeout = timeout.as_ref().map_or(ptr::null(), ptr::from_ref);
        // SAFETY: `fds` is an array of two, alive during the call as the timeout is; no signal mask.
        if unsafe { libc::ppoll(fds.as_mut_ptr(), 2, timeout, ptr::null()) } >= 0 {
            let [stop, _] = fds;
            return Ok(stop.revents != 0);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
