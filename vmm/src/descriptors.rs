//! Descriptors that guests can make the process hold: one budget for all devices.
//!
//! Every file a guest looked up or opened through virtio-fs and every vsock connection it made costs descriptors of a
//! process that also runs the pod. A ticket is taken before the descriptor is, and given back with it. What the host
//! itself opens needs no ticket: a part of the process' limit is left to it.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors left to the host, or half of all if that is less.
const RESERVED: u64 = 1024;

/// How many descriptors guests may hold.
#[derive(Debug)]
pub struct Budget {
    used: AtomicUsize,
    limit: usize,
}

impl Budget {
    /// A budget of `limit` descriptors.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            used: AtomicUsize::new(0),
            limit,
        })
    }

    /// The budget of the process. The first call raises the soft limit of open files to the hard one.
    pub fn of_process() -> Arc<Self> {
        static OF_PROCESS: OnceLock<Arc<Budget>> = OnceLock::new();
        OF_PROCESS
            .get_or_init(|| Self::new(guests_share(raise_limit())))
            .clone()
    }

    /// All places there are.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Places for `count` descriptors.
    ///
    /// # Errors
    /// ENFILE when there are not so many.
    pub fn take(self: &Arc<Self>, count: usize) -> io::Result<Ticket> {
        let take = |used: usize| used.checked_add(count).filter(|used| *used <= self.limit);
        match self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take) {
            Ok(_) => Ok(Ticket {
                budget: self.clone(),
                count,
            }),
            Err(_) => Err(io::Error::from_raw_os_error(libc::ENFILE)),
        }
    }
}

/// Places in a budget, given back when dropped.
#[derive(Debug)]
pub struct Ticket {
    budget: Arc<Budget>,
    count: usize,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.count, Ordering::Relaxed);
    }
}

/// What guests may have of a process that may open `limit` files.
fn guests_share(limit: u64) -> usize {
    let share = limit.saturating_sub(RESERVED).max(limit / 2);
    usize::try_from(share).unwrap_or(usize::MAX)
}

/// Raises the soft limit of open files as far as it goes, and returns it.
fn raise_limit() -> u64 {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    let reached = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => maximum,
        Err(_) => current,
    };
    // None is "unlimited", which the kernel does not give for files.
    reached.unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tickets_when_dropped_make_room() {
        let budget = Budget::new(5);
        let three = budget.take(3).unwrap();
        let _two = budget.take(2).unwrap();
        assert_eq!(budget.take(1).unwrap_err().raw_os_error(), Some(libc::ENFILE));
        assert!(budget.take(usize::MAX).is_err());
        drop(three);
        let _three = budget.take(3).unwrap();
        assert!(budget.take(1).is_err());
    }

    #[test]
    fn limit_when_small_or_large_leaves_some_to_the_host() {
        assert_eq!(guests_share(1 << 20), (1 << 20) - 1024);
        assert_eq!(guests_share(1024), 512);
        assert_eq!(guests_share(1500), 750);
    }

    #[test]
    fn process_when_asked_twice_has_one_budget() {
        assert!(Arc::ptr_eq(&Budget::of_process(), &Budget::of_process()));
        let limit = getrlimit(Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
    }
}
