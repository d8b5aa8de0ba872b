//! What to show when a test fails: the logs of containerd and its shims, the guests' consoles, and
//! what the shims' threads and VMs are doing.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use crate::containerd::Containerd;

/// How much of each file is shown, in bytes.
const SHOWN: u64 = 16 << 10;

/// The end of a file as text, but nothing before `from` bytes.
pub fn tail_of(path: &Path, from: u64) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(from.max(length.saturating_sub(SHOWN))))?;
        let mut bytes = Vec::new();
        file.take(SHOWN).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    read().unwrap_or_else(|e| format!("({}: {e})", path.display()))
}

/// The files a pattern names; `*` stands for one whole path component.
pub fn glob(pattern: &str) -> Vec<PathBuf> {
    let mut found = vec![PathBuf::new()];
    for part in Path::new(pattern).components() {
        found = match part {
            Component::Normal(name) if name == "*" => found.iter().flat_map(|dir| entries(dir)).collect(),
            part => found
                .iter()
                .map(|path| path.join(part))
                .filter(|path| path.exists())
                .collect(),
        };
    }
    found
}

/// The entries of a folder, sorted; none when it cannot be read.
pub fn entries(dir: &Path) -> Vec<PathBuf> {
    let mut paths = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect::<Vec<_>>();
    paths.sort();
    paths
}

/// Writes past libtest's capture, so that a skip or a hang is seen at once.
pub fn say(text: &str) {
    // Nothing is left to do when standard error is closed.
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Everything known about a failure, as text; the daemon's log is shown from `log_start` on.
pub fn report(daemon: &Containerd, log_start: u64) -> String {
    let mut text = String::new();
    let mut section = |title: &str, body: &str| {
        text.push_str(&format!("---- {title}\n{}\n", body.trim_end()));
    };
    section("containerd and shim log", &tail_of(&daemon.log(), log_start));
    for console in glob(&daemon.settings.console_glob) {
        section(
            &format!("guest console {}", console.display()),
            &tail_of(&console, 0),
        );
    }
    let processes = processes_mentioning(&format!("{}/", daemon.dir().display()));
    section("processes of this run", &processes.join("\n"));
    for process in &processes {
        let (pid, command) = process.split_once(' ').unwrap_or_default();
        if command.contains(&daemon.settings.shim_name()) {
            section(
                &format!("threads and KVM counters of {pid}, twice"),
                &activity(pid),
            );
        }
    }
    text
}

/// What a shim's threads and its VM do: looked at twice, so that busy, waiting and stuck can be told apart.
fn activity(pid: &str) -> String {
    let first = snapshot(pid);
    std::thread::sleep(Duration::from_secs(1));
    let second = snapshot(pid);
    let mut text = String::new();
    for (name, now) in &second {
        match first.get(name) {
            Some(before) if before != now => text.push_str(&format!("{name}: {before} -> {now}\n")),
            _ => text.push_str(&format!("{name}: {now}\n")),
        }
    }
    text
}

/// Per thread its state, CPU ticks and kernel stack; KVM's counters that are not zero.
fn snapshot(pid: &str) -> BTreeMap<String, String> {
    let text = |path: PathBuf| fs::read_to_string(path).unwrap_or_default();
    let mut found = BTreeMap::new();
    for task in entries(&Path::new("/proc").join(pid).join("task")) {
        let name = format!("{} {}", text(task.join("comm")).trim_end(), file_name(&task));
        let stat = text(task.join("stat"));
        // Behind the name in brackets: state, ..., utime and stime as the 12th and 13th (proc(5)).
        let fields = stat.rsplit(')').next().unwrap_or_default();
        let fields = fields.split_whitespace().collect::<Vec<_>>();
        let field = |index: usize| fields.get(index).copied().unwrap_or("?");
        let stack = text(task.join("stack"));
        let frames = stack.lines().filter_map(|line| line.split_whitespace().nth(1));
        let frames = frames.take(6).collect::<Vec<_>>().join(" < ");
        let state = format!("{} user {} system {} {frames}", field(0), field(11), field(12));
        found.insert(name, state);
    }
    let vms = entries(Path::new("/sys/kernel/debug/kvm")).into_iter();
    for vm in vms.filter(|vm| file_name(vm).split('-').next() == Some(pid)) {
        let vcpus = entries(&vm).into_iter().filter(|path| path.is_dir());
        for folder in vcpus.chain([vm.clone()]) {
            for counter in entries(&folder).into_iter().filter(|path| path.is_file()) {
                let value = text(counter.clone()).trim().to_owned();
                if !value.is_empty() && value != "0" && !value.contains('\n') {
                    found.insert(format!("{} {}", file_name(&folder), file_name(&counter)), value);
                }
            }
        }
    }
    found
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// `pid command line` of each process whose command line holds `text`.
pub fn processes_mentioning(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for proc in entries(Path::new("/proc")) {
        let Some(pid) = proc
            .file_name()
            .and_then(|n| n.to_str())
            .filter(|n| n.parse::<u32>().is_ok())
        else {
            continue;
        };
        let Ok(line) = fs::read(proc.join("cmdline")) else {
            continue;
        };
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(text) {
            found.push(format!("{pid} {}", line.trim_end()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn glob_when_component_is_star_lists_the_folder() {
        let found = glob("/proc/*/cmdline");
        assert!(found.contains(&PathBuf::from(format!("/proc/{}/cmdline", std::process::id()))));
        assert!(glob("/nowhere/*/x").is_empty());
    }

    #[test]
    fn activity_shows_every_thread() {
        let text = activity(&std::process::id().to_string());
        assert!(text.contains(": S ") || text.contains(": R "), "{text}");
    }

    #[test]
    fn tail_of_when_file_is_missing_says_so() {
        assert!(tail_of(Path::new("/nowhere/x"), 0).contains("/nowhere/x"));
    }
}
