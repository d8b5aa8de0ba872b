//! From a folder to a paused machine; the recipe, from top to bottom, as `build.rs` is for a boot.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvm_bindings::{KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::state::{ClockState, MachineState};
use super::{Contradiction, MEMORY, MemoryMode, OverrideError, RestoreError, RestoreOptions, STATE, file};
use crate::acpi::shared_page::SharedPage;
use crate::config::{DeviceConfig, VmConfig};
use crate::confinement::Confinement;
use crate::devices::ged::Event;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::config::Opened;
use crate::devices::virtio::mem::{self, Mem, MemHandle};
use crate::devices::vmgenid;
use crate::kvm::{self, ioctl_error};
use crate::lifecycle::{ExitReason, Lifecycle};
use crate::memory::image::{self, Contents, ReadError};
use crate::memory::layout::{MemoryLayout, RegionKind};
use crate::memory::pager::Pager;
use crate::memory::userfaultfd::Watch;
use crate::memory::window::{Memslots, Windows};
use crate::memory::write_log::{Beneath, WriteLog};
use crate::memory::{self, GuestMemory};
use crate::vcpu::cpuid::{self, CpuModel};
use crate::vcpu::create;
use crate::vm::build::{self, Built, Opener, Parts};
use crate::vm::console::Input;
use crate::vm::error::BuildError;
use crate::vm::info::Mark;
use crate::vm::machine::{Machine, Origin};
use crate::vm::registry::Content;
use crate::vm::{Vm, VmState, wiring};

impl Vm {
    /// Makes a machine of what [`save`](Vm::save) wrote to `dir`. It is paused; [`resume`](Vm::resume) lets it go on. Before
    /// that, vsock listeners must be registered again and devices may be added or removed.
    ///
    /// # Errors
    /// [`RestoreError`]; nothing is left behind.
    pub fn restore(dir: &Path, options: &RestoreOptions) -> Result<Self, RestoreError> {
        let started = Mark::now();
        let mut state: MachineState = file::read(&dir.join(STATE))?;
        check(&state)?;
        apply(&mut state, options)?;
        let config = state.config.clone();
        let built = restore(dir, state, options)?;
        built.lifecycle.set_restored();
        let id = config.id.clone();
        let vm = Self::from_built(config, built, started)?;
        tracing::info!(id, ?dir, state = %VmState::Paused, "machine restored");
        Ok(vm)
    }
}

/// What the file says must be possible before anything is allocated for it.
pub(super) fn check(state: &MachineState) -> Result<(), RestoreError> {
    let invalid = |contradiction| Err(RestoreError::Invalid(contradiction));
    if let Err(error) = state.config.validate() {
        return invalid(Contradiction::Config(error));
    }
    let max = usize::from(state.config.vcpus.max);
    if state.present.len() != max {
        return invalid(Contradiction::Processors {
            saved: state.present.len(),
            max,
        });
    }
    let present = state.present.iter().zip(0u8..).filter(|(present, _)| **present);
    if !present
        .map(|(_, index)| index)
        .eq(state.vcpus.iter().map(|vcpu| vcpu.index))
    {
        return invalid(Contradiction::ProcessorStates);
    }
    if state.vcpus.is_empty() {
        return invalid(Contradiction::NoProcessor);
    }
    if state.memory.pmem_window > crate::config::MAX_MEMORY_MIB << 20 {
        return invalid(Contradiction::PmemWindow(state.memory.pmem_window));
    }
    let mut ids: Vec<&str> = devices(state).map(DeviceConfig::id).collect();
    let count = ids.len();
    ids.sort_unstable();
    ids.dedup();
    if ids.len() != count {
        return invalid(Contradiction::DuplicateDevice);
    }
    for device in devices(state) {
        if let Err(error) = device.validate() {
            return invalid(Contradiction::Device(error));
        }
    }
    let size = image::file_size(&layout(state));
    state.memory.contents.check(size).map_err(invalid_state)
}

fn invalid_state(contradiction: impl Into<Contradiction>) -> RestoreError {
    RestoreError::Invalid(contradiction.into())
}

fn devices(state: &MachineState) -> impl Iterator<Item = &DeviceConfig> {
    let devices = state.slots.iter().filter_map(|slot| slot.device.as_ref());
    devices.filter_map(|device| device.content.config())
}

