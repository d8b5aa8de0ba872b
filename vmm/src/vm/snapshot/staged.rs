//! Files that take their place in a folder when they are complete and on disk.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A save has everything the guest knows.
const FILE_MODE: u32 = 0o600;
const FOLDER_MODE: u32 = 0o700;

/// A file under another name until it is committed; removed if it is not.
#[derive(Debug)]
pub(super) struct Staged {
    file: File,
    temporary: PathBuf,
    target: PathBuf,
    committed: bool,
}

impl Staged {
    /// An empty file, for its owner only, that is to be `target`. What a failed attempt left is replaced.
    pub(super) fn create(target: &Path) -> io::Result<Self> {
        let temporary = target.with_extension("new");
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // Whoever else may write to the folder gets neither an open descriptor nor a link in the way.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(FILE_MODE)
            .open(&temporary)?;
        Ok(Self {
            file,
            temporary,
            target: target.to_owned(),
            committed: false,
        })
    }

    /// To be written.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Waits until the content is on disk. A rename may be there before the content of what was renamed.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    /// Replaces what is at the target.
    pub(super) fn commit(mut self) -> io::Result<()> {
        fs::rename(&self.temporary, &self.target)?;
        self.committed = true;
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.committed
            && let Err(error) = fs::remove_file(&self.temporary)
        {
            tracing::warn!(path = ?self.temporary, %error, "cannot remove an incomplete file");
        }
    }
}

/// Makes the folder `dir`, for its owner only, if there is none, with those above it.
pub(super) fn make_folder(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(FOLDER_MODE).create(dir)?;
    match dir.parent() {
        Some(parent) if parent.as_os_str().is_empty() => sync_folder(Path::new(".")),
        Some(parent) => sync_folder(parent),
        None => Ok(()),
    }
}

/// Waits until the names in `dir` are on disk.
pub(super) fn sync_folder(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn file_when_committed_replaces_and_is_the_owners_only() {
        let dir = TempDir::new_with_prefix("/tmp/dragonball-staged").unwrap();
        let folder = dir.as_path().join("a/b");
        make_folder(&folder).unwrap();
        make_folder(&folder).unwrap();
        assert_eq!((mode(&folder), mode(&dir.as_path().join("a"))), (0o700, 0o700));
        let target = folder.join("state");
        fs::write(&target, b"old").unwrap();
        // A link somebody left where the file is written first.
        let elsewhere = dir.as_path().join("elsewhere");
        fs::write(&elsewhere, b"precious").unwrap();
        symlink(&elsewhere, folder.join("state.new")).unwrap();
        let staged = Staged::create(&target).unwrap();
        staged.file().write_all(b"new").unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"old");
        staged.sync().unwrap();
        staged.commit().unwrap();
        sync_folder(&folder).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"new");
        assert_eq!(mode(&target), 0o600);
        assert_eq!(fs::read(&elsewhere).unwrap(), b"precious");
    }

    #[test]
    fn file_when_not_committed_is_gone() {
        let dir = TempDir::new_with_prefix("/tmp/dragonball-staged").unwrap();
        let target = dir.as_path().join("memory");
        fs::write(&target, b"old").unwrap();
        drop(Staged::create(&target).unwrap());
        assert_eq!(fs::read_dir(dir.as_path()).unwrap().count(), 1);
        assert_eq!(fs::read(&target).unwrap(), b"old");
    }
}
