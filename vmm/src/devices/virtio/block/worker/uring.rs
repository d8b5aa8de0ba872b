//! The io_uring engine: a queue served on the I/O loop, with as many requests in flight as it has entries.
//!
//! The invariant that keeps guest memory safe (CVE-2026-45782 was its absence elsewhere): a request whose step the
//! kernel has is in `slots`, which owns its segments and its share of guest memory, until the completion is taken. Who
//! stops the worker waits for all completions first.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::timerfd::TimerFd;

use super::intake::{Intake, Taken};
use crate::devices::virtio::block::request::Request;
use crate::devices::virtio::block::ring::{Full, Ring};
use crate::devices::virtio::block::step::Step;
use crate::devices::virtio::state::QueuePosition;

/// Chains per turn of the loop.
const BUDGET: usize = 64;
/// Bytes per turn that may be copied from or to the page cache on the loop's own thread, at some GB/s; more are left to the
/// kernel's workers.
const INLINE_BYTES: u64 = 256 << 10;
/// Between attempts when the kernel has no memory for requests and the worker is being stopped.
const RETRY: Duration = Duration::from_millis(1);

/// How taking requests ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Taking {
    /// Something will kick.
    Wait,
    /// All slots are taken: go on after a completion.
    Full,
    /// Nothing will kick, and there may be more.
    More,
}

/// Serves one queue.
#[derive(Debug)]
pub(in super::super) struct UringWorker {
    intake: Intake,
    ring: Ring,
    /// Requests in flight; the index is the token of their steps. Never moves while the kernel has one: only the requests'
    /// own heap memory is shared with it.
    slots: Vec<Option<Request>>,
    free: Vec<usize>,
    /// Slots whose step waits for a place in the submission queue.
    ready: VecDeque<usize>,
    /// Steps the kernel has or will have with the next submit.
    pushed: usize,
    /// The ring does not take submissions any more.
    broken: bool,
    /// Brings the turn that ends a hold.
    timer: TimerFd,
    /// When it fires.
    armed: Option<Instant>,
}

impl UringWorker {
    /// The ring for a queue, and a timer.
    pub(super) fn resources(intake: &Intake) -> io::Result<(Ring, TimerFd)> {
        let ring = Ring::new(&intake.target.disk, intake.queue.size())?;
        Ok((ring, TimerFd::new()?))
    }

    pub(super) fn new(intake: Intake, (ring, timer): (Ring, TimerFd)) -> Self {
        let size = usize::from(intake.queue.size());
        Self {
            intake,
            ring,
            slots: (0..size).map(|_| None).collect(),
            free: (0..size).rev().collect(),
            ready: VecDeque::new(),
            pushed: 0,
            broken: false,
            timer,
            armed: None,
        }
    }

    /// Everything that can be done without waiting.
    fn turn(&mut self) {
        self.intake.begin_turn();
        // Nothing to read: a turn for another reason took the completions.
        let _ = self.ring.completed().read();
        self.reap();
        let more = self.take_requests();
        let refused = self.submit();
        self.reap();
        if self.pushed == 0 {
            // All of it completed at once; nobody needs to come back for the signals of that.
            let _ = self.ring.completed().read();
        }
        if let Some(until) = self.intake.end_turn(self.pushed > 0) {
            self.come_back(until);
        }
        // `full`: places became free again without a completion that would wake us.
        let full = more == Taking::Full && !self.free.is_empty();
        if (more == Taking::More || full || refused || !self.ready.is_empty()) && !self.broken {
            self.intake.queue.kick_self();
        }
    }

    /// Brings a turn at `until` at the latest.
    fn come_back(&mut self, until: Instant) {
        if self.armed == Some(until) {
            return;
        }
        let wait = until.saturating_duration_since(Instant::now());
        // Zero would disarm it.
        match self.timer.reset(wait.max(Duration::from_nanos(1)), None) {
            Ok(()) => self.armed = Some(until),
            Err(error) => {
                guest_log!(ERROR, device = %self.intake.target.id, %error, "block: cannot arm the timer");
                self.intake.queue.kick_self();
            }
        }
    }

    /// Takes requests while there is room.
    fn take_requests(&mut self) -> Taking {
        for _ in 0..BUDGET {
            // A driver that keeps to its queue's size never sees this: it has no descriptors left either.
            if self.free.is_empty() {
                return Taking::Full;
            }
            match self.intake.take() {
                Taken::Request(request) => self.begin(request),
                Taken::Returned => {}
                Taken::Idle | Taken::Throttled => return Taking::Wait,
            }
        }
        Taking::More
    }

