//! The synchronous engine: a thread per queue that does one request after the other.
//!
//! Who stops it waits for the step in hand. A flush may take as long as the host's disk has written data to store, and
//! touches no memory of the guest: it is not waited for, the thread ends when it is done.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::intake::{Intake, Stopped, Taken};
use crate::confinement::{Confinement, Role, Thread};
use crate::devices::virtio::block::request::Request;
use crate::devices::virtio::block::step::Step;
use crate::devices::virtio::worker::queue_thread::Aside;

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

/// How the thread is stopped.
#[derive(Debug)]
struct Control {
    stopping: AtomicBool,
    /// Wakes it when it sleeps.
    wake: EventFd,
    /// Where it waits for the disk.
    aside: Aside<Stopped>,
}

impl Control {
    fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }
}

/// The running thread. [`SyncWorker::stop`] ends it.
#[derive(Debug)]
pub(in super::super) struct SyncWorker {
    control: Arc<Control>,
    thread: Thread<Option<Stopped>>,
}

impl SyncWorker {
    pub(super) fn spawn(intake: Intake, queue: usize, confinement: Confinement) -> io::Result<Self> {
        let control = Arc::new(Control {
            stopping: AtomicBool::new(false),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            aside: Aside::default(),
        });
        let controlled = control.clone();
        let name = format!("blk{queue}-{}", intake.target.id);
        let thread = confinement.spawn(Role::Block, &name, move || run(intake, &controlled))?;
        Ok(Self { control, thread })
    }

    /// Waits for the step in hand, if it is no flush, and ends the thread. Says where the queue stands.
    pub(super) fn stop(self, device: &str) -> Option<Stopped> {
        self.control.stopping.store(true, Ordering::Release);
        if let Err(error) = self.control.wake.write(1) {
            guest_log!(ERROR, device, %error, "block: cannot wake the worker to stop it");
        }
        match self.control.aside.end(self.thread) {
            Ok(Some(stopped)) => stopped,
            Ok(None) => {
                guest_log!(ERROR, device, "block: the worker panicked");
                None
            }
            Err(waiting) => Some(waiting),
        }
    }
}

/// Serves the queue until it is to stop; `None` when somebody else said where the queue stands.
fn run(mut intake: Intake, control: &Control) -> Option<Stopped> {
    // Without a kick at first: requests may have come while no worker looked.
    let mut wait = Wait::Not;
    loop {
        match wait_for_kick(&intake, control, wait) {
            Ok(false) => {}
            Ok(true) => break,
            Err(error) => {
                guest_log!(ERROR, device = %intake.target.id, %error, "block: poll failed, worker ends");
                break;
            }
        }
        intake.begin_turn();
        let more = match batch(&mut intake, control) {
            Batch::Done => false,
            Batch::More => true,
            Batch::Stopped(request) => return Some(intake.stop(vec![request.head()])),
            Batch::Abandoned => return None,
        };
        wait = match intake.end_turn(false) {
            _ if more => Wait::Not,
            Some(until) => Wait::Until(until),
            None => Wait::Kick,
        };
    }
    Some(intake.stop(Vec::new()))
}

/// How serving some chains ended.
#[derive(Debug)]
enum Batch {
    /// There is nothing to do now.
    Done,
    /// There may be more.
    More,
    /// The worker is to stop, and this request is not finished.
    Stopped(Box<Request>),
    /// The worker was stopped while it waited for the disk.
    Abandoned,
}

/// Serves up to [`BATCH`] chains.
fn batch(intake: &mut Intake, control: &Control) -> Batch {
    for _ in 0..BATCH {
        match intake.take() {
            Taken::Request(request) => match perform(intake, control, request) {
                Performed::Answered => {}
                Performed::Stopped(request) => return Batch::Stopped(request),
                Performed::Abandoned => return Batch::Abandoned,
            },
            Taken::Returned => {}
            Taken::Idle | Taken::Throttled => return Batch::Done,
        }
    }
    Batch::More
}

/// How a request ended.
#[derive(Debug)]
enum Performed {
    /// The driver has its status.
    Answered,
    /// The worker is to stop; there are steps left.
    Stopped(Box<Request>),
    /// The worker was stopped while it waited for the disk.
    Abandoned,
}

fn perform(intake: &mut Intake, control: &Control, mut request: Request) -> Performed {
    while let Some(step) = request.step() {
        if control.stopping() {
            return Performed::Stopped(Box::new(request));
        }
        let result = if matches!(step, Step::Flush) {
            let standing = intake.standing(request.head());
            let flushed = control.aside.wait(standing, || step.perform(&intake.target.disk));
            match flushed {
                Some(result) => result,
                None => return Performed::Abandoned,
            }
        } else {
            step.perform(&intake.target.disk)
        };
        request.step_done(&intake.target.disk, result);
    }
    intake.answer(request);
    Performed::Answered
}

/// Sleeps as `wait` says; true means stop.
fn wait_for_kick(intake: &Intake, control: &Control, wait: Wait) -> io::Result<bool> {
    let readable = |fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let mut fds = [
        readable(control.wake.as_raw_fd()),
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
