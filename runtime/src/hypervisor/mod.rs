//! The virtual machine as the rest of the runtime sees it: one trait, Kata's method names.
//!
//! The production implementation ([`make_dragonball`]) runs the library `dragonball` in this process; tests use a fake.

mod console;
mod dragonball;
#[cfg(test)]
pub(crate) mod fake;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;

use crate::config::{HypervisorConfig, VirtioFsCache};
use crate::error::{Error, Result};

pub use ::dragonball::confinement::violation::{is_confined, report_to as report_violations_to};
pub use dragonball::{Dragonball, make_dragonball};

/// Host port on which the agent announces that it serves; the guest's command line names it.
pub const READY_PORT: u32 = 1023;

/// Why a VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmExit {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reboot,
    /// The guest kernel panicked.
    Panic,
    /// A vCPU shut down on a triple fault.
    TripleFault,
    /// The runtime stopped it.
    Stopped,
    /// The VMM failed.
    Failure(String),
}

impl std::fmt::Display for VmExit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest powered off"),
            Self::Reboot => f.write_str("the guest reset"),
            Self::Panic => f.write_str("the guest kernel panicked"),
            Self::TripleFault => f.write_str("a guest CPU triple-faulted"),
            Self::Stopped => f.write_str("the VM was stopped"),
            Self::Failure(reason) => write!(f, "the VMM failed: {reason}"),
        }
    }
}

/// A device of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceType {
    /// A disk.
    Block(BlockDevice),
    /// A shared directory.
    ShareFs(ShareFsDevice),
    /// A network interface.
    Network(NetworkDevice),
}

impl DeviceType {
    /// Its id.
    pub fn id(&self) -> &str {
        match self {
            Self::Block(device) => &device.id,
            Self::ShareFs(device) => &device.id,
            Self::Network(device) => &device.id,
        }
    }
}

/// A disk backed by a raw image or a block device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockDevice {
    /// Id, unique in the VM.
    pub id: String,
    /// Image file or block device.
    pub path: PathBuf,
    /// Refuse writes.
    pub read_only: bool,
}

/// A directory served over virtio-fs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShareFsDevice {
    /// Id, unique in the VM.
    pub id: String,
    /// Mount tag.
    pub tag: String,
    /// Host directory.
    pub shared_dir: PathBuf,
    /// What the guest may keep.
    pub cache: VirtioFsCache,
    /// Worker threads.
    pub threads: u8,
}

/// A network interface over a TAP. It leaves its MTU to whoever configures it in the guest: one that is told by the
/// device could never grow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkDevice {
    /// Id, unique in the VM.
    pub id: String,
    /// Name of the TAP, for messages.
    pub tap: String,
    /// Its open queues.
    pub queues: TapQueues,
    /// Hardware address of the guest's interface.
    pub mac: [u8; 6],
    /// Bandwidth.
    pub limits: NetworkLimits,
}

/// Limits of an interface as its guest sees it, in bits a second; 0 for none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NetworkLimits {
    /// What it receives.
    pub rx: u64,
    /// What it sends.
    pub tx: u64,
}

/// The open queues of a TAP, one descriptor for each, until a VM takes them: a TAP goes with its last descriptor.
#[derive(Debug, Clone)]
pub struct TapQueues(Arc<Mutex<Vec<OwnedFd>>>);

impl TapQueues {
    /// To be handed over.
    pub fn new(queues: Vec<OwnedFd>) -> Self {
        Self(Arc::new(Mutex::new(queues)))
    }

    /// Takes them; nothing is left for a second caller.
    pub fn take(&self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl PartialEq for TapQueues {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for TapQueues {}

/// Threads of a VM, for cgroups and metrics.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VcpuThreadIds {
    /// vCPU index → host thread id.
    pub vcpus: HashMap<u32, u32>,
}

/// What a hypervisor can do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Block devices.
    pub block_device: bool,
    /// Block devices in a running VM.
    pub block_device_hotplug: bool,
    /// Network interfaces in a running VM.
    pub network_device_hotplug: bool,
    /// Network interfaces with several queues.
    pub multi_queue: bool,
    /// Shared directories.
    pub fs_sharing: bool,
    /// vsock.
    pub hybrid_vsock: bool,
}

/// State to find a VM again after a crash. A VM lives in the shim's process, so there is nothing to find.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct HypervisorState {
    /// Sandbox id.
    pub id: String,
}

