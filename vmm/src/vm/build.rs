//! The recipe of a machine, from top to bottom.
//!
//! KVM's cost depends on the order (design decision 3): all memslots, then the interrupt controllers, vCPUs, irqfds, and
//! ioeventfds last.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::acpi::shared_page::SharedPage;
use crate::boot::{self, EntryPoint};
use crate::bus::Bus;
use crate::config::{ConsoleConfig, MemoryConfig, VcpuConfig, VmConfig};
use crate::confinement::Confinement;
use crate::devices::cpu_hotplug::{self, CpuHotplug};
use crate::devices::ged::{self, Ged};
use crate::devices::power::{self, Power};
use crate::devices::pvpanic::{self, PvPanic};
use crate::devices::serial::{self, Serial};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::config::{Complete, Opened};
use crate::devices::virtio::console::{Console, ConsoleLog};
use crate::devices::virtio::mem::{self, Mem, MemHandle};
use crate::devices::virtio::transport::mmio::registers::RegisterPages;
use crate::devices::virtio::transport::mmio::slots::{self, Slots};
use crate::devices::virtio::vsock::{Vsock, VsockHandle};
use crate::devices::vmgenid;
use crate::io_loop::IoLoop;
use crate::irq::GsiAllocator;
use crate::irq::io_apic::{self, IoApic};
use crate::kvm::{self, ioctl_error};
use crate::lifecycle::Lifecycle;
use crate::memory::layout::MemoryLayout;
use crate::memory::window::{Memslots, Windows};
use crate::memory::write_log::{Beneath, WriteLog};
use crate::memory::{self, GuestMemory, layout};
use crate::vcpu::cpuid::{self, CpuModel};
use crate::vcpu::create::{self, VcpuContext};
use crate::vcpu::regs;
use crate::vm::acpi::Platform;
use crate::vm::console::Input;
use crate::vm::error::{BuildError, DeviceFault};
use crate::vm::machine::{Board, Machine, Origin};
use crate::vm::registry::Content;
use crate::vm::vcpus::Vcpus;
use crate::vm::wiring;

/// A machine whose vCPU threads wait at the gate.
pub struct Built {
    /// The machine.
    pub machine: Machine,
    /// Its state.
    pub lifecycle: Arc<Lifecycle>,
    /// Its console.
    pub console: ConsoleLog,
    /// What is typed on it.
    pub input: Input,
    /// Its vsock device, if it has one.
    pub vsock: Option<VsockHandle>,
    /// Its hotpluggable memory, if it has any.
    pub mem: Option<MemHandle>,
}

/// Devices in slot order.
type Devices = Vec<(Content, Box<dyn VirtioDevice>)>;

