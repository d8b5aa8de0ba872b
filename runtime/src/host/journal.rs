//! What has to be undone when a sandbox ends, written down before it is done.
//!
//! Each line of `/run/kata/<sandbox>/journal` is one [`Undo`] as JSON. A shim that ends properly replays its own list;
//! after a crash `delete` replays it. Replaying is idempotent: undoing what never happened is fine.
//!
//! A living shim holds a lock (flock(2)) on its journal, which the kernel gives back with the process: a journal that can
//! be locked is a dead shim's. Nobody else ever replays one that cannot.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::netns::Netns;
use super::{cgroup, link, mounts};

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
    /// Remove this network link.
    DeleteLink {
        /// Its namespace.
        netns: Netns,
        /// Its name.
        link: String,
    },
    /// Take the ingress qdisc, with its filters, off this network link.
    DeleteIngress {
        /// Its namespace.
        netns: Netns,
        /// Its name.
        link: String,
        /// Its index: another one of this name is left alone.
        index: u32,
    },
}

impl Undo {
    /// Undoes it. Blocks. Idempotent.
    ///
    /// # Errors
    /// One line: what could not be undone, and why.
    pub fn run(&self) -> Result<(), String> {
        match self {
            Self::Unmount(path) => mounts::unmount(path).map_err(|error| error.to_string()),
            Self::RemoveFile(path) => mounts::remove_file(path).map_err(|error| error.to_string()),
            Self::RemoveTree(path) => mounts::remove_tree(path).map_err(|error| error.to_string()),
            Self::RemoveCgroup(path) => {
                cgroup::remove(path).map_err(|error| format!("cgroup {}: {error}", path.display()))
            }
            Self::DeleteLink { netns, link } => link::delete(netns, link).map_err(|error| error.to_string()),
            Self::DeleteIngress { netns, link, index } => {
                link::delete_ingress(netns, link, *index).map_err(|error| error.to_string())
            }
        }
    }
}

/// How long a shim that is being killed may take to give its lock back.
const DYING: Duration = Duration::from_millis(1000);

/// How often a journal may vanish between its opening and its locking before that is no coincidence.
const VANISHED: u32 = 100;

/// A journal that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The shim that writes it lives.
    #[error("journal {}: the shim that writes it is alive", .0.display())]
    InUse(PathBuf),
    /// A file operation failed.
    #[error("{what} journal {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// The journal.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Something is left; everything else has been undone.
    #[error("journal {}: not undone: {}", path.display(), left.join("; "))]
    Left {
        /// The journal.
        path: PathBuf,
        /// What could not be undone, and why.
        left: Vec<String>,
    },
}

impl From<JournalError> for crate::error::Error {
    fn from(error: JournalError) -> Self {
        use crate::error::ErrorKind;
        let kind = match &error {
            JournalError::InUse(_) => ErrorKind::AlreadyExists,
            JournalError::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                ErrorKind::ResourceExhausted
            }
            JournalError::Io { .. } | JournalError::Left { .. } => ErrorKind::Internal,
        };
        Self::new(kind, error.to_string())
    }
}

/// The open journal of a living sandbox.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    /// Locked as long as it is open.
    file: Mutex<File>,
}