pub(super) fn layout(state: &MachineState) -> MemoryLayout {
    let memory = &state.config.memory;
    MemoryLayout::with_windows(
        memory.size_mib << 20,
        memory.hotpluggable_bytes(),
        state.memory.pmem_window,
    )
}

/// Applies the overrides, each of which must hit something.
pub(super) fn apply(state: &mut MachineState, options: &RestoreOptions) -> Result<(), RestoreError> {
    state.config.memory.track_writes = options.track_writes;
    state.config.confinement = options.confinement;
    if let Some(id) = &options.id {
        state.config.id.clone_from(id);
    }
    let mut left = Overrides {
        disks: options.disks.clone(),
        taps: options.taps.clone(),
        adopted: options.tap_fds.keys().cloned().collect(),
    };
    for slot in &mut state.slots {
        if let Some(device) = &mut slot.device {
            left.apply(&mut device.content)?;
        }
    }
    left.check()?;
    match (&mut state.config.vsock, &options.vsock_uds) {
        (Some(vsock), Some(path)) => vsock.uds_path = Some(path.clone()),
        (None, Some(_)) => {
            return Err(RestoreError::Override(OverrideError::NoVsock));
        }
        (_, None) => {}
    }
    Ok(())
}

/// What devices are to have instead; each entry is taken by its device.
struct Overrides {
    disks: BTreeMap<String, PathBuf>,
    taps: BTreeMap<String, String>,
    /// Network devices for which there are open TAP queues.
    adopted: BTreeSet<String>,
}

impl Overrides {
    fn apply(&mut self, content: &mut Content) -> Result<(), RestoreError> {
        let was_adopted = matches!(content, Content::Adopted(_));
        let (Content::Device(config) | Content::Adopted(config)) = content else {
            return Ok(());
        };
        match &mut **config {
            DeviceConfig::Block(block) => {
                if let Some(path) = self.disks.remove(&block.id) {
                    block.path = path;
                }
            }
            DeviceConfig::Pmem(pmem) => {
                if let Some(path) = self.disks.remove(&pmem.id) {
                    pmem.path = path;
                }
            }
            DeviceConfig::Net(net) => {
                let (name, open) = (self.taps.remove(&net.id), self.adopted.remove(&net.id));
                if was_adopted && name.is_none() && !open {
                    let id = net.id.clone();
                    return Err(RestoreError::Override(OverrideError::TapNeeded(id)));
                }
                let mut config = config.clone();
                if let (DeviceConfig::Net(net), Some(name)) = (&mut *config, name) {
                    net.tap.name = name;
                }
                *content = match open {
                    true => Content::Adopted(config),
                    false => Content::Device(config),
                };
            }
            DeviceConfig::Fs(_) | DeviceConfig::Rng(_) | DeviceConfig::Balloon(_) => {}
        }
        Ok(())
    }

    fn check(&self) -> Result<(), RestoreError> {
        let disks = self.disks.keys().map(|id| format!("disk {id}"));
        let networks = self.taps.keys().chain(&self.adopted);
        let left: Vec<String> = disks.chain(networks.map(|id| format!("network {id}"))).collect();
        if left.is_empty() {
            return Ok(());
        }
        Err(RestoreError::Override(OverrideError::Unknown(left)))
    }
}