/// Builds the machine of `config`. On an error everything made so far is taken apart again.
pub fn build(config: &VmConfig) -> Result<Built, BuildError> {
    config.validate()?;
    let plan = Plan::new(config)?;
    let console = plan.console.clone();
    let layout = plan.layout(&config.memory);

    let memory = Arc::new(memory::allocate(&layout)?);
    // Neither needs the other: reading a kernel takes milliseconds, KVM's part most of one.
    let (kvm, contents) = std::thread::scope(|scope| {
        let filling = std::thread::Builder::new()
            .name("vmm-load".to_owned())
            .spawn_scoped(scope, || fill(&memory, config, &plan.platform));
        let filling = filling.map_err(|source| BuildError::Host {
            what: "thread vmm-load",
            source,
        })?;
        let kvm = KvmParts::new(config, &memory, &layout);
        let contents = filling
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok::<_, BuildError>((kvm?, contents?))
    })?;
    let KvmParts { vm, model, registers } = kvm;
    let (shared, entry) = contents;

    let memslots: Arc<dyn Memslots> = vm.clone();
    let windows = Windows::new(layout, &memory, &memslots).map_err(|source| BuildError::Host {
        what: "sealing hotpluggable memory",
        source,
    })?;
    // Files of pmem devices get their memslots here, before the irqchip exists.
    let (devices, mem) = connect(plan.devices, &config.memory, &windows)?;
    wiring::split_irqchip(&vm)?;
    let max = config.vcpus.max;
    let mut fds = Vec::new();
    for index in 0..config.vcpus.boot {
        let vcpu = create::create(&vm, &model, index, max)?;
        if index == 0 {
            regs::set_boot_state(&vcpu, &memory, entry)?;
        }
        fds.push(vcpu);
    }

    let lifecycle = Arc::new(Lifecycle::new());
    let mut origin = Origin::default();
    if config.memory.track_writes {
        let log = WriteLog::new(&memory, windows.layout(), Beneath::Zeros);
        origin.log = Some(log.map_err(|source| BuildError::Host {
            what: "log of writes",
            source,
        })?);
    }
    let parts = Parts {
        vm,
        memory,
        origin,
        windows,
        registers,
        shared,
        model,
        platform: plan.platform,
        console,
        vcpus: config.vcpus,
        lifecycle: lifecycle.clone(),
        confinement: config.confinement,
    };
    let machine = parts.assemble()?;
    let input = machine.board.serial.clone().map_or(plan.input, Input::Serial);
    let built = Built {
        machine,
        lifecycle,
        console: plan.console,
        input,
        vsock: plan.vsock,
        mem,
    };
    match populate(&built.machine, devices, fds) {
        Ok(()) => Ok(built),
        Err(error) => {
            built.lifecycle.gate().end();
            built.machine.shut_down();
            Err(error)
        }
    }
}

/// KVM's machine with its memory, before there are interrupt controllers and vCPUs.
struct KvmParts {
    vm: Arc<VmFd>,
    model: CpuModel,
    registers: Arc<RegisterPages>,
}

impl KvmParts {
    fn new(config: &VmConfig, guest_memory: &GuestMemory, layout: &MemoryLayout) -> Result<Self, BuildError> {
        let kvm = kvm::open()?;
        check_vcpu_limit(&kvm, config)?;
        let model = CpuModel::new(&kvm, config.cpu)?;
        check_address_space(cpuid::physical_address_bits(&model.cpuid), layout)?;
        let vm = Arc::new(kvm::create_vm(&kvm)?);
        memory::set_memory(&vm, guest_memory, layout)?;
        let registers = wiring::set_registers(&vm)?;
        Ok(Self { vm, model, registers })
    }
}

/// Writes what a booting processor finds in memory; returns the page shared with AML, and where the kernel begins.
fn fill(
    memory: &Arc<GuestMemory>,
    config: &VmConfig,
    platform: &Platform,
) -> Result<(Arc<SharedPage>, EntryPoint), BuildError> {
    let rsdp = platform.tables().write(memory)?;
    memory
        .write_slice(&power::reset_vector(), GuestAddress(layout::RESET_VECTOR))
        .map_err(|e| BuildError::Host {
            what: "reset vector",
            source: io::Error::other(e.to_string()),
        })?;
    let shared = Arc::new(SharedPage::new(memory.clone()));
    let generation = vmgenid::new_id().map_err(|source| BuildError::Host {
        what: "generation id",
        source,
    })?;
    shared.set_generation(generation);
    let entry = boot::load(&config.boot, memory, config.memory.size_mib << 20, rsdp)?;
    Ok((shared, entry))
}

/// What a machine without devices and vCPU threads is made of, whether it boots or is restored.
pub struct Parts {
    /// KVM's side, with memslots and local APICs.
    pub vm: Arc<VmFd>,
    /// Guest memory.
    pub memory: Arc<GuestMemory>,
    /// Where its content comes from.
    pub origin: Origin,
    /// Its windows.
    pub windows: Windows,
    /// What the guest reads of its virtio-mmio slots.
    pub registers: Arc<RegisterPages>,
    /// What AML reads.
    pub shared: Arc<SharedPage>,
    /// What the vCPUs can.
    pub model: CpuModel,
    /// GSIs.
    pub platform: Platform,
    /// Where COM1's output goes.
    pub console: ConsoleLog,
    /// Processors of the configuration.
    pub vcpus: VcpuConfig,
    /// The machine's state.
    pub lifecycle: Arc<Lifecycle>,
    /// What threads give up.
    pub confinement: Confinement,
}

