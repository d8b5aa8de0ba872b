//! The namespaces that all containers of the pod share: IPC and UTS.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;

use nix::sched::{CloneFlags, setns, unshare};

/// Open descriptors keep the namespaces alive; no mount is needed, and nothing to clean up.
pub struct Namespaces {
    ipc: File,
    uts: File,
}

impl Namespaces {
    /// Makes both, with `hostname` in the UTS namespace unless empty. A thread of its own goes through them, so the
    /// agent stays where it is.
    ///
    /// # Errors
    /// The kernel lacks one, or the hostname is too long.
    pub fn create(hostname: &str) -> io::Result<Self> {
        on_own_thread(|| {
            unshare(CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)?;
            if !hostname.is_empty() {
                nix::unistd::sethostname(hostname)?;
            }
            let open = |kind| File::open(format!("/proc/thread-self/ns/{kind}"));
            Ok(Self {
                ipc: open("ipc")?,
                uts: open("uts")?,
            })
        })
    }

    /// Changes the pod's hostname.
    ///
    /// # Errors
    /// It is too long.
    pub fn set_hostname(&self, hostname: &str) -> io::Result<()> {
        on_own_thread(|| {
            setns(self.uts.as_fd(), CloneFlags::CLONE_NEWUTS)?;
            Ok(nix::unistd::sethostname(hostname)?)
        })
    }

    /// Runs `work` in both.
    ///
    /// # Errors
    /// Of entering them, and of `work`.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        on_own_thread(|| {
            setns(self.ipc.as_fd(), CloneFlags::CLONE_NEWIPC)?;
            setns(self.uts.as_fd(), CloneFlags::CLONE_NEWUTS)?;
            work()
        })
    }

    /// The IPC namespace, for containers to join.
    pub fn ipc(&self) -> PathBuf {
        path(&self.ipc)
    }

    /// The UTS namespace, for containers to join.
    pub fn uts(&self) -> PathBuf {
        path(&self.uts)
    }
}

/// Readable by the agent's children for as long as the descriptor is open.
pub fn path(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()))
}

/// Runs `work` on a thread that ends with it, whatever namespaces it has gone to.
pub fn on_own_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, work)?;
        thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the namespace thread panicked")))
    })
}
