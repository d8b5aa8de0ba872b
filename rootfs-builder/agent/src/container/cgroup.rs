//! A container's cgroup (version 2).

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::CGROUP_PARENT;
use crate::init::CGROUP_ROOT;

/// How long an emptied cgroup may still count its dying processes.
const REMOVAL_TRIES: u32 = 100;
const REMOVAL_INTERVAL: Duration = Duration::from_millis(10);

/// A cgroup operation that failed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The folder stays.
    #[error("remove cgroup {path}: {source}")]
    Remove {
        /// Its folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Where a container's processes are counted and limited.
#[derive(Clone)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// The cgroup of container `id`.
    pub fn of(id: &str) -> Self {
        let relative = CGROUP_PARENT.trim_start_matches('/');
        Self {
            path: Path::new(CGROUP_ROOT).join(relative).join(id),
        }
    }

    /// Makes the folder all containers' cgroups are in. libcontainer would, too, but fails when two containers are made at
    /// once and both find it missing.
    ///
    /// # Errors
    /// The parent's path and why it cannot be made.
    pub(super) fn make_parent(&self) -> Result<(), (PathBuf, io::Error)> {
        let parent = self.path.parent().unwrap_or(&self.path);
        std::fs::create_dir_all(parent).map_err(|source| (parent.to_owned(), source))
    }

    /// A file of it.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Its path below the hierarchy's root, as libcgroups wants it.
    pub(super) fn relative(&self) -> PathBuf {
        let relative = self.path.strip_prefix(CGROUP_ROOT).unwrap_or(&self.path);
        Path::new("/").join(relative)
    }

    /// A cgroup elsewhere.
    #[cfg(test)]
    pub(super) fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Signals every process in it. SIGKILL catches processes that fork meanwhile, too.
    pub fn signal_all(&self, signal: Signal) {
        if signal == Signal::SIGKILL && std::fs::write(self.path.join("cgroup.kill"), "1").is_ok() {
            return;
        }
        // A missing file is a cgroup that is gone, and everything in it.
        let processes = std::fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default();
        for pid in processes
            .lines()
            .filter_map(|line| line.parse().ok())
            .filter(|pid| *pid > 0)
        {
            // Gone since the file was read.
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }

    /// Removes it, with what containers may have made below. Blocks while the kernel buries the last processes.
    pub fn remove(&self) -> Result<(), CgroupError> {
        let mut tries = REMOVAL_TRIES;
        loop {
            match remove_tree(&self.path) {
                Ok(()) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) && tries > 0 => {
                    tries -= 1;
                    self.signal_all(Signal::SIGKILL);
                    std::thread::sleep(REMOVAL_INTERVAL);
                }
                Err(source) => {
                    return Err(CgroupError::Remove {
                        path: self.path.clone(),
                        source,
                    });
                }
            }
        }
    }
}

/// Files of a cgroup cannot be unlinked; the folders go, deepest first.
fn remove_tree(path: &Path) -> io::Result<()> {
    let entries = match std::fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    match std::fs::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
