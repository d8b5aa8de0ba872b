//! The `vmm-io` thread: one epoll loop that runs the virtqueue workers, timers and the vsock muxer of a VM.
//!
//! Work is handed over once, as a [`Worker`]; from then on the loop owns the calls into it. A worker must never block:
//! anything that can (a file on a slow disk, a FUSE request) belongs on a thread of its own.

#![allow(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, mpsc};

use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::confinement::{Confinement, Role, Thread};

/// Something that reacts to file descriptors becoming ready, on the loop's thread.
pub type Worker = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// The loop cannot be started or no longer answers.
#[derive(Debug, thiserror::Error)]
pub enum IoLoopError {
    /// The kernel refuses an eventfd.
    #[error("I/O loop: eventfd: {0}")]
    EventFd(#[from] io::Error),
    /// The kernel refuses epoll, or to watch something with it.
    #[error("I/O loop: epoll: {0}")]
    Epoll(#[from] event_manager::Error),
    /// The thread could not be spawned.
    #[error("I/O loop: cannot start thread {name}: {source}")]
    Spawn {
        /// Thread name.
        name: String,
        /// Cause.
        source: io::Error,
    },
    /// The loop has ended.
    #[error("I/O loop: cannot {0}: the loop has ended")]
    Ended(&'static str),
}

/// What others ask of the loop, carried out on its thread between two events.
type Call = Box<dyn FnOnce(&mut EventManager<Worker>) + Send>;

/// A handle to the loop; clones refer to the same thread.
#[derive(Clone)]
pub struct IoLoop {
    calls: mpsc::Sender<Call>,
    /// Written for each call. The event manager has an endpoint of its own for this, whose eventfd every program inherits that
    /// this process executes.
    wake: Arc<EventFd>,
    stop: Arc<AtomicBool>,
    /// Set by the thread itself; nobody waits for it to start.
    thread_id: Arc<OnceLock<i32>>,
}

impl std::fmt::Debug for IoLoop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IoLoop").finish_non_exhaustive()
    }
}

impl IoLoop {
    /// Starts the loop on a thread called `name`, which gives up what `confinement` says.
    ///
    /// # Errors
    /// [`IoLoopError`] when the kernel refuses epoll, eventfd or the thread.
    pub(crate) fn spawn(name: &str, confinement: Confinement) -> Result<(Self, Thread<()>), IoLoopError> {
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let mut manager: EventManager<Worker> = EventManager::new()?;
        let waker = Arc::new(Mutex::new(Waker {
            event: wake.clone(),
            watched: Ok(()),
        }));
        manager.add_subscriber(waker.clone());
        let watched = std::mem::replace(
            &mut waker.lock().unwrap_or_else(PoisonError::into_inner).watched,
            Ok(()),
        );
        watched?;
        let (calls, asked) = mpsc::channel::<Call>();
        let stop = Arc::new(AtomicBool::new(false));
        let ended = stop.clone();
        let thread_id = Arc::new(OnceLock::new());
        let own_id = thread_id.clone();
        let spawn_error = |source| IoLoopError::Spawn {
            name: name.to_owned(),
            source,
        };
        let thread = confinement
            .spawn(Role::Io, name, move || {
                // SAFETY: gettid has no arguments and cannot fail.
                own_id.get_or_init(|| unsafe { libc::gettid() });
                while !ended.load(Ordering::Acquire) {
                    if let Err(error) = manager.run() {
                        guest_log!(ERROR, ?error, "I/O loop: epoll failed");
                    }
                    for call in asked.try_iter() {
                        call(&mut manager);
                    }
                }
            })
            .map_err(spawn_error)?;
        Ok((
            Self {
                calls,
                wake,
                stop,
                thread_id,
            },
            thread,
        ))
    }

    /// Carries `call` out on the loop's thread; `what` is for people.
    fn call<T: Send + 'static>(
        &self,
        what: &'static str,
        call: impl FnOnce(&mut EventManager<Worker>) -> T + Send + 'static,
    ) -> Result<T, IoLoopError> {
        let (answer, answered) = mpsc::sync_channel(1);
        let call = move |manager: &mut EventManager<Worker>| {
            // Whoever asked waits.
            let _ = answer.send(call(manager));
        };
        self.calls
            .send(Box::new(call))
            .map_err(|_| IoLoopError::Ended(what))?;
        self.wake.write(1)?;
        // A loop that ends drops the calls it has not answered.
        answered.recv().map_err(|_| IoLoopError::Ended(what))
    }

    /// Kernel thread id of the loop; waits until its thread has started.
    pub fn thread_id(&self) -> i32 {
        *self.thread_id.wait()
    }

    /// Returns after every event that was pending when it was called has been handled.
    ///
    /// Must not be called from the loop's own thread.
    ///
    /// # Errors
    /// [`IoLoopError::Ended`] when the loop has ended.
    pub fn drain(&self) -> Result<(), IoLoopError> {
        // A call to the endpoint is no sign of that: several are answered in a row without a look at events. An event of
        // our own is: the first time it may overtake some of those epoll has ready, the second time none.
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        event.write(1)?;
        let (done, seen) = mpsc::sync_channel(1);
        let turns = 2;
        let id = self.add(Arc::new(Mutex::new(Probe { event, turns, done })))?;
        seen.recv().map_err(|_| IoLoopError::Ended("drain"))?;
        self.remove(id).map(|_| ())
    }

