//! The recipe of a machine, from top to bottom.
//!
//! KVM's cost depends on the order (design decision 3): all memslots, then the interrupt controllers, vCPUs, irqfds, and
//! ioeventfds last.

use std::io;
use std::sync::Arc;

use kvm_ioctls::{Kvm, VmFd};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::acpi;
use crate::boot;
use crate::bus::Bus;
use crate::config::{ConsoleConfig, MemoryConfig, VmConfig};
use crate::devices::ged::{self, Ged};
use crate::devices::power::{self, Power};
use crate::devices::pvpanic::{self, PvPanic};
use crate::devices::serial::{self, Serial};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::console::{Console, ConsoleLog};
use crate::devices::virtio::mem::{self, Mem, MemHandle};
use crate::devices::virtio::slots::{PRESENCE_PORT, PRESENCE_PORTS, Presence, Slots};
use crate::devices::virtio::vsock::{Vsock, VsockHandle};
use crate::io_loop::IoLoop;
use crate::irq::{self, GsiAllocator};
use crate::memory::layout::MemoryLayout;
use crate::memory::window::{Memslots, Windows};
use crate::memory::{self, layout};
use crate::vcpu::metrics::VcpuCounters;
use crate::vcpu::run::Vcpu;
use crate::vcpu::{cpuid, kick, regs};
use crate::vm::devices::{self, Opened};
use crate::vm::error::BuildError;
use crate::vm::kvm::{self, ioctl_error};
use crate::vm::lifecycle::Lifecycle;
use crate::vm::machine::Machine;

/// A machine whose vCPU threads wait at the gate.
pub struct Built {
    /// The machine.
    pub machine: Machine,
    /// Its state.
    pub lifecycle: Arc<Lifecycle>,
    /// Its console.
    pub console: ConsoleLog,
    /// Its vsock device, if it has one.
    pub vsock: Option<VsockHandle>,
    /// Its hotpluggable memory, if it has any.
    pub mem: Option<MemHandle>,
}

/// Devices in slot order.
type Devices = Vec<Box<dyn VirtioDevice>>;

/// Builds the machine of `config`. On an error everything made so far is taken apart again.
pub fn build(config: &VmConfig) -> Result<Built, BuildError> {
    config.validate()?;
    let console = ConsoleLog::default();
    let plan = Plan::new(config, &console)?;
    let layout = plan.layout(&config.memory);

    let kvm = kvm::open()?;
    check_vcpu_limit(&kvm, config)?;
    let cpuid = cpuid::supported(&kvm)?;
    check_address_space(cpuid::physical_address_bits(&cpuid), &layout)?;
    let vm = Arc::new(kvm::create_vm(&kvm)?);

    let memory_size = config.memory.size_mib << 20;
    let memory = Arc::new(memory::allocate(&layout)?);
    let rsdp = acpi::write_tables(&memory, &plan.acpi)?;
    memory
        .write_slice(&power::reset_vector(), GuestAddress(layout::RESET_VECTOR))
        .map_err(|e| BuildError::Host {
            what: "reset vector",
            source: io::Error::other(e.to_string()),
        })?;
    let entry = boot::load(&config.boot, &memory, memory_size, rsdp)?;

    kvm::set_memory(&vm, &memory, &layout)?;
    let memslots: Arc<dyn Memslots> = vm.clone();
    let windows = Windows::new(layout, &memory, &memslots);
    // Files of pmem devices get their memslots here, before the irqchip exists.
    let (devices, mem) = connect(plan.devices, &config.memory, &windows)?;
    vm.create_irq_chip().map_err(ioctl_error("KVM_CREATE_IRQCHIP"))?;
    let mut vcpus = Vec::new();
    for index in 0..config.vcpus.boot {
        let vcpu = vm
            .create_vcpu(u64::from(index))
            .map_err(ioctl_error("KVM_CREATE_VCPU"))?;
        let cpuid = cpuid::for_vcpu(&cpuid, index, config.vcpus.max)?;
        vcpu.set_cpuid2(&cpuid).map_err(ioctl_error("KVM_SET_CPUID2"))?;
        regs::set_msrs(&vcpu, index)?;
        if index == 0 {
            regs::set_boot_state(&vcpu, &memory, entry)?;
        }
        vcpus.push(vcpu);
    }

    let slots = Arc::new(Slots::new(plan.acpi.slot_gsis.len() as u8));
    let ged = Arc::new(Ged::new(new_irqfd(&vm, plan.acpi.ged_gsi)?));
    let serial = match plan.acpi.serial {
        true => Some(Serial::new(console.clone(), new_irqfd(&vm, serial::GSI)?)),
        false => None,
    };
    let (pio, mmio) = buses(&slots, &ged, serial)?;

    let io = IoLoop::spawn("vmm-io")?;
    let lifecycle = Arc::new(Lifecycle::new(vcpus.len()));
    let machine = Machine::new(vm, (memory, windows), slots, &plan.acpi.slot_gsis, ged, io);
    let mut built = Built {
        machine,
        lifecycle,
        console,
        vsock: plan.vsock,
        mem,
    };
    match populate(&mut built, devices, vcpus, pio, mmio) {
        Ok(()) => Ok(built),
        Err(error) => {
            built.lifecycle.gate().end();
            drop(built.machine.shut_down());
            Err(error)
        }
    }
}