    /// Gives the request a slot, or answers it if there is nothing to do. There must be a free slot.
    fn begin(&mut self, request: Request) {
        if request.step().is_none() {
            self.intake.answer(request);
        } else if let Some(index) = self.free.pop()
            && let Some(slot) = self.slots.get_mut(index)
        {
            *slot = Some(request);
            self.ready.push_back(index);
        }
    }

    /// Pushes the steps that are ready and hands them to the kernel; true when it refused for now.
    fn submit(&mut self) -> bool {
        let mut inline = INLINE_BYTES;
        while let Some(index) = self.ready.pop_front() {
            let Some(step) = self.slots.get(index).and_then(|slot| slot.as_ref()?.step()) else {
                continue;
            };
            let detached = !self.fits_inline(step, &mut inline);
            // SAFETY: the request stays in its slot, and its step first in it, until `reap` takes the completion.
            let result = unsafe { self.ring.push(index as u64, step, detached) };
            match result {
                Ok(()) => self.pushed += 1,
                Err(Full) => {
                    self.ready.push_front(index);
                    if self.enter(0) {
                        return true;
                    }
                }
            }
        }
        self.enter(0)
    }

    /// Takes what the step copies from `inline`, if that is enough for it.
    fn fits_inline(&self, step: &Step, inline: &mut u64) -> bool {
        match step {
            Step::Move(transfer) if self.intake.target.disk.copies(transfer.route()) => {
                let left = inline.checked_sub(transfer.left());
                *inline = left.unwrap_or(*inline);
                left.is_some()
            }
            // Direct I/O does not copy, and the kernel always detaches the others.
            _ => true,
        }
    }

    /// Enters the kernel; true when it takes nothing now.
    fn enter(&mut self, wait: usize) -> bool {
        match self.ring.submit(wait) {
            Ok(()) => false,
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM)
                ) =>
            {
                guest_log!(DEBUG, device = %self.intake.target.id, %error, "block: submission put off");
                true
            }
            Err(error) => {
                guest_log!(ERROR, device = %self.intake.target.id, %error, "block: io_uring_enter failed, queue stopped");
                self.broken = true;
                true
            }
        }
    }

    /// Takes all completions: requests go on to their next step or back to the driver.
    fn reap(&mut self) {
        while let Some((token, result)) = self.ring.take() {
            self.pushed = self.pushed.saturating_sub(1);
            let slot = usize::try_from(token)
                .ok()
                .and_then(|index| Some((index, self.slots.get_mut(index)?)));
            let Some((index, slot)) = slot else { continue };
            let Some(mut request) = slot.take() else { continue };
            request.step_done(&self.intake.target.disk, result);
            if request.step().is_some() {
                *slot = Some(request);
                self.ready.push_back(index);
            } else {
                self.free.push(index);
                self.intake.answer(request);
            }
        }
    }

    /// Finishes everything taken from the queue; takes nothing more. Bounded by the kernel finishing its I/O. Says where
    /// the queue stands.
    pub(super) fn finish(&mut self) -> Option<QueuePosition> {
        self.reap();
        while let Some(request) = self.take_held_if_room() {
            self.begin(request);
        }
        while !self.broken && self.free.len() < self.slots.len() {
            let refused = self.submit() || self.enter(usize::from(self.pushed > 0));
            if refused {
                std::thread::sleep(RETRY);
            }
            self.reap();
        }
        if self.pushed > 0 {
            // Only a ring the kernel no longer answers on gets here. It may still move bytes.
            guest_log!(ERROR, device = %self.intake.target.id, requests = self.pushed, "block: requests in flight given up, their memory is kept");
            std::mem::forget(std::mem::take(&mut self.slots));
            self.pushed = 0;
        }
        self.intake.queue.notify();
        Some(self.intake.queue.position())
    }

    fn take_held_if_room(&mut self) -> Option<Request> {
        // A held request was taken when there was a free slot, and nothing was taken since.
        (!self.free.is_empty()).then(|| self.intake.take_held()).flatten()
    }
}

impl Drop for UringWorker {
    fn drop(&mut self) {
        self.finish();
    }
}

impl MutEventSubscriber for UringWorker {
    fn init(&mut self, ops: &mut EventOps) {
        let kick = Events::new(&**self.intake.queue.kick(), EventSet::IN);
        let completed = Events::new(self.ring.completed(), EventSet::IN);
        let timer = Events::new(&self.timer, EventSet::IN);
        if let Err(error) = [kick, completed, timer]
            .into_iter()
            .try_for_each(|events| ops.add(events))
        {
            guest_log!(ERROR, device = %self.intake.target.id, ?error, "block: cannot watch the queue");
        }
        // Requests may have come while no worker looked.
        self.intake.queue.kick_self();
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        if events.fd() == self.timer.as_raw_fd() {
            self.armed = None;
            // Readable, so it does not wait.
            let _ = self.timer.wait();
        }
        self.turn();
    }
}
