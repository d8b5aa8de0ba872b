//! Machines in files: `save` writes a paused machine to a folder, `restore` makes a machine of it, in this process or
//! another, once or many times.
//!
//! The folder has two files: `state` (versioned, with a checksum) and `memory` (sparse; its checksums are in the state). A
//! full save stands for itself; a difference has only the pages that differ from a full save and needs that one to be
//! restored. Both files are for their owner only: they have everything the guest knows.
//!
//! What differs between a machine and its clones: the generation id (see [`crate::devices::vmgenid`]), and the clocks,
//! which go on as if the machine had been running. Connections of the vsock device are gone; the guest is told.

mod file;
mod restore;
mod save;
mod staged;
mod state;
mod verify;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

pub use save::SaveReport;
pub use verify::verify;

use crate::config::ConfigError;
use crate::confinement::Confinement;
use crate::devices::cpu_hotplug::PresenceError;
use crate::devices::virtio::state::{EncodingError, StateError};
use crate::irq::io_apic::IoApicStateError;
use crate::kvm::KvmError;
use crate::memory::image::{ContentsError, ReadError};
pub use crate::vcpu::cpuid::CpuMismatch;
use crate::vcpu::state::VcpuStateError;
use crate::vm::error::BuildError;
use crate::vm::registry::ResumeError;
use crate::vm::vcpus::NoThread;
use crate::vm::{ExitReason, VmState};

/// Name of the state file in a save's folder.
const STATE: &str = "state";
/// Name of the memory file in a save's folder.
const MEMORY: &str = "memory";

/// What a save contains.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum SaveKind {
    /// All memory that is not zero.
    #[default]
    Full,
    /// The pages that differ from the full save in this folder.
    ///
    /// They are found by comparing all memory with the base, unless the machine
    /// [tracks writes](crate::config::MemoryConfig::track_writes) and the base is its last full save, or what it was restored
    /// from: then only pages that were written or given back since are compared. The result is the same. Where the log
    /// cannot be had (Linux before 6.7, another base), all is compared and the reason is logged.
    Difference {
        /// Folder of the full save, which must stay as it is as long as the difference is of use.
        base: PathBuf,
    },
}

/// How the memory of a restored machine gets its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MemoryMode {
    /// All of it is read, and its checksums compared, before the machine exists. The files may change afterwards.
    Eager,
    /// The file is mapped privately: pages come from the host's page cache, shared by all clones, and are copied when they
    /// are written. The memory file must not change while the machine exists. Checksums are not looked at: [`verify`] does.
    #[default]
    CopyOnWrite,
    /// A thread copies pages in when they are touched (userfaultfd). The memory file must not change until then. Checksums
    /// are not looked at: [`verify`] does.
    Userfaultfd,
}

/// What is different in a restored machine. A name that does not exist in the save is an error.
#[derive(Debug, Clone, Default)]
pub struct RestoreOptions {
    /// How memory gets its content.
    pub memory: MemoryMode,
    /// Whether the machine [tracks writes](crate::config::MemoryConfig::track_writes), whatever the saved one did; from the
    /// start, that is since the full save it comes from.
    pub track_writes: bool,
    /// Another id for the machine.
    pub id: Option<String>,
    /// Other images, by id of the block or pmem device.
    pub disks: BTreeMap<String, PathBuf>,
    /// Other TAPs, by id of the network device.
    pub taps: BTreeMap<String, String>,
    /// Open queues of other TAPs, one for each queue pair, by id of the network device; the machine gets duplicates. A device
    /// that was given open queues when it was added needs them again, or a name in `taps`.
    pub tap_fds: BTreeMap<String, Vec<Arc<OwnedFd>>>,
    /// Another Unix socket for the vsock device.
    pub vsock_uds: Option<PathBuf>,
    /// What the machine's threads give up; the saved machine's is not known.
    pub confinement: Confinement,
}

/// Decodes and checks `body` as the state of a machine, as far as that goes without the host; for fuzzing.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn check_untrusted(body: &[u8]) {
    let bytes = [&file::header(body)[..], body].concat();
    if let Ok(mut state) = file::parse::<state::MachineState>(&bytes)
        && restore::check(&state).is_ok()
    {
        // Nothing is overridden, so nothing can be missing.
        let _ = restore::apply(&mut state, &RestoreOptions::default());
    }
}

/// A state file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateFileError {
    /// It cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// It is not a state this library can read.
    #[error("{path}: {reason}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: InvalidState,
    },
}

/// Why the bytes of a file are no state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidState {
    /// It is something else.
    #[error("this is no state file")]
    NoState,
    /// It was written by another version of this library.
    #[error("format version {found}, this is version {supported}: save the machine again")]
    Version {
        /// Its version.
        found: u32,
        /// The only one that can be read.
        supported: u32,
    },
    /// It has another length than was written.
    #[error("{found} bytes of state, should be {expected}: cut off?")]
    Length {
        /// Bytes after the header.
        found: u64,
        /// What the header says.
        expected: u64,
    },
    /// It has another content than was written.
    #[error("checksum {found:#010x}, should be {expected:#010x}: damaged")]
    Checksum {
        /// Checksum of what is there.
        found: u32,
        /// What the header says.
        expected: u32,
    },
    /// It cannot be decoded.
    #[error("state: {0}")]
    Content(EncodingError),
}

