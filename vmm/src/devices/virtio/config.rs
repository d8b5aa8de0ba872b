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
        Err(TakesNone {
            id: self.id().to_owned(),
        }
        .into())
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

/// What is wrong with what a device needs, for callers that do not know the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A file, directory, interface or driver is not there.
    Missing,
    /// The process lacks a right.
    Denied,
    /// Somebody else has it.
    Busy,
    /// It is there, and cannot be what it is to be: its kind, size or number.
    Unfit,
    /// There is no room for it: descriptors, memory, the window in guest memory.
    Full,
    /// The host failed.
    Host,
}

impl From<&io::Error> for Fault {
    fn from(error: &io::Error) -> Self {
        use io::ErrorKind as Kind;
        match error.kind() {
            Kind::NotFound => Self::Missing,
            Kind::PermissionDenied | Kind::ReadOnlyFilesystem => Self::Denied,
            Kind::ResourceBusy | Kind::AddrInUse | Kind::AlreadyExists | Kind::ExecutableFileBusy => {
                Self::Busy
            }
            Kind::NotADirectory | Kind::IsADirectory | Kind::InvalidInput | Kind::Unsupported => Self::Unfit,
            Kind::OutOfMemory | Kind::StorageFull | Kind::QuotaExceeded => Self::Full,
            _ => match error.raw_os_error() {
                Some(libc::EMFILE | libc::ENFILE) => Self::Full,
                Some(libc::ENXIO | libc::ENODEV) => Self::Missing,
                _ => Self::Host,
            },
        }
    }
}

/// An error of a device that says what kind of fault it is.
pub trait Faulty: std::error::Error + Send + Sync + 'static {
    /// What is wrong.
    fn fault(&self) -> Fault;
}

/// A device cannot be made. The message is the device's own and names it.
#[derive(Debug, thiserror::Error)]
#[error("{source}")]
pub struct OpenError {
    fault: Fault,
    source: Box<dyn std::error::Error + Send + Sync>,
}

impl OpenError {
    /// What is wrong.
    pub fn fault(&self) -> Fault {
        self.fault
    }
}

impl<E: Faulty> From<E> for OpenError {
    fn from(error: E) -> Self {
        Self {
            fault: error.fault(),
            source: Box::new(error),
        }
    }
}

/// Open descriptors were handed over for a device that has no use for them.
#[derive(Debug, thiserror::Error)]
#[error("device {id}: only network interfaces take open descriptors")]
struct TakesNone {
    /// Device id.
    id: String,
}

impl Faulty for TakesNone {
    fn fault(&self) -> Fault {
        Fault::Unfit
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("device d: {0}")]
    struct Opening(#[source] io::Error);

    impl Faulty for Opening {
        fn fault(&self) -> Fault {
            Fault::from(&self.0)
        }
    }

    #[test]
    fn open_error_when_made_of_a_devices_keeps_its_words_and_its_fault() {
        for (errno, fault) in [
            (libc::ENOENT, Fault::Missing),
            (libc::ENXIO, Fault::Missing),
            (libc::EACCES, Fault::Denied),
            (libc::EPERM, Fault::Denied),
            (libc::EROFS, Fault::Denied),
            (libc::EBUSY, Fault::Busy),
            (libc::EADDRINUSE, Fault::Busy),
            (libc::ENOTDIR, Fault::Unfit),
            (libc::EINVAL, Fault::Unfit),
            (libc::ENOMEM, Fault::Full),
            (libc::ENOSPC, Fault::Full),
            (libc::EMFILE, Fault::Full),
            (libc::EIO, Fault::Host),
        ] {
            let cause = io::Error::from_raw_os_error(errno);
            let text = format!("device d: {cause}");
            let error = OpenError::from(Opening(cause));
            assert_eq!((error.fault(), error.to_string()), (fault, text));
        }
    }
}
