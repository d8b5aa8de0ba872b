//! Cgroups of the host: finding the hierarchies, moving this process into a cgroup, removing one.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

const ROOT: &str = "/sys/fs/cgroup";

/// How long a cgroup may stay busy after its processes have left it.
const BUSY: Duration = Duration::from_secs(2);

const BUSY_PAUSE: Duration = Duration::from_millis(2);

/// Roots of the host's hierarchies: the one of cgroup v2, or one for every controller of v1.
pub fn hierarchies() -> Vec<PathBuf> {
    hierarchies_in(Path::new(ROOT))
}

fn hierarchies_in(root: &Path) -> Vec<PathBuf> {
    if root.join("cgroup.controllers").exists() {
        return vec![root.to_owned()];
    }
    let entries = fs::read_dir(root)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()));
    // `cpu` and `cpuacct` are links to `cpu,cpuacct`; one way to each hierarchy is enough.
    let mut found: Vec<PathBuf> = entries
        .filter(|path| {
            path.symlink_metadata().is_ok_and(|m| m.is_dir()) && path.join("cgroup.procs").exists()
        })
        .collect();
    found.sort();
    found
}

/// Creates the cgroup `folder`, with the levels above it, and moves this process into it.
///
/// # Errors
/// What the kernel said.
pub fn join(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    // A v1 cpuset is unusable until it has processors and nodes.
    for file in ["cpuset.cpus", "cpuset.mems"] {
        inherit(folder, file)?;
    }
    fs::write(folder.join("cgroup.procs"), std::process::id().to_string())
}

/// Copies `file` from the parent, in every level that has none; only where the file exists (v1).
fn inherit(folder: &Path, file: &str) -> io::Result<()> {
    let path = folder.join(file);
    if folder.join("cgroup.controllers").exists()
        || !path.exists()
        || !fs::read_to_string(&path)?.trim().is_empty()
    {
        return Ok(());
    }
    if let Some(parent) = folder.parent().filter(|parent| parent.join(file).exists()) {
        inherit(parent, file)?;
        fs::write(&path, fs::read_to_string(parent.join(file))?)?;
    }
    Ok(())
}

/// Moves every process of the cgroup `folder` to its parent (or the root) and removes it. Fine when it does not exist.
///
/// A thread that has ended for `join` may not have left its cgroup yet (kernel/exit.c: it wakes its joiner in
/// `exit_mm`, long before `cgroup_exit`), and one that is ending is not moved with its process: the kernel answers
/// EBUSY until it is gone. So the removal is tried again, for [`BUSY`] at most.
///
/// # Errors
/// What the kernel said.
pub fn remove(folder: &Path) -> io::Result<()> {
    remove_within(folder, BUSY)
}

fn remove_within(folder: &Path, patience: Duration) -> io::Result<()> {
    let start = Instant::now();
    loop {
        match try_remove(folder) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && start.elapsed() < patience => {
                thread::sleep(BUSY_PAUSE);
            }
            done => return done,
        }
    }
}

fn try_remove(folder: &Path) -> io::Result<()> {
    let processes = match fs::read_to_string(folder.join("cgroup.procs")) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        // ENODEV: the cgroup was removed under us.
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(()),
        Err(error) => return Err(error),
    };
    for pid in processes.lines() {
        if let Err(error) = leave(folder, pid) {
            tracing::debug!(pid, cgroup = %folder.display(), %error, "process does not leave the cgroup");
        }
    }
    match fs::remove_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The nearest ancestor that takes the process; cgroup v2 allows processes only in leaves and in the root.
fn leave(folder: &Path, pid: &str) -> io::Result<()> {
    let mut result = Ok(());
    for ancestor in folder
        .ancestors()
        .skip(1)
        .take_while(|ancestor| ancestor.join("cgroup.procs").exists())
    {
        result = fs::write(ancestor.join("cgroup.procs"), pid);
        if result.is_ok() {
            break;
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_when_v1_are_one_per_controller() {
        let root = tempfile::tempdir().unwrap();
        for controller in ["cpu,cpuacct", "memory", "not-a-hierarchy"] {
            fs::create_dir(root.path().join(controller)).unwrap();
        }
        for controller in ["cpu,cpuacct", "memory"] {
            fs::write(root.path().join(controller).join("cgroup.procs"), "").unwrap();
        }
        std::os::unix::fs::symlink("cpu,cpuacct", root.path().join("cpu")).unwrap();
        assert_eq!(
            hierarchies_in(root.path()),
            [root.path().join("cpu,cpuacct"), root.path().join("memory")]
        );

        fs::write(root.path().join("cgroup.controllers"), "").unwrap();
        assert_eq!(hierarchies_in(root.path()), [root.path()]);
    }

    #[test]
    fn busy_cgroup_is_removed_when_it_is_free() {
        let hierarchy = hierarchies()
            .pop()
            .expect("a cgroup hierarchy below /sys/fs/cgroup");
        let folder = hierarchy.join(format!("dragonball-test-{}", std::process::id()));
        let child = folder.join("child");
        fs::create_dir_all(&child).unwrap();
        assert_eq!(
            try_remove(&folder).unwrap_err().kind(),
            io::ErrorKind::ResourceBusy
        );

        let release = thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            fs::remove_dir(child)
        });
        remove_within(&folder, Duration::from_secs(60)).unwrap();
        release.join().unwrap().unwrap();
        assert!(!folder.exists());
    }
}
