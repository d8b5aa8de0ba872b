//! Tells when the kernel kills a container's process for memory: `memory.events` changes, and inotify says so.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

use super::cgroup::Cgroup;

/// Sends `id` for each change in the count of kills, until the cgroup is gone or nobody listens. A full queue
/// already says that the host is behind; one notice more would tell it nothing.
pub async fn watch(cgroup: Cgroup, id: String, killed: mpsc::Sender<String>) {
    if let Err(error) = follow(&cgroup, &id, &killed).await {
        tracing::warn!(container = id, "memory events are not watched: {error}");
    }
}

async fn follow(cgroup: &Cgroup, id: &str, killed: &mpsc::Sender<String>) -> io::Result<()> {
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
        if kills > known
            && killed
                .try_send(id.to_owned())
                .is_err_and(|error| matches!(error, mpsc::error::TrySendError::Closed(_)))
        {
            return Ok(());
        }
        known = known.max(kills);
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
