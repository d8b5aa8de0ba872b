//! What kind of failure a caller sees: errors keep their kind across the wire as gRPC codes.

use ttrpc::{Code, get_status};

use crate::container::{ContainerError, LaunchError, PortError, ResourceError, StreamError};
use crate::machine::MachineError;
use crate::network::NetworkError;
use crate::sandbox::SandboxError;
use crate::storage::StorageError;

/// A failed call's status.
pub fn status(code: Code, message: impl ToString) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(code, message))
}

/// The wire form of a sandbox error.
pub fn of_sandbox(error: SandboxError) -> ttrpc::Error {
    let code = match &error {
        SandboxError::InvalidId { .. } | SandboxError::Missing(_) | SandboxError::Wire(_) => {
            Code::INVALID_ARGUMENT
        }
        SandboxError::ContainerExists(_) | SandboxError::SandboxExists(_) => Code::ALREADY_EXISTS,
        SandboxError::NoContainer(_) => Code::NOT_FOUND,
        SandboxError::Unsupported(_) => Code::UNIMPLEMENTED,
        SandboxError::Sysctl(_) => Code::INVALID_ARGUMENT,
        SandboxError::PidNamespace { .. } => Code::FAILED_PRECONDITION,
        SandboxError::Storage(error) => of_storage(error),
        SandboxError::Container { source, .. } => of_container(source),
        SandboxError::Stream(error) => of_stream(error),
        SandboxError::Port(error) => of_port(error),
        SandboxError::Namespaces(_) | SandboxError::File { .. } => Code::INTERNAL,
    };
    status(code, error)
}

/// The wire form of an error of the machine's own.
pub fn of_machine(error: MachineError) -> ttrpc::Error {
    let code = match &error {
        MachineError::Argument { .. } => Code::INVALID_ARGUMENT,
        MachineError::Timeout { .. } => Code::DEADLINE_EXCEEDED,
        MachineError::Call { .. } | MachineError::File { .. } => Code::INTERNAL,
    };
    status(code, error)
}

/// The wire form of an error of the network.
pub fn of_network(error: NetworkError) -> ttrpc::Error {
    let code = match &error {
        NetworkError::Argument { .. } => Code::INVALID_ARGUMENT,
        NetworkError::NoInterface(_) => Code::NOT_FOUND,
        NetworkError::Timeout { .. } => Code::DEADLINE_EXCEEDED,
        NetworkError::Ambiguous { .. } | NetworkError::Mismatch { .. } | NetworkError::NotAGuest(_) => {
            Code::FAILED_PRECONDITION
        }
        NetworkError::Kernel { .. } | NetworkError::File { .. } => Code::INTERNAL,
    };
    status(code, error)
}

fn of_container(error: &ContainerError) -> Code {
    match error {
        ContainerError::Spec(_)
        | ContainerError::Exec(_)
        | ContainerError::Launch(LaunchError::Refused(_)) => Code::INVALID_ARGUMENT,
        ContainerError::State { .. } => Code::FAILED_PRECONDITION,
        ContainerError::NoProcess { .. } | ContainerError::NoProgram(_) => Code::NOT_FOUND,
        ContainerError::ProcessExists { .. } => Code::ALREADY_EXISTS,
        ContainerError::Launch(LaunchError::Timeout) => Code::DEADLINE_EXCEEDED,
        ContainerError::Resources(ResourceError::Limits(_)) => Code::INVALID_ARGUMENT,
        ContainerError::Resources(ResourceError::Freeze { .. }) => Code::DEADLINE_EXCEEDED,
        ContainerError::Resources(ResourceError::File { .. })
        | ContainerError::Launch(_)
        | ContainerError::Devices { .. }
        | ContainerError::File { .. }
        | ContainerError::Stdio(_)
        | ContainerError::Notify { .. } => Code::INTERNAL,
    }
}

/// End of file has a code of its own: reading past the end.
fn of_stream(error: &StreamError) -> Code {
    match error {
        StreamError::NotHere(_) => Code::FAILED_PRECONDITION,
        StreamError::EndOfFile => Code::OUT_OF_RANGE,
        StreamError::Io { .. } => Code::ABORTED,
    }
}

fn of_port(error: &PortError) -> Code {
    match error {
        PortError::NotListening(_) | PortError::Taken(_) => Code::INVALID_ARGUMENT,
        PortError::Timeout { .. } => Code::UNAVAILABLE,
    }
}

fn of_storage(error: &StorageError) -> Code {
    match error {
        StorageError::Driver(_) => Code::UNIMPLEMENTED,
        StorageError::MountPoint(_) | StorageError::Option(_) => Code::INVALID_ARGUMENT,
        StorageError::Device { .. } => Code::DEADLINE_EXCEEDED,
        StorageError::Mount { .. } | StorageError::File { .. } => Code::INTERNAL,
    }
}
