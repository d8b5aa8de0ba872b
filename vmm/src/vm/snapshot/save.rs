//! From a paused machine to a folder.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvm_bindings::KVM_CLOCK_REALTIME;

use super::staged::{self, Staged};
use super::state::{Base, ClockState, DeviceState, MachineState, MemoryState, SlotState};
use super::{BaseError, MEMORY, STATE, SaveError, SaveKind, file};
use crate::devices::cpu_hotplug::Cpu;
use crate::devices::vmgenid;
use crate::kvm;
use crate::lifecycle::{ExitReason, Failure, errno_of};
use crate::memory::image::{self, Pages, Written};
use crate::memory::layout::RegionKind;
use crate::memory::page_set::PageSet;
use crate::vcpu::state::{self as vcpu_state, Inventory, VcpuState};
use crate::vm::machine::{Machine, Origin};
use crate::vm::vcpus::NoThread;
use crate::vm::{Vm, VmState, lock};

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SaveReport {
    /// Bytes of data in the memory file (which is as long as the machine's memory, and sparse).
    pub memory_bytes: u64,
    /// Pages whose content was looked at.
    pub pages_read: u64,
    /// A log of writes told which pages can differ from the base; the others were not looked at.
    pub by_log: bool,
}

impl Vm {
    /// Writes the machine to the folder `dir`, which is made if it does not exist, and waits until it is on disk. A save in
    /// the folder is replaced, once the new one is complete. The machine stays paused and can go on.
    ///
    /// # Errors
    /// [`SaveError`]. The folder has the save it had before, or none if the host failed while they were exchanged.
    pub fn save(&self, dir: &Path, kind: &SaveKind) -> Result<SaveReport, SaveError> {
        // What it is written against is opened while nobody has to wait for it.
        let machine = self.paused()?;
        let base = Opened::new(kind, dir, &machine)?;
        staged::make_folder(dir).map_err(io_error(dir))?;

        let _operation = lock(&self.operation);
        let _passage = lock(&self.passage);
        let machine = self.paused()?;
        let result = self.save_parts(&machine, dir, base);
        // Whatever happened, the machine is to be usable.
        if let Err(error) = machine.devices.resume() {
            let id = error.id.clone();
            self.lifecycle
                .finish(ExitReason::Failure(Failure::DeviceResume { id }));
            return Err(SaveError::Resume(error));
        }
        result
    }

    /// The machine, if it is paused.
    fn paused(&self) -> Result<Arc<Machine>, SaveError> {
        match (self.state(), self.machine.get()) {
            (VmState::Paused, Some(machine)) => Ok(machine),
            (state, _) => Err(SaveError::State(state)),
        }
    }

    /// Devices first, because they may still interrupt; then vCPUs, then memory, which both have written to.
    fn save_parts(&self, machine: &Machine, dir: &Path, base: Opened) -> Result<SaveReport, SaveError> {
        let present = presence(&machine.vcpus.hotplug.cpus())?;
        let mut origin = lock(&machine.origin);
        let slots = machine.save_devices()?;
        let clock = machine.save_clock()?;
        let vcpus = self.save_vcpus(machine)?;
        let memory_path = dir.join(MEMORY);
        let memory_error = |source| SaveError::Io {
            path: memory_path.clone(),
            source,
        };
        // A new file: the old one may be another machine's memory.
        let memory = Staged::create(&memory_path).map_err(memory_error)?;
        let among = match &base {
            Opened::Full => None,
            Opened::Difference { base, .. } => origin.written_since(base.id),
        };
        let (pages, base) = match &base {
            Opened::Full => (Pages::All, None),
            Opened::Difference { memory, base } => {
                let among = among.as_ref();
                (Pages::Changed { base: memory, among }, Some(base.clone()))
            }
        };
        let layout = machine.windows.layout();
        let backing = origin.backing.as_ref();
        let Written { contents, pages_read } =
            image::write(&machine.memory, layout, backing, pages, memory.file()).map_err(memory_error)?;
        memory.sync().map_err(memory_error)?;
        let report = SaveReport {
            memory_bytes: contents.bytes(),
            pages_read,
            by_log: among.is_some(),
        };
        let state = MachineState {
            id: vmgenid::new_id().map_err(memory_error)?,
            config: self.config.clone(),
            memory: MemoryState {
                pmem_window: layout.window(RegionKind::Pmem).map_or(0, |region| region.size),
                contents,
                base,
            },
            clock,
            cpu: machine.vcpus.context.model.clone(),
            present,
            vcpus,
            io_apic: machine.board.io_apic.save(),
            ged_pending: machine.board.ged.pending(),
            serial: machine.board.serial.as_ref().map(|serial| serial.save_state()),
            slots,
        };
        // Parts of a machine that was taken apart meanwhile are no machine.
        if let Some(reason) = self.lifecycle.ending() {
            return Err(SaveError::State(VmState::Stopped(reason)));
        }
        replace(dir, memory, &state)?;
        if state.memory.base.is_none() {
            origin.log_writes_since(state.id);
        }
        tracing::info!(id = self.id, ?dir, ?report, "machine saved");
        Ok(report)
    }

    fn save_vcpus(&self, machine: &Machine) -> Result<Vec<VcpuState>, SaveError> {
        let kvm = kvm::open()?;
        let inventory = Inventory::new(&kvm, self.config.cpu.nested).map_err(|source| SaveError::Kvm {
            ioctl: "KVM_GET_MSR_INDEX_LIST",
            source,
        })?;
        let states = machine.vcpus.stopped(|vcpus| {
            let states = vcpus
                .iter()
                .map(|vcpu| vcpu_state::save(&vcpu.fd, vcpu.index, &inventory));
            states.collect::<Result<Vec<_>, _>>()
        });
        let states = states.inspect_err(|NoThread { index, source }| {
            let (index, source) = (*index, errno_of(source));
            self.lifecycle
                .finish(ExitReason::Failure(Failure::VcpuThread { index, source }));
        })?;
        Ok(states?)
    }
}