fn restore(dir: &Path, state: MachineState, options: &RestoreOptions) -> Result<Built, RestoreError> {
    let layout = layout(&state);
    let layers = Layers::open(dir, &state, &layout)?;
    let lifecycle = Arc::new(Lifecycle::new());
    let mut opener = Opener::new(&state.config);
    opener.tap_fds = duplicate(&options.tap_fds)?;
    let mut opened = Vec::new();
    for slot in &state.slots {
        let content = slot.device.as_ref().map(|device| &device.content);
        opened.push(match content {
            Some(Content::Mem) | None => None,
            Some(content) => Some(opener.open(content)?),
        });
    }

    let kvm = kvm::open().map_err(BuildError::from)?;
    build::check_vcpu_limit(&kvm, &state.config)?;
    let here = CpuModel::of_host(&kvm).map_err(BuildError::from)?;
    state.cpu.check_compatible(state.config.cpu.template, &here)?;
    build::check_address_space(cpuid::physical_address_bits(&here.cpuid), &layout)?;
    let vm = Arc::new(kvm::create_vm(&kvm).map_err(BuildError::from)?);

    let memory = Arc::new(memory::allocate(&layout).map_err(BuildError::from)?);
    let origin = layers.load(
        (&memory, &layout),
        options.memory,
        (state.config.memory.track_writes, state.config.confinement),
        &lifecycle,
    )?;
    memory::set_memory(&vm, &memory, &layout).map_err(BuildError::from)?;
    let registers = wiring::set_registers(&vm)?;
    let memslots: Arc<dyn Memslots> = vm.clone();
    let windows = Windows::new(layout.clone(), &memory, &memslots).map_err(|source| BuildError::Host {
        what: "sealing hotpluggable memory",
        source,
    })?;
    wiring::split_irqchip(&vm).map_err(BuildError::from)?;
    let (vcpus, clock) = make_vcpus(&kvm, &vm, &state)?;

    let parts = Parts {
        vm: vm.clone(),
        memory: memory.clone(),
        origin,
        windows,
        registers,
        shared: Arc::new(SharedPage::new(memory.clone())),
        model: state.cpu.clone(),
        platform: build::gsis(&state.config, state.slots.len())?,
        console: opener.console.clone(),
        vcpus: state.config.vcpus,
        lifecycle: lifecycle.clone(),
        confinement: state.config.confinement,
    };
    let machine = parts.assemble()?;
    let input = machine.board.serial.clone().map_or(opener.input, Input::Serial);
    let (console, vsock) = (opener.console, opener.vsock);
    let result = populate(&machine, opened, &state).and_then(|mem| {
        // Files of pmem devices are mapped now; this machine's own copies of their pages go on top.
        layers.load_private(&memory, &layout)?;
        set_board(&machine, &state)?;
        vm.set_clock(&clock)
            .map_err(ioctl_error("KVM_SET_CLOCK"))
            .map_err(BuildError::from)?;
        machine.vcpus.start_all(vcpus)?;
        match lifecycle.ending() {
            Some(reason) => Err(RestoreError::Ended(reason)),
            None => Ok(mem),
        }
    });
    match result {
        Ok(mem) => Ok(Built {
            machine,
            lifecycle,
            console,
            input,
            vsock,
            mem,
        }),
        Err(error) => {
            lifecycle.gate().end();
            machine.shut_down();
            Err(error)
        }
    }
}

fn duplicate(
    fds: &BTreeMap<String, Vec<Arc<OwnedFd>>>,
) -> Result<BTreeMap<String, Vec<OwnedFd>>, RestoreError> {
    let mut duplicates = BTreeMap::new();
    for (id, fds) in fds {
        let fds = fds.iter().map(|fd| fd.try_clone()).collect::<io::Result<_>>();
        let fds = fds.map_err(|source| {
            let id = id.clone();
            RestoreError::Override(OverrideError::TapQueue { id, source })
        })?;
        duplicates.insert(id.clone(), fds);
    }
    Ok(duplicates)
}

/// vCPUs with their state; and the clock to set, by which the guest has missed nothing.
fn make_vcpus(
    kvm: &Kvm,
    vm: &VmFd,
    state: &MachineState,
) -> Result<(Vec<(u8, VcpuFd)>, kvm_clock_data), RestoreError> {
    let ClockState { kvmclock, realtime } = state.clock;
    let passed = kvm::realtime_ns().saturating_sub(realtime);
    let mut vcpus = Vec::new();
    for saved in &state.vcpus {
        let fd =
            create::create(vm, &state.cpu, saved.index, state.config.vcpus.max).map_err(BuildError::from)?;
        saved.restore(&fd, passed)?;
        vcpus.push((saved.index, fd));
    }
    let mut clock = kvm_clock_data::default();
    if kvm::adjusts_clock(kvm) {
        // KVM adds what has passed until the moment it sets the clock.
        (clock.clock, clock.realtime, clock.flags) =
            (kvmclock, realtime.min(kvm::realtime_ns()), KVM_CLOCK_REALTIME);
    } else {
        clock.clock = kvmclock.saturating_add(passed);
    }
    Ok((vcpus, clock))
}

