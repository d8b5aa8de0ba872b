//! Opening KVM and creating a VM, with errors a person can act on.

use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use kvm_bindings::KVM_CLOCK_REALTIME;
use kvm_ioctls::{Cap, Kvm, VmFd};

/// The device node.
pub const DEVICE: &str = "/dev/kvm";
const API_VERSION: i32 = 12;
/// Attempts at KVM_CREATE_VM while it says EINTR.
const CREATE_ATTEMPTS: u32 = 5;

/// KVM cannot be used at all.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// No device node: no virtualization, or the module is not loaded.
    #[error("{0}: no such device: this host has no KVM (is the kvm module loaded, virtualization enabled?)")]
    Missing(PathBuf),
    /// The user may not open it.
    #[error("{0}: permission denied: the process needs read and write access to KVM")]
    Permission(PathBuf),
    /// Anything else.
    #[error("{path}: {source}")]
    Open {
        /// The device.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// A KVM too old or too new.
    #[error("{path}: KVM API version {version}, need 12")]
    Version {
        /// The device.
        path: PathBuf,
        /// Reported version.
        version: i32,
    },
}

/// A KVM request failed.
#[derive(Debug, thiserror::Error)]
#[error("{ioctl}: {source}")]
pub struct IoctlError {
    /// The ioctl.
    pub ioctl: &'static str,
    /// Cause.
    pub source: io::Error,
}

/// Opens [`DEVICE`].
///
/// # Errors
/// [`KvmError`] tells a missing device, a lack of permission and a wrong version apart.
pub fn open() -> Result<Kvm, KvmError> {
    let path = Path::new(DEVICE).to_owned();
    // kvm-ioctls takes a C string; the path is constant.
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Missing(path.clone()),
        libc::EACCES | libc::EPERM => KvmError::Permission(path.clone()),
        errno => KvmError::Open {
            path: path.clone(),
            source: io::Error::from_raw_os_error(errno),
        },
    })?;
    match kvm.get_api_version() {
        API_VERSION => Ok(kvm),
        version => Err(KvmError::Version { path, version }),
    }
}

/// Creates a VM. KVM_CREATE_VM can say EINTR without a signal being meant for it (mm_take_all_locks gives up when any
/// is pending), so it is tried again.
///
/// # Errors
/// [`IoctlError`].
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, IoctlError> {
    let mut attempt = 0;
    loop {
        attempt += 1;
        match kvm.create_vm() {
            Ok(vm) => return Ok(vm),
            Err(error) if error.errno() == libc::EINTR && attempt < CREATE_ATTEMPTS => {}
            Err(error) => return Err(ioctl_error("KVM_CREATE_VM")(error)),
        }
    }
}

/// CLOCK_REALTIME in ns, 0 before 1970.
pub fn realtime_ns() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(u64::MAX))
}

/// Whether KVM_SET_CLOCK adds the time that has passed since the clock was read (Linux 5.16).
pub fn adjusts_clock(kvm: &Kvm) -> bool {
    let flags = kvm.check_extension_int(Cap::AdjustClock);
    flags > 0 && flags as u32 & KVM_CLOCK_REALTIME != 0
}

/// Turns an errno into a [`IoctlError`] that names the request.
pub fn ioctl_error(ioctl: &'static str) -> impl Fn(kvm_ioctls::Error) -> IoctlError {
    move |error| IoctlError {
        ioctl,
        source: io::Error::from_raw_os_error(error.errno()),
    }
}