/// Completes the devices with their parts of guest memory. The one of hotpluggable memory comes last: the guest's numbering
/// of the others does not depend on it.
fn connect(
    opened: Vec<Opened>,
    config: &MemoryConfig,
    windows: &Windows,
) -> Result<(Devices, Option<MemHandle>), BuildError> {
    let mut devices = Devices::new();
    for device in opened {
        let id = device.id().to_owned();
        let connected = device.connect(windows);
        devices.push(connected.map_err(|reason| BuildError::Device { id, reason })?);
    }
    let mut handle = None;
    if config.hotpluggable_bytes() > 0 {
        let device = Mem::new(
            mem::DEVICE_ID,
            windows.hotplug()?.clone(),
            config.hotpluggable_bytes(),
        );
        handle = Some(device.handle());
        devices.push(Box::new(device));
    }
    Ok((devices, handle))
}

/// The parts that have threads or registrations to undo: devices, then vCPU threads.
fn populate(
    built: &mut Built,
    devices: Devices,
    vcpus: Vec<kvm_ioctls::VcpuFd>,
    pio: Arc<Bus>,
    mmio: Arc<Bus>,
) -> Result<(), BuildError> {
    for (slot, device) in devices.into_iter().enumerate() {
        let id = device.id().to_owned();
        built.machine.plug(slot, device).map_err(|e| BuildError::Device {
            id,
            reason: format!("{}: {}", e.what, e.source),
        })?;
    }
    kick::install_handler().map_err(|source| BuildError::Host {
        what: "signal handler",
        source,
    })?;
    for (index, fd) in (0u8..).zip(vcpus) {
        let vcpu = Vcpu {
            index,
            fd,
            pio: pio.clone(),
            mmio: mmio.clone(),
            lifecycle: built.lifecycle.clone(),
            counters: Arc::new(VcpuCounters::default()),
        };
        let thread = vcpu.spawn().map_err(|source| BuildError::Host {
            what: "vCPU thread",
            source,
        })?;
        built.machine.vcpus.push(thread);
    }
    Ok(())
}

/// Everything that can be decided, opened and checked before KVM is asked for anything.
struct Plan {
    /// In slot order; the one of hotpluggable memory is not among them.
    devices: Vec<Opened>,
    vsock: Option<VsockHandle>,
    acpi: acpi::Machine,
}

impl Plan {
    fn new(config: &VmConfig, console: &ConsoleLog) -> Result<Self, BuildError> {
        let mut all = Vec::new();
        if config.console == ConsoleConfig::Hvc {
            all.push(Opened::Device(Box::new(Console::new(console.clone()))));
        }
        let mut vsock = None;
        if let Some(config) = &config.vsock {
            let (device, handle) = Vsock::new(config).map_err(|e| BuildError::Device {
                id: "vsock".to_owned(),
                reason: e.to_string(),
            })?;
            all.push(Opened::Device(Box::new(device)));
            vsock = Some(handle);
        }
        for device in &config.devices {
            all.push(devices::open(device).map_err(|reason| BuildError::Device {
                id: device.id().to_owned(),
                reason,
            })?);
        }
        let mem = usize::from(config.memory.hotpluggable_bytes() > 0);
        let slots = all.len() + mem + usize::from(config.hotplug_slots);
        let too_many = || BuildError::TooManySlots {
            requested: slots,
            max: irq::MAX_SLOTS,
        };
        let mut gsis = GsiAllocator::default();
        let ged_gsi = gsis.allocate().ok_or_else(too_many)?;
        let mut slot_gsis = Vec::new();
        for _ in 0..slots {
            slot_gsis.push(gsis.allocate().ok_or_else(too_many)?);
        }
        let acpi = acpi::Machine {
            boot_vcpus: config.vcpus.boot,
            max_vcpus: config.vcpus.max,
            ged_gsi,
            slot_gsis,
            serial: config.console == ConsoleConfig::Serial,
        };
        Ok(Self {
            devices: all,
            vsock,
            acpi,
        })
    }

    /// Where RAM and windows go.
    fn layout(&self, config: &MemoryConfig) -> MemoryLayout {
        let boot_pmem = self.devices.iter().map(Opened::pmem_bytes).sum();
        let pmem = (config.pmem_window_mib << 20).max(boot_pmem);
        MemoryLayout::with_windows(config.size_mib << 20, config.hotpluggable_bytes(), pmem)
    }
}

fn check_vcpu_limit(kvm: &Kvm, config: &VmConfig) -> Result<(), BuildError> {
    let supported = kvm.get_max_vcpus();
    if usize::from(config.vcpus.max) > supported {
        return Err(BuildError::TooManyVcpus {
            requested: config.vcpus.max,
            supported,
        });
    }
    Ok(())
}

fn check_address_space(bits: u32, layout: &MemoryLayout) -> Result<(), BuildError> {
    let end = layout.end();
    if end > 1 << bits {
        return Err(BuildError::AddressSpace { end, bits });
    }
    Ok(())
}

fn buses(
    slots: &Arc<Slots>,
    ged: &Arc<Ged>,
    serial: Option<Serial>,
) -> Result<(Arc<Bus>, Arc<Bus>), BuildError> {
    let mut pio = Bus::default();
    pio.insert(power::PORT.into(), power::PORTS.into(), Arc::new(Power))?;
    pio.insert(pvpanic::PORT.into(), 1, Arc::new(PvPanic))?;
    pio.insert(ged::PORT.into(), 1, ged.clone())?;
    pio.insert(
        PRESENCE_PORT.into(),
        PRESENCE_PORTS.into(),
        Arc::new(Presence(slots.clone())),
    )?;
    if let Some(serial) = serial {
        pio.insert(serial::PORT.into(), serial::PORTS.into(), Arc::new(serial))?;
    }
    let mut mmio = Bus::default();
    if !slots.is_empty() {
        let size = slots.len() as u64 * layout::VIRTIO_MMIO_SLOT_SIZE;
        mmio.insert(layout::VIRTIO_MMIO_START, size, slots.clone())?;
    }
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
