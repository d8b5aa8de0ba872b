//! The gate all vCPU threads of a machine pass before each KVM_RUN: open, closed (pause) or ended (stop).

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// What vCPU threads are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Order {
    Park = 0,
    Run = 1,
    End = 2,
}

/// What a thread does after passing the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passage {
    /// It was open: enter the guest.
    Open,
    /// It was closed and has opened: the guest was not running for a while.
    Reopened,
    /// Leave the thread.
    End,
}

/// The gate; starts closed.
#[derive(Debug)]
pub struct Gate {
    /// Copy of `State::order` for the check on each round.
    order: AtomicU8,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    order: Order,
    /// Threads that have not left.
    threads: usize,
    /// Threads waiting at the closed gate.
    parked: usize,
}

impl Gate {
    /// A closed gate for `threads` threads.
    pub fn new(threads: usize) -> Self {
        Self {
            order: AtomicU8::new(Order::Park as u8),
            state: Mutex::new(State {
                order: Order::Park,
                threads,
                parked: 0,
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, order: Order) {
        let mut state = self.lock();
        // Nothing comes after the end.
        if state.order != Order::End {
            state.order = order;
            self.order.store(order as u8, Ordering::Release);
            self.changed.notify_all();
        }
    }

    /// Lets the threads run.
    pub fn open(&self) {
        self.set(Order::Run);
    }

    /// Makes the threads wait at their next passage; kick them, then [`wait_parked`](Self::wait_parked).
    pub fn close(&self) {
        self.set(Order::Park);
    }

    /// Makes the threads leave at their next passage; kick them, then join them.
    pub fn end(&self) {
        self.set(Order::End);
    }

    /// Waits until every thread is parked or has left.
    pub fn wait_parked(&self) {
        let mut state = self.lock();
        while state.parked < state.threads && state.order == Order::Park {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until every thread has left; after [`end`](Self::end) and a kick for each.
    pub fn wait_left(&self) {
        let mut state = self.lock();
        while state.threads > 0 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// One more thread will pass; before it is made.
    pub fn join(&self) {
        self.lock().threads += 1;
    }

    /// Makes threads that wait at the closed gate look at their `leaving` flag.
    pub fn nudge(&self) {
        let _state = self.lock();
        self.changed.notify_all();
    }

    /// Called by a vCPU thread before each KVM_RUN; waits while the gate is closed. `leaving` is the thread's own order to
    /// end. Unless the gate is open, `settle` runs before the thread counts as parked or leaves.
    pub fn pass(&self, leaving: &AtomicBool, settle: impl FnOnce()) -> Passage {
        let told = leaving.load(Ordering::Acquire);
        if !told && self.order.load(Ordering::Acquire) == Order::Run as u8 {
            return Passage::Open;
        }
        settle();
        if told {
            return Passage::End;
        }
        let mut state = self.lock();
        let mut passage = Passage::Open;
        loop {
            match state.order {
                Order::Run => return passage,
                Order::End => return Passage::End,
                Order::Park => {}
            }
            passage = Passage::Reopened;
            state.parked += 1;
            self.changed.notify_all();
            while state.order == Order::Park && !leaving.load(Ordering::Acquire) {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.parked -= 1;
            if leaving.load(Ordering::Acquire) {
                return Passage::End;
            }
        }
    }

    /// Called once by a vCPU thread when it leaves, whatever the reason.
    pub fn leave(&self) {
        let mut state = self.lock();
        state.threads = state.threads.saturating_sub(1);
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;
    use std::thread;

    use super::*;

    #[test]
    fn wait_parked_when_closed_returns_with_no_thread_running() {
        let gate = Arc::new(Gate::new(3));
        let rounds = Arc::new(AtomicUsize::new(0));
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let (gate, rounds) = (gate.clone(), rounds.clone());
                thread::spawn(move || {
                    while gate.pass(&AtomicBool::new(false), || ()) != Passage::End {
                        rounds.fetch_add(1, Ordering::SeqCst);
                        thread::yield_now();
                    }
                    gate.leave();
                })
            })
            .collect();
        gate.wait_parked();
        assert_eq!(rounds.load(Ordering::SeqCst), 0);
        for _ in 0..20 {
            let before = rounds.load(Ordering::SeqCst);
            gate.open();
            while rounds.load(Ordering::SeqCst) == before {
                thread::yield_now();
            }
            gate.close();
            gate.wait_parked();
            let parked = rounds.load(Ordering::SeqCst);
            thread::yield_now();
            assert_eq!(rounds.load(Ordering::SeqCst), parked);
        }
        gate.end();
        gate.open();
        for thread in threads {
            thread.join().unwrap();
        }
    }

    #[test]
    fn pass_when_it_was_closed_says_reopened() {
        let gate = Arc::new(Gate::new(1));
        let thread = {
            let gate = gate.clone();
            thread::spawn(move || {
                let stay = AtomicBool::new(false);
                (gate.pass(&stay, || ()), gate.pass(&stay, || ()))
            })
        };
        gate.wait_parked();
        gate.open();
        assert_eq!(thread.join().unwrap(), (Passage::Reopened, Passage::Open));
    }

    #[test]
    fn pass_when_closed_settles_before_it_counts_as_parked() {
        let gate = Arc::new(Gate::new(1));
        let settled = Arc::new(AtomicBool::new(false));
        let thread = {
            let (gate, settled) = (gate.clone(), settled.clone());
            thread::spawn(move || {
                let settle = || {
                    thread::sleep(std::time::Duration::from_millis(20));
                    settled.store(true, Ordering::SeqCst);
                };
                gate.pass(&AtomicBool::new(false), settle);
                // Open: nothing to settle.
                gate.pass(&AtomicBool::new(false), || unreachable!());
                let (mut left, leaving) = (false, AtomicBool::new(true));
                gate.pass(&leaving, || left = true);
                left
            })
        };
        gate.wait_parked();
        assert!(settled.load(Ordering::SeqCst));
        gate.open();
        assert!(thread.join().unwrap(), "a thread that leaves settles, too");
    }

    #[test]
    fn pass_when_told_to_leave_ends_at_the_closed_gate() {
        let gate = Arc::new(Gate::new(1));
        gate.join();
        let leaving = Arc::new(AtomicBool::new(false));
        let thread = {
            let (gate, leaving) = (gate.clone(), leaving.clone());
            thread::spawn(move || gate.pass(&leaving, || ()))
        };
        while gate.lock().parked == 0 {
            thread::yield_now();
        }
        leaving.store(true, Ordering::Release);
        gate.nudge();
        assert_eq!(thread.join().unwrap(), Passage::End);
        let state = gate.lock();
        assert_eq!((state.threads, state.parked), (2, 0));
    }
}