    /// Hands `worker` to the loop and waits until its `init` has run.
    ///
    /// Must not be called from the loop's own thread (it would wait for itself).
    ///
    /// # Errors
    /// [`IoLoopError::Ended`] when the loop has ended.
    pub fn add(&self, worker: Worker) -> Result<SubscriberId, IoLoopError> {
        self.call("add a worker", move |manager| manager.add_subscriber(worker))
    }

    /// Takes a worker back. When this returns the loop no longer calls it.
    ///
    /// # Errors
    /// [`IoLoopError::Ended`] when the loop has ended or does not know `id`.
    pub fn remove(&self, id: SubscriberId) -> Result<Worker, IoLoopError> {
        let removed = self.call("remove a worker", move |manager| manager.remove_subscriber(id))?;
        Ok(removed?)
    }

    /// Ends the thread after the event in hand. Idempotent.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        if let Err(error) = self.wake.write(1) {
            guest_log!(ERROR, %error, "I/O loop: cannot wake its thread");
        }
    }
}

/// Takes the loop out of epoll_wait.
struct Waker {
    event: Arc<EventFd>,
    /// Whether the loop watches it.
    watched: Result<(), event_manager::Error>,
}

impl MutEventSubscriber for Waker {
    fn init(&mut self, ops: &mut EventOps) {
        self.watched = ops.add(Events::new(&*self.event, EventSet::IN));
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        // Only this thread reads it.
        let _ = self.event.read();
    }
}

/// A worker whose event stays ready until it had `turns` turns; then it says so.
struct Probe {
    event: EventFd,
    turns: u8,
    done: mpsc::SyncSender<()>,
}

impl MutEventSubscriber for Probe {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.event, EventSet::IN)) {
            guest_log!(ERROR, ?error, "I/O loop: cannot watch the event of a drain");
            // Nobody is to wait for an event that does not come.
            let _ = self.done.try_send(());
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        self.turns = self.turns.saturating_sub(1);
        if self.turns == 0 {
            let _ = self.event.read();
            let _ = self.done.try_send(());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Duration;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// Notes that its event came.
    struct Noting {
        event: EventFd,
        came: Arc<AtomicBool>,
    }

    impl MutEventSubscriber for Noting {
        fn init(&mut self, ops: &mut EventOps) {
            ops.add(Events::new(&self.event, EventSet::IN)).unwrap();
        }

        fn process(&mut self, _events: Events, _ops: &mut EventOps) {
            self.event.read().unwrap();
            self.came.store(true, Ordering::SeqCst);
        }
    }

    /// Holds the loop in an endpoint call.
    struct Gate(Sender<()>, Receiver<()>);

    impl MutEventSubscriber for Gate {
        fn init(&mut self, _ops: &mut EventOps) {
            self.0.send(()).unwrap();
            self.1.recv().unwrap();
        }

        fn process(&mut self, _events: Events, _ops: &mut EventOps) {}
    }

    /// Asks for a gate; returns what says that it is entered, and what opens it.
    fn gate(io: &IoLoop) -> (Receiver<()>, Sender<()>) {
        let (enter, entered) = channel();
        let (open, opened) = channel();
        let io = io.clone();
        std::thread::spawn(move || io.add(Arc::new(Mutex::new(Gate(enter, opened)))));
        (entered, open)
    }

    #[test]
    fn drain_when_the_loop_answers_calls_in_a_row_waits_for_events() {
        let (io, thread) = IoLoop::spawn("test-io", Confinement::default()).unwrap();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let came = Arc::new(AtomicBool::new(false));
        let noting = Noting {
            event: event.try_clone().unwrap(),
            came: came.clone(),
        };
        io.add(Arc::new(Mutex::new(noting))).unwrap();
        let (entered, open) = gate(&io);
        entered.recv_timeout(PATIENCE).unwrap();
        event.write(1).unwrap();
        let drain = std::thread::spawn({
            let (io, came) = (io.clone(), came.clone());
            move || {
                io.drain().unwrap();
                came.load(Ordering::SeqCst)
            }
        });
        // More calls arrive than the loop can answer before it looks at events. Each pause lets the last call arrive; a
        // call that comes late makes the test pass, never fail.
        let pause = || std::thread::sleep(Duration::from_millis(50));
        pause();
        let (second_entered, open_second) = gate(&io);
        pause();
        open.send(()).unwrap();
        second_entered.recv_timeout(PATIENCE).unwrap();
        pause();
        let (third_entered, open_third) = gate(&io);
        pause();
        open_second.send(()).unwrap();
        third_entered.recv_timeout(PATIENCE).unwrap();
        pause();
        open_third.send(()).unwrap();
        assert!(drain.join().unwrap(), "drained before the event was handled");
        io.stop();
        thread.join().unwrap();
    }

    #[test]
    fn drain_when_the_loop_has_ended_says_so() {
        let (io, thread) = IoLoop::spawn("test-io", Confinement::default()).unwrap();
        io.drain().unwrap();
        io.stop();
        thread.join().unwrap();
        assert!(matches!(io.drain(), Err(IoLoopError::Ended(_))));
    }
}
