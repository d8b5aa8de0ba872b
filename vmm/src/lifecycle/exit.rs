//! Why a machine ended.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitReason {
    /// The guest powered off (ACPI S5).
    PowerOff,
    /// The guest asked for a reset.
    Reboot,
    /// The guest kernel panicked (pvpanic).
    Panic,
    /// A vCPU shut down: a triple fault, by accident or as a way to reboot.
    TripleFault,
    /// The host asked.
    Stopped,
    /// KVM or the host failed the guest; the text says how.
    Failure(String),
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("guest powered off"),
            Self::Reboot => f.write_str("guest rebooted"),
            Self::Panic => f.write_str("guest kernel panicked"),
            Self::TripleFault => f.write_str("guest triple fault"),
            Self::Stopped => f.write_str("stopped by the host"),
            Self::Failure(what) => write!(f, "virtual machine failure: {what}"),
        }
    }
}
