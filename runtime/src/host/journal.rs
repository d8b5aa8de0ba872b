//! What has to be undone when a sandbox ends, written down before it is done.
//!
//! Each line of `/run/kata/<sandbox>/journal` is one [`Undo`] as JSON. A shim that ends properly replays its own list;
//! after a crash `delete` replays it. Replaying is idempotent: undoing what never happened is fine.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::{cgroup, mounts};

/// One thing to undo.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "undo", content = "path", rename_all = "snake_case")]
pub enum Undo {
    /// Unmount what is mounted here.
    Unmount(PathBuf),
    /// Remove this file.
    RemoveFile(PathBuf),
    /// Unmount everything below this folder, then remove it.
    RemoveTree(PathBuf),
    /// Move what runs in this cgroup to its parent, then remove it.
    RemoveCgroup(PathBuf),
}

impl Undo {
    fn run(&self) -> Result<(), String> {
        match self {
            Self::Unmount(path) => mounts::unmount(path).map_err(|error| error.to_string()),
            Self::RemoveFile(path) => mounts::remove_file(path).map_err(|error| error.to_string()),
            Self::RemoveTree(path) => mounts::remove_tree(path).map_err(|error| error.to_string()),
            Self::RemoveCgroup(path) => {
                cgroup::remove(path).map_err(|error| format!("cgroup {}: {error}", path.display()))
            }
        }
    }
}

/// The open journal of a living sandbox.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: Mutex<File>,
}

impl Journal {
    /// Opens the journal at `path`, making its folder.
    ///
    /// # Errors
    /// What creating the file said.
    pub fn open(path: &Path) -> io::Result<Self> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        Ok(Self {
            path: path.to_owned(),
            file: Mutex::new(file),
        })
    }

    /// Writes `undo` down. Call it before doing what it undoes.
    ///
    /// # Errors
    /// What writing said; do not go on then.
    pub fn record(&self, undo: &Undo) -> io::Result<()> {
        let mut line = serde_json::to_vec(undo)?;
        line.push(b'\n');
        // One write: a crash leaves at most one torn line, the last.
        self.file
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write_all(&line)
    }

    /// Undoes everything, last first. The journal itself is left: the last entries usually remove its folder.
    ///
    /// # Errors
    /// What could not be undone, one line each; everything else has been.
    pub fn replay(&self) -> Result<(), Vec<String>> {
        replay(&self.path)
    }
}

/// Undoes what the journal at `path` lists, last first. Fine when there is no journal.
///
/// # Errors
/// What could not be undone, one line each; everything else has been.
pub fn replay(path: &Path) -> Result<(), Vec<String>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(vec![format!("journal {}: {error}", path.display())]),
    };
    let errors: Vec<String> = entries(path, &bytes)
        .iter()
        .rev()
        .filter_map(|undo| undo.run().err())
        .collect();
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

fn entries(path: &Path, bytes: &[u8]) -> Vec<Undo> {
    let mut entries = Vec::new();
    for (number, line) in bytes
        .split(|byte| *byte == b'\n')
        .enumerate()
        .filter(|(_, line)| !line.is_empty())
    {
        match serde_json::from_slice(line) {
            Ok(undo) => entries.push(undo),
            // A crash in the middle of a write: what the line was about has not been done.
            Err(error) => {
                tracing::warn!(journal = %path.display(), line = number + 1, %error, "journal entry skipped");
            }
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal() -> (tempfile::TempDir, Journal) {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(&folder.path().join("state/journal")).unwrap();
        (folder, journal)
    }

    #[test]
    fn replay_undoes_everything_last_first() {
        let (folder, journal) = journal();
        let tree = folder.path().join("tree");
        let (source, target) = (folder.path().join("source"), tree.join("mnt"));
        fs::create_dir_all(&source).unwrap();
        fs::write(source.join("kept"), "x").unwrap();
        journal.record(&Undo::RemoveTree(tree.clone())).unwrap();
        fs::create_dir_all(&target).unwrap();
        journal.record(&Undo::Unmount(target.clone())).unwrap();
        mounts::bind(&source, &target, false).unwrap();

        journal.replay().unwrap();

        assert!(!tree.exists());
        assert!(source.join("kept").exists());
    }

    #[test]
    fn replay_is_idempotent_and_needs_nothing_done() {
        let (folder, journal) = journal();
        journal
            .record(&Undo::RemoveFile(folder.path().join("never")))
            .unwrap();
        journal
            .record(&Undo::Unmount(folder.path().join("never")))
            .unwrap();
        journal
            .record(&Undo::RemoveTree(folder.path().join("never")))
            .unwrap();
        journal
            .record(&Undo::RemoveCgroup("/sys/fs/cgroup/never-made-by-anyone".into()))
            .unwrap();

        journal.replay().unwrap();
        journal.replay().unwrap();
        replay(&folder.path().join("no-such-journal")).unwrap();
    }

    #[test]
    fn torn_last_line_does_not_hide_the_others() {
        let (folder, journal) = journal();
        let file = folder.path().join("file");
        fs::write(&file, "x").unwrap();
        journal.record(&Undo::RemoveFile(file.clone())).unwrap();
        journal
            .file
            .lock()
            .unwrap()
            .write_all(b"{\"undo\":\"unmount\",\"pa")
            .unwrap();

        journal.replay().unwrap();

        assert!(!file.exists());
    }

    #[test]
    fn what_cannot_be_undone_is_named_and_the_rest_goes_on() {
        let (folder, journal) = journal();
        let (file, directory) = (folder.path().join("file"), folder.path().join("directory"));
        fs::write(&file, "x").unwrap();
        fs::create_dir(&directory).unwrap();
        journal.record(&Undo::RemoveFile(file.clone())).unwrap();
        journal.record(&Undo::RemoveFile(directory.clone())).unwrap();

        let errors = journal.replay().unwrap_err();

        assert_eq!(errors.len(), 1);
        assert!(errors[0].contains(&directory.display().to_string()), "{errors:?}");
        assert!(!file.exists());
    }
}