impl Journal {
    /// Opens and locks the journal at `path`, making its folder. What a dead shim has left there is undone first.
    ///
    /// # Errors
    /// [`JournalError::InUse`] when a living shim has it, [`JournalError::Left`] when what a dead one left cannot be
    /// undone, otherwise what creating the file said.
    pub fn open(path: &Path) -> Result<Self, JournalError> {
        let failed = |what| move |source| io_error(what, path, source);
        for _ in 0..VANISHED {
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder).map_err(failed("make the folder of"))?;
            }
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .open(path);
            let Some(journal) = Self::lock(path, file.map_err(failed("open"))?, Duration::ZERO)? else {
                continue;
            };
            if journal.read()?.is_empty() {
                return Ok(journal);
            }
            // What a crashed shim of the same sandbox left; its `delete` may not have run.
            tracing::warn!(journal = %path.display(), "state of an earlier sandbox is cleaned up");
            journal.replay()?;
            // Usually gone with its folder.
            mounts::remove_file(path)
                .map_err(|error| failed("remove")(io::Error::other(error.to_string())))?;
        }
        Err(io_error("lock", path, io::ErrorKind::Interrupted.into()))
    }

    /// Takes the lock within `patience`; `None` when `file` is no longer what is at `path`.
    fn lock(path: &Path, file: File, patience: Duration) -> Result<Option<Self>, JournalError> {
        let deadline = Instant::now() + patience;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(10));
                }
                Err(TryLockError::WouldBlock) => return Err(JournalError::InUse(path.to_owned())),
                Err(TryLockError::Error(source)) => return Err(io_error("lock", path, source)),
            }
        }
        let mine = file
            .metadata()
            .map_err(|source| io_error("look at", path, source))?;
        let current =
            fs::metadata(path).is_ok_and(|there| (there.dev(), there.ino()) == (mine.dev(), mine.ino()));
        Ok(current.then(|| Self {
            path: path.to_owned(),
            file: Mutex::new(file),
        }))
    }

    /// Writes `undo` down. Call it before doing what it undoes.
    ///
    /// # Errors
    /// [`JournalError::Io`]; do not go on then.
    pub fn record(&self, undo: &Undo) -> Result<(), JournalError> {
        let failed = |source| io_error("write", &self.path, source);
        let line = line_of(undo).map_err(failed)?;
        let mut file = self.file();
        let before = file.seek(SeekFrom::End(0)).map_err(failed)?;
        // One write: a crash leaves at most one torn line, the last. A full /run must not leave one in the middle.
        file.write_all(&line).map_err(|source| {
            if let Err(error) = file.set_len(before) {
                tracing::error!(journal = %self.path.display(), %error, "torn line stays");
            }
            failed(source)
        })
    }

    /// Strikes the last record of `undo` out, which has been done: a sandbox that lives for long keeps no list of all it ever
    /// had. A record that stays is no harm, it is only undone once more; so there is nothing to be told but the log.
    pub fn strike(&self, undo: &Undo) {
        if let Err(error) = self.try_strike(undo) {
            tracing::warn!(journal = %self.path.display(), %error, ?undo, "what has been undone stays in the journal");
        }
    }

    fn try_strike(&self, undo: &Undo) -> io::Result<()> {
        let line = line_of(undo)?;
        let mut file = self.file();
        let mut bytes = read_all(&mut file)?;
        let Some(start) = last_line(&bytes, &line) else {
            return Ok(());
        };
        // Overwritten where it is: whatever a crash leaves of that, all other lines are whole.
        if let Some(struck) = bytes.get_mut(start..start + line.len()) {
            struck.fill(b'\n');
        }
        let last = bytes.iter().rposition(|byte| *byte != b'\n');
        // With its line feed.
        let end = last.map_or(0, |last| last + 2).min(bytes.len());
        if start < end {
            file.write_all_at(&vec![b'\n'; line.len()], start as u64)?;
        }
        file.set_len(end as u64)
    }

    /// Undoes everything, last first. The journal itself is left: the last entries usually remove its folder.
    ///
    /// # Errors
    /// [`JournalError::Left`] naming what could not be undone; everything else has been.
    pub fn replay(&self) -> Result<(), JournalError> {
        let left: Vec<String> = entries(&self.path, &self.read()?)
            .iter()
            .rev()
            .filter_map(|undo| undo.run().err())
            .collect();
        if left.is_empty() {
            return Ok(());
        }
        Err(JournalError::Left {
            path: self.path.clone(),
            left,
        })
    }

    /// All of it, through the open descriptor: the file may have lost its name.
    fn read(&self) -> Result<Vec<u8>, JournalError> {
        read_all(&mut self.file()).map_err(|source| io_error("read", &self.path, source))
    }

    fn file(&self) -> std::sync::MutexGuard<'_, File> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Undoes what the journal of a dead shim at `path` lists, last first. Fine when there is no journal. Blocks for a second
