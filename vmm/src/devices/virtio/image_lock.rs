//! Locks on image files: many readers or one writer, by open file description (F_OFD_SETLK, fcntl(2)), so the lock lasts
//! as long as the file is open and dies with the process.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// How long a taken lock is tried for. A process that forks holds a copy of every descriptor until it executes, also of
/// those closed meanwhile: a lock that was just given up may seem taken for a moment.
const PATIENCE: Duration = Duration::from_millis(200);
const PAUSE: Duration = Duration::from_millis(5);

/// Locks all of `file` for reading, or for writing. False when another virtual machine or process has it.
///
/// # Errors
/// The file system has no locks.
pub fn lock(file: &File, read_only: bool) -> io::Result<bool> {
    let kind = if read_only { libc::F_RDLCK } else { libc::F_WRLCK };
    // SAFETY: all-zero is a valid `flock`: the whole file, pid 0 as open file description locks require.
    let mut range: libc::flock64 = unsafe { std::mem::zeroed() };
    range.l_type = kind as i16;
    range.l_whence = libc::SEEK_SET as i16;
    let end = Instant::now() + PATIENCE;
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
        assert!(lock(&open(), false).unwrap());
        later.join().unwrap();
    }
}
