//! The OCI runtime specification, from [`oci_spec::runtime`] to the agent's wire messages and back.
//!
//! proto3 scalars have no "absent": zero, `false` and the empty string travel as nothing. Fields where the
//! difference matters and how they are treated:
//!
//! | field | rule |
//! |---|---|
//! | device cgroup `major`, `minor` | absent (any device) travels as -1; a major of 0 also reads as absent, which is what stock shims send |
//! | capability sets | a present `capabilities` always carries five sets: an empty one means "none", never "leave as is" |
//! | `memory.swappiness`, `oomScoreAdj`, CPU numbers | 0 reads as absent |
//! | `process.terminal`, `noNewPrivileges`, `root.readonly` | read as present |
//!
//! Fields newer than the wire table have nowhere to go: [`uncarried`] names the ones a spec sets, so that the
//! caller can warn instead of dropping them silently.

mod from_wire;
mod to_wire;
mod uncarried;

#[cfg(test)]
mod tests;

pub use from_wire::{process_from_wire, resources_from_wire, spec_from_wire};
pub use to_wire::{process_to_wire, resources_to_wire, spec_to_wire};
pub use uncarried::uncarried;

/// A wire message that does not describe a valid OCI specification.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FromWireError {
    /// A name outside the specification's list, for example an unknown namespace type.
    #[error("{field}: unknown value {value:?}")]
    UnknownValue {
        /// The specification's name of the field.
        field: &'static str,
        /// What the message carried.
        value: String,
    },
    /// A number that does not fit the specification's type.
    #[error("{field}: {value} is out of range")]
    OutOfRange {
        /// The specification's name of the field.
        field: &'static str,
        /// What the message carried.
        value: i128,
    },
    /// The specification's own builder refused the value.
    #[error("{field}: {reason}")]
    Incomplete {
        /// The specification's name of the field.
        field: &'static str,
        /// The builder's message.
        reason: String,
    },
}