/// Way of an attached descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttachDirection {
    /// Host descriptor → guest.
    ToGuest,
    /// Guest → host descriptor.
    FromGuest,
}

/// A descriptor handed to the vsock muxer.
pub struct Attach {
    /// The descriptor; the muxer owns it from now on and closes it at the end of the stream.
    pub fd: OwnedFd,
    /// Guest port to connect to.
    pub port: u32,
    /// Which way bytes flow.
    pub direction: AttachDirection,
}

/// Accepts what the guest opens towards one host port; closing it stops listening.
pub trait GuestListener: Send {
    /// Waits up to `timeout` for a connection. Blocks.
    ///
    /// # Errors
    /// `DeadlineExceeded` after `timeout`, `Unavailable` when the VM is gone.
    fn accept(&mut self, timeout: Duration) -> Result<UnixStream>;
}

/// A virtual machine, with Kata's methods and those of the in-process vsock.
///
/// Without a caller yet are `resize_vcpu`, `resize_memory`, `get_thread_ids` and the memory block size
/// (VMs that grow and shrink with their containers, volumes that grow), `pause_vm`, `resume_vm`, `save_vm`, `save_state`
/// and `disconnect` (templates), `check`, `get_pids`, `get_ns_path`, `get_jailer_root`, `get_agent_socket` and the metrics
/// (management socket). Those whose work belongs to a later release have a default that says so.
#[async_trait]
pub trait Hypervisor: Send + Sync {
    /// Gives the VM its name and folders; devices may be added from now on.
    ///
    /// # Errors
    /// `FailedPrecondition` when called twice.
    async fn prepare_vm(
        &self,
        id: &str,
        netns: Option<String>,
        annotations: &HashMap<String, String>,
    ) -> Result<()>;

    /// Builds the machine and runs it. `timeout` bounds the set-up on the host, not the guest's boot.
    ///
    /// # Errors
    /// One line naming what could not be built: KVM, kernel, image, memory.
    async fn start_vm(&self, timeout: Duration) -> Result<()>;

    /// Ends the VM; idempotent. Memory is given back in the background.
    ///
    /// # Errors
    /// When the VM cannot be told to stop.
    async fn stop_vm(&self) -> Result<()>;

    /// Waits until the VM has ended; any number of callers.
    async fn wait_vm(&self) -> VmExit;

    /// Parks all vCPUs.
    ///
    /// # Errors
    /// `FailedPrecondition` when the VM does not run.
    async fn pause_vm(&self) -> Result<()>;

    /// Lets a paused VM go on.
    ///
    /// # Errors
    /// `FailedPrecondition` when the VM is not paused.
    async fn resume_vm(&self) -> Result<()>;

    /// Writes a snapshot.
    async fn save_vm(&self) -> Result<()> {
        Err(Error::unsupported("Hypervisor::save_vm"))
    }

    /// Changes the number of vCPUs; returns (old, new).
    async fn resize_vcpu(&self, _old: u32, _new: u32) -> Result<(u32, u32)> {
        Err(Error::unsupported("Hypervisor::resize_vcpu"))
    }

    /// Changes the memory to `_mib`; returns the size reached.
    async fn resize_memory(&self, _mib: u32) -> Result<u32> {
        Err(Error::unsupported("Hypervisor::resize_memory"))
    }

    /// Adds a device: queued before the VM starts, plugged afterwards.
    ///
    /// # Errors
    /// `AlreadyExists` for a taken id, `ResourceExhausted` without a free slot.
    async fn add_device(&self, device: DeviceType) -> Result<DeviceType>;

    /// Removes a device by id.
    ///
    /// # Errors
    /// `NotFound` for an unknown id.
    async fn remove_device(&self, id: &str) -> Result<()>;

    /// Changes a device in place.
    async fn update_device(&self, _device: DeviceType) -> Result<()> {
        Err(Error::unsupported("Hypervisor::update_device"))
    }

    /// Address of the agent for tools outside of this process: `hvsock://<socket>`.
    ///
    /// # Errors
    /// `FailedPrecondition` before `prepare_vm`.
    async fn get_agent_socket(&self) -> Result<String>;