impl Parts {
    /// Connects them. The last thing made is the I/O loop's thread: from then on [`Machine::shut_down`] must be called.
    ///
    /// # Errors
    /// [`BuildError`].
    pub fn assemble(self) -> Result<Machine, BuildError> {
        let VcpuConfig { boot, max } = self.vcpus;
        let hotplug = Arc::new(CpuHotplug::new(self.shared.clone(), boot, max));
        let board = board(
            &self.vm,
            &self.platform,
            self.registers,
            self.shared,
            &self.console,
        )?;
        let (pio, mmio) = buses(&board, &hotplug)?;
        let context = VcpuContext {
            model: self.model,
            max,
            pio,
            mmio,
            lifecycle: self.lifecycle,
            confinement: self.confinement,
        };
        let vcpus = Vcpus::new(context, hotplug);
        let starting = board.slots.start_on_a_thread(self.confinement);
        starting.map_err(|source| BuildError::Host {
            what: "thread vmm-starter",
            source,
        })?;
        let io = IoLoop::spawn("vmm-io", self.confinement)?;
        let memory = (self.memory, self.windows, self.origin);
        Ok(Machine::new(self.vm, memory, board, vcpus, io, self.confinement))
    }
}

/// The interrupt controller and what hangs on it.
fn board(
    vm: &Arc<VmFd>,
    platform: &Platform,
    registers: Arc<RegisterPages>,
    shared: Arc<SharedPage>,
    console: &ConsoleLog,
) -> Result<Board, BuildError> {
    let slots = Arc::new(Slots::new(
        platform.slot_gsis.len() as u8,
        registers,
        shared.clone(),
    ));
    let ged = Arc::new(Ged::new(new_irqfd(vm, platform.ged_gsi)?));
    let serial = match platform.serial {
        true => Some(Arc::new(Serial::new(
            console.clone(),
            new_irqfd(vm, serial::GSI)?,
        ))),
        false => None,
    };
    let routing = wiring::Routes {
        vm: vm.clone(),
        ged: (platform.ged_gsi, ged.clone()),
        slots: (
            platform.slot_gsis.first().copied().unwrap_or(u32::MAX),
            slots.clone(),
        ),
        serial: serial.clone(),
    };
    Ok(Board {
        slots,
        slot_gsis: platform.slot_gsis.clone(),
        ged,
        io_apic: Arc::new(IoApic::new(platform.io_apic_pins, Box::new(routing))),
        shared,
        serial,
    })
}

/// Completes the devices with their parts of guest memory. The one of hotpluggable memory comes last: the guest's numbering
/// of the others does not depend on it.
fn connect(
    opened: Vec<(Content, Box<dyn Opened>)>,
    config: &MemoryConfig,
    windows: &Windows,
) -> Result<(Devices, Option<MemHandle>), BuildError> {
    let mut devices = Devices::new();
    for (content, device) in opened {
        let id = device.id().to_owned();
        let connected = device.connect(windows);
        devices.push((
            content,
            connected.map_err(|error| BuildError::Device {
                id,
                source: error.into(),
            })?,
        ));
    }
    let mut handle = None;
    if config.hotpluggable_bytes() > 0 {
        let device = Mem::new(
            mem::DEVICE_ID,
            windows.hotplug()?.clone(),
            config.hotpluggable_bytes(),
        );
        handle = Some(device.handle());
        devices.push((Content::Mem, Box::new(device)));
    }
    Ok((devices, handle))
}

