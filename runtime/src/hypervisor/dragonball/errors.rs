//! The VMM's errors and ends, in the runtime's words.

use dragonball::devices::virtio::vsock::VsockError;
use dragonball::vm::{BuildError, ExitReason, HotplugError, KvmError, OpenErrorKind, VmError};

use crate::error::{Error, ErrorKind};
use crate::hypervisor::VmExit;

pub(super) fn vm_exit(reason: ExitReason) -> VmExit {
    match reason {
        ExitReason::PowerOff => VmExit::PowerOff,
        ExitReason::Reboot => VmExit::Reboot,
        ExitReason::Panic => VmExit::Panic,
        ExitReason::TripleFault => VmExit::TripleFault,
        ExitReason::Stopped => VmExit::Stopped,
        ExitReason::Failure(failure) => VmExit::Failure(failure.to_string()),
    }
}

pub(super) fn build_error(error: &BuildError) -> Error {
    let kind = match error {
        BuildError::Kvm(KvmError::Permission(_)) => ErrorKind::PermissionDenied,
        BuildError::Kvm(_) => ErrorKind::FailedPrecondition,
        BuildError::Config(_) | BuildError::TooManyVcpus { .. } | BuildError::TooManySlots { .. } => {
            ErrorKind::InvalidArgument
        }
        // A file that is missing, or not what it should be.
        BuildError::Boot(_) => io_kind(error).unwrap_or(ErrorKind::InvalidArgument),
        BuildError::Memory(_) => ErrorKind::ResourceExhausted,
        _ => io_kind(error).unwrap_or(ErrorKind::Internal),
    };
    Error::new(kind, error.to_string())
}

/// Kind of the I/O error an error comes from.
fn io_kind(error: &dyn std::error::Error) -> Option<ErrorKind> {
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            return match io.kind() {
                std::io::ErrorKind::NotFound => Some(ErrorKind::NotFound),
                std::io::ErrorKind::PermissionDenied => Some(ErrorKind::PermissionDenied),
                std::io::ErrorKind::OutOfMemory => Some(ErrorKind::ResourceExhausted),
                _ => None,
            };
        }
        cause = error.source();
    }
    None
}

pub(super) fn vm_error(error: VmError) -> Error {
    match error {
        VmError::State { .. } | VmError::NoVsock => {
            Error::new(ErrorKind::FailedPrecondition, error.to_string())
        }
        VmError::Vsock(error) => vsock_error(error),
        VmError::Interrupt(_) | VmError::Device(_) => Error::new(ErrorKind::Internal, error.to_string()),
    }
}

pub(super) fn vsock_error(error: VsockError) -> Error {
    let kind = match &error {
        VsockError::ConnectTimeout { .. } | VsockError::AcceptTimeout { .. } => ErrorKind::DeadlineExceeded,
        VsockError::TooManyConnections { .. } => ErrorKind::ResourceExhausted,
        VsockError::PortInUse(_) => ErrorKind::AlreadyExists,
        VsockError::NotAttached(_) => ErrorKind::NotFound,
        VsockError::Stopped => ErrorKind::Unavailable,
        _ => ErrorKind::Internal,
    };
    Error::new(kind, error.to_string())
}

pub(super) fn hotplug_error(error: HotplugError) -> Error {
    let kind = match &error {
        HotplugError::Config(_) => ErrorKind::InvalidArgument,
        HotplugError::State { .. } | HotplugError::InUse(_) => ErrorKind::FailedPrecondition,
        HotplugError::Exists(_) => ErrorKind::AlreadyExists,
        HotplugError::NotFound(_) => ErrorKind::NotFound,
        HotplugError::NoFreeSlot { .. } => ErrorKind::ResourceExhausted,
        HotplugError::Device { source, .. } => match source.kind() {
            OpenErrorKind::Missing => ErrorKind::NotFound,
            OpenErrorKind::Permission => ErrorKind::PermissionDenied,
            OpenErrorKind::Busy => ErrorKind::FailedPrecondition,
            OpenErrorKind::Unfit => ErrorKind::InvalidArgument,
            OpenErrorKind::Exhausted => ErrorKind::ResourceExhausted,
            _ => ErrorKind::Internal,
        },
        _ => ErrorKind::Internal,
    };
    Error::new(kind, error.to_string())
}
