//! Opening KVM and creating a VM, with errors a person can act on.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_CLOCK_REALTIME, KVM_MEM_READONLY, KvmIrqRouting, kvm_enable_cap,
    kvm_irq_routing_entry, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::{GuestAddress, GuestMemory as _};

use crate::devices::ged::Ged;
use crate::devices::serial::{self, Serial};
use crate::devices::virtio::registers::RegisterPages;
use crate::devices::virtio::slots::{MAX_SLOTS, Slots};
use crate::irq::io_apic::Routing;
use crate::memory::layout::{MemoryLayout, Region, RegionKind};
use crate::memory::window::{Memslot, Memslots, REGISTER_SLOT};
use crate::memory::{GuestMemory, layout};
use crate::vm::error::{BuildError, KvmError};

/// The device node.
pub const DEVICE: &str = "/dev/kvm";
const API_VERSION: i32 = 12;
/// Attempts at KVM_CREATE_VM while it says EINTR.
const CREATE_ATTEMPTS: u32 = 5;

/// Opens [`DEVICE`].
///
/// # Errors
/// [`KvmError`] tells a missing device, a lack of permission and a wrong version apart.
pub fn open() -> Result<Kvm, KvmError> {
    let path = Path::new(DEVICE).to_owned();
    // kvm-ioctls takes a C string; the path is constant.
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Missing(path.clone()),
        libc::EACCES | libc::EPERM => KvmError::Permission(path.clone()),
        errno => KvmError::Open {
            path: path.clone(),
            source: io::Error::from_raw_os_error(errno),
        },
    })?;
    match kvm.get_api_version() {
        API_VERSION => Ok(kvm),
        version => Err(KvmError::Version { path, version }),
    }
}

/// Creates a VM. KVM_CREATE_VM can say EINTR without a signal being meant for it (mm_take_all_locks gives up when any
/// is pending), so it is tried again.
///
/// # Errors
/// [`BuildError::Ioctl`].
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, BuildError> {
    let mut attempt = 0;
    loop {
        attempt += 1;
        match kvm.create_vm() {
            Ok(vm) => return Ok(vm),
            Err(error) if error.errno() == libc::EINTR && attempt < CREATE_ATTEMPTS => {}
            Err(error) => return Err(ioctl_error("KVM_CREATE_VM")(error)),
        }
    }
}