/// Which vCPUs the guest has. A request it has not answered is none of a save's: no clone could tell what became of it. While
/// one is under way a save waits, so this is about one that was given up half-way.
fn presence(cpus: &[Cpu]) -> Result<Vec<bool>, SaveError> {
    let present = (0u8..).zip(cpus).map(|(index, cpu)| match cpu {
        Cpu::Present => Ok(true),
        Cpu::Absent => Ok(false),
        Cpu::Inserting | Cpu::Ejecting | Cpu::Refused(_) => Err(SaveError::Pending { index }),
    });
    present.collect()
}

/// Puts the save into its folder. Until all of it is on disk the one before stays; then there is none, for a moment.
fn replace(dir: &Path, memory: Staged, state: &MachineState) -> Result<(), SaveError> {
    let state_path = dir.join(STATE);
    let state = file::stage(&state_path, state)?;
    match fs::remove_file(&state_path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_error(&state_path)(error)),
        _ => {}
    }
    memory.commit().map_err(io_error(dir))?;
    // No state is to be found beside another save's memory.
    staged::sync_folder(dir).map_err(io_error(dir))?;
    state.commit().map_err(io_error(dir))?;
    staged::sync_folder(dir).map_err(io_error(dir))
}

fn io_error(path: &Path) -> impl Fn(io::Error) -> SaveError {
    move |source| SaveError::Io {
        path: path.to_owned(),
        source,
    }
}

/// What the save is written against.
enum Opened {
    Full,
    Difference { memory: File, base: Base },
}

impl Opened {
    fn new(kind: &SaveKind, target: &Path, machine: &Machine) -> Result<Self, SaveError> {
        let SaveKind::Difference { base: dir } = kind else {
            return Ok(Self::Full);
        };
        let io = |path: PathBuf| move |source| SaveError::Io { path, source };
        let dir = fs::canonicalize(dir).map_err(io(dir.clone()))?;
        let refused = |reason| SaveError::Base {
            path: dir.clone(),
            reason,
        };
        if fs::canonicalize(target).is_ok_and(|target| target == dir) {
            return Err(refused(BaseError::Target));
        }
        let state: MachineState = file::read(&dir.join(STATE))?;
        if let Some(other) = state.memory.base {
            return Err(refused(BaseError::Difference { against: other.dir }));
        }
        let path = dir.join(MEMORY);
        let memory = File::open(&path).map_err(io(path.clone()))?;
        let (len, size) = (
            memory.metadata().map_err(io(path))?.len(),
            image::file_size(machine.windows.layout()),
        );
        if len != size {
            return Err(refused(BaseError::Size { len, size }));
        }
        Ok(Self::Difference {
            memory,
            base: Base { dir, id: state.id },
        })
    }
}

impl Origin {
    /// The pages that may differ from the save `id`; `None` when nobody knows and all must be compared.
    fn written_since(&self, id: [u8; 16]) -> Option<PageSet> {
        let written = self.log.as_ref()?.written_since(id);
        written
            .inspect_err(|reason| tracing::warn!(%reason, "all memory is compared with the base"))
            .ok()
    }

    /// Starts the log of writes, if there is to be one, now that memory is as it is in the save `id`. The save is complete,
    /// so that an earlier one keeps its log when this one fails.
    fn log_writes_since(&mut self, id: [u8; 16]) {
        if let Some(log) = &mut self.log
            && let Err(reason) = log.restart(id)
        {
            tracing::warn!(%reason, "no log of writes: differences against this save will compare all memory");
        }
    }
}

impl Machine {
    /// Stops all devices and takes their state.
    fn save_devices(&self) -> Result<Vec<SlotState>, SaveError> {
        self.devices.suspend();
        let mut slots = Vec::new();
        for (index, (content, used_before)) in self.devices.contents().into_iter().enumerate() {
            let saved = self
                .devices
                .with_transport(index, |transport| transport.save())
                .transpose()?;
            let device = content
                .zip(saved)
                .map(|(content, (transport, state))| DeviceState {
                    content,
                    transport,
                    state,
                });
            slots.push(SlotState { used_before, device });
        }
        Ok(slots)
    }

    fn save_clock(&self) -> Result<ClockState, SaveError> {
        let kvm = |ioctl| move |source| SaveError::Kvm { ioctl, source };
        let clock = self.vm.get_clock().map_err(kvm("KVM_GET_CLOCK"))?;
        // Without the flag (Linux before 5.16) the two are read one after the other.
        let realtime = match clock.flags & KVM_CLOCK_REALTIME {
            0 => kvm::realtime_ns(),
            _ => clock.realtime,
        };
        Ok(ClockState {
            kvmclock: clock.clock,
            realtime,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presence_when_a_request_is_pending_is_refused() {
        let present = presence(&[Cpu::Present, Cpu::Absent, Cpu::Present]).unwrap();
        assert_eq!(present, [true, false, true]);
        for pending in [Cpu::Inserting, Cpu::Ejecting, Cpu::Refused(1)] {
            let result = presence(&[Cpu::Present, pending]);
            assert!(
                matches!(result, Err(SaveError::Pending { index: 1 })),
                "{pending:?}: {result:?}"
            );
        }
    }
}
