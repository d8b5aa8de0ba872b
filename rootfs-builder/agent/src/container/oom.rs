//! Tells when the kernel kills a container's process for memory: `memory.events` changes, and inotify says so.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::time::sleep;

use super::cgroup::Cgroup;

/// A container that has its processes killed over and over is told of this often.
const INTERVAL: Duration = Duration::from_secs(1);

/// Containers of which the host is to be told; each at most once until it has been. Cheap to clone.
#[derive(Clone, Default)]
pub struct OomNotices {
    waiting: Arc<Mutex<VecDeque<String>>>,
    added: Arc<Notify>,
}

impl OomNotices {
    /// Adds a container.
    pub fn add(&self, id: &str) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if !waiting.iter().any(|known| known == id) {
            waiting.push_back(id.to_owned());
            self.added.notify_one();
        }
    }

    /// The one that waits longest. Of several callers each container reaches one.
    pub async fn next(&self) -> String {
        loop {
            let added = self.added.notified();
            let oldest = self
                .waiting
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .pop_front();
            if let Some(id) = oldest {
                // Another caller may sleep while there is more.
                self.added.notify_one();
                return id;
            }
            added.await;
        }
    }
}

/// Adds `id` to `killed` when the count of kills has changed, until the cgroup is gone.
pub async fn watch(cgroup: Cgroup, id: String, killed: OomNotices) {
    if let Err(error) = follow(&cgroup, &id, &killed).await {
        tracing::warn!(container = id, "memory events are not watched: {error}");
    }
}

async fn follow(cgroup: &Cgroup, id: &str, killed: &OomNotices) -> io::Result<()> {
    let notifier = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    match notifier.add_watch(&cgroup.file("memory.events"), AddWatchFlags::IN_MODIFY) {
        // No memory controller: nothing is limited, so nothing is killed.
        Err(nix::Error::ENOENT) => return Ok(()),
        watched => drop(watched?),
    }
    let mut known = cgroup.oom_kills();
    // SAFETY: an Inotify keeps its descriptor open and the same for as long as it is registered.
    let notifier = unsafe { AsyncFd::register(Notifier(notifier))? };
    loop {
        let mut ready = notifier.readable().await?;
        let events = match ready.try_io(|notifier| Ok(notifier.get_ref().0.read_events()?)) {
            Ok(events) => events?,
            Err(_would_block) => continue,
        };
        let kills = cgroup.oom_kills();
        if kills > known {
            known = kills;
            killed.add(id);
            sleep(INTERVAL).await;
        }
        if events
            .iter()
            .any(|event| event.mask.contains(AddWatchFlags::IN_IGNORED))
        {
            return Ok(());
        }
    }
}

/// What the event loop wants to see of an [`Inotify`].
struct Notifier(Inotify);

impl AsRawFd for Notifier {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn notice_when_added_again_before_it_is_taken_is_one() {
        let notices = OomNotices::default();
        for id in ["one", "two", "one", "one"] {
            notices.add(id);
        }

        assert_eq!(notices.next().await, "one");
        assert_eq!(notices.next().await, "two");
        let waiter = tokio::spawn({
            let notices = notices.clone();
            async move { notices.next().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        notices.add("three");
        assert_eq!(waiter.await.unwrap(), "three");
    }
}
