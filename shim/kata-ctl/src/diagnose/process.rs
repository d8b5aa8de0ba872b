//! Shims and what they do, from /proc and KVM's counters.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use shim::args::{Action, Args};
use shim::version;

use super::files::{entries, name, text};

/// Between the two looks at a process.
const APART: Duration = Duration::from_secs(1);

/// Most frames of a kernel stack that are shown.
const FRAMES: usize = 6;

/// A running shim.
#[derive(Debug)]
pub struct Shim {
    /// Its process.
    pub pid: u32,
    /// The sandbox it serves.
    pub id: String,
    /// The containerd namespace of the sandbox.
    pub namespace: String,
    /// Its working folder: the bundle of the sandbox' first container.
    pub bundle: PathBuf,
}

impl Shim {
    /// Memory, descriptors and threads.
    pub fn summary(&self, root: &Path) -> String {
        let proc = root.join("proc").join(self.pid.to_string());
        let status = text(&proc.join("status"));
        let wanted = ["State:", "VmRSS:", "RssAnon:", "Threads:"];
        let lines = status
            .lines()
            .filter(|line| wanted.iter().any(|key| line.starts_with(key)));
        let mut lines: Vec<String> = lines.map(|line| line.replace('\t', " ")).collect();
        lines.push(format!("Descriptors: {}", entries(&proc.join("fd")).len()));
        lines.join("\n")
    }
}

/// The serving shims of this host by process id; starters and cleaners, which end by themselves, are left out.
pub fn shims(root: &Path) -> Vec<Shim> {
    let mut found: Vec<Shim> = entries(&root.join("proc"))
        .iter()
        .filter_map(|proc| shim(proc))
        .collect();
    found.sort_by_key(|shim| shim.pid);
    found
}

fn shim(proc: &Path) -> Option<Shim> {
    let pid = name(proc).parse().ok()?;
    let line = fs::read(proc.join("cmdline")).ok()?;
    let mut words = line.split(|byte| *byte == 0).filter(|word| !word.is_empty());
    let program = PathBuf::from(OsString::from_vec(words.next()?.to_vec()));
    if program.file_name()? != version::NAME {
        return None;
    }
    let args = Args::parse(words.map(|word| String::from_utf8_lossy(word).into_owned())).ok()?;
    matches!(args.action, Action::Run).then(|| Shim {
        pid,
        id: args.id,
        namespace: args.namespace,
        bundle: fs::read_link(proc.join("cwd")).unwrap_or_default(),
    })
}

/// What a shim's threads and its VM do: looked at twice, so that busy, waiting and stuck can be told apart.
pub fn activity(root: &Path, pid: u32) -> String {
    let first = snapshot(root, pid);
    sleep(APART);
    let second = snapshot(root, pid);
    let line = |(name, now): (&String, &String)| match first.get(name) {
        Some(before) if before != now => format!("{name}: {before} -> {now}\n"),
        _ => format!("{name}: {now}\n"),
    };
    second.iter().map(line).collect()
}

/// Per thread its state, CPU ticks and kernel stack; KVM's counters that are not zero.
fn snapshot(root: &Path, pid: u32) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for task in entries(&root.join("proc").join(pid.to_string()).join("task")) {
        let title = format!("{} {}", text(&task.join("comm")).trim_end(), name(&task));
        found.insert(title, thread_state(&task));
    }
    let prefix = format!("{pid}-");
    for vm in entries(&root.join("sys/kernel/debug/kvm")) {
        if !name(&vm).starts_with(&prefix) {
            continue;
        }
        let vcpus = entries(&vm).into_iter().filter(|path| path.is_dir());
        for folder in vcpus.chain([vm.clone()]) {
            for counter in entries(&folder).into_iter().filter(|path| path.is_file()) {
                let value = text(&counter).trim().to_owned();
                if !value.is_empty() && value != "0" && !value.contains('\n') {
                    found.insert(format!("{} {}", name(&folder), name(&counter)), value);
                }
            }
        }
    }
    found
}

fn thread_state(task: &Path) -> String {
    let stat = text(&task.join("stat"));
    // Behind the name in brackets: state, ..., utime and stime as the 12th and 13th (proc(5)).
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .collect();
    let field = |index: usize| fields.get(index).copied().unwrap_or("?");
    let stack = text(&task.join("stack"));
    let frames: Vec<&str> = stack
        .lines()
        .filter_map(|line| line.split_whitespace().nth(1))
        .take(FRAMES)
        .collect();
    let frames = frames.join(" < ");
    format!("{} user {} system {} {frames}", field(0), field(11), field(12))
}
