//! The handle of a machine.

mod acpi;
mod build;
mod console;
mod disks;
mod error;
mod hotplug;
mod info;
mod machine;
mod memory;
mod processors;
mod registry;
mod share;
pub mod snapshot;
mod vcpus;
mod wiring;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

pub use crate::devices::virtio::balloon::{BalloonError, BalloonStatistics, BalloonStatus};
pub use crate::devices::virtio::config::{OpenError, OpenErrorKind};
pub use crate::devices::virtio::mem::ResizeMemoryError;
pub use crate::lifecycle::{ExitReason, Failure, VcpuFailure, VmState};
pub use error::{
    BuildError, DeviceError, DeviceFault, HotplugError, IoctlError, KvmError, ResizeVcpuError,
    StartVcpuError, VcpuRefusal, VmError,
};
pub use info::{BootTimings, DeviceAddress, DeviceInfo, DeviceMetrics, Mark, ThreadIds, VmMetrics};

use crate::config::VmConfig;
use crate::devices::ged::Event;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::console::ConsoleLog;
use crate::devices::virtio::mem::MemHandle;
use crate::devices::virtio::vsock::{AttachOptions, VsockHandle, VsockListener};
use crate::lifecycle::Lifecycle;
use console::Input;
use machine::Machine;
use registry::NoSuchDevice;

