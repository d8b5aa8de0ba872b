//! The host before and after: what a runtime must not leave behind.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::command::eventually;
use crate::containerd::Containerd;
use crate::diagnosis::{entries, processes_mentioning};

/// How long cleaning up may take after the last visible step.
const SETTLE_LIMIT: Duration = Duration::from_secs(60);

/// Folders that a runtime makes once, for all containers.
const FIXED: [&str; 2] = [
    "/run/kata-containers/shared",
    "/run/kata-containers/shared/sandboxes",
];

/// Everything on the host that a container could have added to, one item a line.
#[derive(Debug)]
pub struct Host(BTreeSet<String>);

impl Host {
    /// Looks at the host now.
    pub fn look(daemon: &Containerd) -> Self {
        let mut items = BTreeSet::new();
        let mut add = |kind: &str, what: &str| items.insert(format!("{kind} {what}"));
        // Other users of this machine come and go; ours have our folder on the command line.
        let run = format!("{}/", daemon.dir().display());
        for process in processes_mentioning(&run) {
            // The command line alone: `ctr events` of a running test is there before and after.
            add("process", &process);
        }
        for shim in processes_mentioning(&daemon.settings.shim_name()) {
            if shim.contains(daemon.namespace()) {
                add("process", &shim);
            }
        }
        for line in fs::read_to_string("/proc/self/mountinfo")
            .unwrap_or_default()
            .lines()
        {
            if let Some(point) = line.split(' ').nth(4) {
                add("mount", point);
            }
        }
        for interface in entries(Path::new("/sys/class/net")) {
            add("interface", &interface.display().to_string());
        }
        for namespace in entries(Path::new("/run/netns")) {
            add("network namespace", &namespace.display().to_string());
        }
        for device in entries(Path::new("/sys/block")) {
            let file = fs::read_to_string(device.join("loop/backing_file"));
            if let Ok(file) = file {
                add("loop device", &format!("{} of {}", device.display(), file.trim()));
            }
        }
        for folder in [
            "/run/containerd/s",
            "/run/kata",
            "/run/kata-containers",
            "/run/vc",
        ] {
            walk(Path::new(folder), 6, &mut |path| {
                if FIXED.iter().any(|fixed| path == Path::new(fixed)) {
                    return;
                }
                add("file", &path.display().to_string());
            });
        }
        walk(Path::new("/sys/fs/cgroup"), 8, &mut |path| {
            let text = path.display().to_string();
            if path.is_dir() && (text.contains(daemon.namespace()) || text.contains("kata")) {
                add("cgroup", &text);
            }
        });
        // The namespace's own folders stay as long as containerd runs.
        for folder in [
            "state/io.containerd.runtime.v2.task",
            "root/io.containerd.runtime.v2.task",
            "state/io.containerd.sandbox.controller.v1.shim",
            "root/io.containerd.sandbox.controller.v1.shim",
        ] {
            for bundle in entries(&daemon.dir().join(folder).join(daemon.namespace())) {
                add("bundle", &bundle.display().to_string());
            }
        }
        Self(items)
    }

    /// What is there now and was not before.
    pub fn added_since(&self, before: &Self) -> Vec<String> {
        // A namespace's parent cgroup (and kata's) is made once for all containers and is not per container.
        let parent = |item: &&String| item.starts_with("cgroup ") && !has_child_name(item);
        self.0
            .difference(&before.0)
            .filter(|item| !parent(item))
            .cloned()
            .collect()
    }
}

/// Whether a cgroup is below the namespace's parent group, and so belongs to one container.
fn has_child_name(item: &str) -> bool {
    let path = item.trim_start_matches("cgroup ");
    let deepest = path.rsplit('/').next().unwrap_or_default();
    !(deepest.starts_with("e2e-") || deepest == "kata" || deepest == "kata_overhead")
}

/// Waits for the host to look as before, and returns what was added all the same.
pub fn added(daemon: &Containerd, before: &Host) -> Vec<String> {
    let mut added = Vec::new();
    eventually(SETTLE_LIMIT, || {
        added = Host::look(daemon).added_since(before);
        added.is_empty()
    });
    added
}

/// Calls `visit` for everything below `dir`, at most `depth` levels down, without following links.
fn walk(dir: &Path, depth: usize, visit: &mut impl FnMut(&Path)) {
    if depth == 0 {
        return;
    }
    for path in entries(dir) {
        visit(&path);
        if path.is_dir() && !path.is_symlink() {
            walk(&path, depth - 1, visit);
        }
    }
}