/// at most when its shim is still dying.
///
/// # Errors
/// [`JournalError::InUse`] when the shim is alive: nothing has been undone then. Otherwise as [`Journal::replay`].
pub fn replay(path: &Path) -> Result<(), JournalError> {
    replay_after(path, || ())
}

/// As [`replay`], with `before` called first: when it is certain that the shim is dead, and nothing has been undone yet.
///
/// # Errors
/// As [`replay`].
pub fn replay_after(path: &Path, before: impl FnOnce()) -> Result<(), JournalError> {
    let file = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(io_error("open", path, source)),
    };
    match Journal::lock(path, file, DYING)? {
        Some(journal) => {
            before();
            journal.replay()
        }
        // Its shim has undone everything itself in the meantime.
        None => Ok(()),
    }
}

/// As it is in the file.
pub(crate) fn line_of(undo: &Undo) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(undo)?;
    line.push(b'\n');
    Ok(line)
}

/// Where the last line that equals `line` begins.
fn last_line(bytes: &[u8], line: &[u8]) -> Option<usize> {
    let mut start = 0;
    let mut found = None;
    for other in bytes.split_inclusive(|byte| *byte == b'\n') {
        if other == line {
            found = Some(start);
        }
        start += other.len();
    }
    found
}

fn read_all(file: &mut File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn io_error(what: &'static str, path: &Path, source: io::Error) -> JournalError {
    let path = path.to_owned();
    JournalError::Io { what, path, source }
}

/// The entries of a journal that can be read, in the order they were written.
pub(crate) fn entries(path: &Path, bytes: &[u8]) -> Vec<Undo> {
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
    fn replay_when_run_undoes_the_last_first() {
        let (folder, journal) = journal();
        let tree = folder.path().join("tree");
        let (source, target) = (folder.path().join("source"), tree.join("mnt"));
        fs::create_dir_all(&source).unwrap();
        fs::write(source.join("kept"), "x").unwrap();
        journal.record(&Undo::RemoveTree(tree.clone())).unwrap();
        fs::create_dir_all(&target).unwrap();
        journal.record(&Undo::Unmount(target.clone())).unwrap();
        crate::host::bind::bind(&source, &target, crate::host::bind::Bind::tree()).unwrap();

        journal.replay().unwrap();

        assert!(!tree.exists());
        assert!(source.join("kept").exists());
    }

    #[test]
    fn replay_when_repeated_or_needless_is_fine() {
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
    fn journal_when_its_last_line_is_torn_keeps_the_others() {
        let (folder, journal) = journal();
        let file = folder.path().join("file");
        fs::write(&file, "x").unwrap();
        journal.record(&Undo::RemoveFile(file.clone())).unwrap();
        journal.file().write_all(b"{\"undo\":\"unmount\",\"pa").unwrap();

        journal.replay().unwrap();

        assert!(!file.exists());
    }

    #[test]
    fn record_when_struck_out_is_not_undone_and_takes_no_room() {
        let (folder, journal) = journal();
        let [kept, struck, last] = ["kept", "struck", "last"].map(|name| folder.path().join(name));
        for path in [&kept, &struck, &last] {
            fs::write(path, "x").unwrap();
            journal.record(&Undo::RemoveFile(path.clone())).unwrap();
        }
        // Twice there, once struck out: the other one counts.
        journal.record(&Undo::RemoveFile(kept.clone())).unwrap();
        let before = journal.read().unwrap().len();

        journal.strike(&Undo::RemoveFile(struck.clone()));
        journal.strike(&Undo::RemoveFile(folder.path().join("never")));
        assert_eq!(journal.read().unwrap().len(), before, "in the middle");
        journal.strike(&Undo::RemoveFile(kept.clone()));
        journal.strike(&Undo::RemoveFile(last.clone()));

        let bytes = journal.read().unwrap();
        let left = entries(Path::new("journal"), &bytes);
        assert_eq!(left, [Undo::RemoveFile(kept.clone())]);
        assert_eq!(bytes, line_of(&Undo::RemoveFile(kept.clone())).unwrap());
        journal.record(&Undo::RemoveFile(last.clone())).unwrap();
        journal.replay().unwrap();
        assert!(struck.exists() && !kept.exists() && !last.exists());
    }

    #[test]
    fn journal_when_things_come_and_go_does_not_grow() {
        let (folder, journal) = journal();
        let always = Undo::RemoveFile(folder.path().join("always"));
        journal.record(&always).unwrap();
        let before = journal.read().unwrap();
        for number in 0..100 {
            let undo = ["tap", "ingress"]
                .map(|name| Undo::RemoveFile(format!("/nonexistent/{name}{number}").into()));
            undo.iter().for_each(|undo| journal.record(undo).unwrap());
            undo.iter().rev().for_each(|undo| journal.strike(undo));
        }
        assert_eq!(journal.read().unwrap(), before);
        journal.strike(&always);
        assert_eq!(journal.read().unwrap(), b"");
    }

    #[test]
    fn replay_when_something_stays_names_it_and_goes_on() {
        let (folder, journal) = journal();
        let (file, directory) = (folder.path().join("file"), folder.path().join("directory"));
        fs::write(&file, "x").unwrap();
        fs::create_dir(&directory).unwrap();
        journal.record(&Undo::RemoveFile(file.clone())).unwrap();
        journal.record(&Undo::RemoveFile(directory.clone())).unwrap();

        let Err(JournalError::Left { left, .. }) = journal.replay() else {
            panic!("a folder is no file");
        };

        assert_eq!(left.len(), 1);
        assert!(left[0].contains(&directory.display().to_string()), "{left:?}");
        assert!(!file.exists());
    }

    #[test]
    fn journal_when_its_shim_lives_is_neither_opened_nor_replayed() {
        let (folder, journal) = journal();
        let (path, file) = (folder.path().join("state/journal"), folder.path().join("file"));
        fs::write(&file, "x").unwrap();
        journal.record(&Undo::RemoveFile(file.clone())).unwrap();

        assert!(matches!(Journal::open(&path), Err(JournalError::InUse(_))));
        assert!(matches!(replay(&path), Err(JournalError::InUse(_))));
        assert!(file.exists());

        // As when the process ends.
        drop(journal);
        replay(&path).unwrap();
        assert!(!file.exists());
    }

    #[test]
    fn journal_when_its_shim_is_dead_is_undone_before_a_new_one() {
        let (folder, journal) = journal();
        let state = folder.path().join("state");
        journal.record(&Undo::RemoveTree(state.clone())).unwrap();
        fs::write(state.join("left"), "x").unwrap();
        drop(journal);

        let journal = Journal::open(&state.join("journal")).unwrap();

        assert!(!state.join("left").exists());
        assert_eq!(journal.read().unwrap(), b"");
        assert!(matches!(
            Journal::open(&state.join("journal")),
            Err(JournalError::InUse(_))
        ));
    }

    #[test]
    fn journal_when_the_file_system_is_full_has_no_torn_line() {
        let folder = tempfile::tempdir().unwrap();
        let small = crate::types::Mount {
            fs_type: "tmpfs".into(),
            source: "tmpfs".into(),
            options: vec!["size=4k".into()],
            ..Default::default()
        };
        mounts::mount_request(&small, folder.path()).unwrap();
        let journal = Journal::open(&folder.path().join("journal")).unwrap();
        let never = Undo::RemoveFile(folder.path().join("never"));

        let written = (0..1000).take_while(|_| journal.record(&never).is_ok()).count();

        assert!((1..1000).contains(&written), "{written}");
        let bytes = journal.read().unwrap();
        assert_eq!(bytes.last(), Some(&b'\n'));
        assert_eq!(entries(Path::new("journal"), &bytes).len(), written);
        drop(journal);
        mounts::unmount(folder.path()).unwrap();
    }
}
