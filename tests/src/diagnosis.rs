//! What to show when a test fails: the log of containerd and its shims, and what `kata-ctl diagnose` tells of the sandboxes.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::command::run;
use crate::containerd::Containerd;

/// How much of each file is shown, in bytes.
const SHOWN: u64 = 16 << 10;
/// How long `kata-ctl diagnose` may take: it looks at each shim for a second.
const DIAGNOSE_LIMIT: Duration = Duration::from_secs(60);

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
    section("kata-ctl diagnose", &diagnose(daemon));
    let processes = processes_mentioning(&format!("{}/", daemon.dir().display()));
    section("processes of this run", &processes.join("\n"));
    text
}

/// What the operator's tool says of every sandbox on this host.
fn diagnose(daemon: &Containerd) -> String {
    let mut tool = Command::new(daemon.settings.shim_dir.join("kata-ctl"));
    if let Some(config) = &daemon.settings.config {
        tool.arg("--config").arg(config);
    }
    match run(tool.arg("diagnose"), DIAGNOSE_LIMIT) {
        Ok(finished) => finished.out(),
        Err(error) => error.to_string(),
    }
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
    fn tail_of_when_file_is_missing_says_so() {
        assert!(tail_of(Path::new("/nowhere/x"), 0).contains("/nowhere/x"));
    }
}
