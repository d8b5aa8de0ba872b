//! The production hypervisor: `dragonball` in this process. Every method is a function call; those that block run on
//! tokio's blocking threads.

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use dragonball::Vm;
use dragonball::config as vmm;
use dragonball::devices::virtio::console::ConsoleLog;
use dragonball::devices::virtio::vsock::{AttachOptions, Direction, VsockError, VsockHandle, VsockListener};
use dragonball::probe::ProbeError;
use dragonball::vm::{BuildError, ExitReason, HotplugError, KvmError, VmError};
use tokio::sync::watch;

use super::{
    Attach, AttachDirection, BlockDevice, Capabilities, DeviceType, GuestListener, Hypervisor, READY_PORT,
    ShareFsDevice, VcpuThreadIds, VmExit, console,
};
use crate::config::{BootAsset, CpuTemplate, HypervisorConfig, TomlConfig, VirtioFsCache};
use crate::error::{Error, ErrorKind, Result};
use crate::host::blocking;
use crate::paths::SandboxPaths;

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
        // The image first: it is vda.
        let devices = image
            .into_iter()
            .chain([rng])
            .chain(devices.iter().map(device))
            .collect();
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
            hotplug_slots: self.config.hotplug_slots,
        }
    }
}

fn device(device: &DeviceType) -> vmm::DeviceConfig {
    match device {
        DeviceType::Block(device) => block(device),
        DeviceType::ShareFs(device) => share(device),
    }
}

fn block(device: &BlockDevice) -> vmm::DeviceConfig {
    vmm::DeviceConfig::Block(vmm::BlockConfig {
        read_only: device.read_only,
        ..vmm::BlockConfig::new(&device.id, &device.path)
    })
}

fn share(device: &ShareFsDevice) -> vmm::DeviceConfig {
    vmm::DeviceConfig::Fs(vmm::FsConfig {
        cache: match device.cache {
            VirtioFsCache::Never => vmm::FsCache::Never,
            VirtioFsCache::Auto => vmm::FsCache::Auto,
            VirtioFsCache::Always => vmm::FsCache::Always,
        },
        threads: device.threads,
        ..vmm::FsConfig::new(
            device.id.clone(),
            device.tag.clone(),
            vmm::FsRoot::Directory(vmm::SharedDir::writable(&device.shared_dir)),
        )
    })
}

/// The guest's kernel command line: what the guest needs to boot and to find its agent, then the user's parameters.
fn cmdline(hypervisor: &HypervisorConfig, config: &TomlConfig, debug: bool) -> String {
    let kata = &config.agent.kata;
    let mut words: Vec<String> = Vec::new();
    let mut add = |word: &str| words.push(word.to_owned());
    if !debug {
        add("quiet");
    }
    add(if debug { "loglevel=7" } else { "loglevel=4" });
    for word in ["panic=-1", "console=hvc0"] {
        add(word);
    }
    if let BootAsset::Image(path) = hypervisor.boot_asset() {
        add(&format!("root={}", root_device(&path)));
        add("ro");
        add(&format!("rootfstype={}", hypervisor.rootfs_type));
        // For images with systemd; others do not look at it.
        add("systemd.unit=kata-containers.target");
        add("systemd.mask=systemd-networkd.service");
        add("systemd.mask=systemd-networkd.socket");
    }
    add(&format!("agent.log_vport={}", kata.log_port));
    add(&format!(
        "agent.passfd_listener_port={}",
        config.runtime.passfd_listener_port
    ));
    add(&format!("agent.ready_vport={READY_PORT}"));
    if kata.server_port != 1024 {
        add(&format!("agent.server_addr=vsock://-1:{}", kata.server_port));
    }
    if kata.container_pipe_size != 0 {
        add(&format!("agent.container_pipe_size={}", kata.container_pipe_size));
    }
    if kata.enable_debug {
        add("agent.log=debug");
    }
    if kata.debug_console_enabled {
        add("agent.debug_console");
        add("agent.debug_console_vport=1026");
    }
    // Last, so that a user's choice wins.
    words.extend(hypervisor.kernel_params.split_whitespace().map(str::to_owned));
    words.join(" ")
}