/// Gives KVM all RAM of `layout`; windows are plugged piece by piece ([`Memslots`]). Slow once an irqchip or ioeventfd exists (Linux 6.18 and later), so it comes first.
///
/// # Errors
/// [`BuildError::Ioctl`].
pub fn set_memory(vm: &VmFd, memory: &GuestMemory, layout: &MemoryLayout) -> Result<(), BuildError> {
    // KVM's own memslots, needed by Intel CPUs.
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(ioctl_error("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.set_tss_address(layout::KVM_TSS)
        .map_err(ioctl_error("KVM_SET_TSS_ADDR"))?;
    let ram = |region: &&Region| region.kind == RegionKind::Ram;
    for (slot, region) in (0u32..).zip(layout.regions().iter().filter(ram)) {
        let host = memory
            .get_host_address(GuestAddress(region.start))
            .map_err(|e| BuildError::Host {
                what: "address of guest memory",
                source: io::Error::other(e.to_string()),
            })?;
        let memslot = Memslot {
            slot,
            guest: region.start,
            size: region.size,
            host: host as u64,
            read_only: false,
        };
        // SAFETY: the range is one whole mapping owned by `memory`, which outlives the VM: the machine drops its VmFd
        // and vCPUs first. Regions do not overlap.
        unsafe { vm.set(memslot) }.map_err(|source| BuildError::Ioctl {
            ioctl: "KVM_SET_USER_MEMORY_REGION",
            source,
        })?;
    }
    Ok(())
}

/// Gives KVM a page of registers for each virtio-mmio slot a machine can have: read in memory, written as MMIO. Comes early
/// for the same reason as [`set_memory`].
///
/// # Errors
/// [`BuildError::Host`], [`BuildError::Ioctl`].
pub fn set_registers(vm: &VmFd) -> Result<Arc<RegisterPages>, BuildError> {
    let pages = RegisterPages::new(MAX_SLOTS).map_err(|source| BuildError::Host {
        what: "registers of the virtio-mmio slots",
        source,
    })?;
    let memslot = Memslot {
        slot: REGISTER_SLOT,
        guest: layout::VIRTIO_MMIO_START,
        size: pages.size(),
        host: pages.host_address(),
        read_only: true,
    };
    // SAFETY: the range is one whole mapping owned by `pages`, which the machine keeps until its VmFd and vCPUs are gone. No
    // RAM is at these addresses.
    unsafe { vm.set(memslot) }.map_err(|source| BuildError::Ioctl {
        ioctl: "KVM_SET_USER_MEMORY_REGION",
        source,
    })?;
    Ok(Arc::new(pages))
}

/// Makes the local APICs KVM's and leaves the I/O APIC to us; must come before the first vCPU.
///
/// # Errors
/// [`BuildError::Ioctl`].
pub fn split_irqchip(vm: &VmFd) -> Result<(), BuildError> {
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        ..Default::default()
    };
    // Pins whose EOI KVM reports: none, since no interrupt is level-triggered.
    cap.args[0] = 0;
    vm.enable_cap(&cap)
        .map_err(ioctl_error("KVM_ENABLE_CAP(KVM_CAP_SPLIT_IRQCHIP)"))
}

/// Where the I/O APIC's routes go, and who is asked again when a pin is unmasked.
pub struct Routes {
    /// The VM.
    pub vm: Arc<VmFd>,
    /// GSI and device.
    pub ged: (u32, Arc<Ged>),
    /// GSI of the first slot, and the slots: their GSIs are consecutive.
    pub slots: (u32, Arc<Slots>),
    /// COM1, if there is one.
    pub serial: Option<Arc<Serial>>,
}

impl Routing for Routes {
    fn set(&self, routes: &[kvm_irq_routing_entry]) -> Result<(), kvm_ioctls::Error> {
        let too_many = |_| kvm_ioctls::Error::new(libc::E2BIG);
        let routes = KvmIrqRouting::from_entries(routes).map_err(too_many)?;
        self.vm.set_gsi_routing(&routes)
    }

    fn unmasked(&self, pin: u8) {
        let gsi = u32::from(pin);
        if gsi == self.ged.0 {
            self.ged.1.repeat();
        } else if gsi == serial::GSI {
            if let Some(serial) = &self.serial {
                serial.repeat();
            }
        } else if let Some(slot) = gsi.checked_sub(self.slots.0) {
            self.slots.1.repeat_interrupt(slot as usize);
        }
    }
}

impl Memslots for VmFd {
    unsafe fn set(&self, memslot: Memslot) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot: memslot.slot,
            flags: if memslot.read_only { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: memslot.guest,
            memory_size: memslot.size,
            userspace_addr: memslot.host,
        };
        // SAFETY: the caller keeps the range mapped and slots apart.
        unsafe { self.set_user_memory_region(region) }
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }
}

/// CLOCK_REALTIME in ns, 0 before 1970.
pub fn realtime_ns() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(u64::MAX))
}

/// Whether KVM_SET_CLOCK adds the time that has passed since the clock was read (Linux 5.16).
pub fn adjusts_clock(kvm: &Kvm) -> bool {
    let flags = kvm.check_extension_int(Cap::AdjustClock);
    flags > 0 && flags as u32 & KVM_CLOCK_REALTIME != 0
}

/// Turns an errno into a [`BuildError::Ioctl`] that names the request.
pub fn ioctl_error(ioctl: &'static str) -> impl Fn(kvm_ioctls::Error) -> BuildError {
    move |error| BuildError::Ioctl {
        ioctl,
        source: io::Error::from_raw_os_error(error.errno()),
    }
}
