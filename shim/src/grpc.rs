//! Error kinds as gRPC status codes: what containerd decides on (a task that is NOT_FOUND counts as gone, for example).

use runtime::error::{Error, ErrorKind};
use ttrpc::Code;

/// The gRPC code of an error kind.
pub fn code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::NotFound => Code::NOT_FOUND,
        ErrorKind::AlreadyExists => Code::ALREADY_EXISTS,
        ErrorKind::InvalidArgument => Code::INVALID_ARGUMENT,
        ErrorKind::FailedPrecondition => Code::FAILED_PRECONDITION,
        ErrorKind::PermissionDenied => Code::PERMISSION_DENIED,
        ErrorKind::Unimplemented => Code::UNIMPLEMENTED,
        ErrorKind::Unavailable => Code::UNAVAILABLE,
        ErrorKind::DeadlineExceeded => Code::DEADLINE_EXCEEDED,
        ErrorKind::ResourceExhausted => Code::RESOURCE_EXHAUSTED,
        ErrorKind::Internal => Code::INTERNAL,
    }
}

/// The reply that carries `error`.
pub fn status(error: &Error) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code(error.kind), &error.message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_when_made_carries_code_and_message() {
        let error = Error::new(ErrorKind::NotFound, "container c1 does not exist");

        let ttrpc::Error::RpcStatus(status) = status(&error) else {
            panic!("not a status")
        };

        assert_eq!(status.code(), Code::NOT_FOUND);
        assert_eq!(status.message(), "container c1 does not exist");
    }
}