/// Kata's images have the filesystem in partition 1; a bare filesystem is the disk itself. A master boot record ends with
/// 55 AA at byte 510, where a bare ext4 or erofs has zeros.
fn root_device(image: &Path) -> &'static str {
    use std::os::unix::fs::FileExt;
    let mut signature = [0; 2];
    let read = std::fs::File::open(image).and_then(|file| file.read_exact_at(&mut signature, 510));
    if read.is_ok() && signature == [0x55, 0xaa] {
        "/dev/vda1"
    } else {
        "/dev/vda"
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
        let config = match &*self.stage() {
            Stage::Prepared { id, devices } => self.vm_config(id, devices),
            _ => {
                return Err(Error::new(
                    ErrorKind::FailedPrecondition,
                    "start_vm: the VM is not prepared",
                ));
            }
        };
        let id = config.id.clone();
        let (console_log, forward) = (self.paths.console_log(), self.forward_console);
        let build = tokio::task::spawn_blocking(move || build(config, &console_log, forward));
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
            built
                .vm
                .add_device(device(&new))
                .map(|_| new)
                .map_err(hotplug_error)
        })
        .await
    }

    async fn remove_device(&self, id: &str) -> Result<()> {
        let (built, id) = (self.built("remove_device")?, id.to_owned());
        blocking("remove_device", move || {
            built.vm.remove_device(&id).map(drop).map_err(hotplug_error)
        })
        .await
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

fn build(config: vmm::VmConfig, console_log: &Path, forward: bool) -> Result<Built> {
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
    vm.start().map_err(vm_error)?;
    Ok(Built {
        vm: Arc::new(vm),
        vsock,
        console,
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

fn vm_exit(reason: ExitReason) -> VmExit {
    match reason {
        ExitReason::PowerOff => VmExit::PowerOff,
        ExitReason::Reboot => VmExit::Reboot,
        ExitReason::Panic => VmExit::Panic,
        ExitReason::TripleFault => VmExit::TripleFault,
        ExitReason::Stopped => VmExit::Stopped,
        ExitReason::Failure(failure) => VmExit::Failure(failure.to_string()),
    }
}

fn build_error(error: &BuildError) -> Error {
    let kind = match error {
        BuildError::Kvm(KvmError::Permission(_)) => ErrorKind::PermissionDenied,
        BuildError::Kvm(_) => ErrorKind::FailedPrecondition,
        BuildError::Config(_) | BuildError::TooManyVcpus { .. } | BuildError::TooManySlots { .. } => {
            ErrorKind::InvalidArgument
        }
        // A file that is missing, or not what it should be.
        BuildError::Boot(_) => io_kind(error).unwrap_or(ErrorKind::InvalidArgument),
        BuildError::Memory(_) => ErrorKind::ResourceExhausted,
        _ => io_kind(error).unwrap_or(ErrorKind::Internal),
    };
    Error::new(kind, error.to_string())
}

/// Kind of the I/O error an error comes from.
fn io_kind(error: &dyn std::error::Error) -> Option<ErrorKind> {
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            return match io.kind() {
                std::io::ErrorKind::NotFound => Some(ErrorKind::NotFound),
                std::io::ErrorKind::PermissionDenied => Some(ErrorKind::PermissionDenied),
                std::io::ErrorKind::OutOfMemory => Some(ErrorKind::ResourceExhausted),
                _ => None,
            };
        }
        cause = error.source();
    }
    None
}

fn vm_error(error: VmError) -> Error {
    match error {
        VmError::State { .. } | VmError::NoVsock => {
            Error::new(ErrorKind::FailedPrecondition, error.to_string())
        }
        VmError::Vsock(error) => vsock_error(error),
        VmError::Interrupt(_) | VmError::Device(_) => Error::new(ErrorKind::Internal, error.to_string()),
    }
}

fn vsock_error(error: VsockError) -> Error {
    let kind = match &error {
        VsockError::ConnectTimeout { .. } | VsockError::AcceptTimeout { .. } => ErrorKind::DeadlineExceeded,
        VsockError::TooManyConnections { .. } => ErrorKind::ResourceExhausted,
        VsockError::PortInUse(_) => ErrorKind::AlreadyExists,
        VsockError::NotAttached(_) => ErrorKind::NotFound,
        VsockError::Stopped => ErrorKind::Unavailable,
        _ => ErrorKind::Internal,
    };
    Error::new(kind, error.to_string())
}

fn hotplug_error(error: HotplugError) -> Error {
    let kind = match &error {
        HotplugError::Config(_) => ErrorKind::InvalidArgument,
        HotplugError::State { .. } | HotplugError::InUse(_) => ErrorKind::FailedPrecondition,
        HotplugError::Exists(_) => ErrorKind::AlreadyExists,
        HotplugError::NotFound(_) => ErrorKind::NotFound,
        HotplugError::NoFreeSlot { .. } => ErrorKind::ResourceExhausted,
        _ => ErrorKind::Internal,
    };
    Error::new(kind, error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cmdline_when_made_has_the_users_words_last() {
        let mut config = TomlConfig::default();
        config.hypervisor.dragonball.kernel_params = " loglevel=8  foo=bar ".into();
        let text = cmdline(&config.hypervisor.dragonball, &config, false);
        assert_eq!(
            text,
            "quiet loglevel=4 panic=-1 console=hvc0 root=/dev/vda ro rootfstype=erofs \
             systemd.unit=kata-containers.target systemd.mask=systemd-networkd.service \
             systemd.mask=systemd-networkd.socket agent.log_vport=1025 agent.passfd_listener_port=1027 \
             agent.ready_vport=1023 loglevel=8 foo=bar"
        );

        config.agent.kata.enable_debug = true;
        config.agent.kata.debug_console_enabled = true;
        let text = cmdline(&config.hypervisor.dragonball, &config, true);
        assert!(
            !text.contains("quiet") && text.contains("agent.log=debug agent.debug_console"),
            "{text}"
        );
    }

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