/// The parts that have threads or registrations to undo: devices, then vCPU threads.
fn populate(machine: &Machine, devices: Devices, vcpus: Vec<VcpuFd>) -> Result<(), BuildError> {
    for (slot, (content, device)) in devices.into_iter().enumerate() {
        plug(machine, slot, content, device)?;
    }
    machine.vcpus.start_all((0u8..).zip(vcpus))
}

/// Puts `device` into slot `index` of a machine that is made.
///
/// # Errors
/// [`BuildError::Device`].
pub fn plug(
    machine: &Machine,
    index: usize,
    content: Content,
    device: Box<dyn VirtioDevice>,
) -> Result<(), BuildError> {
    let id = device.id().to_owned();
    let plugged = machine.devices.plug(index, content, device);
    plugged.map(drop).map_err(|error| BuildError::Device {
        id,
        source: error.into(),
    })
}

/// Everything that can be decided, opened and checked before KVM is asked for anything.
struct Plan {
    /// In slot order; the one of hotpluggable memory is not among them.
    devices: Vec<(Content, Box<dyn Opened>)>,
    console: ConsoleLog,
    input: Input,
    vsock: Option<VsockHandle>,
    platform: Platform,
}

impl Plan {
    fn new(config: &VmConfig) -> Result<Self, BuildError> {
        let mut contents = Vec::new();
        if config.console == ConsoleConfig::Hvc {
            contents.push(Content::Console);
        }
        if config.vsock.is_some() {
            contents.push(Content::Vsock);
        }
        contents.extend(config.devices.iter().cloned().map(Box::new).map(Content::Device));
        let mut opener = Opener::new(config);
        let mut devices = Vec::new();
        for content in contents {
            let opened = opener.open(&content)?;
            devices.push((content, opened));
        }
        let mem = usize::from(config.memory.hotpluggable_bytes() > 0);
        let slots = devices.len() + mem + usize::from(config.hotplug_slots);
        Ok(Self {
            devices,
            platform: gsis(config, slots)?,
            console: opener.console,
            input: opener.input,
            vsock: opener.vsock,
        })
    }

    /// Where RAM and windows go.
    fn layout(&self, config: &MemoryConfig) -> MemoryLayout {
        let boot_pmem = self.devices.iter().map(|(_, opened)| opened.pmem_bytes()).sum();
        let pmem = (config.pmem_window_mib << 20).max(boot_pmem);
        MemoryLayout::with_windows(config.size_mib << 20, config.hotpluggable_bytes(), pmem)
    }
}

/// What the tables of a machine with `slots` slots describe; GSIs are given out in the same order each time.
///
/// # Errors
/// [`BuildError::TooManySlots`].
pub fn gsis(config: &VmConfig, slots: usize) -> Result<Platform, BuildError> {
    let too_many = || BuildError::TooManySlots {
        requested: slots,
        max: slots::MAX_SLOTS,
    };
    if slots > usize::from(slots::MAX_SLOTS) {
        return Err(too_many());
    }
    let mut gsis = GsiAllocator::default();
    let ged_gsi = gsis.allocate().ok_or_else(too_many)?;
    let mut slot_gsis = Vec::new();
    for _ in 0..slots {
        slot_gsis.push(gsis.allocate().ok_or_else(too_many)?);
    }
    Ok(Platform {
        boot_vcpus: config.vcpus.boot,
        max_vcpus: config.vcpus.max,
        ged_gsi,
        slot_gsis,
        io_apic_pins: gsis.pins(),
        serial: config.console == ConsoleConfig::Serial,
    })
}

/// Opens the devices of a machine, and keeps the handles of those that have one.
pub struct Opener<'c> {
    config: &'c VmConfig,
    /// The guest's output.
    pub console: ConsoleLog,
    /// What is typed.
    pub input: Input,
    /// The host side of the vsock device.
    pub vsock: Option<VsockHandle>,
    /// Open TAP queues, by id of the network device.
    pub tap_fds: BTreeMap<String, Vec<OwnedFd>>,
}

