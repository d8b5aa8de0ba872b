//! Whether anybody still needs this process: a shim that serves nothing for long ends itself.
//!
//! containerd can forget a shim: it dies between `start` and Create, or Create fails and its Shutdown never comes. Such
//! processes otherwise stay for ever.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// What the process is doing.
#[derive(Debug)]
pub struct Activity {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    containers: HashSet<String>,
    requests: usize,
    last: Instant,
}

/// A request being served; dropping it ends it.
#[derive(Debug)]
pub struct Request(Arc<Activity>);

impl Activity {
    /// Nothing served yet; the clock starts now.
    pub fn new() -> Arc<Self> {
        let state = State {
            containers: HashSet::new(),
            requests: 0,
            last: Instant::now(),
        };
        Arc::new(Self {
            state: Mutex::new(state),
        })
    }

    /// A request came in.
    pub fn request(self: &Arc<Self>) -> Request {
        self.with(|state| state.requests += 1);
        Request(Arc::clone(self))
    }

    /// A container exists from now on.
    pub fn created(&self, container_id: &str) {
        self.with(|state| state.containers.insert(container_id.to_owned()));
    }

    /// A container is gone.
    pub fn deleted(&self, container_id: &str) {
        self.with(|state| state.containers.remove(container_id));
    }

    /// Whether any container exists.
    pub fn has_containers(&self) -> bool {
        self.with(|state| !state.containers.is_empty())
    }

    /// Returns once there has been no container and no request for `limit`.
    pub async fn idle_for(&self, limit: Duration) {
        loop {
            let (busy, last) =
                self.with(|state| (state.requests > 0 || !state.containers.is_empty(), state.last));
            let now = Instant::now();
            if !busy && last + limit <= now {
                return;
            }
            // While busy, look again after `limit`: idleness is counted from the last request's end anyway.
            sleep_until(if busy { now + limit } else { last + limit }).await;
        }
    }

    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        // The state is a set and two numbers: usable even if a thread panicked while holding it.
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        self.0.with(|state| {
            state.requests -= 1;
            state.last = Instant::now();
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::{advance, timeout};

    const LIMIT: Duration = Duration::from_secs(60);

    async fn becomes_idle_within(activity: &Activity, time: Duration) -> bool {
        timeout(time, activity.idle_for(LIMIT)).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn shim_when_unused_becomes_idle() {
        let activity = Activity::new();

        assert!(!becomes_idle_within(&activity, LIMIT - Duration::from_secs(1)).await);
        assert!(becomes_idle_within(&activity, Duration::from_secs(2)).await);
    }

    #[tokio::test(start_paused = true)]
    async fn shim_when_it_has_a_container_is_not_idle() {
        let activity = Activity::new();
        drop(activity.request());
        activity.created("c");
        assert!(!becomes_idle_within(&activity, LIMIT * 10).await);

        drop(activity.request());
        activity.deleted("c");

        assert!(becomes_idle_within(&activity, LIMIT * 2).await);
    }

    #[tokio::test(start_paused = true)]
    async fn shim_when_a_request_is_in_flight_is_not_idle() {
        let activity = Activity::new();
        let request = activity.request();
        advance(LIMIT * 3).await;
        assert!(!becomes_idle_within(&activity, LIMIT).await);

        drop(request);

        assert!(becomes_idle_within(&activity, LIMIT * 2).await);
    }
}
