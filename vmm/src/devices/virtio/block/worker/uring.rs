//! The io_uring engine: a queue served on the I/O loop, with as many requests in flight as it has entries.
//!
//! Who stops the worker waits for the steps the kernel has, of which there are never more than take a short time
//! ([`IN_FLIGHT_BYTES`], and one at a time of a DISCARD or WRITE_ZEROES), but not for flushes: these touch no memory.
//! Requests with steps left begin anew when the queue is served again.
//!
//! The invariant that keeps guest memory safe (CVE-2026-45782 was its absence elsewhere): a request whose step the
//! kernel has is in `slots`, which owns its segments and its share of guest memory, until the completion is taken. Who
//! stops the worker waits for all completions first.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::timerfd::TimerFd;

use super::intake::{Intake, Stopped, Taken};
use crate::devices::virtio::block::disk::Disk;
use crate::devices::virtio::block::request::Request;
use crate::devices::virtio::block::ring::{Full, Ring};
use crate::devices::virtio::block::step::Step;

/// Chains per turn of the loop.
const BUDGET: usize = 64;
/// Bytes per turn that may be copied from or to the page cache on the loop's own thread, at some GB/s; more are left to the
/// kernel's workers.
const INLINE_BYTES: u64 = 256 << 10;
/// Bytes the kernel has in hand at most, so that stopping is short: some GB/s times some milliseconds, more than any disk
/// needs to be busy.
const IN_FLIGHT_BYTES: u64 = 32 << 20;
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

/// What the pushed steps are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct InFlight {
    bytes: u64,
    /// Steps of a DISCARD or WRITE_ZEROES: 1 at most.
    bulk: usize,
    flushes: usize,
}

impl InFlight {
    fn add(&mut self, request: &Request) {
        match request.step() {
            Some(Step::Flush) => self.flushes += 1,
            Some(step) => {
                self.bytes += step.bytes_moved();
                self.bulk += usize::from(request.is_bulk());
            }
            None => {}
        }
    }

    fn remove(&mut self, request: &Request) {
        match request.step() {
            Some(Step::Flush) => self.flushes = self.flushes.saturating_sub(1),
            Some(step) => {
                self.bytes = self.bytes.saturating_sub(step.bytes_moved());
                self.bulk = self.bulk.saturating_sub(usize::from(request.is_bulk()));
            }
            None => {}
        }
    }
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
    /// Slots with a DISCARD or WRITE_ZEROES that waits for its turn. One step of one of them is in hand at a time: a file
    /// system does one after the other anyway.
    bulk: VecDeque<usize>,
    /// Steps the kernel has or will have with the next submit, and what they are.
    pushed: usize,
    in_flight: InFlight,
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
            ready: VecDeque::with_capacity(size),
            bulk: VecDeque::new(),
            pushed: 0,
            in_flight: InFlight::default(),
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
        // A step that waits for others to end comes with the completion of one.
        let stuck = self.pushed == 0 && !(self.ready.is_empty() && self.bulk.is_empty());
        if (more == Taking::More || full || refused || stuck) && !self.broken {
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
            let bulk = request.is_bulk();
            *slot = Some(request);
            match bulk {
                true => self.bulk.push_back(index),
                false => self.ready.push_back(index),
            }
        }
    }

    /// The next slot whose step may be pushed.
    fn next_ready(&mut self) -> Option<usize> {
        if self.in_flight.bytes >= IN_FLIGHT_BYTES {
            return None;
        }
        let bulk = || match self.in_flight.bulk {
            0 => self.bulk.pop_front(),
            _ => None,
        };
        self.ready.pop_front().or_else(bulk)
    }

    /// Pushes the steps that are ready and hands them to the kernel; true when it refused for now.
    fn submit(&mut self) -> bool {
        let mut inline = INLINE_BYTES;
        while let Some(index) = self.next_ready() {
            let Some(request) = self.slots.get(index).and_then(Option::as_ref) else {
                continue;
            };
            let Some(step) = request.step() else { continue };
            let detached = !fits_inline(&self.intake.target.disk, step, &mut inline);
            // SAFETY: the request stays in its slot, and its step first in it, until `reap` takes the completion.
            let result = unsafe { self.ring.push(index as u64, step, detached) };
            match result {
                Ok(()) => {
                    self.pushed += 1;
                    self.in_flight.add(request);
                }
                Err(Full) => {
                    match request.is_bulk() {
                        true => self.bulk.push_front(index),
                        false => self.ready.push_front(index),
                    }
                    if self.enter(0) {
                        return true;
                    }
                }
            }
        }
        self.enter(0)
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
            self.in_flight.remove(&request);
            request.step_done(&self.intake.target.disk, result);
            if request.step().is_none() {
                self.free.push(index);
                self.intake.answer(request);
                continue;
            }
            // One DISCARD after the other, but many transfers side by side.
            match request.is_bulk() {
                true => self.bulk.push_front(index),
                false => self.ready.push_back(index),
            }
            *slot = Some(request);
        }
    }

    /// Waits for what the kernel has in hand, but for flushes, and begins nothing more. Says where the queue stands.
    pub(super) fn finish(&mut self) -> Stopped {
        self.reap();
        while !self.broken && self.pushed > self.in_flight.flushes {
            if self.enter(1) {
                std::thread::sleep(RETRY);
            }
            self.reap();
        }
        if self.pushed > self.in_flight.flushes {
            // Only a ring the kernel no longer answers on gets here. It may still move bytes.
            guest_log!(ERROR, device = %self.intake.target.id, requests = self.pushed, "block: requests in flight given up, their memory is kept");
            std::mem::forget(std::mem::take(&mut self.slots));
        }
        if self.pushed > 0 {
            self.ring.abandon();
        }
        let left = std::mem::take(&mut self.slots);
        let unfinished = left.iter().flatten().map(Request::head).collect();
        (self.pushed, self.in_flight) = (0, InFlight::default());
        self.intake.stop(unfinished)
    }
}

/// Takes what the step copies from `inline`, if that is enough for it.
fn fits_inline(disk: &Disk, step: &Step, inline: &mut u64) -> bool {
    match step {
        Step::Move(transfer) if disk.copies(transfer.route()) => {
            let left = inline.checked_sub(transfer.now());
            *inline = left.unwrap_or(*inline);
            left.is_some()
        }
        // Direct I/O does not copy, and the kernel always detaches the others.
        _ => true,
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
