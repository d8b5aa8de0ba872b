//! Files and block devices that are the content of a device: opened, and locked for as long as they are open.
//!
//! Many readers or one writer, by open file description (F_OFD_SETLK, fcntl(2)), so the lock lasts as long as the file is
//! open and dies with the process.

#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use super::config::OpenErrorKind;

/// A file that cannot be the content of a device.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It cannot be opened.
    #[error("cannot open {path:?} {}: {source}", mode(*read_only))]
    Open {
        /// The file.
        path: PathBuf,
        /// Without writing.
        read_only: bool,
        /// Cause.
        source: io::Error,
    },
    /// Neither a regular file nor a block device.
    #[error("{path:?} is neither a regular file nor a block device")]
    Type {
        /// The file.
        path: PathBuf,
    },
    /// Somebody else writes it, or uses it while we want to write it.
    #[error("{path:?} is in use by another virtual machine or process")]
    Locked {
        /// The file.
        path: PathBuf,
    },
}

impl ImageError {
    /// What can be done about it.
    pub fn kind(&self) -> OpenErrorKind {
        match self {
            Self::Open { source, .. } => OpenErrorKind::of(source),
            Self::Type { .. } => OpenErrorKind::Unfit,
            Self::Locked { .. } => OpenErrorKind::Busy,
        }
    }
}

fn mode(read_only: bool) -> &'static str {
    if read_only { "read-only" } else { "read-write" }
}

/// Opens and locks `path` for `device` (its id, for logs). A file system without locks is only warned about.
///
/// # Errors
/// [`ImageError`].
pub fn open(device: &str, path: &Path, read_only: bool) -> Result<File, ImageError> {
    let path = || path.to_owned();
    let failed = |source| ImageError::Open {
        path: path(),
        read_only,
        source,
    };
    let file = open_without_waiting(&path(), read_only).map_err(failed)?;
    let file_type = file.metadata().map_err(failed)?.file_type();
    if !file_type.is_file() && !file_type.is_block_device() {
        return Err(ImageError::Type { path: path() });
    }
    match lock(&file, read_only) {
        Ok(true) => {}
        Ok(false) => return Err(ImageError::Locked { path: path() }),
        Err(error) => {
            tracing::warn!(device, path = ?path(), %error, "the file system of an image has no locks");
        }
    }
    Ok(file)
}

fn open_without_waiting(path: &Path, read_only: bool) -> io::Result<File> {
    // O_NONBLOCK: opening a FIFO by mistake must not hang.
    let file = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    // It must not stay: io_uring answers EAGAIN on such a file where it would have to wait for the disk.
    let flags = rustix::fs::fcntl_getfl(&file)?;
    rustix::fs::fcntl_setfl(&file, flags & !OFlags::NONBLOCK)?;
    Ok(file)
}

/// Size of `file` now, in bytes. Works for block devices, whose metadata has no size; moves the file's position, which nobody
/// uses.
///
/// # Errors
/// What the kernel said.
pub fn size(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

/// How long a taken lock is tried for. A process that forks holds a copy of every descriptor until it executes, also of
/// those closed meanwhile: a lock that was just given up may seem taken for a moment.
const PATIENCE: Duration = Duration::from_millis(200);
const PAUSE: Duration = Duration::from_millis(5);

/// Locks all of `file` for reading, or for writing. False when another virtual machine or process has it.
fn lock(file: &File, read_only: bool) -> io::Result<bool> {
    lock_within(file, read_only, PATIENCE)
}

fn lock_within(file: &File, read_only: bool, patience: Duration) -> io::Result<bool> {
    let kind = if read_only { libc::F_RDLCK } else { libc::F_WRLCK };
    // SAFETY: all-zero is a valid `flock`: the whole file, pid 0 as open file description locks require.
    let mut range: libc::flock64 = unsafe { std::mem::zeroed() };
    range.l_type = kind as i16;
    range.l_whence = libc::SEEK_SET as i16;
    let end = Instant::now() + patience;
    loop {
        // SAFETY: `range` outlives the call, the descriptor is open.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw mut range) } == 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) if Instant::now() < end => std::thread::sleep(PAUSE),
            Some(libc::EAGAIN | libc::EACCES) => return Ok(false),
            _ => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::tempfile::TempFile;

    use super::*;

    #[test]
    fn lock_when_given_up_meanwhile_is_taken_and_else_refused() {
        let file = TempFile::new().unwrap();
        let open = || {
            let file = File::options().read(true).write(true).open(file.as_path());
            file.unwrap()
        };
        let first = open();
        assert!(lock(&first, true).unwrap());
        assert!(lock(&open(), true).unwrap());
        assert!(!lock(&open(), false).unwrap());
        let later = std::thread::spawn(move || {
            std::thread::sleep(PAUSE);
            drop(first);
        });
        assert!(lock_within(&open(), false, Duration::from_secs(60)).unwrap());
        later.join().unwrap();
    }
}
