//! What the agent does because it is PID 1: mounts, modules, loopback, limits, and powering the machine off.
//!
//! All of it happens before the first thread starts, and in an order: modules before anything needs their devices,
//! the new root before the first container.

#![allow(unsafe_code)]

mod modules;
mod mounts;
mod power;
mod root;

use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

pub use mounts::CGROUP_ROOT;
pub use power::{install_panic_hook, power_off};

const SEARCH_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Open files for the agent and, unless their spec says otherwise, for containers.
const MAX_OPEN_FILES: libc::rlim_t = 1 << 20;

/// A step of the machine's set-up that failed. Only [`prepare`]'s mounts are fatal; the rest is a warning.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// A directory of the root could not be made.
    #[error("create directory {path}: {source}")]
    Directory {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A mount failed.
    #[error("mount {fstype} on {target}: {source}")]
    Mount {
        /// Filesystem type, or the kind of mount.
        fstype: &'static str,
        /// Mount point.
        target: PathBuf,
        /// Why not.
        source: nix::Error,
    },
    /// The new root could not become `/`.
    #[error("switch to the new root: {0}")]
    SwitchRoot(nix::Error),
    /// A kernel module did not load.
    #[error("load kernel module {path}: {source}")]
    Module {
        /// The module's file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file of the kernel could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A system call on no file.
    #[error("{call}: {source}")]
    Call {
        /// What was tried.
        call: &'static str,
        /// Why not.
        source: nix::Error,
    },
}

/// Turns a freshly booted kernel into a machine that containers can run on. Returns the kernel command line, and
/// what went wrong without being fatal.
///
/// # Errors
/// One of the mounts every container needs failed.
pub fn prepare() -> Result<(String, Vec<InitError>), InitError> {
    let mut warnings = modules::load_listed();
    root::build_and_enter()?;
    warnings.extend(mounts::enable_cgroup_controllers().err());
    warnings.extend(loopback_up().err());
    warnings.extend(raise_open_files().err());
    let hostname = nix::unistd::sethostname("localhost");
    warnings.extend(hostname.err().map(|source| InitError::Call {
        call: "sethostname",
        source,
    }));
    // SAFETY: no other thread exists yet that could read the environment.
    unsafe { std::env::set_var("PATH", SEARCH_PATH) };
    Ok((read(Path::new("/proc/cmdline"))?, warnings))
}

fn loopback_up() -> Result<(), InitError> {
    let failed = |source| InitError::Call {
        call: "bring up lo",
        source,
    };
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .map_err(failed)?;
    // SAFETY: an all-zero `ifreq` is valid: an empty name and a zero union.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo\0") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads one `ifreq`, which outlives the call; the descriptor is open.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request) };
    nix::errno::Errno::result(result).map(drop).map_err(failed)
}

fn raise_open_files() -> Result<(), InitError> {
    let limit = libc::rlimit {
        rlim_cur: MAX_OPEN_FILES,
        rlim_max: MAX_OPEN_FILES,
    };
    // SAFETY: setrlimit reads one `rlimit`, which outlives the call.
    let result = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) };
    nix::errno::Errno::result(result)
        .map(drop)
        .map_err(|source| InitError::Call {
            call: "setrlimit(RLIMIT_NOFILE)",
            source,
        })
}

fn read(path: &Path) -> Result<String, InitError> {
    std::fs::read_to_string(path).map_err(|source| InitError::File {
        path: path.to_owned(),
        source,
    })
}