/// A virtual machine. Methods may be called from any thread; dropping the handle stops the machine.
///
/// ```no_run
/// use dragonball::Vm;
/// use dragonball::config::{
///     BlockConfig, BootConfig, Confinement, ConsoleConfig, CpuConfig, DeviceConfig, MemoryConfig, VcpuConfig, VmConfig,
/// };
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let vm = Vm::new(VmConfig {
///     id: "example".to_owned(),
///     vcpus: VcpuConfig { boot: 1, max: 4 },
///     cpu: CpuConfig::default(),
///     memory: MemoryConfig::fixed(256),
///     boot: BootConfig {
///         kernel: "/usr/share/kata-containers/vmlinux".into(),
///         initramfs: None,
///         cmdline: "console=hvc0 root=/dev/vda ro".to_owned(),
///         cache_dir: "/var/cache/dragonball".into(),
///     },
///     console: ConsoleConfig::Hvc,
///     vsock: None,
///     devices: vec![DeviceConfig::Block(BlockConfig::new("root", "/srv/root.img"))],
///     hotplug_slots: 2,
///     confinement: Confinement::default(),
/// })?;
/// vm.start()?;
/// let data = vm.add_device(DeviceConfig::Block(BlockConfig::new("data", "/srv/data.img")))?;
/// println!("the guest finds the disk as {}", data.address.name());
/// println!("{}: {:?}", vm.wait(), vm.console().tail(10));
/// # Ok(())
/// # }
/// ```
///
/// A save, a change of size and the addition or removal of a device wait for each other. None of them keeps
/// [`stop`](Self::stop), [`wait`](Self::wait), [`state`](Self::state) or [`metrics`](Self::metrics) waiting, not even one that
/// hangs in the host's storage.
#[derive(Debug)]
pub struct Vm {
    id: String,
    lifecycle: Arc<Lifecycle>,
    machine: Arc<Current>,
    /// What changes or saves the machine's parts: save, resize, hotplug, one at a time. Taken before `passage`, and not while
    /// something is opened.
    operation: Mutex<()>,
    /// Start, pause and resume one at a time; held by a save, whose machine stays paused.
    passage: Mutex<()>,
    console: ConsoleLog,
    input: Input,
    vsock: Option<VsockHandle>,
    /// Hotpluggable memory, if there is any.
    mem: Option<MemHandle>,
    /// Bytes of memory at boot.
    boot_memory: u64,
    /// What it was made from.
    config: VmConfig,
    timings: Mutex<BootTimings>,
}

/// The machine until the reaper takes it. Locked for a moment only: who works on the machine has a reference of his own.
#[derive(Debug)]
struct Current(Mutex<Option<Arc<Machine>>>);

impl Current {
    fn get(&self) -> Option<Arc<Machine>> {
        lock(&self.0).clone()
    }

    fn take(&self) -> Option<Arc<Machine>> {
        lock(&self.0).take()
    }
}

impl Vm {
    /// Builds the machine: memory, kernel, devices, vCPU threads. No guest code runs yet.
    ///
    /// # Errors
    /// [`BuildError`]; nothing is left behind.
    pub fn new(config: VmConfig) -> Result<Self, BuildError> {
        let build_started = Mark::now();
        let built = build::build(&config)?;
        Self::from_built(config, built, build_started)
    }

    /// The handle of a machine just made, by building or restoring.
    fn from_built(config: VmConfig, built: build::Built, build_started: Mark) -> Result<Self, BuildError> {
        let build::Built {
            machine,
            lifecycle,
            console,
            input,
            vsock,
            mem,
        } = built;
        let thread_count = machine.vcpus.count();
        let machine = Arc::new(Current(Mutex::new(Some(Arc::new(machine)))));
        spawn_reaper(lifecycle.clone(), machine.clone()).inspect_err(|_| {
            lifecycle.gate().end();
            if let Some(machine) = machine.take() {
                machine.shut_down();
            }
        })?;
        tracing::info!(id = config.id, vcpus = thread_count, "machine built");
        let timings = BootTimings {
            build_started,
            built: Mark::now(),
            started: None,
        };
        Ok(Self {
            id: config.id.clone(),
            lifecycle,
            machine,
            operation: Mutex::new(()),
            passage: Mutex::new(()),
            console,
            input,
            vsock,
            mem,
            boot_memory: config.memory.size_mib << 20,
            config,
            timings: Mutex::new(timings),
        })
    }

    /// Lets the vCPUs into the guest.
    ///
    /// # Errors
    /// [`VmError::State`] unless the machine is configured.
    pub fn start(&self) -> Result<(), VmError> {
        let _passage = lock(&self.passage);
        self.transition("start", VmState::Configured, VmState::Running)?;
        lock(&self.timings).started = Some(Mark::now());
        self.lifecycle.gate().open();
        Ok(())
    }

    /// Stops all vCPUs between two instructions; when this returns none is in the guest. Device workers go on.
    ///
    /// # Errors
    /// [`VmError::State`] unless the machine is running, or when it ends meanwhile.
    pub fn pause(&self) -> Result<(), VmError> {
        let _passage = lock(&self.passage);
        self.transition("pause", VmState::Running, VmState::Running)?;
        self.lifecycle.gate().close();
        if let Some(machine) = self.machine.get() {
            machine.vcpus.kick();
        }
        self.lifecycle.gate().wait_parked();
        self.transition("pause", VmState::Running, VmState::Paused)
    }

    /// Lets paused vCPUs go on; the guest's clock and watchdogs are told. The devices of a restored machine go on, too.
    ///
    /// # Errors
    /// [`VmError::State`] unless the machine is paused, [`VmError::Device`] when a device of a restored machine cannot go
    /// on (the machine stays paused).
    pub fn resume(&self) -> Result<(), VmError> {
        let _passage = lock(&self.passage);
        if let (VmState::Paused, Some(machine)) = (self.state(), self.machine.get()) {
            machine.devices.resume()?;
        }
        self.transition("resume", VmState::Paused, VmState::Running)?;
        self.lifecycle.gate().open();
        Ok(())
    }

    /// Presses the power button. What the guest does about it is its own decision; nothing may happen.
    ///
    /// # Errors
    /// [`VmError::State`] when the machine is stopped, [`VmError::Interrupt`] when the host refuses the interrupt.
    pub fn press_power_button(&self) -> Result<(), VmError> {
        match self.machine.get() {
            Some(machine) => Ok(machine.board.ged.notify(Event::PowerButton)?),
            None => Err(VmError::State {
                operation: "press the power button of",
                state: self.state(),
            }),
        }
    }

    /// Ends the machine, in whatever state it is; when this returns no vCPU and no device worker runs. Memory and file
    /// descriptors are freed in the background. On a stopped machine it does nothing.
    ///
    /// # Errors
    /// None today; a stop that could fail would say so here.
    pub fn stop(&self) -> Result<(), VmError> {
        self.lifecycle.finish(ExitReason::Stopped);
        self.wait();
        Ok(())
    }

    /// Where the machine is in its life.
    pub fn state(&self) -> VmState {
        self.lifecycle.state()
    }

    /// Waits until the machine is stopped and says why. Any number of callers may wait.
    pub fn wait(&self) -> ExitReason {
        loop {
            if let Some(reason) = self.lifecycle.wait_stopped(None) {
                return reason;
            }
        }
    }

    /// Waits at most `timeout` until the machine is stopped.
    pub fn wait_timeout(&self, timeout: Duration) -> Option<ExitReason> {
        // A timeout beyond the clock's range waits for ever.
        self.lifecycle.wait_stopped(Instant::now().checked_add(timeout))
    }

    /// The guest's console output.
    pub fn console(&self) -> ConsoleLog {
        self.console.clone()
    }

    /// The host side of the vsock device, if the machine has one.
    pub fn vsock(&self) -> Option<VsockHandle> {
        self.vsock.clone()
    }

    /// Connects to `port` in the guest; see [`VsockHandle::connect`].
    ///
    /// # Errors
    /// [`VmError::NoVsock`] or [`VmError::Vsock`].
    pub fn vsock_connect(&self, port: u32, timeout: Duration) -> Result<UnixStream, VmError> {
        Ok(self.need_vsock()?.connect(port, timeout)?)
    }

    /// Accepts the guest's connections to `port`; see [`VsockHandle::listen`].
    ///
    /// # Errors
    /// [`VmError::NoVsock`] or [`VmError::Vsock`].
    pub fn vsock_listen(&self, port: u32) -> Result<VsockListener, VmError> {
        Ok(self.need_vsock()?.listen(port)?)
    }

    /// Relays between `fd` and `port` in the guest; see [`VsockHandle::attach`].
    ///
    /// # Errors
    /// [`VmError::NoVsock`] or [`VmError::Vsock`].
    pub fn vsock_attach(&self, fd: OwnedFd, port: u32, options: AttachOptions) -> Result<u32, VmError> {
        Ok(self.need_vsock()?.attach(fd, port, options)?)
    }

    fn need_vsock(&self) -> Result<&VsockHandle, VmError> {
        self.vsock.as_ref().ok_or(VmError::NoVsock)
    }

    /// Counters of vCPUs and devices; empty once the machine is stopped. Those of a device that is busy with something are as
    /// they were when they were asked for the last time.
    pub fn metrics(&self) -> VmMetrics {
        self.machine
            .get()
            .map(|machine| machine.metrics())
            .unwrap_or_default()
    }

    /// Kernel thread ids of the vCPUs and the I/O loop; empty, with an `io` of 0, once the machine is stopped.
    pub fn thread_ids(&self) -> ThreadIds {
        match self.machine.get() {
            Some(machine) => ThreadIds {
                vcpus: machine.vcpus.thread_ids(),
                io: machine.io.thread_id(),
            },
            None => ThreadIds {
                vcpus: Vec::new(),
                io: 0,
            },
        }
    }

    /// When the phases of the boot happened.
    pub fn timings(&self) -> BootTimings {
        *lock(&self.timings)
    }

    /// Runs `operation` on the device called `id`, which must be a `T` (`wanted` for people, e.g. `disk`). The device is
    /// locked meanwhile: `operation` must not wait for the guest.
    ///
    /// # Errors
    /// [`DeviceError`]; a refusal of the device becomes [`DeviceError::Refused`].
    pub(crate) fn with_device<T, R, E>(
        &self,
        id: &str,
        wanted: &'static str,
        operation: impl FnOnce(&mut T) -> Result<R, E>,
    ) -> Result<R, DeviceError>
    where
        T: VirtioDevice,
        E: std::error::Error + Send + Sync + 'static,
    {
        let id = || id.to_owned();
        let machine = self.machine.get().ok_or_else(|| DeviceError::State {
            id: id(),
            state: self.state(),
        })?;
        match machine.devices.with_device(&id(), operation) {
            Ok(Some(result)) => result.map_err(|e| DeviceError::Refused(Box::new(e))),
            Ok(None) => Err(DeviceError::Kind { id: id(), wanted }),
            Err(NoSuchDevice) => Err(DeviceError::NotFound(id())),
        }
    }

    fn transition(&self, operation: &'static str, from: VmState, to: VmState) -> Result<(), VmError> {
        self.lifecycle
            .transition(&[from], to)
            .map_err(|state| VmError::State { operation, state })
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        tracing::debug!(id = self.id, "machine handle dropped");
        self.lifecycle.finish(ExitReason::Stopped);
    }
}

/// Starts the thread that takes the machine apart when it ends. It exists from the beginning because at the end it might
/// not be possible to start one.
fn spawn_reaper(lifecycle: Arc<Lifecycle>, machine: Arc<Current>) -> Result<(), BuildError> {
    let reap = move || {
        let reason = lifecycle.wait_ending();
        let machine = machine.take();
        if let Some(machine) = &machine {
            machine.shut_down();
        }
        lifecycle.set_stopped(reason);
        // Closing the VM and unmapping its memory takes long; nobody waits for it. An operation that still works on it, or hangs,
        // frees it when it ends.
        drop(machine);
    };
    thread::Builder::new()
        .name("vmm-reaper".to_owned())
        .spawn(reap)
        .map(drop)
        .map_err(|source| BuildError::Host {
            what: "reaper thread",
            source,
        })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
