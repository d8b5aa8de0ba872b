//! What to show when a test fails: the logs of containerd and its shims, and the guests' consoles.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Component, Path, PathBuf};

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
    section(
        "processes of this run",
        &processes_mentioning(&format!("{}/", daemon.dir().display())).join("\n"),
    );
    text
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
    fn tail_of_when_file_is_missing_says_so() {
        assert!(tail_of(Path::new("/nowhere/x"), 0).contains("/nowhere/x"));
    }
}