/// Puts the devices into their slots, with their state.
fn populate(
    machine: &Machine,
    opened: Vec<Option<Box<dyn Opened>>>,
    state: &MachineState,
) -> Result<Option<MemHandle>, RestoreError> {
    let mut handle = None;
    for (index, (slot, opened)) in state.slots.iter().zip(opened).enumerate() {
        if let Some(saved) = &slot.device {
            let device = connect(machine, opened, &saved.state, &state.config, &mut handle)?;
            build::plug(machine, index, saved.content.clone(), device)?;
            let restored = machine.devices.with_transport(index, |transport| {
                transport.restore(saved.transport.clone(), &saved.state)
            });
            restored.unwrap_or(Ok(()))?;
        }
        if slot.used_before {
            machine.devices.set_used_before(index);
        }
    }
    Ok(handle)
}

fn connect(
    machine: &Machine,
    opened: Option<Box<dyn Opened>>,
    state: &[u8],
    config: &VmConfig,
    handle: &mut Option<MemHandle>,
) -> Result<Box<dyn VirtioDevice>, BuildError> {
    if let Some(opened) = opened {
        let id = opened.id().to_owned();
        let device = opened.connect_again(&machine.windows, state);
        return device.map_err(|error| BuildError::Device {
            id,
            source: error.into(),
        });
    }
    let window = machine.windows.hotplug()?.clone();
    let device = Mem::new(mem::DEVICE_ID, window, config.memory.hotpluggable_bytes());
    *handle = Some(device.handle());
    Ok(Box::new(device))
}

/// The rest of the board. The interrupt controller comes first: the others may interrupt.
fn set_board(machine: &Machine, state: &MachineState) -> Result<(), RestoreError> {
    let board = &machine.board;
    board
        .io_apic
        .restore(state.io_apic.clone())
        .map_err(invalid_state)?;
    machine
        .vcpus
        .hotplug
        .restore(&state.present)
        .map_err(invalid_state)?;
    match (&board.serial, &state.serial) {
        (Some(serial), Some(state)) => serial.restore_state(state)?,
        (None, None) => {}
        _ => {
            return Err(RestoreError::Invalid(Contradiction::Serial));
        }
    }
    board.ged.restore(state.ged_pending);
    let host = |what| move |source| BuildError::Host { what, source };
    let generation = vmgenid::new_id().map_err(host("generation id"))?;
    board.shared.set_generation(generation);
    let notified = board.ged.notify(Event::Generation);
    Ok(notified.map_err(host("interrupt of the generic event device"))?)
}

/// The memory files of a save: of itself and, below, of the save it is a difference against.
pub(super) struct Layers<'s> {
    base: Option<(PathBuf, File, Contents)>,
    /// Of the full save among them.
    lowest_id: [u8; 16],
    path: PathBuf,
    file: File,
    contents: &'s Contents,
}

impl<'s> Layers<'s> {
    pub(super) fn open(
        dir: &Path,
        state: &'s MachineState,
        layout: &MemoryLayout,
    ) -> Result<Self, RestoreError> {
        let size = image::file_size(layout);
        let base = match &state.memory.base {
            None => None,
            Some(base) => {
                let saved: MachineState = file::read(&base.dir.join(STATE))?;
                if saved.id != base.id || saved.memory.base.is_some() {
                    let dir = base.dir.clone();
                    return Err(RestoreError::Invalid(Contradiction::Base(dir)));
                }
                saved.memory.contents.check(size).map_err(invalid_state)?;
                let (path, file) = open_memory(&base.dir, size)?;
                Some((path, file, saved.memory.contents))
            }
        };
        let (path, file) = open_memory(dir, size)?;
        Ok(Self {
            base,
            lowest_id: state.memory.base.as_ref().map_or(state.id, |base| base.id),
            path,
            file,
            contents: &state.memory.contents,
        })
    }