impl<'c> Opener<'c> {
    /// For the machine of `config`.
    pub fn new(config: &'c VmConfig) -> Self {
        Self {
            config,
            console: ConsoleLog::default(),
            input: Input::Off,
            vsock: None,
            tap_fds: BTreeMap::new(),
        }
    }

    /// Opens what the device of `content` needs from the host.
    ///
    /// # Errors
    /// [`BuildError::Device`].
    pub fn open(&mut self, content: &Content) -> Result<Box<dyn Opened>, BuildError> {
        let error = |id: &str, source| BuildError::Device {
            id: id.to_owned(),
            source,
        };
        Ok(match (content, &self.config.vsock) {
            (Content::Console, _) => {
                let console = Console::new(self.console.clone());
                let (device, handle) = console.map_err(|source| BuildError::Host {
                    what: "eventfd",
                    source,
                })?;
                self.input = Input::Hvc(handle);
                Complete::opened(device)
            }
            (Content::Vsock, Some(config)) => {
                let vsock = Vsock::new(config);
                let (device, handle) = vsock.map_err(|e| error("vsock", e.into()))?;
                self.vsock = Some(handle);
                Complete::opened(device)
            }
            (Content::Vsock, None) => {
                return Err(error("vsock", DeviceFault::NotConfigured));
            }
            (Content::Mem, _) => {
                return Err(error(mem::DEVICE_ID, DeviceFault::OfMemory));
            }
            (Content::Device(config), _) => {
                config.knobs().open().map_err(|e| error(config.id(), e.into()))?
            }
            (Content::Adopted(config), _) => {
                let fds = self.tap_fds.remove(config.id()).unwrap_or_default();
                config
                    .knobs()
                    .adopt(fds)
                    .map_err(|e| error(config.id(), e.into()))?
            }
        })
    }
}

pub fn check_vcpu_limit(kvm: &Kvm, config: &VmConfig) -> Result<(), BuildError> {
    let supported = kvm.get_max_vcpus();
    if usize::from(config.vcpus.max) > supported {
        return Err(BuildError::TooManyVcpus {
            requested: config.vcpus.max,
            supported,
        });
    }
    Ok(())
}

pub fn check_address_space(bits: u32, layout: &MemoryLayout) -> Result<(), BuildError> {
    let end = layout.end();
    if end > 1 << bits {
        return Err(BuildError::AddressSpace { end, bits });
    }
    Ok(())
}

fn buses(board: &Board, hotplug: &Arc<CpuHotplug>) -> Result<(Arc<Bus>, Arc<Bus>), BuildError> {
    let mut pio = Bus::default();
    pio.insert(power::PORT.into(), power::PORTS.into(), Arc::new(Power))?;
    pio.insert(pvpanic::PORT.into(), 1, Arc::new(PvPanic))?;
    pio.insert(ged::PORT.into(), 1, board.ged.clone())?;
    pio.insert(
        cpu_hotplug::PORT.into(),
        cpu_hotplug::PORTS.into(),
        hotplug.clone(),
    )?;
    if let Some(serial) = &board.serial {
        pio.insert(serial::PORT.into(), serial::PORTS.into(), serial.clone())?;
    }
    let mut mmio = Bus::default();
    if !board.slots.is_empty() {
        let size = board.slots.len() as u64 * layout::VIRTIO_MMIO_SLOT_SIZE;
        mmio.insert(layout::VIRTIO_MMIO_START, size, board.slots.clone())?;
    }
    mmio.insert(layout::IO_APIC.into(), io_apic::SIZE, board.io_apic.clone())?;
    Ok((Arc::new(pio), Arc::new(mmio)))
}

fn new_irqfd(vm: &VmFd, gsi: u32) -> Result<Arc<EventFd>, BuildError> {
    let irqfd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|source| BuildError::Host {
        what: "eventfd",
        source,
    })?;
    vm.register_irqfd(&irqfd, gsi).map_err(ioctl_error("KVM_IRQFD"))?;
    Ok(Arc::new(irqfd))
}
