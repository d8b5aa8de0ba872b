//! Why a machine ended.

use std::fmt;
use std::io;

use vmm_sys_util::errno;

/// Why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    /// KVM or the host failed the guest.
    Failure(Failure),
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("guest powered off"),
            Self::Reboot => f.write_str("guest rebooted"),
            Self::Panic => f.write_str("guest kernel panicked"),
            Self::TripleFault => f.write_str("guest triple fault"),
            Self::Stopped => f.write_str("stopped by the host"),
            Self::Failure(failure) => write!(f, "virtual machine failure: {failure}"),
        }
    }
}

/// How KVM or the host failed a machine that ran.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// KVM cannot run a vCPU.
    #[error("vCPU {index}: {failure}")]
    Vcpu {
        /// vCPU index.
        index: u8,
        /// What KVM said.
        failure: VcpuFailure,
    },
    /// A fault of this library, which the log has.
    #[error("vCPU thread panicked")]
    VcpuPanicked,
    /// A vCPU's thread ended for a save and could not be made again.
    #[error("after a save: vCPU {index} has no thread: {source}")]
    VcpuThread {
        /// vCPU index.
        index: u8,
        /// Cause.
        source: errno::Error,
    },
    /// A device stopped for a save and could not start again.
    #[error("after a save: device {id} cannot go on")]
    DeviceResume {
        /// Device id.
        id: String,
    },
    /// A page of a restored machine cannot be read from its memory file.
    #[error("guest memory cannot be brought in: page at offset {offset:#x} of the memory file: {source}")]
    Page {
        /// Byte offset in the file.
        offset: u64,
        /// Cause.
        source: errno::Error,
    },
    /// The kernel tells no more of pages that are to be brought in.
    #[error("guest memory cannot be brought in: userfaultfd: {source}")]
    PageFaults {
        /// Cause.
        source: errno::Error,
    },
}

/// What KVM said of a vCPU it cannot run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VcpuFailure {
    /// The signal that gets a vCPU out of the guest would be lost.
    #[error("cannot unblock the signal that stops it: {0}")]
    Signal(errno::Error),
    /// The processor refuses the guest's state.
    #[error("KVM cannot enter the guest, hardware reason {0:#x}")]
    Entry(u64),
    /// KVM gave up inside.
    #[error("KVM internal error {suberror} ({}) at rip {rip:#x}", suberror_name(*suberror))]
    Internal {
        /// KVM_INTERNAL_ERROR_* of linux/kvm.h.
        suberror: u32,
        /// Where the guest was; 0 if that cannot be read.
        rip: u64,
    },
    /// An exit nothing here asks for.
    #[error("unexpected exit {0}")]
    Exit(String),
    /// KVM_RUN failed.
    #[error("KVM_RUN: {0}")]
    Run(errno::Error),
}

/// The error number of a system call that failed; EIO where there is none.
pub fn errno_of(error: &io::Error) -> errno::Error {
    errno::Error::new(error.raw_os_error().unwrap_or(libc::EIO))
}

fn suberror_name(suberror: u32) -> &'static str {
    match suberror {
        1 => "instruction emulation failed",
        2 => "simultaneous exceptions",
        3 => "exit while delivering an event",
        4 => "unexpected exit reason",
        _ => "unknown",
    }
}