    /// Fills everything but the window of virtio-pmem. `track_writes` starts a log that is about the full save. `lifecycle` is
    /// told if pages that are brought in later cannot be.
    fn load(
        &self,
        (memory, layout): (&Arc<GuestMemory>, &MemoryLayout),
        mode: MemoryMode,
        (track_writes, confinement): (bool, Confinement),
        lifecycle: &Arc<Lifecycle>,
    ) -> Result<Origin, RestoreError> {
        let lowest = self.base.as_ref();
        let (path, file, contents) = match lowest {
            Some((path, file, contents)) => (path, file, contents),
            None => (&self.path, &self.file, self.contents),
        };
        let damaged = |source| RestoreError::Memory {
            path: path.clone(),
            source,
        };
        let error = |source: io::Error| damaged(source.into());
        let not_pmem = |kind| kind != RegionKind::Pmem;
        let mut origin = Origin::default();
        let beneath = match mode {
            MemoryMode::Eager => {
                image::read(memory, layout, file, contents, not_pmem).map_err(damaged)?;
                Beneath::Zeros
            }
            MemoryMode::CopyOnWrite => {
                image::map_private(memory, layout, file).map_err(error)?;
                Beneath::File
            }
            MemoryMode::Userfaultfd => {
                let pager = start_pager(memory, layout, file, (track_writes, confinement), lifecycle)
                    .map_err(error)?;
                Beneath::Pager(origin.pager.insert(pager).userfaultfd().clone())
            }
        };
        if track_writes {
            // Before the pages of a difference are read: those are written.
            origin.log = Some(self.start_log(memory, layout, beneath).map_err(error)?);
        }
        if mode != MemoryMode::Eager {
            origin.backing = Some(file.try_clone().map_err(error)?);
        }
        if lowest.is_some() {
            let read = image::read(memory, layout, &self.file, self.contents, not_pmem);
            read.map_err(|source| self.error(source))?;
        }
        Ok(origin)
    }

    fn start_log(
        &self,
        memory: &Arc<GuestMemory>,
        layout: &MemoryLayout,
        beneath: Beneath,
    ) -> io::Result<WriteLog> {
        let owns_content = matches!(beneath, Beneath::Zeros);
        let mut log = WriteLog::new(memory, layout, beneath)?;
        if !owns_content {
            log.start_at_source(self.lowest_id);
        } else if let Err(reason) = log.restart(self.lowest_id) {
            tracing::warn!(%reason, "no log of writes: differences will compare all memory");
        }
        Ok(log)
    }

    /// Fills the window of virtio-pmem with the pages that are the machine's own. A difference has all of them; those of
    /// its base may be of a device that was removed, and there may be another one's file, not to be written, in its place.
    fn load_private(&self, memory: &GuestMemory, layout: &MemoryLayout) -> Result<(), RestoreError> {
        let pmem = |kind| kind == RegionKind::Pmem;
        image::read(memory, layout, &self.file, self.contents, pmem).map_err(|source| self.error(source))
    }

    /// Reads all of it and compares checksums.
    pub(super) fn verify(&self) -> Result<(), RestoreError> {
        if let Some((path, file, contents)) = &self.base {
            image::verify(file, contents, true).map_err(|source| RestoreError::Memory {
                path: path.clone(),
                source,
            })?;
        }
        let whole = self.base.is_none();
        image::verify(&self.file, self.contents, whole).map_err(|source| self.error(source))
    }

    fn error(&self, source: ReadError) -> RestoreError {
        RestoreError::Memory {
            path: self.path.clone(),
            source,
        }
    }
}

/// Brings memory in from `file`, and watches writes if they are tracked and the kernel can.
fn start_pager(
    memory: &Arc<GuestMemory>,
    layout: &MemoryLayout,
    file: &File,
    (track_writes, confinement): (bool, Confinement),
    lifecycle: &Arc<Lifecycle>,
) -> io::Result<Pager> {
    let start = |watch| {
        let lifecycle = lifecycle.clone();
        let failed = move |failure| lifecycle.finish(ExitReason::Failure(failure));
        Pager::start(memory, layout, file, (watch, confinement), failed)
    };
    if track_writes {
        match start(Watch::MissingAndWrites) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                tracing::warn!(%error, "no log of writes: differences will compare all memory");
            }
            started => return started,
        }
    }
    start(Watch::Missing)
}

/// Opens the memory file in `dir`, which must have `size` bytes: a shorter one would be a SIGBUS when it is mapped.
fn open_memory(dir: &Path, size: u64) -> Result<(PathBuf, File), RestoreError> {
    let path = dir.join(MEMORY);
    let error = |source: io::Error| RestoreError::Memory {
        path: path.clone(),
        source: source.into(),
    };
    let file = File::open(&path).map_err(error)?;
    let len = file.metadata().map_err(error)?.len();
    if len != size {
        return Err(RestoreError::Invalid(Contradiction::MemorySize {
            path,
            len,
            size,
        }));
    }
    Ok((path, file))
}