/// A machine cannot be saved. It is as before.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The machine is not paused.
    #[error("cannot save a machine that is {0}: pause it first")]
    State(VmState),
    /// The guest has not answered a request to take or to give back a vCPU, which nobody waits for any more.
    #[error(
        "vCPU {index} is neither the guest's nor not: resize the machine to the number of vCPUs it is to have"
    )]
    Pending {
        /// vCPU index.
        index: u8,
    },
    /// A device does not let itself be saved.
    #[error(transparent)]
    Device(#[from] StateError),
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuStateError),
    /// KVM cannot be used any more.
    #[error(transparent)]
    Open(#[from] KvmError),
    /// KVM.
    #[error("{ioctl}: {source}")]
    Kvm {
        /// The ioctl.
        ioctl: &'static str,
        /// Cause.
        source: kvm_ioctls::Error,
    },
    /// The host refused something.
    #[error("{path}: {source}")]
    Io {
        /// File or folder.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The state file.
    #[error(transparent)]
    File(#[from] StateFileError),
    /// The base of a difference is another machine's, or a difference itself.
    #[error("{path} cannot be the base of a difference: {reason}")]
    Base {
        /// Its folder.
        path: PathBuf,
        /// Why not.
        reason: BaseError,
    },
    /// A vCPU whose thread ended for the save could not be made again; the machine is stopped.
    #[error("the machine cannot go on after the save: {0}")]
    Vcpus(#[from] NoThread),
    /// The machine was saved, but a device could not go on; the machine is stopped.
    #[error("the machine was saved and cannot go on: {0}")]
    Resume(ResumeError),
}

/// A save that nothing can be a difference against.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BaseError {
    /// It would be replaced by the difference.
    #[error("it is the folder to be written")]
    Target,
    /// There are two floors, not more.
    #[error("it is a difference against {}", against.display())]
    Difference {
        /// Folder of the full save.
        against: PathBuf,
    },
    /// It is of another machine.
    #[error("its memory has {len} bytes, this machine's has {size}")]
    Size {
        /// Bytes of its memory file.
        len: u64,
        /// Bytes of the machine's memory.
        size: u64,
    },
}

/// A saved machine cannot be restored. Nothing of it is left behind.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The state file is missing, cut off, damaged or of another version.
    #[error(transparent)]
    File(#[from] StateFileError),
    /// The state contradicts itself.
    #[error("saved state: {0}")]
    Invalid(Contradiction),
    /// The host's CPU is not the one it was saved on.
    #[error(transparent)]
    Cpu(#[from] CpuMismatch),
    /// An override names something the machine does not have.
    #[error("override: {0}")]
    Override(OverrideError),
    /// The memory file cannot be read, or is damaged.
    #[error("{path}: {source}")]
    Memory {
        /// The file.
        path: PathBuf,
        /// Cause.
        source: ReadError,
    },
    /// A device does not accept its state.
    #[error(transparent)]
    Device(#[from] StateError),
    /// A vCPU does not accept its state.
    #[error(transparent)]
    Vcpu(#[from] VcpuStateError),
    /// Its memory could not be brought in while it was made.
    #[error("the machine ended while it was restored: {0}")]
    Ended(ExitReason),
    /// The machine cannot be built on this host.
    #[error(transparent)]
    Build(#[from] BuildError),
}

/// A saved state whose parts do not belong together.
#[derive(Debug, thiserror::Error)]
pub enum Contradiction {
    /// The machine's configuration.
    #[error("configuration: {0}")]
    Config(ConfigError),
    /// The knobs of a device.
    #[error(transparent)]
    Device(ConfigError),
    /// Not one entry for each processor.
    #[error("{saved} processors, the configuration has {max}")]
    Processors {
        /// Entries.
        saved: usize,
        /// Maximum of the configuration.
        max: usize,
    },
    /// States of other processors than those the guest has.
    #[error("processors and their states do not match")]
    ProcessorStates,
    /// Nothing that could run.
    #[error("no processor")]
    NoProcessor,
    /// A window that no configuration can have.
    #[error("a pmem window of {0:#x} bytes")]
    PmemWindow(u64),
    /// Ids are unique.
    #[error("two devices have the same id")]
    DuplicateDevice,
    /// What the memory file is said to contain.
    #[error(transparent)]
    Contents(#[from] ContentsError),
    /// The interrupt controller's registers.
    #[error(transparent)]
    IoApic(#[from] IoApicStateError),
    /// Presence of processors.
    #[error(transparent)]
    Presence(#[from] PresenceError),
    /// One has a serial port, the other has none.
    #[error("COM1 and its state do not match")]
    Serial,
    /// The base of a difference was replaced.
    #[error("{} is not the save this one is a difference against", .0.display())]
    Base(PathBuf),
    /// The memory file was cut, or is another machine's.
    #[error("{} has {len} bytes, the machine's memory has {size}", path.display())]
    MemorySize {
        /// The memory file.
        path: PathBuf,
        /// Its length.
        len: u64,
        /// Bytes of the machine's memory.
        size: u64,
    },
}

/// Something a machine was to get instead of what it was saved with.
#[derive(Debug, thiserror::Error)]
pub enum OverrideError {
    /// Disks and networks the saved machine does not have.
    #[error("the saved machine has no {}", .0.join(", no "))]
    Unknown(Vec<String>),
    /// A socket for a device the saved machine does not have.
    #[error("the saved machine has no vsock device")]
    NoVsock,
    /// Nobody can open by name what was handed over open.
    #[error("network {0} was given open TAP queues: give it others (tap_fds) or a TAP by name (taps)")]
    TapNeeded(String),
    /// An open TAP queue cannot be duplicated.
    #[error("network {id}: open TAP queue: {source}")]
    TapQueue {
        /// Device id.
        id: String,
        /// Cause.
        source: io::Error,
    },
}