    /// Forgets the connection to the VM.
    async fn disconnect(&self) {}

    /// The configuration in use.
    async fn hypervisor_config(&self) -> HypervisorConfig;

    /// Host threads of the vCPUs.
    ///
    /// # Errors
    /// `FailedPrecondition` before the VM runs.
    async fn get_thread_ids(&self) -> Result<VcpuThreadIds>;

    /// Host processes of the VM: the shim itself.
    async fn get_pids(&self) -> Result<Vec<u32>> {
        Ok(vec![std::process::id()])
    }

    /// The pid that stands for the VM: the shim itself.
    async fn get_vmm_master_tid(&self) -> Result<u32> {
        Ok(std::process::id())
    }

    /// Namespaces of the VM on the host.
    async fn get_ns_path(&self) -> Result<String> {
        Ok(format!("/proc/{}/ns", std::process::id()))
    }

    /// Removes the VM's files; idempotent.
    ///
    /// # Errors
    /// When something cannot be removed.
    async fn cleanup(&self) -> Result<()>;

    /// Whether the VM still works, as far as the host can tell.
    ///
    /// # Errors
    /// `Unavailable` with the reason of its end.
    async fn check(&self) -> Result<()>;

    /// Folder of the VM's sockets.
    ///
    /// # Errors
    /// `FailedPrecondition` before `prepare_vm`.
    async fn get_jailer_root(&self) -> Result<String>;

    /// State for a restore.
    async fn save_state(&self) -> Result<HypervisorState> {
        Err(Error::unsupported("Hypervisor::save_state"))
    }

    /// What this hypervisor can do.
    async fn capabilities(&self) -> Capabilities;

    /// Overrides what this hypervisor claims to do.
    async fn set_capabilities(&self, _capabilities: Capabilities) -> Result<()> {
        Err(Error::unsupported("Hypervisor::set_capabilities"))
    }

    /// Figures of the VM, as JSON.
    ///
    /// # Errors
    /// `FailedPrecondition` before the VM runs.
    async fn get_hypervisor_metrics(&self) -> Result<String>;

    /// Remembers the guest's memory block size, bytes.
    async fn set_guest_memory_block_size(&self, _size: u32) -> Result<()> {
        Err(Error::unsupported("Hypervisor::set_guest_memory_block_size"))
    }

    /// The guest's memory block size, bytes; 0 when unknown.
    async fn guest_memory_block_size(&self) -> u32 {
        0
    }

    /// Where streams are handed over from outside of the process. Inside, see [`Hypervisor::vsock_attach`].
    async fn get_passfd_listener_addr(&self) -> Result<(String, u32)> {
        Err(Error::unsupported("Hypervisor::get_passfd_listener_addr"))
    }

    /// PCI path of a VFIO device in the guest.
    async fn resolve_vfio_device_pci_path(&self, _device: &str) -> Result<String> {
        Err(Error::unsupported("Hypervisor::resolve_vfio_device_pci_path"))
    }

    /// Connects to a guest port; retries inside the muxer until `timeout`.
    ///
    /// # Errors
    /// `DeadlineExceeded` after `timeout`, `Unavailable` when the VM is gone.
    async fn vsock_connect(&self, port: u32, timeout: Duration) -> Result<UnixStream>;

    /// Listens for guest connections to a host port.
    ///
    /// # Errors
    /// `AlreadyExists` for a taken port.
    fn vsock_listen(&self, port: u32) -> Result<Box<dyn GuestListener>>;

    /// Lets the muxer serve a descriptor; returns the host port the guest sees as the source.
    ///
    /// # Errors
    /// `ResourceExhausted` without a free port, `Unavailable` when the VM is gone.
    fn vsock_attach(&self, attach: Attach) -> Result<u32>;

    /// Waits until the relay on host port `port` is over and its descriptor closed; false after `timeout`.
    async fn vsock_wait(&self, port: u32, timeout: Duration) -> bool;

    /// Ends the relay on host port `port`, as if the descriptor had come to its end; unknown ports are ignored.
    fn vsock_close(&self, port: u32);

    /// The last `lines` lines of the guest's console.
    fn console_tail(&self, lines: usize) -> Vec<String>;
}
