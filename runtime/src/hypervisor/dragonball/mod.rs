//! The production hypervisor: `dragonball` in this process. Every method is a function call; those that block run on
//! tokio's blocking threads.

mod cmdline;
mod devices;
mod errors;

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use dragonball::Vm;
use dragonball::config as vmm;
use dragonball::devices::virtio::console::ConsoleLog;
use dragonball::devices::virtio::vsock::{AttachOptions, Direction, VsockHandle, VsockListener};
use dragonball::probe::ProbeError;
use tokio::sync::watch;

use super::{
    Attach, AttachDirection, BlockDevice, Capabilities, DeviceType, GuestListener, Hypervisor, NetworkDevice,
    VcpuThreadIds, VmExit, console,
};
use crate::config::{BootAsset, CpuTemplate, HypervisorConfig, TomlConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::host::blocking;
use crate::paths::SandboxPaths;
use cmdline::cmdline;
use devices::{Interfaces, block, device};
use errors::{build_error, hotplug_error, vm_error, vm_exit, vsock_error};

/// The guest's context id; every sandbox has its own device, so all use the same.
const GUEST_CID: u32 = 3;
/// How long the agent may take to accept a stream.
const ATTACH: Duration = Duration::from_secs(60);
/// Where kernels taken out of bzImages are kept.
const KERNEL_CACHE: &str = "/var/cache/dragonball";

/// The hypervisor of a sandbox with the settings of `config`.
pub fn make_dragonball(
    hypervisor: &HypervisorConfig,
    config: &TomlConfig,
    paths: &SandboxPaths,
    debug: bool,
) -> Arc<dyn Hypervisor> {
    Arc::new(Dragonball::new(hypervisor, config, paths, debug))
}

/// What the VM's threads give up.
fn confinement(config: &HypervisorConfig) -> vmm::Confinement {
    let seccomp = match (config.disable_seccomp, config.seccomp_log_only) {
        (true, _) => vmm::Seccomp::Off,
        (false, true) => vmm::Seccomp::LogOnly,
        (false, false) => vmm::Seccomp::Enforce,
    };
    vmm::Confinement {
        seccomp,
        keep_capabilities: config.keep_capabilities,
    }
}

/// A VM in this process.
pub struct Dragonball {
    config: HypervisorConfig,
    cmdline: String,
    paths: SandboxPaths,
    forward_console: bool,
    stage: Mutex<Stage>,
    exit: watch::Sender<Option<VmExit>>,
}

/// How far the VM is.
enum Stage {
    /// Nothing has been asked yet.
    New,
    /// Devices are collected.
    Prepared { id: String, devices: Vec<DeviceType> },
    /// Built; also after its end, for its console.
    Built(Built),
}

#[derive(Clone)]
struct Built {
    vm: Arc<Vm>,
    vsock: VsockHandle,
    console: ConsoleLog,
    interfaces: Arc<Interfaces>,
}

impl Dragonball {
    /// A VM that has not been built.
    pub fn new(
        hypervisor: &HypervisorConfig,
        config: &TomlConfig,
        paths: &SandboxPaths,
        debug: bool,
    ) -> Self {
        let debug_guest = hypervisor.enable_debug || config.agent.kata.enable_debug;
        Self {
            config: hypervisor.clone(),
            cmdline: cmdline(hypervisor, config, debug_guest),
            paths: paths.clone(),
            forward_console: debug || debug_guest,
            stage: Mutex::new(Stage::New),
            exit: watch::Sender::new(None),
        }
    }

    fn stage(&self) -> std::sync::MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn built(&self, method: &str) -> Result<Built> {
        match &*self.stage() {
            Stage::Built(built) => Ok(built.clone()),
            _ => Err(Error::new(
                ErrorKind::FailedPrecondition,
                format!("{method}: the VM has not been started"),
            )),
        }
    }

    fn vm_config(&self, id: &str, devices: &[DeviceType]) -> vmm::VmConfig {
        let initramfs = match self.config.boot_asset() {
            BootAsset::Initrd(path) => Some(path),
            BootAsset::Image(_) => None,
        };
        let image = match self.config.boot_asset() {
            BootAsset::Image(path) => Some(block(&BlockDevice {
                id: "rootfs".into(),
                path,
                read_only: true,
            })),
            BootAsset::Initrd(_) => None,
        };
        let rng = vmm::DeviceConfig::Rng(vmm::RngConfig { id: "rng".into() });
        // An interface is added to the machine that is built, and needs a slot as any that comes later.
        let interfaces = interfaces_of(devices).count();
        // The image first: it is vda.
        let devices = image
            .into_iter()
            .chain([rng])
            .chain(devices.iter().filter_map(device))
            .collect();
        let hotplug_slots = usize::from(self.config.hotplug_slots) + interfaces;
        vmm::VmConfig {
            id: id.to_owned(),
            vcpus: vmm::VcpuConfig {
                boot: self.config.boot_vcpus(),
                max: self.config.max_vcpus(),
            },
            cpu: vmm::CpuConfig {
                nested: self.config.enable_nested_virtualization,
                template: cpu_template(self.config.cpu_template),
            },
            memory: vmm::MemoryConfig::fixed(self.config.default_memory),
            boot: vmm::BootConfig {
                kernel: self.config.kernel.clone(),
                initramfs,
                cmdline: self.cmdline.clone(),
                cache_dir: KERNEL_CACHE.into(),
            },
            console: vmm::ConsoleConfig::Hvc,
            vsock: Some(vmm::VsockConfig {
                guest_cid: GUEST_CID,
                uds_path: Some(self.paths.hvsock()),
            }),
            devices,
            hotplug_slots: u8::try_from(hotplug_slots).unwrap_or(u8::MAX),
            confinement: confinement(&self.config),
        }
    }
}

#[async_trait]
impl Hypervisor for Dragonball {
    async fn prepare_vm(
        &self,
        id: &str,
        _netns: Option<String>,
        _annotations: &HashMap<String, String>,
    ) -> Result<()> {
        let mut stage = self.stage();
        if !matches!(*stage, Stage::New) {
            return Err(Error::new(
                ErrorKind::FailedPrecondition,
                "prepare_vm: the VM is already prepared",
            ));
        }
        *stage = Stage::Prepared {
            id: id.to_owned(),
            devices: Vec::new(),
        };
        Ok(())
    }

    async fn start_vm(&self, timeout: Duration) -> Result<()> {
        let (config, interfaces) = match &*self.stage() {
            Stage::Prepared { id, devices } => {
                let interfaces: Vec<_> = interfaces_of(devices).cloned().collect();
                (self.vm_config(id, devices), interfaces)
            }
            _ => {
                return Err(Error::new(
                    ErrorKind::FailedPrecondition,
                    "start_vm: the VM is not prepared",
                ));
            }
        };
        let id = config.id.clone();
        let (console_log, forward) = (self.paths.console_log(), self.forward_console);
        let build = tokio::task::spawn_blocking(move || build(config, &interfaces, &console_log, forward));
        let built = match tokio::time::timeout(timeout, build).await {
            Ok(Ok(built)) => built?,
            Ok(Err(error)) => return Err(Error::new(ErrorKind::Internal, format!("VM set-up: {error}"))),
            Err(_) => {
                return Err(Error::new(
                    ErrorKind::DeadlineExceeded,
                    format!("VM set-up: not done after {timeout:?}"),
                ));
            }
        };
        *self.stage() = Stage::Built(built.clone());
        let (vm, exit) = (built.vm, self.exit.clone());
        // A thread of its own: tokio would wait for a blocking task when the process ends.
        std::thread::Builder::new()
            .name("vm-wait".into())
            .spawn(move || {
                let reason = vm.wait();
                exit.send_replace(Some(vm_exit(reason)));
            })
            .map(drop)
            .map_err(|error| Error::new(ErrorKind::ResourceExhausted, format!("VM {id}: thread: {error}")))
    }

    async fn stop_vm(&self) -> Result<()> {
        let Ok(built) = self.built("stop_vm") else {
            self.exit.send_if_modified(|exit| {
                let running = exit.is_none();
                exit.get_or_insert(VmExit::Stopped);
                running
            });
            return Ok(());
        };
        blocking("stop_vm", move || built.vm.stop().map_err(vm_error)).await
    }

    async fn wait_vm(&self) -> VmExit {
        let mut exit = self.exit.subscribe();
        let ended = exit.wait_for(Option::is_some).await;
        ended
            .ok()
            .and_then(|exit| exit.clone())
            .unwrap_or(VmExit::Stopped)
    }

    async fn pause_vm(&self) -> Result<()> {
        let built = self.built("pause_vm")?;
        blocking("pause_vm", move || built.vm.pause().map_err(vm_error)).await
    }

    async fn resume_vm(&self) -> Result<()> {
        let built = self.built("resume_vm")?;
        blocking("resume_vm", move || built.vm.resume().map_err(vm_error)).await
    }

    async fn add_device(&self, new: DeviceType) -> Result<DeviceType> {
        let built = match &mut *self.stage() {
            Stage::New => {
                return Err(Error::new(
                    ErrorKind::FailedPrecondition,
                    "add_device: the VM is not prepared",
                ));
            }
            Stage::Prepared { devices, .. } => {
                devices.push(new.clone());
                return Ok(new);
            }
            Stage::Built(built) => built.clone(),
        };
        blocking("add_device", move || {
            match (&new, device(&new)) {
                (DeviceType::Network(network), _) => built.interfaces.add(&built.vm, network)?,
                (_, Some(config)) => drop(built.vm.add_device(config).map_err(hotplug_error)?),
                (_, None) => return Err(Error::unsupported("Hypervisor::add_device")),
            }
            Ok(new)
        })
        .await
    }

    async fn remove_device(&self, id: &str) -> Result<()> {
        let (built, id) = (self.built("remove_device")?, id.to_owned());
        blocking("remove_device", move || {
            built.vm.remove_device(&id).map_err(hotplug_error)?;
            built.interfaces.removed(&id);
            Ok(())
        })
        .await
    }

    async fn update_device(&self, device: DeviceType) -> Result<()> {
        match device {
            DeviceType::Network(device) => self.built("update_device")?.interfaces.limit(&device),
            DeviceType::Block(_) | DeviceType::ShareFs(_) => {
                Err(Error::unsupported("Hypervisor::update_device"))
            }
        }
    }

    async fn get_agent_socket(&self) -> Result<String> {
        Ok(format!("hvsock://{}", self.paths.hvsock().display()))
    }

    async fn hypervisor_config(&self) -> HypervisorConfig {
        self.config.clone()
    }

    async fn get_thread_ids(&self) -> Result<VcpuThreadIds> {
        let ids = self.built("get_thread_ids")?.vm.thread_ids();
        let vcpus = ids
            .vcpus
            .into_iter()
            .map(|(index, tid)| (u32::from(index), tid.unsigned_abs()))
            .collect();
        Ok(VcpuThreadIds { vcpus })
    }

    async fn cleanup(&self) -> Result<()> {
        // Sockets and logs are in the sandbox's state folder, which the journal removes.
        Ok(())
    }

    async fn check(&self) -> Result<()> {
        match &*self.exit.borrow() {
            None => Ok(()),
            Some(exit) => Err(Error::new(ErrorKind::Unavailable, exit.to_string())),
        }
    }

    async fn get_jailer_root(&self) -> Result<String> {
        Ok(self.paths.jail().display().to_string())
    }

    async fn capabilities(&self) -> Capabilities {
        Capabilities {
            block_device: true,
            block_device_hotplug: true,
            network_device_hotplug: true,
            multi_queue: true,
            fs_sharing: true,
            hybrid_vsock: true,
        }
    }

    async fn get_hypervisor_metrics(&self) -> Result<String> {
        let metrics = self.built("get_hypervisor_metrics")?.vm.metrics();
        serde_json::to_string(&metrics)
            .map_err(|error| Error::new(ErrorKind::Internal, format!("get_hypervisor_metrics: {error}")))
    }

    async fn vsock_connect(&self, port: u32, timeout: Duration) -> Result<UnixStream> {
        let built = self.built("vsock_connect")?;
        blocking("vsock_connect", move || {
            built.vsock.connect(port, timeout).map_err(vsock_error)
        })
        .await
    }

    fn vsock_listen(&self, port: u32) -> Result<Box<dyn GuestListener>> {
        let listener = self
            .built("vsock_listen")?
            .vsock
            .listen(port)
            .map_err(vsock_error)?;
        Ok(Box::new(Listener(listener)))
    }

    fn vsock_attach(&self, attach: Attach) -> Result<u32> {
        let direction = match attach.direction {
            AttachDirection::ToGuest => Direction::ToGuest,
            AttachDirection::FromGuest => Direction::FromGuest,
        };
        let options = AttachOptions {
            direction,
            timeout: ATTACH,
        };
        self.built("vsock_attach")?
            .vsock
            .attach(attach.fd, attach.port, options)
            .map_err(vsock_error)
    }

    async fn vsock_wait(&self, port: u32, timeout: Duration) -> bool {
        let Ok(built) = self.built("vsock_wait") else {
            return true;
        };
        let waited = tokio::task::spawn_blocking(move || built.vsock.wait_attached(port, timeout));
        waited.await.unwrap_or(true)
    }

    fn vsock_close(&self, port: u32) {
        if let Ok(built) = self.built("vsock_close")
            && let Err(error) = built.vsock.close_attached(port)
        {
            tracing::trace!(port, %error, "vsock_close");
        }
    }

    fn console_tail(&self, lines: usize) -> Vec<String> {
        self.built("console_tail")
            .map(|built| built.console.tail(lines))
            .unwrap_or_default()
    }
}

/// Says at once what a boot would only say after many seconds, and then in a riddle: a KVM without hardware behind it
/// cannot run Linux. Beside the hardware's own KVM module this is one look at /sys.
fn check_host() -> Result<()> {
    match dragonball::probe::linux_capable() {
        Err(error @ ProbeError::Incapable(_)) => {
            Err(Error::new(ErrorKind::FailedPrecondition, error.to_string()))
        }
        // Anything else will be found, and named, by building the VM.
        _ => Ok(()),
    }
}

fn interfaces_of(devices: &[DeviceType]) -> impl Iterator<Item = &NetworkDevice> {
    devices.iter().filter_map(|device| match device {
        DeviceType::Network(device) => Some(device),
        _ => None,
    })
}

fn build(
    config: vmm::VmConfig,
    interfaces: &[NetworkDevice],
    console_log: &Path,
    forward: bool,
) -> Result<Built> {
    let id = config.id.clone();
    check_host().map_err(|error| error.context("VM set-up"))?;
    let vm = Vm::new(config).map_err(|error| build_error(&error).context("VM set-up"))?;
    let console = vm.console();
    let sink = console::start(console_log, &id, forward)?;
    if let Err(error) = console.set_sink(sink.into()) {
        tracing::warn!(%error, "console log");
    }
    let vsock = vm
        .vsock()
        .ok_or_else(|| Error::new(ErrorKind::Internal, "VM set-up: no vsock device"))?;
    let handles = Interfaces::default();
    for interface in interfaces {
        handles
            .add(&vm, interface)
            .map_err(|error| error.context("VM set-up"))?;
    }
    vm.start().map_err(vm_error)?;
    Ok(Built {
        vm: Arc::new(vm),
        vsock,
        console,
        interfaces: Arc::new(handles),
    })
}

struct Listener(VsockListener);

impl GuestListener for Listener {
    fn accept(&mut self, timeout: Duration) -> Result<UnixStream> {
        self.0.accept_timeout(timeout).map_err(vsock_error)
    }
}

fn cpu_template(template: CpuTemplate) -> vmm::CpuTemplate {
    match template {
        CpuTemplate::None => vmm::CpuTemplate::None,
        CpuTemplate::V2 => vmm::CpuTemplate::V2,
        CpuTemplate::V3 => vmm::CpuTemplate::V3,
        CpuTemplate::V4 => vmm::CpuTemplate::V4,
    }
}

#[cfg(test)]
mod tests {
    use super::cmdline::root_device;
    use super::*;

    #[test]
    fn image_when_partitioned_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        std::fs::write(&image, [0; 4096]).unwrap();
        assert_eq!(root_device(&image), "/dev/vda");
        let mut bytes = [0; 4096];
        bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
        std::fs::write(&image, bytes).unwrap();
        assert_eq!(root_device(&image), "/dev/vda1");

        let mut config = TomlConfig::default();
        config.hypervisor.dragonball.image = Some(image.clone());
        let paths = SandboxPaths::below(folder.path(), "k8s.io", "s1").unwrap();
        let hypervisor = Dragonball::new(&config.hypervisor.dragonball, &config, &paths, false);
        assert!(
            hypervisor.cmdline.contains("root=/dev/vda1 ro rootfstype=erofs"),
            "{}",
            hypervisor.cmdline
        );
        let vm = hypervisor.vm_config("s1", &[]);
        assert_eq!(vm.boot.initramfs, None);
        assert!(
            matches!(&vm.devices[0], vmm::DeviceConfig::Block(disk) if disk.path == image && disk.read_only)
        );
        vm.validate().unwrap();
    }

    #[test]
    fn cpu_when_configured_reaches_the_vm() {
        let folder = tempfile::tempdir().unwrap();
        let paths = SandboxPaths::below(folder.path(), "k8s.io", "s1").unwrap();
        let mut config = TomlConfig::default();
        let cpu = |config: &TomlConfig| {
            let hypervisor = Dragonball::new(&config.hypervisor.dragonball, config, &paths, false);
            hypervisor.vm_config("s1", &[]).cpu
        };
        assert_eq!(cpu(&config), vmm::CpuConfig::default());
        config.hypervisor.dragonball.enable_nested_virtualization = true;
        for (name, template) in vmm::CpuTemplate::NAMES {
            // Every template of the VMM has a word of the same name.
            config.hypervisor.dragonball.cpu_template = name.parse().unwrap();
            assert_eq!(
                cpu(&config),
                vmm::CpuConfig {
                    nested: true,
                    template
                }
            );
        }
    }

    #[test]
    fn confinement_when_configured_reaches_the_vm() {
        let folder = tempfile::tempdir().unwrap();
        let paths = SandboxPaths::below(folder.path(), "k8s.io", "s1").unwrap();
        let mut config = TomlConfig::default();
        let of_vm = |config: &TomlConfig| {
            let hypervisor = Dragonball::new(&config.hypervisor.dragonball, config, &paths, false);
            let told = config.hypervisor.dragonball.confinement();
            (hypervisor.vm_config("s1", &[]).confinement, told)
        };
        let (confinement, told) = of_vm(&config);
        assert_eq!(confinement, vmm::Confinement::default());
        assert_eq!(told, "seccomp enforced, capabilities given up");
        config.hypervisor.dragonball.keep_capabilities = true;
        config.hypervisor.dragonball.seccomp_log_only = true;
        let (confinement, told) = of_vm(&config);
        assert_eq!(confinement.seccomp, vmm::Seccomp::LogOnly);
        assert!(confinement.keep_capabilities);
        assert_eq!(told, "seccomp logs only, capabilities kept");
        config.hypervisor.dragonball.disable_seccomp = true;
        assert_eq!(of_vm(&config).0.seccomp, vmm::Seccomp::Off);
    }

    #[tokio::test]
    async fn calls_when_in_the_wrong_order_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let config = TomlConfig::default();
        let paths = SandboxPaths::below(folder.path(), "k8s.io", "s1").unwrap();
        let vm = Dragonball::new(&config.hypervisor.dragonball, &config, &paths, false);

        assert_eq!(
            vm.start_vm(Duration::ZERO).await.unwrap_err().kind,
            ErrorKind::FailedPrecondition
        );
        assert_eq!(
            vm.pause_vm().await.unwrap_err().kind,
            ErrorKind::FailedPrecondition
        );
        vm.prepare_vm("s1", None, &HashMap::new()).await.unwrap();
        let again = vm.prepare_vm("s1", None, &HashMap::new()).await.unwrap_err();
        assert_eq!(again.kind, ErrorKind::FailedPrecondition);
        assert_eq!(vm.save_vm().await.unwrap_err().kind, ErrorKind::Unimplemented);
        vm.stop_vm().await.unwrap();
        assert_eq!(vm.wait_vm().await, VmExit::Stopped);
    }
}
