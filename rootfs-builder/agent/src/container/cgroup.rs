//! A container's cgroup (version 2).

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::Pid;
use tokio::time::{Instant, sleep};

use super::CGROUP_PARENT;
use crate::init::CGROUP_ROOT;
use crate::signal::Signal;

/// How long an emptied cgroup may still count its dying processes.
const REMOVAL_TRIES: u32 = 100;
const REMOVAL_INTERVAL: Duration = Duration::from_millis(10);
/// How long processes are waited for to stand still before all of them are signalled; one that is stuck in the kernel
/// can fork as little as a frozen one.
const HOLD_PATIENCE: Duration = Duration::from_secs(1);
const HOLD_POLL: Duration = Duration::from_millis(1);
/// Cgroups below a container's that are looked into. A container can only make more to waste the agent's time.
const MAX_CGROUPS: usize = 4096;

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

    /// Kills every process in it, and in the cgroups below, also those that are being forked meanwhile.
    pub fn kill_all(&self) {
        if std::fs::write(self.file("cgroup.kill"), "1").is_ok() {
            return;
        }
        // Linux before 5.14. Until nobody new is found, because processes fork.
        let mut killed = std::collections::HashSet::new();
        loop {
            let before = killed.len();
            for pid in self.processes() {
                killed.insert(pid);
                // Gone since the file was read.
                let _ = Signal::KILL.send(pid);
            }
            if killed.len() == before {
                return;
            }
        }
    }

    /// Calls `signal` once for every process in it, and in the cgroups below, while they stand still: what a process
    /// does when it is signalled is not signalled itself. Leaves a paused container paused.
    pub async fn signal_all(&self, mut signal: impl FnMut(Pid)) {
        let switch = self.file("cgroup.freeze");
        let paused = std::fs::read_to_string(&switch).is_ok_and(|state| state.trim() == "1");
        if !paused && std::fs::write(&switch, "1").is_ok() {
            let deadline = Instant::now() + HOLD_PATIENCE;
            while !self.is_frozen() && Instant::now() < deadline {
                sleep(HOLD_POLL).await;
            }
        }
        self.processes().into_iter().for_each(&mut signal);
        if !paused && let Err(error) = std::fs::write(&switch, "0") {
            tracing::debug!("thaw after a signal: {error}");
        }
    }

    /// Whether everything in it stands still.
    pub(super) fn is_frozen(&self) -> bool {
        self.table("cgroup.events").get("frozen") == Some(&1)
    }

    /// The processes in it and in the cgroups below.
    fn processes(&self) -> Vec<Pid> {
        let mut pids = Vec::new();
        for folder in self.tree() {
            // A missing file is a cgroup that is gone, and everything in it.
            let text = std::fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
            pids.extend(
                text.lines()
                    .filter_map(|line| line.parse().ok())
                    .map(Pid::from_raw),
            );
        }
        pids
    }

    /// Its folder and those below, parents before children.
    fn tree(&self) -> Vec<PathBuf> {
        let mut folders = vec![self.path.clone()];
        let mut next = 0;
        while let Some(folder) = folders.get(next).cloned() {
            next += 1;
            let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
            let below = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            folders.extend(below.map(|entry| entry.path()));
            folders.truncate(MAX_CGROUPS);
        }
        folders
    }

    /// Removes it, with what containers may have made below. Blocks while the kernel buries the last processes.
    pub fn remove(&self) -> Result<(), CgroupError> {
        let mut tries = REMOVAL_TRIES;
        loop {
            match self.remove_tree() {
                Ok(()) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) && tries > 0 => {
                    tries -= 1;
                    self.kill_all();
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
    /// Files of a cgroup cannot be unlinked; the folders go, deepest first.
    fn remove_tree(&self) -> io::Result<()> {
        loop {
            let folders = self.tree();
            for folder in folders.iter().rev() {
                match std::fs::remove_dir(folder) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
            if folders.len() < MAX_CGROUPS {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder tree in the shape of a cgroup's.
    fn cgroup(name: &str) -> Cgroup {
        let path = std::env::temp_dir().join(format!("agent-{name}-{}", std::process::id()));
        std::fs::create_dir_all(path.join("below/deeper")).unwrap();
        Cgroup { path }
    }

    #[tokio::test]
    async fn signal_when_for_all_reaches_the_cgroups_below_and_thaws() {
        let cgroup = cgroup("signal-all");
        for (folder, pids) in [("", "11\n12\n"), ("below", ""), ("below/deeper", "13\n")] {
            std::fs::write(cgroup.path.join(folder).join("cgroup.procs"), pids).unwrap();
        }
        std::fs::write(cgroup.file("cgroup.events"), "populated 1\nfrozen 1\n").unwrap();

        for (before, after) in [("0", "0"), ("1\n", "1\n")] {
            std::fs::write(cgroup.file("cgroup.freeze"), before).unwrap();
            let mut signalled = Vec::new();
            cgroup.signal_all(|pid| signalled.push(pid.as_raw())).await;
            assert_eq!(signalled, [11, 12, 13]);
            assert_eq!(
                std::fs::read_to_string(cgroup.file("cgroup.freeze")).unwrap(),
                after
            );
        }
        std::fs::remove_dir_all(&cgroup.path).unwrap();
    }

    #[test]
    fn tree_when_removed_goes_with_everything_below() {
        let cgroup = cgroup("remove");

        cgroup.remove().unwrap();

        assert!(!cgroup.path.exists());
        cgroup.remove().unwrap();
    }
}
