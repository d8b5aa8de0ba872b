//! The "first output" mark of the timeline, without touching the way of the bytes: inotify tells of a write to the
//! FIFO, whoever makes it. Only with a timeline; otherwise nothing happens here.

use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use crate::timeline;

/// Milliseconds after which nobody cares any more.
const GIVE_UP: u16 = 60_000;

/// Marks the first write to `path`, in the background.
pub(super) fn watch(path: &str) {
    if !timeline::is_enabled() || !path.starts_with('/') {
        return;
    }
    let watched = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
        .and_then(|inotify| inotify.add_watch(path, AddWatchFlags::IN_MODIFY).map(|_| inotify));
    match watched {
        Ok(inotify) => {
            std::thread::spawn(move || {
                let mut fds = [PollFd::new(inotify.as_fd(), PollFlags::POLLIN)];
                if poll(&mut fds, PollTimeout::from(GIVE_UP)).is_ok_and(|ready| ready > 0) {
                    timeline::mark("first output");
                }
            });
        }
        Err(error) => tracing::debug!(path, %error, "no mark for the first output"),
    }
}
