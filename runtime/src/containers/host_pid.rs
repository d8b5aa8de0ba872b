//! The pid that stands for a container on the host.
//!
//! Its processes live in the guest, but containerd, OCI hooks and monitoring ask for a pid and look into `/proc/PID`: above
//! all at `/proc/PID/ns/net`, where a CNI plugin that a hook starts (nerdctl's `createRuntime`) puts the interfaces. The
//! shim's own pid would lead them into the host's network. So each container has a thread of the shim's that sleeps in
//! the pod's network namespace: the kernel shows a thread in `/proc` by its id as it does a process, and takes it away
//! with the shim, however that ends. A signal to it is one to the whole shim.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::{Builder, JoinHandle};

use nix::sched::{CloneFlags, setns, unshare};

use crate::error::{Error, ErrorKind, Result};

/// The thread only sleeps. Nothing of it is touched but what the standard library needs to begin a thread.
const STACK: usize = 128 << 10;
/// Its name, as `ps -L` shows it: 15 bytes at most.
const NAME: &str = "container";

/// A parked thread of this process; dropping it ends the thread.
#[derive(Debug)]
pub struct HostPid {
    tid: u32,
    /// The thread waits for this to be dropped.
    wake: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Which network namespace the thread sleeps in.
enum Netns {
    /// That of the thread it is started from: the shim's.
    Inherited,
    At(PathBuf),
    New,
}

impl HostPid {
    /// Parks a thread in the network namespace at `netns`; `None` leaves it in the shim's. Blocks for a moment.
    ///
    /// # Errors
    /// Naming the namespace that cannot be entered.
    pub fn park(netns: Option<&Path>) -> Result<Self> {
        Self::park_in(netns.map_or(Netns::Inherited, |path| Netns::At(path.to_owned())))
    }

    /// Parks a thread in a new network namespace that has nothing but a loopback. It lives as long as this thread, or
    /// anybody else in it, does: see [`Self::netns`].
    ///
    /// # Errors
    /// When there is no new namespace to be had.
    pub fn park_in_new_netns() -> Result<Self> {
        Self::park_in(Netns::New)
    }

    fn park_in(netns: Netns) -> Result<Self> {
        let (report, parked) = mpsc::channel();
        let (wake, asleep) = mpsc::channel();
        let thread = Builder::new().name(NAME.into()).stack_size(STACK);
        let thread = thread.spawn(move || {
            let entered = netns.enter().map(|()| nix::unistd::gettid().as_raw());
            let parked = entered.is_ok();
            // The receiver waits for it.
            let _ = report.send(entered);
            if parked {
                // Always the error: nobody sends anything, the sender is dropped.
                let _ = asleep.recv();
            }
        });
        let thread = thread.map_err(|error| {
            Error::new(ErrorKind::ResourceExhausted, format!("host pid: thread: {error}"))
        })?;
        let tid = parked.recv().unwrap_or_else(|_| {
            let message = "host pid: the thread ended before it was parked".to_owned();
            Err(Error::new(ErrorKind::Internal, message))
        })?;
        Ok(Self {
            // The kernel's ids are positive.
            tid: tid.unsigned_abs(),
            wake: Some(wake),
            thread: Some(thread),
        })
    }

    /// Its id, good for `/proc/ID` and as the pid of a process.
    pub fn tid(&self) -> u32 {
        self.tid
    }

    /// Where its network namespace can be opened, as long as it is parked.
    pub fn netns(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.tid).into()
    }
}

impl Netns {
    fn enter(self) -> Result<()> {
        let failed = |what: &str, error: io::Error| {
            let kind = match error.kind() {
                io::ErrorKind::NotFound => ErrorKind::NotFound,
                // What setns(2) says to a file that is no network namespace.
                io::ErrorKind::InvalidInput => ErrorKind::InvalidArgument,
                io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
                io::ErrorKind::StorageFull => ErrorKind::ResourceExhausted,
                _ => ErrorKind::Internal,
            };
            Error::new(kind, format!("network namespace{what}: {error}"))
        };
        match self {
            Self::Inherited => Ok(()),
            Self::At(path) => File::open(&path)
                .and_then(|file| setns(file, CloneFlags::CLONE_NEWNET).map_err(io::Error::from))
                .map_err(|error| failed(&format!(" {}", path.display()), error)),
            // ENOSPC when the host has as many as it may have (user.max_net_namespaces).
            Self::New => unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| failed("", errno.into())),
        }
    }
}

impl Drop for HostPid {
    fn drop(&mut self) {
        drop(self.wake.take());
        if let Some(thread) = self.thread.take() {
            // It has nothing to do but to end; a panic there is impossible and would have aborted.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn namespace(path: impl AsRef<Path>) -> u64 {
        std::fs::metadata(path).unwrap().ino()
    }

    #[test]
    fn pid_when_parked_without_a_namespace_shows_the_shims() {
        let pid = HostPid::park(None).unwrap();

        assert_ne!(pid.tid(), std::process::id());
        assert_eq!(namespace(pid.netns()), namespace("/proc/self/ns/net"));
        let comm = std::fs::read_to_string(format!("/proc/{}/comm", pid.tid())).unwrap();
        assert_eq!(comm.trim_end(), NAME);
    }

    #[test]
    fn pid_when_parked_in_a_namespace_shows_it_and_changes_nobody_elses() {
        let own = namespace("/proc/thread-self/ns/net");
        let first = HostPid::park_in_new_netns().unwrap();
        let second = HostPid::park(Some(&first.netns())).unwrap();

        assert_ne!(namespace(first.netns()), own);
        assert_eq!(namespace(second.netns()), namespace(first.netns()));
        assert_eq!(namespace("/proc/thread-self/ns/net"), own);

        // The namespace stays with the one that is left.
        let inode = namespace(first.netns());
        drop(first);
        assert_eq!(namespace(second.netns()), inode);
    }

    #[test]
    fn pid_when_dropped_is_no_thread_of_the_shim_any_more() {
        let pid = HostPid::park(None).unwrap();
        let task = format!("/proc/self/task/{}", pid.tid());
        assert!(Path::new(&task).exists());
        drop(pid);

        // Joined, the thread has nothing more to run; the kernel takes its entry away when it gets to it.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while Path::new(&task).exists() {
            assert!(std::time::Instant::now() < deadline, "{task} is still there");
            std::thread::yield_now();
        }
    }

    #[test]
    fn namespace_when_it_cannot_be_entered_is_named() {
        let missing = HostPid::park(Some(Path::new("/nonexistent/netns"))).unwrap_err();
        assert_eq!(missing.kind, ErrorKind::NotFound);
        assert!(
            missing.message.contains("network namespace /nonexistent/netns"),
            "{missing}"
        );

        let file = tempfile::NamedTempFile::new().unwrap();
        let other = HostPid::park(Some(file.path())).unwrap_err();
        assert_eq!(other.kind, ErrorKind::InvalidArgument);
        assert!(
            other.message.contains(&file.path().display().to_string()),
            "{other}"
        );
    }
}
