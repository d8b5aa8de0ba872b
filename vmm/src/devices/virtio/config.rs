//! What all devices' configurations have in common: an id, values that can be wrong, and how they become a device.

use std::fmt::Debug;
use std::io;
use std::os::fd::OwnedFd;

use super::device::VirtioDevice;
use crate::memory::window::Windows;
use crate::rate_limiter::{BucketConfigError, RateLimiterConfig};

/// The configuration of one device. Each is in its device's folder; [`DeviceConfig`](crate::config::DeviceConfig) is one of
/// them all.
pub trait Knobs {
    /// Device id, unique in the VM.
    fn id(&self) -> &str;

    /// Checks everything that can be checked without touching the host.
    ///
    /// # Errors
    /// The first knob with a value it cannot have.
    fn validate(&self) -> Result<(), KnobError>;

    /// Opens what the device needs from the host.
    ///
    /// # Errors
    /// What is wrong; it names the device.
    fn open(&self) -> Result<Box<dyn Opened>, OpenError>;

    /// As [`open`](Self::open), for a device whose host side was handed over open: the queues of a TAP.
    ///
    /// # Errors
    /// What is wrong with them, or that the device takes none.
    fn adopt(&self, _fds: Vec<OwnedFd>) -> Result<Box<dyn Opened>, OpenError> {
        let id = self.id().to_owned();
        Err(OpenError::new(OpenErrorKind::Unfit, TakesNoDescriptors { id }))
    }
}

/// A knob of a device has a value it cannot have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("device {id:?}: {knob} is {value}: need {need}")]
pub struct KnobError {
    /// Device id.
    pub id: String,
    /// Name of the knob, e.g. `queue_size`.
    pub knob: String,
    /// The value.
    pub value: String,
    /// What it could be instead.
    pub need: String,
}

impl KnobError {
    /// `value` of `knob` of the device `id` should be `need`.
    pub fn new(id: &str, knob: &str, value: &dyn Debug, need: impl Into<String>) -> Self {
        Self {
            id: id.to_owned(),
            knob: knob.to_owned(),
            value: format!("{value:?}"),
            need: need.into(),
        }
    }

    /// Checks the limiter `knob` of the device `id`.
    ///
    /// # Errors
    /// The first bucket that could never hold or never gain a token.
    pub fn check_limiter(id: &str, knob: &str, limiter: &RateLimiterConfig) -> Result<(), Self> {
        limiter.validate().map_err(|error| {
            let BucketConfigError {
                bucket,
                size,
                refill_time_ms,
            } = error;
            Self {
                id: id.to_owned(),
                knob: format!("{knob}.{bucket}"),
                value: format!("size {size}, refill_time_ms {refill_time_ms}"),
                need: "1 or more of both (leave the bucket out for no limit)".to_owned(),
            }
        })
    }
}

/// A device cannot be made; the message names it, the object that is wrong and its value.
#[derive(Debug, thiserror::Error)]
#[error("{source}")]
pub struct OpenError {
    kind: OpenErrorKind,
    source: Box<dyn std::error::Error + Send + Sync>,
}

impl OpenError {
    /// An error of a device's own type, of this kind.
    pub fn new(kind: OpenErrorKind, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self {
            kind,
            source: Box::new(source),
        }
    }

    /// What the caller can do about it.
    pub fn kind(&self) -> OpenErrorKind {
        self.kind
    }
}

/// Why a device cannot be made, by what can be done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum OpenErrorKind {
    /// Something of the host is not there: a file, a directory, a TAP driver.
    Missing,
    /// This process may not use it.
    Permission,
    /// Another machine or process uses it. It may be free later.
    Busy,
    /// There is no more of something: descriptors, memory, room in a window.
    Exhausted,
    /// The host cannot do what was asked for.
    Unsupported,
    /// It is there, and is not what the device needs: of another type, size or content.
    Unfit,
    /// The host failed otherwise.
    Host,
}

impl OpenErrorKind {
    /// The kind of an error of a system call.
    pub fn of(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO | libc::ENOTDIR) => Self::Missing,
            Some(libc::EPERM | libc::EACCES | libc::EROFS) => Self::Permission,
            Some(libc::EBUSY | libc::ETXTBSY | libc::EAGAIN) => Self::Busy,
            Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOSPC | libc::EDQUOT) => Self::Exhausted,
            Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY) => Self::Unsupported,
            _ => Self::Host,
        }
    }
}

/// Open descriptors for a device that takes none.
#[derive(Debug, thiserror::Error)]
#[error("device {id}: only network interfaces take open descriptors")]
struct TakesNoDescriptors {
    id: String,
}

/// A device that has what it needs from the host, and maybe not yet what it needs from the machine.
pub trait Opened: Send {
    /// Device id.
    fn id(&self) -> &str;

    /// What the device takes of the pmem window, in bytes.
    fn pmem_bytes(&self) -> u64 {
        0
    }

    /// Completes the device with its part of the machine's memory.
    ///
    /// # Errors
    /// What is wrong; it names the device.
    fn connect(self: Box<Self>, windows: &Windows) -> Result<Box<dyn VirtioDevice>, OpenError>;

    /// As [`connect`](Self::connect), for a device that gave `state` when it was saved: one that has a place in guest memory
    /// is to be where it was.
    ///
    /// # Errors
    /// What is wrong; it names the device.
    fn connect_again(
        self: Box<Self>,
        windows: &Windows,
        _state: &[u8],
    ) -> Result<Box<dyn VirtioDevice>, OpenError> {
        self.connect(windows)
    }
}

/// A device that needs nothing more.
pub struct Complete(Box<dyn VirtioDevice>);

impl Complete {
    /// `device`, opened.
    pub fn opened(device: impl VirtioDevice) -> Box<dyn Opened> {
        Box::new(Self(Box::new(device)))
    }
}

impl Opened for Complete {
    fn id(&self) -> &str {
        self.0.id()
    }

    fn connect(self: Box<Self>, _windows: &Windows) -> Result<Box<dyn VirtioDevice>, OpenError> {
        Ok(self.0)
    }
}
