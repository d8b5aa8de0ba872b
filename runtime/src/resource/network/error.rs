//! What can go wrong with a pod's network.

use std::net::IpAddr;

use crate::error::{Error, ErrorKind};
use crate::host::link::LinkError;
use crate::host::netns::NetnsError;

/// A network that a guest cannot have.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The pod is to share the host's network.
    #[error(
        "the pod asks for the host's network ({0}): a virtual machine has a network of its own, leave hostNetwork (--net-host) out"
    )]
    HostNetwork(String),
    /// The namespace cannot be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// A dump failed.
    #[error("list the {what} of the network namespace: {source}")]
    Dump {
        /// Links, addresses, routes or neighbours.
        what: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A link carries addresses, and its kind cannot be given to a guest.
    #[error("interface {link} ({kind}) {carries}, but cannot be attached to a virtual machine: {reason}")]
    Unsupported {
        /// Its name.
        link: String,
        /// Its kind.
        kind: String,
        /// What it carries.
        carries: String,
        /// Why it cannot.
        reason: &'static str,
    },
    /// Two links that the guest could not tell apart.
    #[error(
        "interfaces {0} and {1} have the same hardware address {2}: the guest tells its interfaces apart by it"
    )]
    SameHardwareAddress(String, String, String),
    /// A link has an address that somebody else on its network has.
    #[error(
        "interface {link}: address {address} is a duplicate: duplicate address detection found another owner"
    )]
    Duplicate {
        /// Its name.
        link: String,
        /// The address.
        address: IpAddr,
    },
    /// A link has an MTU that its guest side cannot have.
    #[error("interface {link}: MTU {mtu} is not one a TAP can have, need {min} to {max}")]
    Mtu {
        /// Its name.
        link: String,
        /// Its MTU.
        mtu: u32,
        /// Smallest.
        min: u32,
        /// Largest.
        max: u32,
    },
    /// Somebody else has a qdisc where ours would be.
    #[error(
        "interface {link}: another program has put an {qdisc} qdisc on it, where the redirection to the guest would be"
    )]
    Taken {
        /// Its name.
        link: String,
        /// Kind of the qdisc.
        qdisc: String,
    },
    /// A link went away.
    #[error("interface {link} vanished while it was attached: {source}")]
    Vanished {
        /// Its name.
        link: String,
        /// What was tried then.
        source: LinkError,
    },
    /// A link cannot be changed.
    #[error(transparent)]
    Link(LinkError),
    /// What is to be undone cannot be written down.
    #[error("{0}")]
    Journal(#[from] crate::host::journal::JournalError),
    /// A value of the pod that is no bandwidth.
    #[error("annotation {annotation} = {value:?}: {need}")]
    Bandwidth {
        /// Which one.
        annotation: &'static str,
        /// Its value.
        value: String,
        /// What is allowed.
        need: &'static str,
    },
}

impl NetworkError {
    /// An error of an operation on the link called `link`.
    pub fn link(link: &str, source: LinkError) -> Self {
        if source.is_gone() {
            return Self::Vanished {
                link: link.to_owned(),
                source,
            };
        }
        Self::Link(source)
    }
}

impl From<NetworkError> for Error {
    fn from(error: NetworkError) -> Self {
        let message = format!("network: {error}");
        let kind = match error {
            NetworkError::HostNetwork(_) | NetworkError::Unsupported { .. } => ErrorKind::Unimplemented,
            NetworkError::Netns(error) => Self::from(error).kind,
            NetworkError::Journal(error) => Self::from(error).kind,
            NetworkError::SameHardwareAddress(..)
            | NetworkError::Duplicate { .. }
            | NetworkError::Mtu { .. }
            | NetworkError::Bandwidth { .. } => ErrorKind::InvalidArgument,
            NetworkError::Taken { .. } | NetworkError::Vanished { .. } => ErrorKind::FailedPrecondition,
            NetworkError::Dump { .. } => ErrorKind::Internal,
            NetworkError::Link(LinkError::Netns(error)) => Self::from(error).kind,
            NetworkError::Link(LinkError::Host { source, .. }) => match source.kind() {
                std::io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
                std::io::ErrorKind::ResourceBusy => ErrorKind::FailedPrecondition,
                _ => ErrorKind::Internal,
            },
        };
        Self::new(kind, message)
    }
}
