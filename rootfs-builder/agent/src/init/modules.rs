//! Kernel modules of a stock kernel: the image carries them uncompressed, with a list in load order.

#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use super::InitError;

/// Written by rootfs-builder: one path per line, relative to the release's folder, dependencies first.
const LIST: &str = "agent.load";
const NO_PARAMETERS: &CStr = c"";

/// Loads every listed module of the running kernel. An image without modules has no list: nothing to do.
/// A module that does not load is reported and skipped: what misses its driver fails later, and says so.
pub fn load_listed() -> Vec<InitError> {
    let release = match nix::sys::utsname::uname() {
        Ok(name) => name.release().to_owned(),
        Err(source) => {
            return vec![InitError::Call {
                call: "uname",
                source,
            }];
        }
    };
    let folder = Path::new("/lib/modules").join(release);
    let list = match std::fs::read_to_string(folder.join(LIST)) {
        Ok(list) => list,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(source) => {
            return vec![InitError::File {
                path: folder.join(LIST),
                source,
            }];
        }
    };
    list.lines()
        .filter(|line| !line.is_empty())
        .filter_map(|line| load(&folder.join(line)).err())
        .collect()
}

fn load(path: &Path) -> Result<(), InitError> {
    let failed = |source| InitError::Module {
        path: PathBuf::from(path),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    // SAFETY: the descriptor is open and the parameter string is NUL-terminated and static.
    let result = unsafe {
        libc::syscall(
            libc::SYS_finit_module,
            file.as_raw_fd(),
            NO_PARAMETERS.as_ptr(),
            0,
        )
    };
    match io::Error::last_os_error() {
        _ if result == 0 => Ok(()),
        // Built in, or loaded already.
        error if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        error => Err(failed(error)),
    }
}
