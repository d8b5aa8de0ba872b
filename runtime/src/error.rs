//! Errors as the shim's caller sees them: a kind that maps to a gRPC code, and one clear line.

/// What went wrong, in the vocabulary of gRPC status codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The container, process or file does not exist.
    NotFound,
    /// The id is taken.
    AlreadyExists,
    /// A bad argument or configuration.
    InvalidArgument,
    /// The object is in the wrong state for the call.
    FailedPrecondition,
    /// Not permitted, e.g. /dev/kvm.
    PermissionDenied,
    /// Not provided by this runtime.
    Unimplemented,
    /// The VM or the agent does not answer (any more).
    Unavailable,
    /// A bound was reached.
    DeadlineExceeded,
    /// A resource ran out: memory, descriptors, slots.
    ResourceExhausted,
    /// Anything else.
    Internal,
}

/// An error with its kind; `Display` is the whole story in one line.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// Kind, for the gRPC code.
    pub kind: ErrorKind,
    /// One line: phase, object, value, what to do.
    pub message: String,
}

/// Result of a runtime operation.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of `kind` that says `message`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    /// The method is part of the trait but its work belongs to a later release.
    pub fn unsupported(method: &'static str) -> Self {
        Self::new(
            ErrorKind::Unimplemented,
            format!("{method} is not supported by this runtime"),
        )
    }

    /// Puts `context` in front of the message and keeps the kind.
    #[must_use]
    pub fn context(self, context: impl std::fmt::Display) -> Self {
        Self {
            kind: self.kind,
            message: format!("{context}: {}", self.message),
        }
    }
}
